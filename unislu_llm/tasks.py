"""What a task is: the markers that it adds to the vocabulary and the outputs that it allows.

A task is data, not code. A :class:`SpanTask` labels phrases of the transcript (named entities,
slots); a :class:`LabelTask` labels the whole utterance (sentiment, dialogue acts). The built-in two
are those of UniSLU (arXiv 2507.12951); :meth:`TaskRegistry.from_yaml` reads others from a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from unislu_llm.errors import UserError, dotted, explain, hint
from unislu_llm.text_files import read_yaml

SEPARATOR = "[T/L]"  # marker between the transcript and the task part
ASR = "asr"  # name of an example that has a transcript and no task part; every utterance has one

# Strict: YAML reads `yes`, `no` and `1` as no strings, and they must not turn into some.
Text = Annotated[str, Strict()]
_CHECKED = ConfigDict(extra="forbid")

_MARKER = re.compile(r"\[/?[A-Za-z0-9_/-]+\]")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = frozenset((
    "all", "asr", "none", "task", "tasks", "labels", "id", "text", "audio", "start", "end",
    "duration", "speaker", "language", "corpus", "draft", "hypothesis", "text_source", "segments",
    "file", "error", "seconds", "problems", "raw", "ctc_hypothesis", "probabilities", "confidence",
    "tokens", "alternatives", "spans", "windows", "text_start", "text_end", "warning", "warnings",
    "no_speech", "evidence", "score"))
"""What manifests, answers, their confidences and scores call other things than a task."""


class Span(NamedTuple):
    """A labelled phrase: `text[start:end]`, offsets in characters of the transcript."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, config=_CHECKED)
class _Task:
    name: Text  # key of the annotation in a manifest row, e.g. `ner`
    marker: Text  # task-control token, e.g. `[NER]`
    labels: tuple[Text, ...]  # the closed set of labels
    # What a label or marker stands for in plain words, to start its embedding from.
    words: dict[Text, Text] | None = Field(default=None, kw_only=True)

    @property
    def pairs(self) -> dict[str, str]:
        """Closing marker by opening marker."""
        raise NotImplementedError

    @property
    def markers(self) -> tuple[str, ...]:
        """Every marker of the task, the control token first."""
        return (self.marker, *(m for pair in self.pairs.items() for m in pair))


@dataclass(frozen=True, config=_CHECKED)
class SpanTask(_Task):
    """Labelled phrases of the transcript, written `[LABEL]phrase[/LABEL]` from left to right."""

    @property
    def pairs(self) -> dict[str, str]:
        return {self.open_of(label): self.close_of(label) for label in self.labels}

    @staticmethod
    def open_of(label: str) -> str:
        return f"[{label}]"

    @staticmethod
    def close_of(label: str) -> str:
        return f"[/{label}]"

    def meaning(self, marker: str) -> str:
        """Plain words that a marker stands for; its embedding row starts from their mean."""
        words, label = self.words or {}, marker.strip("[]").lstrip("/")
        if marker in words:
            return words[marker]
        # Never a single word: the row would equal that word's, and the marker would tie with it
        # in transcripts.
        meaning = words.get(label, f"{label.lower()} phrase")
        return f"end {meaning}" if marker.startswith("[/") else meaning


@dataclass(frozen=True, config=_CHECKED)
class LabelTask(_Task):
    """One label (or a set of labels) for the utterance, as plain text: `[S]Positive[/S]`."""

    open: Text  # marker before a label
    close: Text  # marker after it
    multi: Annotated[bool, Strict()] = False  # several can hold, written in the order of `labels`

    @property
    def pairs(self) -> dict[str, str]:
        return {self.open: self.close}

    def meaning(self, marker: str) -> str:
        """Plain words that a marker stands for; its embedding row starts from their mean."""
        default = {self.marker: f"{self.name} task", self.open: f"{self.name} label",
                   self.close: f"end {self.name} label"}
        return (self.words or {}).get(marker, default[marker])


Task = SpanTask | LabelTask
LabelValue = tuple[Span, ...] | tuple[str, ...] | str
"""Annotation of one task: spans, one label, or (multi-label) a tuple of labels."""

NER = SpanTask(
    name="ner", marker="[NER]",
    labels=("PLACE", "QUANT", "ORG", "WHEN", "NORP", "PERSON", "LAW"),
    words={"[NER]": "named entities", "PLACE": "country city place",
           "QUANT": "number amount quantity", "ORG": "organization institution company",
           "WHEN": "date time day", "NORP": "nationality religion party", "PERSON": "person name",
           "LAW": "law treaty act"})
"""SLUE-VoxPopuli named entities, the seven combined types."""

SA = LabelTask(
    name="sa", marker="[SA]", labels=("Positive", "Neutral", "Negative"), open="[S]", close="[/S]",
    words={"[SA]": "sentiment analysis", "[S]": "sentiment label", "[/S]": "end sentiment"})
"""SLUE-VoxCeleb sentiment, three classes."""

# Facts from slue-toolkit (asappresearch/slue-toolkit): generic_utils.py, raw_to_combined_tag_map.
RAW_TO_COMBINED: dict[str, str | None] = {
    **dict.fromkeys(("DATE", "TIME"), "WHEN"),
    **dict.fromkeys(("CARDINAL", "ORDINAL", "QUANTITY", "MONEY", "PERCENT"), "QUANT"),
    **dict.fromkeys(("GPE", "LOC"), "PLACE"),
    **{label: label for label in ("NORP", "ORG", "LAW", "PERSON")},
    **dict.fromkeys(("FAC", "EVENT", "WORK_OF_ART", "PRODUCT", "LANGUAGE")),
}
"""The 18 OntoNotes labels of the raw annotation to the seven combined ones; None is dropped."""


class TaskRegistry:
    """The tasks of a system, by name. Iterates in order of registration. Raises UserError: a name
    or marker is used twice, or is not well formed."""

    def __init__(self, tasks: Iterable[Task] = (NER, SA)) -> None:
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            self._add(task)

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise UserError(f"unknown task '{name}'; known tasks: {', '.join([ASR, *self._tasks])}."
                            " Add it to the `tasks` file (YAML) or correct the name.")
        return self._tasks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tasks)

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers, the separator first; one token id each in every tokenizer."""
        return (SEPARATOR, *(m for task in self for m in task.markers))

    def meaning(self, marker: str) -> str:
        """Plain words that one of the markers stands for."""
        if marker == SEPARATOR:
            return "transcript end labels"
        return next(task.meaning(marker) for task in self if marker in task.markers)

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, the inverse of :meth:`from_dict`; stored with every model."""
        return [{"kind": "span" if isinstance(task, SpanTask) else "label"}
                | {key: list(value) if key == "labels" else value
                   for key, value in asdict(task).items() if value is not None}
                for task in self]

    @classmethod
    def from_dict(cls, rows: Iterable[Mapping[str, Any]], where: str = "tasks") -> TaskRegistry:
        """Build from plain data: `[{kind: span|label, name: ..., marker: ..., labels: [...]}]`."""
        return cls._placed((row, f"{where}[{i}]") for i, row in enumerate(rows))

    @classmethod
    def _placed(cls, rows: Iterable[tuple[Mapping[str, Any], str]]) -> TaskRegistry:
        registry = cls(())
        for row, where in rows:
            registry._add(_from_row(row, where), f"{where}: ")
        return registry

    def _add(self, task: Task, where: str = "") -> None:
        _check(task, self, f"{where}task '{task.name}'")
        self._tasks[task.name] = task

    @classmethod
    def from_yaml(cls, path: str | Path | None) -> TaskRegistry:
        """Read a YAML list of tasks; without a file: the built-in ones. Raises UserError:
        unreadable file, unknown key, duplicate name or marker."""
        if not path:
            return cls()
        if not Path(path).is_file():
            raise UserError(f"task file {path} does not exist; give a YAML list of tasks")
        node, rows = read_yaml(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a YAML list of tasks, found {type(rows).__name__}")
        lines = [item.start_mark.line + 1 for item in node.value] if node else []
        return cls._placed((row, f"{path}:{line}: tasks[{i}]")
                           for i, (row, line) in enumerate(zip(rows, lines, strict=True)))


def _from_row(row: Mapping[str, Any], where: str) -> Task:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a mapping, found {type(row).__name__}")
    if "builtin" in row:
        name, known = str(row["builtin"]), {task.name: task for task in (NER, SA)}
        if name not in known:
            raise UserError(f"{where}.builtin: '{name}' is not one of {', '.join(known)}"
                            f"{hint(name, known)}")
        if len(row) > 1:
            raise UserError(f"{where}: a builtin task is taken as it is; remove the other keys "
                            f"({', '.join(map(str, row))}), or write out a task of your own")
        return known[name]
    values = dict(row)
    kind: Any = {"span": SpanTask, "label": LabelTask}.get(str(values.pop("kind", None)))
    if kind is None:
        raise UserError(f"{where}.kind: must be 'span' or 'label', found {row.get('kind')!r}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise explain(error, kind, lambda place: f"{where}.{dotted(place)}") from None


def _check(task: Task, known: TaskRegistry, where: str) -> None:
    """Whether a task can be told apart from the known ones, in a manifest and in decoded text."""
    if not _NAME.fullmatch(task.name) or task.name in RESERVED:
        taken = f", and not '{task.name}', which has a meaning already" * (task.name in RESERVED)
        raise UserError(f"{where}: a name is lower-case letters, digits and _{taken}; rename it")
    if task.name in known:
        raise UserError(f"{where} is registered twice; rename one")
    # Scores are flat: `<task>_f1`, `<task>_label_f1`, `<task>_position_f1`.
    if any(task.name.removesuffix(part) in known or task.name + part in known
           for part in ("_label", "_position")):
        raise UserError(f"{where}: its scores would be called as another task's; rename it")
    if not task.labels or len(set(task.labels)) != len(task.labels):
        raise UserError(f"{where}: labels must be given and differ from each other")
    for marker in task.markers:
        if not _MARKER.fullmatch(marker):
            raise UserError(f"{where}: marker '{marker}' must look like [NAME] (letters, digits, "
                            "_, -, /)")
        if marker in known.markers or task.markers.count(marker) > 1:
            raise UserError(f"{where}: marker '{marker}' is already in use; choose another")
    for label in task.labels if isinstance(task, LabelTask) else ():
        # The labels of a span task are markers, and were checked as such.
        if label != label.strip() or not label or _MARKER.search(label):
            raise UserError(f"{where}: label '{label}' must be plain text without markers or outer "
                            "blanks")
    named = {*task.markers, *(task.labels if isinstance(task, SpanTask) else ())}
    for key, words in (task.words or {}).items():
        if key not in named or not words.strip():
            raise UserError(f"{where}.words: '{key}' must be one of {', '.join(sorted(named))}, "
                            "with the words that it stands for")
