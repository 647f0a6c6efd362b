"""What a task is: the markers it adds to the vocabulary and the outputs it allows.

A task is data, not code: :class:`SpanTask` labels phrases of the transcript (named entities, slots), :class:`LabelTask`
labels the whole utterance (sentiment, dialogue acts). The built-in registry holds the two tasks of UniSLU
(arXiv 2507.12951); :meth:`TaskRegistry.from_yaml` adds others without code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unislu_llm.errors import UserError, hint

SEPARATOR = "[T/L]"
"""Marker between the transcript and the task part."""

ASR = "asr"
"""Name of the sample kind that has a transcript and no task part. It is not in the registry: every utterance has it."""

_MARKER = re.compile(r"\[/?[A-Za-z0-9_/-]+\]")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Span(NamedTuple):
    """A labelled phrase: `text[start:end]`, offsets in characters of the transcript."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class SpanTask:
    """Labelled phrases of the transcript, written `[LABEL]phrase[/LABEL]` from left to right.

    Args:
        name: key of the annotation in a manifest row, e.g. `ner`.
        marker: task-control token, e.g. `[NER]`.
        labels: label names; each becomes a pair of markers `[LABEL]`, `[/LABEL]`.
        words: what a marker stands for in plain words, to start its embedding from; default: the label itself.
    """

    name: str
    marker: str
    labels: tuple[str, ...]
    words: Mapping[str, str] | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Every marker of the task, the control token first."""
        return (self.marker, *(m for label in self.labels for m in (self.open_of(label), self.close_of(label))))

    @staticmethod
    def open_of(label: str) -> str:
        return f"[{label}]"

    @staticmethod
    def close_of(label: str) -> str:
        return f"[/{label}]"

    def meaning(self, marker: str) -> str:
        """Plain words that a marker stands for; its embedding row starts from their mean."""
        plain, words = _plain(marker), dict(self.words or {})
        if marker in words:
            return words[marker]
        # Never a single word: the row would equal that word's, and the marker would tie with it in transcripts.
        meaning = words.get(plain, f"{plain.lower()} phrase")
        return f"end {meaning}" if marker.startswith("[/") else meaning


@dataclass(frozen=True)
class LabelTask:
    """One label (or, with `multi`, a set of labels) for the whole utterance, written `[S]Positive[/S]`.

    Args:
        name: key of the annotation in a manifest row, e.g. `sa`.
        marker: task-control token, e.g. `[SA]`.
        labels: the closed set of labels, written as plain text between `open` and `close`.
        open: opening marker. close: closing marker.
        multi: whether several labels can hold; they are written one pair after another in the order of `labels`.
        words: what a marker stands for in plain words, to start its embedding from.
    """

    name: str
    marker: str
    labels: tuple[str, ...]
    open: str
    close: str
    multi: bool = False
    words: Mapping[str, str] | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Every marker of the task, the control token first."""
        return (self.marker, self.open, self.close)

    def meaning(self, marker: str) -> str:
        """Plain words that a marker stands for; its embedding row starts from their mean."""
        default = {self.marker: f"{self.name} task", self.open: f"{self.name} label",
                   self.close: f"end {self.name} label"}
        return dict(self.words or {}).get(marker, default[marker])


Task = SpanTask | LabelTask
LabelValue = tuple[Span, ...] | tuple[str, ...] | str
"""Annotation of one task: spans, one label, or (multi-label) a tuple of labels."""

NER = SpanTask(
    name="ner",
    marker="[NER]",
    labels=("PLACE", "QUANT", "ORG", "WHEN", "NORP", "PERSON", "LAW"),
    words={
        "[NER]": "named entities",
        "PLACE": "country city place",
        "QUANT": "number amount quantity",
        "ORG": "organization institution company",
        "WHEN": "date time day",
        "NORP": "nationality religion party",
        "PERSON": "person name",
        "LAW": "law treaty act",
    },
)
"""SLUE-VoxPopuli named entities, the seven combined types (FACTS 1.1)."""

SA = LabelTask(
    name="sa",
    marker="[SA]",
    labels=("Positive", "Neutral", "Negative"),
    open="[S]",
    close="[/S]",
    words={"[SA]": "sentiment analysis", "[S]": "sentiment label", "[/S]": "end sentiment"},
)
"""SLUE-VoxCeleb sentiment, three classes (FACTS 1.1)."""


class TaskRegistry:
    """The tasks of a system, by name. Iterates in order of registration.

    Raises:
        UserError: a name or marker is used twice, or is not well formed.
    """

    def __init__(self, tasks: Iterable[Task] = (NER, SA)) -> None:
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            self.add(task)

    def add(self, task: Task) -> None:
        """Register a task after checking its name, labels and markers."""
        _check(task, taken=set(self.markers), names=set(self._tasks))
        self._tasks[task.name] = task

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise UserError(f"unknown task '{name}'; known tasks: {', '.join([ASR, *self._tasks])}. "
                            "Add it to the `tasks` file (YAML) or correct the name.")
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
        return (SEPARATOR, *(m for task in self._tasks.values() for m in task.markers))

    def meaning(self, marker: str) -> str:
        """Plain words that a marker stands for."""
        if marker == SEPARATOR:
            return "transcript end labels"
        for task in self:
            if marker in task.markers:
                return task.meaning(marker)
        raise UserError(f"unknown marker '{marker}'; known: {' '.join(self.markers)}")

    def by_marker(self, marker: str) -> Task | None:
        """The task whose control token is `marker`."""
        return next((t for t in self if t.marker == marker), None)

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, the inverse of :meth:`from_dict`; stored in every run and checkpoint."""
        return [_as_dict(task) for task in self]

    @classmethod
    def from_dict(cls, rows: Iterable[Mapping[str, Any]], where: str = "tasks") -> TaskRegistry:
        """Build from plain data: `[{kind: span|label, name: ..., marker: ..., labels: [...]}]`."""
        return cls(_from_dict(row, f"{where}[{i}]") for i, row in enumerate(rows))

    @classmethod
    def from_yaml(cls, path: str | Path) -> TaskRegistry:
        """Read a YAML list of tasks. `- builtin: ner` takes a built-in task as it is.

        Raises:
            UserError: unreadable file, unknown key, duplicate name or marker.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"task file {path} does not exist; give a YAML list of tasks")
        try:
            rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not YAML: {error}") from error
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a YAML list of tasks, found {type(rows).__name__}")
        return cls.from_dict(rows, where=str(path))


def _plain(marker: str) -> str:
    return marker.strip("[]").lstrip("/")


def _check(task: Task, taken: set[str], names: set[str]) -> None:
    where = f"task '{task.name}'"
    if not _NAME.fullmatch(task.name) or task.name == ASR:
        raise UserError(f"{where}: a name is lower-case letters, digits and _, and not '{ASR}'")
    if task.name in names:
        raise UserError(f"{where} is registered twice; rename one")
    if not task.labels or len(set(task.labels)) != len(task.labels):
        raise UserError(f"{where}: labels must be given and differ from each other")
    for marker in task.markers:
        if not _MARKER.fullmatch(marker):
            raise UserError(f"{where}: marker '{marker}' must look like [NAME] (letters, digits, _, -, /)")
        if marker in taken or task.markers.count(marker) > 1:
            raise UserError(f"{where}: marker '{marker}' is already in use; choose another")
    if isinstance(task, LabelTask):
        for label in task.labels:
            if label != label.strip() or not label or _MARKER.search(label):
                raise UserError(f"{where}: label '{label}' must be plain text without markers or outer blanks")
    named = {*task.markers, *(task.labels if isinstance(task, SpanTask) else ())}
    for key, words in (task.words or {}).items():
        if key not in named or not words.strip():
            raise UserError(f"{where}.words: '{key}' must be one of {', '.join(sorted(named))}, "
                            "with the words that it stands for")


_BUILTIN: dict[str, Task] = {"ner": NER, "sa": SA}
_KEYS = {
    "span": ("kind", "name", "marker", "labels", "words"),
    "label": ("kind", "name", "marker", "labels", "open", "close", "multi", "words"),
}


def _as_dict(task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "span" if isinstance(task, SpanTask) else "label", "name": task.name,
                           "marker": task.marker, "labels": list(task.labels)}
    if isinstance(task, LabelTask):
        row |= {"open": task.open, "close": task.close, "multi": task.multi}
    if task.words:
        row["words"] = dict(task.words)
    return row


def _from_dict(row: Mapping[str, Any], where: str) -> Task:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a mapping, found {type(row).__name__}")
    if "builtin" in row:
        return _builtin(row, where)
    kind = row.get("kind")
    if kind not in ("span", "label"):
        raise UserError(f"{where}.kind: must be 'span' or 'label', found {kind!r}")
    for key in row:
        if key not in _KEYS[kind]:
            raise UserError(f"{where}: unknown key '{key}'{hint(key, _KEYS[kind])}; known: {', '.join(_KEYS[kind])}")
    needed = ("name", "marker", "labels", "open", "close") if kind == "label" else ("name", "marker", "labels")
    missing = [f"'{key}'" for key in needed if key not in row]
    if missing:
        raise UserError(f"{where}: missing key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    fields: dict[str, Any] = {key: _string(row[key], f"{where}.{key}") for key in needed if key != "labels"}
    if not isinstance(row["labels"], list | tuple):
        raise UserError(f"{where}.labels: must be a list, found {row['labels']!r}")
    fields["labels"] = tuple(_string(label, f"{where}.labels[{i}]") for i, label in enumerate(row["labels"]))
    if row.get("words"):
        if not isinstance(row["words"], Mapping):
            raise UserError(f"{where}.words: must map markers or labels to words, found {row['words']!r}")
        fields["words"] = {_string(key, f"{where}.words"): _string(value, f"{where}.words.{key}")
                           for key, value in row["words"].items()}
    if not isinstance(row.get("multi", False), bool):
        raise UserError(f"{where}.multi: must be true or false, found {row['multi']!r}")
    return SpanTask(**fields) if kind == "span" else LabelTask(**fields, multi=row.get("multi", False))


def _builtin(row: Mapping[str, Any], where: str) -> Task:
    name, others = str(row["builtin"]), [str(key) for key in row if key != "builtin"]
    if name not in _BUILTIN:
        raise UserError(f"{where}.builtin: '{name}' is not one of {', '.join(_BUILTIN)}{hint(name, _BUILTIN)}")
    if others:
        raise UserError(f"{where}: a builtin task is taken as it is; remove {', '.join(others)}, "
                        "or write out a task of your own")
    return _BUILTIN[name]


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):  # YAML reads yes, no, on, 1 as booleans and numbers
        raise UserError(f"{where}: must be a string, found {value!r}; put it in quotes")
    return value
