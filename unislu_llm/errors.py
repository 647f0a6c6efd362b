"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import ValidationError

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

Place = tuple[str | int, ...]
"""Way to a value in nested data: keys and list indices."""


class UserError(ValueError):
    """Bad input. The message names the file, line, field or flag at fault and says what to do.

    Command-line entry points print it without a traceback and exit with status 2.
    """

    def __init__(self, message: object = "") -> None:
        # File names and texts of strangers are quoted in it, and could steer a terminal.
        super().__init__(_STEERING.sub("\ufffd", str(message)))


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Print the :class:`UserError` of a script's block without a traceback; it exits with 2."""
    try:
        yield
    except UserError as error:
        report(error)
        raise SystemExit(2) from None


def report(error: object) -> None:
    """Print a message for users on stderr."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    # A launcher answers every exit status but 0 with a traceback, which no child can prevent.
    if launched():
        quiet = "" if "LOCAL_RANK" in os.environ else " (`accelerate launch --quiet` prints none)"
        print(f"What follows is the launcher's traceback; it says nothing more{quiet}.",
              file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Switch off what libraries say at a start that no user can act on."""
    # The tokenizer's threads do not survive a fork, and it warns at every one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where it is installed it is imported, and misses kernels for a CPU, which never runs it.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return bool({"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ))


def hint(name: object, known: Iterable[str]) -> str:
    """The end of a message: `; did you mean '...'?` with the nearest known name, or nothing."""
    # Names differ in case on purpose (labels, `[NER]`), and people mistype just that.
    folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(str(name).casefold(), list(folded), n=1, cutoff=0.5)
    return f"; did you mean '{folded[near[0]]}'?" if near else ""


def shorten(text: str, limit: int = 40) -> str:
    """Short and printable for a message."""
    clean = "".join(c if c.isprintable() else "?" for c in text[:limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def dotted(place: Place) -> str:
    """A place as people write it: `train.lr.lora`, `data.train[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{shorten(part, 80)}"
                   for part in place)
    return text.removeprefix(".")


def explain(error: ValidationError, model: type[Any],
            where: Callable[[Place], str]) -> UserError:
    """What pydantic found, as one message: a line a fault, with the nearest known name.

    Args:
        error: from validating `model`.
        model: pydantic model or dataclass, which knows the names of its fields.
        where: what to call a place, e.g. `config.yaml:12: train.epochs`.
    """
    return UserError("\n".join(f"{where(tuple(fault['loc']))}: {_message(fault, model)}"
                               for fault in error.errors()))


_WANTED = {
    "string_type": "must be a string; put it in quotes",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _message(fault: Mapping[str, Any], model: type[Any]) -> str:
    """What is wrong at one place and what would be right."""
    # Pydantic's own words name types of Python, which writers of YAML need not know.
    place, kind, found = fault["loc"], fault["type"], f", found {fault['input']!r}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields(model, place[:-1])
        return f"unknown key{hint(place[-1], known) or '; known: ' + ', '.join(known)}"
    if kind in ("missing", "missing_argument"):
        return "is missing"
    if kind in _WANTED:
        return _WANTED[kind] + found
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        near = hint(fault["input"], allowed)
        return f"{fault['input']!r} is not one of {', '.join(allowed)}{near}"
    message = str(fault["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    return message + ("" if kind == "value_error" else found)


def _fields(model: Any, place: Place) -> list[str]:
    """Names of the fields of the model at a place below `model`."""
    # Models and pydantic dataclasses both have them under this name.
    name = "__pydantic_fields__"
    for part in place:
        field = getattr(model, name, {}).get(part)
        if field is None:
            continue  # an index, or the tag of a union: the model stays the same
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((k for k in kinds if hasattr(k, name)), None)
    return list(getattr(model, name, {}))
