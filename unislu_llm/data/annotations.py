"""What a manifest row may say of a task: spans by offset or by phrase, one label, or several.

Pydantic checks it; its types of errors are the kinds of a row's problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails
from pydantic_core import PydanticCustomError as Refused

from unislu_llm.data.phrases import place_phrases
from unislu_llm.errors import Place, hint, shorten
from unislu_llm.tasks import LabelTask, Span, SpanTask, Task

STRICT = ConfigDict(strict=True)  # "1.5" is no number, nor is 1 a name
Phrase = Annotated[str, Field(pattern=r"\S")]


class _Labelled(BaseModel):
    """A labelled phrase: an object, or a list in the order of the fields."""

    model_config = STRICT
    label: str

    @pydantic.model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        names = list(cls.model_fields)
        if isinstance(value, list) and len(value) == len(names):
            return dict(zip(names, value, strict=True))
        if not isinstance(value, dict):
            raise Refused("type", f"must be an object or a list [{', '.join(names)}], found "
                          f"{shown(value)}")
        return value


class _PhraseRow(_Labelled):
    """The phrase itself, which has one place in the text or is looked for when there is a text."""

    phrase: Phrase


class _SpanRow(_Labelled):
    """Where the phrase stands in the text; that and its language are the validation's context."""

    start: int
    end: int

    @field_validator("start", "end")
    @classmethod
    def _inside(cls, offset: int, info: ValidationInfo) -> int:
        text, name, before = info.context[0], info.field_name, info.data  # type: ignore[index]
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


Item = tuple[Place, _PhraseRow | _SpanRow]
"""An entry of an annotation, and its place in there."""


class SpanReader:
    """Reads the annotation of a span task: a list of spans and phrases, or phrases by label.
    `[["DRUG", 4, 11]]`, `[{"label": "DRUG", "phrase": "aspirin"}]`, `{"DRUG": ["aspirin"]}`. With
    `phrases_alone` there is no text yet: the task is "not annotated" until phrases have places."""

    def __init__(self, task: SpanTask, phrases_alone: bool) -> None:
        label: Any = Annotated[str, AfterValidator(partial(_check_label, task))]
        kinds: list[Any] = [pydantic.create_model(kind.__name__, __base__=kind, label=(label, ...))
                            for kind in (_PhraseRow, _SpanRow)]
        self._phrase, self._span = kinds
        self._alone, self._task = phrases_alone, task
        item: Any = Annotated[Any, pydantic.PlainValidator(self._item)]
        one_or_more: Any = Annotated[list[Phrase], pydantic.BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value)]
        self._list = pydantic.TypeAdapter[Any](list[item], config=STRICT)
        self._mapping = pydantic.TypeAdapter[Any](dict[label, one_or_more], config=STRICT)

    def __call__(self, value: Any, info: ValidationInfo) -> tuple[Span, ...] | None:
        text, language = said = info.context  # type: ignore[misc]
        found = list(self._entries(value, said))
        if self._alone:
            return None if found else ()
        spans = [(place, Span(item.label, item.start, item.end)) for place, item in found
                 if isinstance(item, _SpanRow)]
        phrases = [(place, item) for place, item in found if isinstance(item, _PhraseRow)]
        flat = _flat([span for _, span in spans])
        # Without a text, which is a problem of its own, there are no places.
        if not phrases or not isinstance(text, str):
            return flat
        placed, why = place_phrases(text, [(p.label, p.phrase) for _, p in phrases], flat,
                                    language=str(language or ""))
        if why:
            raise pydantic.ValidationError.from_exception_data(self._task.name, [
                InitErrorDetails(type=Refused("phrase", reason), loc=phrases[i][0],
                                 input=phrases[i][1].phrase) for i, reason in why.items()])
        return tuple(placed)

    def _entries(self, value: Any, text: Any) -> Iterator[Item]:
        if isinstance(value, dict):
            if "label" in value and "label" not in self._task.labels:
                raise Refused("type", "must be a list of spans, found one; put it in brackets")
            for label, said in self._mapping.validate_python(value).items():
                for i, phrase in enumerate(said):
                    # As written: `"DRUG": "aspirin"` has no place 0.
                    place = (label, i) if isinstance(value[label], list) else (label,)
                    yield place, self._phrase.model_construct(label=label, phrase=phrase)
            return
        for i, item in enumerate(self._list.validate_python(value, context=text)):
            yield ((i, "phrase") if isinstance(item, _PhraseRow) else (i,)), item

    def _item(self, value: Any, info: ValidationInfo) -> Any:
        by_phrase = self._alone or (
            "phrase" in value if isinstance(value, dict) else
            isinstance(value, list) and len(value) == 2)
        kind = self._phrase if by_phrase else self._span
        return kind.model_validate(value, context=info.context)


def _flat(items: list[Span]) -> tuple[Span, ...]:
    spans = sorted(items, key=lambda s: s[1:])
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
    # In the order of the task's labels, so that one set has one target.
    return tuple(label for label in task.labels if label in labels)


def annotation(task: Task, phrases_alone: bool) -> Any:
    """Type of the annotation of a task; `phrases_alone` as in :class:`SpanReader`."""
    if isinstance(task, SpanTask):
        return Annotated[Any, pydantic.PlainValidator(SpanReader(task, phrases_alone))]
    label: Any = Annotated[str, AfterValidator(partial(_check_label, task))]
    several: Any = Annotated[list[label], AfterValidator(partial(_label_set, task))]
    return several if task.multi else label


def listed_phrases(value: Any) -> list[tuple[str, str]]:
    """Label and phrase of each phrase of a checked annotation that gives phrases alone."""
    if isinstance(value, dict):
        return [(label, phrase) for label, said in value.items()
                for phrase in ([said] if isinstance(said, str) else said)]
    return [(v[0], v[1]) if isinstance(v, list) else (v["label"], v["phrase"]) for v in value]


def shown(value: Any) -> str:
    """A JSON value, short, for a message."""
    return shorten(json.dumps(value, ensure_ascii=False))
