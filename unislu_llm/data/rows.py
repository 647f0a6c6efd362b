"""One manifest row: every check on it, and the utterance it makes. Format: :mod:`unislu_llm.data.manifest`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from unislu_llm.tasks import LabelTask, LabelValue, Span, SpanTask, Task, TaskRegistry
from unislu_llm.unified import check_text
from unislu_llm.utterance import Utterance

FIELDS = ("id", "audio", "text", "start", "end", "speaker", "language", "corpus", "duration", "draft", "text_source")
"""Keys of a row that are not tasks."""

_SYNONYMS = {
    **dict.fromkeys(("audio_filepath", "audio_path", "audio_file", "path", "file", "wav"), "audio"),
    **dict.fromkeys(("transcript", "transcription", "sentence", "normalized_text"), "text"),
    "sentiment": "sa",
    "entities": "ner",
}
"""Names that other toolkits give to the same things."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DOUBLE_BLANK = re.compile(r"\s\s")
_CLOSE = 0.75  # similarity from which a key counts as misspelt
_DURATION_SLACK = 0.2  # seconds between `duration` and `end - start`: time stamps and durations are rounded


class Fault(NamedTuple):
    """Something wrong with a row, before file and line are known: see `Problem`."""

    field: str
    kind: str
    message: str


class Phrase(NamedTuple):
    """A span whose place is not known yet: there is no transcript to count characters in."""

    label: str
    text: str


class RowReader:
    """Checks rows and makes utterances of them.

    Args:
        registry: the tasks whose annotations are read.
        folder: folder of the manifest, from which audio paths start.
        corpus: corpus of rows that name none.
        check_audio: also look whether audio files exist.
        without_text: rows with audio may lack `text`. Their utterance's text is empty then, and spans are :func:`read_phrases`,
            checked and left out of `labels` where there are any.
    """

    def __init__(self, registry: TaskRegistry, folder: Path, corpus: str, check_audio: bool, without_text: bool = False) -> None:
        self._registry = registry
        self._tasks = tuple(registry)
        self._folder = folder
        self._corpus = corpus
        self._check_audio = check_audio
        self._without_text = without_text
        self._known = frozenset({*FIELDS, *registry.names})
        self._lookalike = lru_cache(maxsize=4096)(self._find_lookalike)

    def read(self, row: Mapping[str, Any], source: str, faults: list[Fault]) -> Utterance | None:
        """The utterance of a row; None when something is added to `faults`."""
        before = len(faults)
        name = _string(row, "id", faults, required=True)
        hint = self._hint(row, "text")
        to_hear = self._without_text and not hint and row.get("text") in (None, "") and bool(row.get("audio"))
        text = "" if to_hear else _string(row, "text", faults, required=True, hint=hint)
        if text:
            self._check_text(text, faults)
        draft = self._draft(row, faults)
        audio = self._audio(row, faults)
        start, end, duration = _times(row, faults)
        self._check_keys(row, faults)
        labels = {task.name: value for task in self._tasks if row.get(task.name) is not None
                  and (value := _annotation(row[task.name], task, text, faults, to_hear)) is not None}
        speaker, language, corpus, text_source = (_string(row, key, faults)
                                                  for key in ("speaker", "language", "corpus", "text_source"))
        if len(faults) > before or name is None or text is None:
            return None
        corpus = corpus or self._corpus
        segments = row.get("segments")
        return Utterance(name, audio, text, labels, start, end, speaker, language, corpus, duration, source,
                         segments if isinstance(segments, list) else None, draft, text_source)

    def _draft(self, row: Mapping[str, Any], faults: list[Fault]) -> str | None:
        draft = "" if row.get("draft") == "" else _string(row, "draft", faults)  # empty: nothing was heard
        if draft is None:
            return None
        self._check_marker(draft, "draft", faults)
        return " ".join(draft.split())

    def _check_text(self, text: str, faults: list[Fault]) -> None:
        if text != text.strip():
            faults.append(Fault("text", "text", "starts or ends with a blank; strip it (and move span offsets along)"))
        if _DOUBLE_BLANK.search(text):
            faults.append(Fault("text", "text", "has two blanks in a row; keep one (and move span offsets along)"))
        self._check_marker(text, "text", faults)

    def _check_marker(self, text: str, field: str, faults: list[Fault]) -> None:
        marker = check_text(text, self._registry) if "[" in text else None
        if marker:
            faults.append(Fault(field, "marker", f"holds the marker {marker}, which could not be told from a real "
                                f"one; take it out of the {'transcript' if field == 'text' else field}"))

    def _audio(self, row: Mapping[str, Any], faults: list[Fault]) -> Path | None:
        value = _string(row, "audio", faults)
        if value is None:
            return None
        path = resolve(self._folder, value)
        if self._check_audio and not is_file(path):
            faults.append(Fault("audio", "audio_missing", f"file {path} does not exist; "
                                "paths are relative to the manifest"))
        return path

    def _check_keys(self, row: Mapping[str, Any], faults: list[Fault]) -> None:
        for key in row:
            if key in self._known:
                continue
            like = self._lookalike(key)
            # `speaker_id` beside `speaker` is metadata; alone it is a speaker that nobody would see.
            if like is not None and row.get(like) is None and like != "text":
                faults.append(Fault(key, "unknown_key", f"unknown key; did you mean '{like}'? Rename or remove it"))

    def _find_lookalike(self, key: str) -> str | None:
        plain = key.casefold()
        if _SYNONYMS.get(plain) in self._known:
            return _SYNONYMS[plain]
        for known in sorted(self._known):
            if sorted(plain) == sorted(known):  # letters swapped
                return known
        return next(iter(difflib.get_close_matches(plain, sorted(self._known), n=1, cutoff=_CLOSE)), None)

    def _hint(self, row: Mapping[str, Any], field: str) -> str:
        like = next((key for key in row if key not in self._known and self._lookalike(key) == field), None)
        return f"; rename '{like}'" if like is not None else ""


def read_phrases(value: Any, task: SpanTask, faults: list[Fault]) -> list[Phrase]:
    """Spans of a row without a transcript, given by what is said: `{"label", "phrase"}` or `[label, phrase]` each, or together
    as an object of label and phrase (or a list of phrases). Those at fault are added to `faults`.
    """
    if isinstance(value, dict):
        items = [(f"{task.name}.{shorten(label)}", label, phrase)
                 for label, given in value.items() for phrase in (given if isinstance(given, list) else [given])]
    elif isinstance(value, list):
        items = [(f"{task.name}[{i}]", *_pair(item)) for i, item in enumerate(value)]
    else:
        faults.append(Fault(task.name, "type", f"must be a list of spans, found {_shown(value)}"))
        return []
    phrases = []
    for field, label, phrase in items:
        if not isinstance(phrase, str) or not phrase.strip():
            faults.append(Fault(field, "span", "the row has no text that offsets could count in; give what is said, as "
                                '{"label", "phrase"} or [label, phrase]'))
        elif _is_label(label, task, field, faults):
            phrases.append(Phrase(label, " ".join(phrase.split())))
    return phrases


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, dict):
        return item.get("label"), item.get("phrase")
    return (item[0], item[1]) if isinstance(item, list) and len(item) == 2 else (None, None)


def resolve(folder: Path, name: str) -> Path:
    """Path of `name` seen from `folder`, leading `..` taken up after symbolic links of `folder` are followed."""
    if ".." not in name:
        return folder / name
    parts = Path(name).parts
    up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    if up:
        folder = folder.resolve()
        for _ in range(up):
            folder = folder.parent
    return folder.joinpath(*parts[up:])


def is_file(path: Path) -> bool:
    """`path.is_file()`, and False for a name that the file system cannot hold."""
    try:
        return path.is_file()
    except OSError:  # name too long
        return False


def _string(row: Mapping[str, Any], key: str, faults: list[Fault], required: bool = False,
            hint: str = "") -> str | None:
    value = row.get(key)
    if value is None or value == "":
        if required:
            what = "is empty" if value == "" else "is missing"
            why = "every row needs a unique id" if key == "id" else "the unified format needs a transcript"
            if key == "text" and not hint and row.get("audio"):
                hint = "; `unislu draft --fill-text` writes a copy with a recogniser's"
            faults.append(Fault(key, "missing", f"{what}; {why}{hint}"))
        elif value == "":
            faults.append(Fault(key, "value", "is empty; leave the key out"))
        return None
    if not isinstance(value, str):
        faults.append(Fault(key, "type", f"must be a string, found {_shown(value)}"))
        return None
    control = _CONTROL.search(value)
    if control:
        faults.append(Fault(key, "text" if key == "text" else "value", f"has the control character {control[0]!a} at "
                            f"character {control.start()}; replace it by a blank or remove it"))
    if key == "id" and value != value.strip():
        faults.append(Fault(key, "value", "starts or ends with a blank; strip it"))
    return value


def _times(row: Mapping[str, Any], faults: list[Fault]) -> tuple[float, float | None, float | None]:
    start, end, duration = (_seconds(row, key, faults) for key in ("start", "end", "duration"))
    begin = start or 0.0
    if end is not None and end <= begin:
        faults.append(Fault("end", "value", f"{end:g} s is not after start {begin:g} s"))
    elif duration is not None and duration <= 0:
        faults.append(Fault("duration", "value", f"must be more than 0 s, found {duration:g}"))
    elif end is not None and duration is not None and abs(duration - (end - begin)) > _DURATION_SLACK:
        faults.append(Fault("duration", "value", f"{duration:g} s does not fit the stretch from {begin:g} s to "
                            f"{end:g} s; give the length after the crop, or leave it out"))
    return begin, end, duration


def _seconds(row: Mapping[str, Any], key: str, faults: list[Fault]) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        faults.append(Fault(key, "type", f"must be a number of seconds, found {_shown(value)}"))
    elif not (math.isfinite(value) if isinstance(value, float) else value < 1 << 53) or value < 0:
        faults.append(Fault(key, "value", f"must be finite and not negative, found {_shown(value)}"))
    else:
        return float(value)
    return None


def _annotation(value: Any, task: Task, text: str | None, faults: list[Fault], to_hear: bool) -> LabelValue | None:
    if isinstance(task, SpanTask):
        if to_hear:
            return () if not read_phrases(value, task, faults) else None
        return _spans(value, task, text, faults)
    if task.multi:
        return _label_set(value, task, faults)
    if not isinstance(value, str):
        faults.append(Fault(task.name, "type", f"must be one label as a string, found {_shown(value)}"))
        return None
    return value if _is_label(value, task, task.name, faults) else None


def _label_set(value: Any, task: LabelTask, faults: list[Fault]) -> tuple[str, ...] | None:
    if not isinstance(value, list):
        faults.append(Fault(task.name, "type", f"must be a list of labels, found {_shown(value)}"))
        return None
    good = [_is_label(label, task, f"{task.name}[{i}]", faults) for i, label in enumerate(value)]
    if not all(good):
        return None
    if len(set(value)) < len(value):
        twice = next(label for label in value if value.count(label) > 1)
        faults.append(Fault(task.name, "label", f"'{twice}' is given twice; keep one"))
        return None
    return tuple(sorted(value, key=task.labels.index))


def _is_label(label: Any, task: Task, field: str, faults: list[Fault]) -> bool:
    if not isinstance(label, str):
        faults.append(Fault(field, "type", f"must be a string, found {_shown(label)}"))
        return False
    if label in task.labels:
        return True
    folded = {known.casefold(): known for known in task.labels}
    near = difflib.get_close_matches(label.casefold(), folded, n=1, cutoff=0.5)
    hint = f"did you mean '{folded[near[0]]}'? Labels" if near else "labels"
    faults.append(Fault(field, "label", f"'{shorten(label)}' is not a label of '{task.name}'; "
                        f"{hint}: {', '.join(task.labels)}"))
    return False


def _spans(value: Any, task: SpanTask, text: str | None, faults: list[Fault]) -> tuple[Span, ...] | None:
    if not isinstance(value, list):
        faults.append(Fault(task.name, "type", f"must be a list of spans, found {_shown(value)}"))
        return None
    before = len(faults)
    spans = [span for i, item in enumerate(value)
             if (span := _span(item, task, text, f"{task.name}[{i}]", faults)) is not None]
    spans.sort(key=lambda span: (span.start, span.end))
    for left, right in pairwise(spans):
        if right.start < left.end:
            faults.append(Fault(task.name, "overlap", f"{_named(left)} and {_named(right)} overlap; the unified format "
                                "is flat: keep one of them"))
    return tuple(spans) if len(faults) == before else None


def _span(item: Any, task: SpanTask, text: str | None, field: str, faults: list[Fault]) -> Span | None:
    if isinstance(item, dict):
        missing = [key for key in ("label", "start", "end") if key not in item]
        if missing:
            faults.append(Fault(f"{field}.{missing[0]}", "missing", "is missing; a span has label, start and end"))
            return None
        label, start, end = item["label"], item["start"], item["end"]
    elif isinstance(item, list) and len(item) == 3:
        label, start, end = item
    else:
        faults.append(Fault(field, "type", "must be {\"label\", \"start\", \"end\"} or [label, start, end], "
                            f"found {_shown(item)}"))
        return None
    good = _is_label(label, task, f"{field}.label", faults)
    for key, offset in (("start", start), ("end", end)):
        if isinstance(offset, bool) or not isinstance(offset, int):
            faults.append(Fault(f"{field}.{key}", "type", f"must be a whole number, found {_shown(offset)}"))
            good = False
    if not good or text is None:
        return None
    problem = _misfit(start, end, text)
    if problem:
        faults.append(Fault(f"{field}.{problem[0]}", "span", problem[1]))
        return None
    return Span(label, start, end)


def _misfit(start: int, end: int, text: str) -> tuple[str, str] | None:
    """Offset at fault and what is wrong with it."""
    if not 0 <= start < len(text):
        return "start", f"{_shown(start)} is outside the text of {len(text)} characters"
    if end <= start:
        return "end", f"{_shown(end)} is not after start {start}; `end` is an offset (exclusive), not a length"
    if end > len(text):
        return "end", f"{_shown(end)} is past the end of the text of {len(text)} characters"
    phrase = text[start:end]
    if phrase != phrase.strip():
        side = "start" if phrase[0].isspace() else "end"
        return side, f"the phrase '{shorten(phrase)}' has a blank at its {side}; move the offset to the word"
    return None


def _named(span: Span) -> str:
    return f"{span.label} {span.start}..{span.end}"


def _shown(value: Any) -> str:
    """A value for a message: its JSON type and, where short, itself."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 63 else "a huge number"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return f"the string '{shorten(value)}'"
    return "a list" if isinstance(value, list) else "an object"


def shorten(text: str, limit: int = 40) -> str:
    """Short and printable for a message."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
