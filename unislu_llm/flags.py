"""A run's flags: all settings, of which `--help` shows the common ones.

Flags and both helps are made from the settings themselves; there is no second list of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from pydantic import BaseModel, Field, ValidationError, create_model

from unislu_llm.config import Config, Section
from unislu_llm.errors import Place, UserError, already_told, dotted, explain
from unislu_llm.setting_types import Common

Extra = Mapping[str, tuple[Any, Any]]
"""Flags that are no settings: by name, type and pydantic field, which holds the default."""


_WORDS = tyro.constructors.ConstructorRegistry()


@_WORDS.primitive_rule
def _as_given(info: tyro.constructors.PrimitiveTypeInfo
              ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """What is no number, JSON or choice stays a word, which the settings' own checks refuse: in the
    same words as in a file, where the parser would show those of Python."""
    choices = get_args(info.type) if info.type_origin is Literal else ()
    make: Any = str if choices else info.type
    if not choices and make not in (int, float, json.loads):
        return None

    def read(words: list[str]) -> Any:
        with contextlib.suppress(ValueError, RecursionError):
            return None if words[0] == "None" else make(words[0])
        return words[0]

    return tyro.constructors.PrimitiveConstructorSpec(
        1, "{" + ",".join(choices) + "}" if choices else make.__name__.upper(), read,
        lambda value: value in choices if choices else type(value) in (int, make),
        lambda value: [json.dumps(value) if make is json.loads else str(value)])


def parse_flags(config: Config, args: Sequence[str], *, prog: str | None = None,
                description: str = "", extra: Extra | None = None) -> Config:
    """A configuration with flags laid over it; those of `extra` are parsed and left out. The help
    shows `prog` and `description`. Raises UserError: a value out of bounds, or a list that is given
    twice. SystemExit: an unknown flag, or help was asked for."""
    refuse_repeats(args, Config, nested=True)
    everything = any(arg.replace("_", "-") == "--help-all" for arg in args)
    if everything:
        args = ["--help"]
    model: Any = create_model("Config", __base__=Config, **{  # type: ignore[call-overload]
        **(extra or {}),
        "help_all": (Annotated[tyro.conf.FlagCreatePairsOff[bool], Common],
                     Field(False, description="List every setting, not only the common ones."))})
    if not everything and any(arg in ("-h", "--help") for arg in args):
        model = _with_common_alone(model)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(model, args=args, prog=prog, description=description, registry=_WORDS,
                             default=model.model_validate(config.model_dump()))
    except SystemExit as stop:
        # tyro says in a box of its own what pydantic found; of that it is better to say more.
        fault: BaseException | None = stop
        while fault is not None and not isinstance(fault, ValidationError):
            fault = fault.__context__
        if fault is None:  # `--help` and unknown flags are tyro's to answer
            if not already_told(said.getvalue()):
                print(said.getvalue(), end="", file=sys.stderr)
            raise
        # pydantic knows the class of the section, and what lies in it, but not where it lies.
        place, kind = next((found for found in _parameters(Config)
                            if getattr(found[1], "__name__", "") == fault.title), ((), Config))
        raise explain(fault, kind, lambda at: flag_of((*place, *at))) from None
    return Config.model_validate(found.model_dump(include=set(Config.model_fields)))


def flag_of(place: Place) -> str:
    """The flag of a setting: `--train.max-steps`."""
    return "--" + dotted(place).replace("_", "-")


def refuse_repeats(args: Sequence[str], kind: Callable[..., Any], *, nested: bool = False) -> None:
    """Raises UserError: a list flag is there twice, of which the parser would take the last. `kind`
    is the function, dataclass or model whose parameters are the flags; `nested` says that those of
    a model within it are written `--outer.inner`."""
    flags = Counter(arg.partition("=")[0].replace("_", "-") for arg in args if arg[:2] == "--")
    for place, hint in _parameters(kind):
        flag = flag_of(place if nested else place[-1:])
        if get_origin(hint) in (list, tuple, Sequence) and flags[flag] > 1:
            raise UserError(f"{flag} is given {flags[flag]} times; give all of its values behind "
                            f"one: {flag} A B")


def _parameters(kind: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Place and type of each, and of those of the models and dataclasses among them."""
    hints = ({name: field.annotation for name, field in kind.model_fields.items()}
             if isinstance(kind, type) and issubclass(kind, BaseModel) else get_type_hints(kind))
    for name, hint in hints.items():
        yield (*place, name), hint
        if isinstance(hint, type) and (issubclass(hint, BaseModel) or is_dataclass(hint)):
            yield from _parameters(hint, (*place, name))


def _with_common_alone(model: type[Section]) -> type[Section]:
    """A section whose help shows the settings that are marked :class:`Common`, and no others."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            fields[name] = (_with_common_alone(kind), field)
        elif Common not in field.metadata:
            fields[name] = (Annotated[kind, *field.metadata, tyro.conf.Suppress], field)
    made: Any = create_model(model.__name__, __base__=model, __doc__=model.__doc__, **fields)
    return made
