"""From a manifest row to an utterance, or to everything that is wrong with the row.

Types, bounds, times, spans and labels are checked by a pydantic model, whose types of errors are
the kinds of problems. The format is in :mod:`unislu_llm.data.manifest`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError as Refused

from unislu_llm.data.annotations import STRICT, annotation, shown
from unislu_llm.data.mending import composed, rewrite
from unislu_llm.errors import dotted, shorten
from unislu_llm.tasks import SpanTask, TaskRegistry
from unislu_llm.unified import find_marker
from unislu_llm.utterance import Utterance

_REQUIRED = {"id": "every row needs a unique id", "text": "the unified format needs a transcript"}
_SYNONYMS = {name: key for key, names in {
    "audio": "audio_filepath audio_path audio_file audio_url path file file_name filename wav",
    "text": "transcript transcription sentence normalized_text utterance utt",
    "start": "offset start_time start_second start_sec begin begin_time onset",
    "end": "end_time end_second end_sec stop stop_time",
    "language": "lang locale", "speaker": "spk client_id", "hypothesis": "pred_text draft",
    "id": "utt_id uid", "sa": "sentiment", "ner": "entities"}.items() for name in names.split()}
"""Names that other tools give to the same things."""
_LENIENT = ("language", "speaker", "hypothesis", "id")  # without them a row is no other one
_ANNOTATIONS = ("label", "labels", "spans", "annotation", "annotations")
"""Names that other tools give to whatever was annotated."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DURATION_SLACK = 0.2  # seconds between `duration` and `end - start`, which corpora round
_CLOSE = 0.75  # similarity from which a key counts as misspelt
# Kinds of problems with which a row can be used all the same.
_WARNINGS = frozenset(("clipping", "silence", "rate", "channels", "long", "same_row", "leak",
                       "characters", "pace", "rare_label", "unread", "inside_word"))


class Problem(NamedTuple):
    """One thing wrong with one row; `str()` is `file:line: field: message`."""

    field: str  # key at fault, e.g. `ner[2].end`
    kind: str  # a word for counts, e.g. `span`
    message: str  # what is wrong and what to do
    file: Path = Path()  # the manifest, once the row's place is known
    line: int = 0  # counted from 1; 0 for the file as a whole

    @property
    def warning(self) -> bool:
        return self.kind in _WARNINGS

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else str(self.file)
        return f"{where}: {shorten(self.field, 80)}: {'warning: ' * self.warning}{self.message}"


# ---- what a row may say


def _plain(value: str, info: ValidationInfo) -> str:
    name = info.field_name
    kind = "text" if name == "text" else "value"
    if not value and name != "hypothesis":  # there: nothing was recognised
        raise Refused("missing" if name in _REQUIRED else "value", "is empty; leave the key out")
    if control := _CONTROL.search(value):
        raise Refused(kind, f"has the control character {control[0]!a} at character "
                      f"{control.start()}; replace it by a blank or remove it")
    # Blanks are refused rather than tidied: offsets of spans count them.
    if name in _REQUIRED and value != value.strip():
        raise Refused(kind, "starts or ends with a blank; strip it (and move span offsets along)")
    if name == "text" and re.search(r"\s\s", value):
        raise Refused(kind, "has two blanks in a row; keep one (and move span offsets along)")
    return value


_Text = Annotated[str, AfterValidator(_plain)]
_Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _Row(BaseModel):
    """What any row may say; :func:`_row_model` adds the tasks. A `null` is to be left out."""

    model_config = STRICT
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


FIELDS = tuple(_Row.model_fields)
"""Keys of a row that are not tasks."""


def _row_model(registry: TaskRegistry, phrases: bool) -> type[_Row]:
    """The model of rows with these tasks; with `phrases` spans are given by what is said."""
    # The prefix keeps a task apart from attributes of the model, such as `copy`.
    fields: Any = {f"task_{task.name}": (annotation(task, phrases) | None,
                                         Field(None, alias=task.name)) for task in registry}
    return pydantic.create_model("Row", __base__=_Row, **fields)


# ---- what is made of it


@dataclass
class RowReader:
    """Checks rows and makes utterances of them, in time linear in the size of a row."""

    registry: TaskRegistry  # the tasks whose annotations are read
    folder: Path = Path()  # of the manifest, from which audio paths start
    corpus: str = "default"  # of rows that name none
    check_audio: bool = False  # also look whether audio files exist
    # Rows with audio may lack `text`: the utterance's is empty, and spans that are given by their
    # phrases are checked and left out of `labels`, unless there are none.
    without_text: bool = False
    language: str = ""  # of rows that name none; phrases are looked for by its normaliser

    def __post_init__(self) -> None:
        self._models = {phrases: _row_model(self.registry, phrases)
                        for phrases in {False, self.without_text}}
        self._known = (*FIELDS, *self.registry.names)

    def read(self, row: Mapping[str, Any], source: str) -> tuple[Utterance | None, list[Problem]]:
        """The utterance of a row, None where there are problems, and these; `source` names it."""
        row = rewrite(dict(row), ("text", "hypothesis", *self.registry.names), composed)
        alike = [(key, like) for key in row if key not in self._known
                 and (like := lookalike(key, self._known)) is not None]
        renamed = next((f"; rename '{key}'" for key, like in alike if like == "text"), "")
        values = {key: row[key] for key in self._known if row.get(key) is not None}
        unheard = self.without_text and not (renamed or row.get("text")) and "audio" in values
        if unheard:
            values["text"] = "?"  # a place-holder: what needs the text is checked when there is one
        found: Any = None
        problems: list[Problem] = []
        try:
            context = values.get("text"), values.get("language") or self.language
            found = self._models[unheard].model_validate(values, context=context)
        except pydantic.ValidationError as error:
            problems += _explain(error, row, renamed)
        for name in ("text", "hypothesis"):
            said = str(values.get(name, ""))
            if "[" in said and (marker := find_marker(said, self.registry)):
                problems.append(Problem(name, "marker", f"holds the marker {marker}, which could "
                                        f"not be told from a real one; take it out of the {name}"))
        # `speaker_id` beside `speaker` is metadata; alone it is a speaker that nobody would see.
        problems += [Problem(key, "unknown_key", f"unknown key; did you mean '{like}'? Rename or "
                             "remove it") for key, like in alike if _counts(key, like, row)]
        problems += self._of_other_tools(row)
        audio = values.get("audio")
        path = resolve(self.folder, audio) if isinstance(audio, str) else None
        if self.check_audio and path and not os.path.isfile(path):  # false for impossible names
            problems.append(Problem("audio", "audio_missing", f"file {path} does not exist; paths "
                                    "are relative to the manifest"))
        if problems:
            return None, problems
        labels = {task.name: value for task in self.registry
                  if (value := getattr(found, f"task_{task.name}")) is not None}
        end = found.end
        if end is None and found.duration is not None and "start" in values:
            end = found.start + found.duration
        return Utterance(
            found.id, path, "" if unheard else found.text, labels, found.start, end,
            found.speaker, found.language or self.language or None,
            found.corpus or self.corpus, found.duration, source,
            None if found.hypothesis is None else " ".join(found.hypothesis.split()),
            found.text_source, found.segments if isinstance(found.segments, list) else None), []

    def _of_other_tools(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        """Annotations under other tools' names, and what an annotator threw away."""
        if row.get("answer") in ("reject", "ignore") and "answer" not in self._known:
            yield Problem("answer", "unknown_key", f"is '{row['answer']}'; take the row out "
                          "(`unislu prepare prodigy` does)")
        for key in _ANNOTATIONS:
            given = row[key] if row.get(key) and key not in self._known else ()
            given = given if isinstance(given, list | tuple) else [given]
            for task in self.registry if given else ():
                spans = isinstance(task, SpanTask) and isinstance(given[0], list | dict)
                if row.get(task.name) is None and (spans or given[0] in task.labels):
                    how = "a list of [label, start, end]" if spans else "a label"
                    yield Problem(key, "unknown_key", f"is not read; '{task.name}' is the key of "
                                  f"the task, and has {how}; rename it")
                    break


def _counts(key: str, like: str, row: Mapping[str, Any]) -> bool:
    """Whether a key that is not read, and looks like another, makes the row another one."""
    if row.get(like) is not None or like == "text" or row[key] is None:
        return False
    if key in _SYNONYMS and like in ("start", "end"):  # of text, or from the start, it is no crop
        return bool(row[key] and row.get("audio"))
    return key not in _SYNONYMS or like not in _LENIENT


@lru_cache(maxsize=4096)  # rows of a manifest have the same keys
def lookalike(key: str, known: tuple[str, ...]) -> str | None:
    """The key of a manifest that another key may stand for, by its letters or in another tool."""
    plain = key.casefold()
    if _SYNONYMS.get(plain, "") in known:
        return _SYNONYMS[plain]
    names = [name for name in known if name != "segments"]  # a `segment` is metadata
    # The same letters in another order count as near: `nre` has too little else of `ner`.
    near = ([name for name in names if sorted(name) == sorted(plain)]
            or get_close_matches(plain, names, 1, _CLOSE))
    return near[0] if near else None


def _explain(error: pydantic.ValidationError, row: Mapping[str, Any],
             renamed: str) -> Iterator[Problem]:
    """Problems of a row in the words of a manifest."""
    for found in error.errors(include_url=False):
        place = tuple(part for part in found["loc"] if part != "[key]")  # pydantic's own word
        field, kind, message = dotted(place), found["type"], found["msg"]
        if kind == "missing" and field in _REQUIRED:
            advice = "; `unislu transcribe --pseudo-label` writes a copy with a recogniser's"
            message = (f"{'is empty' if row.get(field) == '' else 'is missing'}; {_REQUIRED[field]}"
                       + (renamed or advice * bool(row.get("audio"))) * (field == "text"))
        elif kind == "missing":
            message = "is missing; a span has label, start and end, or label and phrase"
        elif "_" in kind:  # one of pydantic's own
            kind = "type" if kind.endswith("_type") else "value"
            message = f"{message.replace('Input should', 'must')}, found {shown(found['input'])}"
        yield Problem(field, kind, message)


def resolve(folder: Path, name: str) -> Path:
    """Path of `name` seen from `folder`; leading `..` go up from where symbolic links lead."""
    parts = Path(name).parts
    while parts and parts[0] == "..":
        folder, parts = folder.resolve().parent, parts[1:]
    return folder.joinpath(*parts)
