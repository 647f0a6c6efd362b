"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
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


class Stopped(BaseException):
    """A run that ended early on purpose: a signal or its time limit; all of it is saved.

    Command-line entry points print it and exit with status 75, which is "try again later". It
    may be raised anywhere by a signal, so nothing that catches errors must catch it.
    """


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Print what a script's block raises for its user without a traceback, and exit: with 2 for
    a :class:`UserError` and what :func:`cause_of` knows, 75 for :class:`Stopped`, 130 for
    Ctrl-C."""
    try:
        yield
    except BaseException as error:
        status = status_of(error)
        if status is None:
            raise
        raise SystemExit(status) from None


def status_of(error: BaseException) -> int | None:
    """Exit status after what a user or a machine is the cause of, which is printed; None: a bug."""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        if os.environ.get("RANK", "0") == "0":
            told = str(error) or "interrupted; what was printed or written stays"
            print(told, file=sys.stderr, flush=True)
            _excuse_launcher()
        return 75 if isinstance(error, Stopped) else 130
    if text := str(error) if isinstance(error, UserError) else cause_of(error):
        report(text)
        return 2
    return None


_FULL = {errno.ENOSPC: "make room", errno.EDQUOT: "make room",
         errno.EROFS: "write to another folder", errno.EACCES: "check its permissions",
         errno.EIO: "check the disk", errno.EMFILE: "raise `ulimit -n`"}


def cause_of(error: BaseException) -> str:
    """What a machine lacks, in one line; nothing for an error of another kind."""
    if (number := _number_of(error)) in _FULL:
        file = getattr(error, "filename", None)
        return f"{f'{file}: ' if file else ''}{os.strerror(number)}; {_FULL[number]}"
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return f"out of memory ({shorten(str(error), 120) or 'of this machine'}); use smaller " \
               "batches (train.batch_size, decode.batch_size) or a smaller model"
    return ""


def report(error: object) -> None:
    """Print a message for users on stderr, in one of several processes that have the same."""
    if already_told(str(error)):
        return
    print(f"error: {error}", file=sys.stderr, flush=True)
    _excuse_launcher()


def _excuse_launcher() -> None:
    # A launcher answers every exit status but 0 with a traceback, which no child can prevent.
    if launched():
        quiet = "" if "LOCAL_RANK" in os.environ else " (`accelerate launch --quiet` prints none)"
        print(f"What follows is the launcher's traceback; it says nothing more{quiet}.",
              file=sys.stderr, flush=True)


def disk_fault(error: BaseException) -> str:
    """What kept a file from being read or written; empty for an error of another kind."""
    return os.strerror(number).lower() if (number := _number_of(error)) else ""


def _number_of(error: BaseException) -> int:
    # safetensors and tokenizers write in Rust, and have the number in their message alone.
    # So does an error of `shutil.copytree`, which has several.
    told = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    own = error.errno if isinstance(error, OSError) else None
    return int(told[1] or told[2]) if told else own or 0


def already_told(message: str) -> bool:
    """Whether another process of this run has printed a message."""
    given = os.environ.get
    # The launcher's store is there before the processes know each other, and outlives them.
    if given("TORCHELASTIC_USE_AGENT_STORE") != "True" or given("WORLD_SIZE", "1") == "1":
        return False
    from torch.distributed import TCPStore

    key = f"unislu_llm {given('TORCHELASTIC_RESTART_COUNT')} {message}"
    with contextlib.suppress(RuntimeError, ValueError):  # rather twice than never
        return TCPStore(given("MASTER_ADDR", ""), int(given("MASTER_PORT", "")), is_master=False,
                        timeout=timedelta(seconds=5), wait_for_workers=False).add(key, 1) > 1
    return False


def quiet_libraries() -> None:
    """Switch off what libraries say at a start that no user can act on."""
    # The tokenizer's threads do not survive a fork, and it warns at every one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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


def explain(error: ValidationError, model: type[Any], where: Callable[[Place], str]) -> UserError:
    """What pydantic found, as one message: a line a fault, with the nearest known name.

    Args:
        error: from validating `model`.
        model: pydantic model or dataclass, which knows the names of its fields.
        where: what to call a place, e.g. `config.yaml:12: train.epochs`.
    """
    lines = [f"{where(tuple(fault['loc']))}: {_message(fault, model)}" for fault in error.errors()]
    more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
    return UserError("\n".join(lines[:10] + more))


_WANTED = {
    "string_type": "must be a string; put it in quotes",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "string_unicode": "holds half a character",
}


def _message(fault: Mapping[str, Any], model: type[Any]) -> str:
    """What is wrong at one place and what would be right."""
    # Pydantic's own words name types of Python, which writers of YAML need not know.
    place, kind = fault["loc"], fault["type"]
    found = f", found {shorten(repr(fault['input']), 80)}"
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
        return f"{shorten(repr(fault['input']), 80)} is not one of {', '.join(allowed)}{near}"
    if kind.startswith(("int_", "float_", "finite_")):
        bounds = getattr(_fields(model, place[:-1]).get(place[-1]), "metadata", ())
        least = next((f" of at least {bound.ge:g}" for bound in bounds if hasattr(bound, "ge")), "")
        what = {"int": "a whole", "fin": "a finite"}.get(kind[:3], "a")
        return f"must be {what} number{least}{found}"
    for key, words in (("ge", "at least"), ("gt", "above"), ("le", "at most")):
        if key in fault.get("ctx", {}):
            bound = fault["ctx"][key]
            return f"must be {words} {bound if isinstance(bound, int) else f'{bound:g}'}{found}"
    message = str(fault["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    return message + ("" if kind == "value_error" else found)


def _fields(model: Any, place: Place) -> dict[str, Any]:
    """Fields of the model at a place below `model`, by name."""
    # Models and pydantic dataclasses both have them under this name.
    name = "__pydantic_fields__"
    for part in place:
        field = getattr(model, name, {}).get(part)
        if field is None:
            continue  # an index, or the tag of a union: the model stays the same
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((k for k in kinds if hasattr(k, name)), None)
    return getattr(model, name, {})
