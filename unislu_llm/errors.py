"""Errors that a user can act on."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names the file, line, field or flag at fault and says what to do.

    Command-line entry points print it without a traceback and exit with status 2.
    """
