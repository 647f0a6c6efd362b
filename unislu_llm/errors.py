"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message names the file, line, field or flag at fault and says what to do.

    Command-line entry points print it without a traceback and exit with status 2.
    """


def hint(name: object, known: Iterable[str]) -> str:
    """`; did you mean '...'?` with the nearest known name, or nothing where none is near; the end of a message."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
