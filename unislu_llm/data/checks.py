"""Every check of `unislu validate` on manifests, row by row: errors (not to be trained on) and warnings (worth a look).

What one row says is checked by :mod:`unislu_llm.data.rows`, its audio by :mod:`unislu_llm.data.audio_checks`; here are added
what rows share (ids, texts, audio), the segments of long recordings, the characters, and the pace of the speech.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unislu_llm.data.audio import MAX_SECONDS
from unislu_llm.data.audio_checks import AudioCheck, check_audio
from unislu_llm.data.long_audio import cut
from unislu_llm.data.manifest import KINDS, Problem, Row, iter_rows
from unislu_llm.data.rows import Fault, RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

ERRORS: dict[str, str] = KINDS | {
    "audio": "the audio cannot be read, is empty or truncated",
    "crop": "the stretch is outside the audio",
    "length": "the row says another length than the audio has",
    "samples": "samples are NaN, infinite or far outside -1..1",
    "too_long": "longer than Whisper's 30 s, and no segments to cut it at",
    "segments": "a segment of a long recording is faulty",
}
"""Kinds of errors: the row cannot be trained on."""

WARNINGS: dict[str, str] = {
    "clipping": "many samples stand at full scale",
    "silence": "next to no sound",
    "rate": "sampled below 16 kHz",
    "channels": "more than one channel",
    "suffix": "the name ends like another format than the file has",
    "long": "longer than 30 s, to be cut at its segments",
    "same_row": "an earlier row has the same audio",
    "leak": "another manifest has the same text or audio",
    "characters": "characters that a tokenizer cannot hold, or that stand for lost ones",
    "pace": "more or fewer words than anyone says in that time",
    "rare_label": "a label is much rarer than the others",
}
"""Kinds of warnings: the row can be trained on."""

_LEAK_WORDS = 4  # shorter texts ("yes", "thank you") are said again and again
_FAST, _SLOW = 7.0, 0.2  # words a second; fast debates have 4
_FAST_LETTERS, _SLOW_LETTERS = 35.0, 1.0  # characters a second, for scripts without blanks between words
_SLOW_FROM = 5.0  # seconds: shorter clips may hold one word and a pause
_RARE, _RARE_FROM = 0.01, 200  # share of the most frequent label, and annotations of the task from which it is judged
_INVISIBLE = "\u00ad\u200b\u2060\ufeff"
_INHERITED = ("corpus", "speaker", "language")


@dataclass(frozen=True)
class Checked:
    """A row after all checks.

    Args:
        row: as read. seconds: length of its audio, where known.
        errors, warnings: what is wrong; a row without errors has an utterance.
    """

    row: Row
    seconds: float | None
    errors: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


class Places:
    """Where keys were seen first, in an SQLite database in a temporary file, deleted when closed.

    Memory is SQLite's page cache of 16 MB, whatever the number of rows; the file has about 50 bytes a key. Keys are compared
    by 16-byte digests.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        for line in ("PRAGMA cache_size=-16384", "PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF",
                     "CREATE TABLE seen (key BLOB PRIMARY KEY, file INT, line INT, value BLOB) WITHOUT ROWID", "BEGIN"):
            self._db.execute(line)

    def first(self, key: str, file: int, line: int, value: bytes = b"") -> tuple[int, int, bytes] | None:
        """File, line and value of the same key before; None (and the key is remembered) when there is none."""
        done = self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?)", (_digest(key), file, line, value))
        if done.rowcount:
            return None
        found: tuple[int, int, bytes] = self._db.execute("SELECT file, line, value FROM seen WHERE key = ?",
                                                         (_digest(key),)).fetchone()
        return found

    def close(self) -> None:
        self._db.close()


class Checker:
    """Checks manifests one after another, and against each other. Memory does not grow with their rows.

    Args:
        registry: the tasks whose annotations are read.
        audio: what is opened of the audio.
        tokenizers: by name, a function that says whether a character survives the tokenizer.
    """

    def __init__(self, registry: TaskRegistry, audio: AudioCheck = "header",
                 tokenizers: Mapping[str, Callable[[str], bool]] | None = None) -> None:
        self._registry = registry
        self._audio: AudioCheck = audio
        self._tokenizers = dict(tokenizers or {})
        self._lost: dict[str, str] = {}  # by character: why it is lost, or ""
        self._files: list[Path] = []
        self._places = Places()

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._places.close()

    def check(self, path: Path) -> Iterator[Checked]:
        """Every row of a manifest, in order; what concerns the file as a whole comes as line 0.

        Raises:
            UserError: there is no such manifest, or it cannot be read.
        """
        rows = iter_rows(path, self._registry, earlier=self._earlier)
        self._files.append(path)
        labels: dict[str, Counter[str]] = {}
        try:
            for row in rows:
                yield self._row(row, path, labels)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); correct the path or its permissions") from error
        rare = tuple(self._rare(path, labels))
        if rare:
            yield Checked(Row(0, b"", None, None, ()), None, (), rare)

    def _row(self, row: Row, path: Path, labels: dict[str, Counter[str]]) -> Checked:
        if row.utterance is None:
            return Checked(row, None, row.problems, ())
        utterance = row.utterance
        heard = check_audio(utterance, self._audio)
        errors, warnings = list(heard.errors), list(heard.warnings)
        if (row.content or {}).get("segments") is not None and not errors:
            errors += self._segments(utterance, heard.seconds)
        if heard.seconds is not None and heard.seconds > MAX_SECONDS:
            self._long(utterance, heard.seconds, errors, warnings)
        if not errors:
            warnings += [*self._characters(utterance), *_pace(utterance, heard.seconds),
                         *self._shared(utterance, heard.key, row.line)]
            for name, value in utterance.labels.items():
                found = [value] if isinstance(value, str) else [v if isinstance(v, str) else v.label for v in value]
                labels.setdefault(name, Counter()).update(found)
        return Checked(row, heard.seconds, tuple(Problem(path, row.line, *fault) for fault in errors),
                       tuple(Problem(path, row.line, *fault) for fault in warnings))

    def _earlier(self, name: str, line: int) -> str | None:
        before = self._places.first(f"id {name}", len(self._files) - 1, line)
        if before is None:
            return None
        if before[0] == len(self._files) - 1:
            return f"line {before[1]}; ids must be unique in a manifest"
        return f"{self._place(before)}; an id may be in one of the manifests only: rename it, or drop one of the rows"

    def _place(self, found: tuple[int, int, bytes]) -> str:
        return f"{self._files[found[0]]}:{found[1]}"

    def _long(self, utterance: Utterance, seconds: float, errors: list[Fault], warnings: list[Fault]) -> None:
        length = f"{seconds:.2f} s is longer than {MAX_SECONDS} s; "
        if utterance.segments is None:
            errors.append(Fault("audio", "too_long", f"{length}cut it with `start` and `end`, or give it `segments`"))
        elif not errors:
            warnings.append(Fault("audio", "long", f"{length}train with --data.long_audio cut, which cuts it at its segments"))

    def _segments(self, utterance: Utterance, seconds: float | None) -> Iterator[Fault]:
        """The same rules as where training cuts a recording, but every segment is looked at."""
        segments = utterance.segments
        if segments is None:
            yield Fault("segments", "segments", "must be a list of objects with start, end and text; correct or remove it")
            return
        reader = RowReader(self._registry, Path(), utterance.corpus, False)
        inherited = {key: value for key in _INHERITED if (value := getattr(utterance, key)) is not None}
        found: list[Fault] = []
        for i, segment in enumerate(segments):
            faults: list[Fault] = []
            if isinstance(segment, dict):
                reader.read({**inherited, **segment, "id": "segment"}, "", faults)
            found += [Fault(f"segments[{i}].{fault.field}", "segments", fault.message) for fault in faults]
        if found:
            yield from found
            return
        end = utterance.start + seconds if seconds is not None else float("inf")
        placed = dataclasses.replace(utterance, end=end, audio=utterance.audio or Path("text"))
        try:
            cut(placed, segments, self._registry, MAX_SECONDS)
        except UserError as error:
            field, _, message = str(error).removeprefix(f"{utterance.source}: ").partition(": ")
            yield Fault(field, "segments", message)

    def _characters(self, utterance: Utterance) -> Iterator[Fault]:
        segments = utterance.segments or ()
        for field, text in [("text", utterance.text), *((f"segments[{i}].text", s["text"]) for i, s in enumerate(segments))]:
            if text.isascii() and not self._tokenizers:
                continue
            lost = [c for c in dict.fromkeys(text) if self._why_lost(c)]
            if lost:
                shown = "; ".join(f"'{c}' (U+{ord(c):04X}) {self._lost[c]}" for c in lost[:3])
                more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
                yield Fault(field, "characters", f"{shown}{more}; replace, or take another tokenizer" if self._tokenizers
                            else f"{shown}{more}; look at the source and correct it")

    def _why_lost(self, character: str) -> str:
        if character not in self._lost:
            names = [name for name, holds in self._tokenizers.items() if not character.isspace() and not holds(character)]
            lost = f"cannot be held by {' and '.join(names)}" if names else ""
            self._lost[character] = _odd(character) or lost
        return self._lost[character]

    def _shared(self, utterance: Utterance, key: str | None, line: int) -> Iterator[Fault]:
        now = len(self._files) - 1
        if key is not None:
            text = _digest(utterance.text)[:8]
            before = self._places.first(f"audio {os.path.abspath(key)}", now, line, text)
            if before is not None and before[0] != now:
                yield Fault("audio", "leak", f"the same audio is in {self._place(before)}; if one of the manifests is there to "
                            "test, take it out of the other")
            elif before is not None:
                other = "the same text" if before[2] == text else "another text"
                yield Fault("audio", "same_row", f"line {before[1]} has the same audio and {other}; keep the row that is right")
        if len(utterance.text.split()) >= _LEAK_WORDS:
            before = self._places.first(f"text {utterance.text}", now, line)
            if before is not None and before[0] != now:
                yield Fault("text", "leak", f"the same text is in {self._place(before)}; if one of the manifests is there to "
                            "test, take it out of the other")

    def _rare(self, path: Path, labels: Mapping[str, Counter[str]]) -> Iterator[Problem]:
        for name, counts in labels.items():
            most, top = counts.most_common(1)[0] if counts else ("", 0)
            for label in self._registry[name].labels if counts.total() >= _RARE_FROM else ():
                if counts[label] < _RARE * top:
                    yield Problem(path, 0, name, "rare_label", f"'{label}' is there {counts[label]} times, '{most}' {top} times; "
                                  "a model will hardly learn it: annotate more, or leave the label out of the task")


def plain_field(field: str) -> str:
    """A field without its indices: `ner[2].end` is `ner.end`."""
    return "".join(part.partition("]")[2] if i else part for i, part in enumerate(field.split("[")))


def _pace(utterance: Utterance, seconds: float | None) -> Iterator[Fault]:
    if not seconds:
        return
    words, letters = len(utterance.text.split()) / seconds, len(utterance.text) / seconds
    if words > _FAST or letters > _FAST_LETTERS:
        yield Fault("text", "pace", f"{words:.1f} words and {letters:.0f} characters a second; text and audio hardly belong "
                    "together: compare them")
    elif seconds >= _SLOW_FROM and words < _SLOW and letters < _SLOW_LETTERS:
        yield Fault("text", "pace", f"{len(utterance.text.split())} words in {seconds:.1f} s; is the transcript whole?")


def _odd(character: str) -> str:
    """Why a character should not be in a transcript, whatever the tokenizer; else nothing."""
    if character == "\ufffd":
        return "stands for a character that was lost when the text was decoded"
    category = unicodedata.category(character)
    if category in ("Cn", "Co"):
        return "is not assigned to any character" if category == "Cn" else "is for private use"
    return "is invisible" if character in _INVISIBLE else ""


def _digest(key: Any) -> bytes:
    return hashlib.blake2b(str(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()
