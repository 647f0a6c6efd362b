"""The pydantic model of a manifest row: types, bounds, times, spans and labels.

The format is in :mod:`unislu_llm.data.manifest`. An error's type is the kind of the problem.
"""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError as Refused

from unislu_llm.errors import hint
from unislu_llm.tasks import LabelTask, Span, SpanTask, Task, TaskRegistry

REQUIRED = {"id": "every row needs a unique id", "text": "the unified format needs a transcript"}
"""Keys that every row has, and why."""

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DURATION_SLACK = 0.2  # seconds between `duration` and `end - start`, which corpora round


def _plain(value: str, info: ValidationInfo) -> str:
    name = info.field_name
    kind = "text" if name == "text" else "value"
    if not value and name != "hypothesis":  # there: nothing was recognised
        raise Refused("missing" if name in REQUIRED else "value", "is empty; leave the key out")
    if control := CONTROL.search(value):
        raise Refused(kind, f"has the control character {control[0]!a} at character "
                      f"{control.start()}; replace it by a blank or remove it")
    # Blanks are refused rather than tidied: offsets of spans count them.
    if name in REQUIRED and value != value.strip():
        raise Refused(kind, "starts or ends with a blank; strip it (and move span offsets along)")
    if name == "text" and re.search(r"\s\s", value):
        raise Refused(kind, "has two blanks in a row; keep one (and move span offsets along)")
    return value


_Text = Annotated[str, AfterValidator(_plain)]
_Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)  # "1.5" is no number, nor is 1 a name


class ManifestRow(_Strict):
    """What any row may say; :func:`row_model` adds the tasks. A `null` is to be left out."""

    id: _Text
    text: _Text
    audio: _Text | None = None
    start: _Seconds = 0.0
    end: _Seconds | None = None
    duration: Annotated[_Seconds, Field(gt=0)] | None = None
    speaker: _Text | None = None
    language: _Text | None = None
    corpus: _Text | None = None
    hypothesis: _Text | None = None
    text_source: _Text | None = None
    segments: Any = None

    @field_validator("end", "duration")
    @classmethod
    def _fits(cls, value: float, info: ValidationInfo) -> float:
        start, end = info.data.get("start", 0.0), info.data.get("end")
        if info.field_name == "end" and value <= start:
            raise Refused("value", f"{value:g} s is not after start {start:g} s")
        if end is not None and abs(value - (end - start)) > _DURATION_SLACK:
            raise Refused("value", f"{value:g} s does not fit the stretch from {start:g} s to "
                          f"{end:g} s; give the length after the crop, or leave it out")
        return value


FIELDS = tuple(ManifestRow.model_fields)
"""Keys of a row that are not tasks."""


class _Labelled(_Strict):
    """A labelled phrase: an object, or a list in the order of the fields."""

    label: str

    @pydantic.model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        names = list(cls.model_fields)
        if isinstance(value, list) and len(value) == len(names):
            return dict(zip(names, value, strict=True))
        if not isinstance(value, dict):
            listed = ", ".join(names)
            raise Refused("type", f"must be an object of {listed} or a list [{listed}], found "
                          f"{shown(value)}")
        return value


class _PhraseRow(_Labelled):
    """The phrase itself, in a row without a text: there are no characters to count."""

    phrase: str = Field(pattern=r"\S")


class _SpanRow(_Labelled):
    """Where the phrase stands in the row's text, which is the context of the validation."""

    start: int
    end: int

    @field_validator("start", "end")
    @classmethod
    def _inside(cls, offset: int, info: ValidationInfo) -> int:
        text, name, before = info.context, info.field_name, info.data
        start = before.get("start") if name == "end" else offset
        edge = offset - (name == "end")  # the phrase's first or last character
        # Without a text, or where what comes before is wrong, there is nothing to compare with.
        if not isinstance(text, str) or "label" not in before or start is None:
            return offset
        if name == "end" and offset <= start:
            why = f"is not after start {start}; `end` is an offset (exclusive), not a length"
        elif not 0 <= edge < len(text):
            why = f"is outside the text of {len(text)} characters"
        elif text[edge].isspace():
            why = f"puts a blank at the {name} of the phrase; move the offset to the word"
        else:
            return offset
        raise Refused("span", f"{shown(offset)} {why}")


def _flat(items: list[_SpanRow]) -> tuple[Span, ...]:
    spans = sorted((Span(s.label, s.start, s.end) for s in items), key=lambda s: s[1:])
    for left, right in pairwise(spans):
        if right.start < left.end:
            named = " and ".join(f"{s.label} {s.start}..{s.end}" for s in (left, right))
            raise Refused("overlap", f"{named} overlap; the format is flat: keep one of them")
    return tuple(spans)


def _check_label(task: Task, label: str) -> str:
    if label not in task.labels:
        raise Refused("label", f"'{shorten(label)}' is not a label of '{task.name}'"
                      f"{hint(label, task.labels)}; labels: {', '.join(task.labels)}")
    return label


def _label_set(task: LabelTask, labels: list[str]) -> tuple[str, ...]:
    if twice := [label for label in task.labels if labels.count(label) > 1]:
        raise Refused("label", f"'{twice[0]}' is given twice; keep one")
    return tuple(label for label in task.labels if label in labels)


def _annotation(task: Task, phrases: bool) -> Any:
    """Type of the annotation of a task."""
    label: Any = Annotated[str, AfterValidator(partial(_check_label, task))]
    if isinstance(task, SpanTask):
        base: Any = _PhraseRow if phrases else _SpanRow
        span: Any = pydantic.create_model("Span", __base__=base, label=(label, ...))
        # Phrases have no place yet: the task is "not annotated" until they have one.
        made = (lambda items: None if items else ()) if phrases else _flat
        return Annotated[list[span], AfterValidator(made)]
    # Sets are written in the order of the task's labels, so that one set has one target.
    several: Any = Annotated[list[label], AfterValidator(partial(_label_set, task))]
    return several if task.multi else label


def row_model(registry: TaskRegistry, phrases: bool = False) -> type[ManifestRow]:
    """The model of rows with these tasks; the annotation of a task `x` is its field `task_x`.

    With `phrases`, spans are given by what is said, as in rows that have no text.
    """
    # The prefix keeps a task apart from attributes of the model, such as `copy`.
    fields: Any = {f"task_{task.name}": (_annotation(task, phrases) | None,
                                         Field(None, alias=task.name)) for task in registry}
    return pydantic.create_model("Row", __base__=ManifestRow, **fields)


def shown(value: Any) -> str:
    """A JSON value, short, for a message."""
    return shorten(json.dumps(value, ensure_ascii=False))


def shorten(text: str, limit: int = 40) -> str:
    """Short and printable for a message."""
    clean = "".join(c if c.isprintable() else "?" for c in text[:limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
