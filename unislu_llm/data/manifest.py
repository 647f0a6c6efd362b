"""Manifests: JSON lines, one utterance a row, checked row by row.

    {"id": "a", "audio": "wav/a.flac", "text": "...", "ner": [{"label": "ORG", "start": 4, "end": 11}], "sa": "Neutral"}

`id` and `text` are required. `audio` is relative to the manifest; without it the row is text only. A task of the registry
stands under its name: a list of spans (`{"label", "start", "end"}`, offsets in characters of `text`, or `[label, start,
end]`), a label, or (multi-label) a list of labels. `[]` says "annotated, there is none"; a missing task or `null` says "not
annotated". `start`, `end` (crop) and `duration` (after the crop) are seconds; `speaker`, `language` and `corpus` are free
strings; `draft` is a recogniser's transcript (`""`: it heard nothing); `text_source` names the
recogniser that wrote `text`, where no person did (docs/drafts.md). Any other key is metadata and ignored, unless it
looks like a misspelt field that the row lacks: that is a problem, because the annotation would be lost in silence.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unislu_llm.data.rows import FIELDS, Fault, RowReader, shorten
from unislu_llm.errors import UserError
from unislu_llm.tasks import LabelValue, Span, TaskRegistry
from unislu_llm.utterance import Utterance

KINDS: dict[str, str] = {
    "encoding": "the line is not UTF-8",
    "json": "the line is not one JSON object, or has a key twice",
    "empty": "the manifest has no rows",
    "missing": "a required field is missing or empty",
    "type": "a value has the wrong type",
    "value": "a value is out of range",
    "duplicate_id": "an earlier row has the same id",
    "unknown_key": "a key looks like a misspelt field",
    "text": "the transcript has blanks or control characters out of place",
    "marker": "the transcript or draft holds a marker of the unified format",
    "label": "a label is not in the task's label set, or is given twice",
    "span": "a span does not fit the transcript",
    "overlap": "two spans overlap; the unified format is flat",
    "audio_missing": "the audio file does not exist",
}
"""Every kind of problem and its meaning."""

_SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row.

    Args:
        file: the manifest. line: counted from 1; 0 for the file as a whole.
        field: key at fault, e.g. `ner[2].end`. kind: one of :data:`KINDS`.
        message: what is wrong and what to do.
    """

    file: Path
    line: int
    field: str
    kind: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else str(self.file)
        return f"{where}: {self.field}: {self.message}"


@dataclass(frozen=True)
class Row:
    """One line of a manifest, as written and as read.

    Args:
        line: counted from 1; 0 for the file as a whole (an empty manifest).
        raw: the line without its end. content: its JSON object; None where it is none.
        utterance: what it makes; None where there is a problem. problems: all of its problems.
    """

    line: int
    raw: bytes
    content: dict[str, Any] | None
    utterance: Utterance | None
    problems: tuple[Problem, ...]


Earlier = Callable[[str, int], str | None]
"""From an id and its line to the place where it stood before, if it did, and why that matters."""


def iter_manifest(path: str | Path, registry: TaskRegistry, *, corpus: str | None = None,
                  check_audio: bool = False) -> Iterator[Utterance | Problem]:
    """Read a manifest in one pass, yielding a valid row as an utterance and a bad one as all of its problems.

    Memory grows by the ids only.

    Args:
        path: manifest. registry: the tasks whose annotations are read.
        corpus: corpus of the rows that name none.
        check_audio: also look whether audio files exist.

    Raises:
        UserError: at once, when there is no such file or a task has the name of a manifest field.
    """
    rows = iter_rows(path, registry, corpus=corpus, check_audio=check_audio)
    return (item for row in rows for item in (row.problems or (row.utterance,)) if item is not None)


def iter_rows(path: str | Path, registry: TaskRegistry, *, corpus: str | None = None, check_audio: bool = False,
              earlier: Earlier | None = None, without_text: bool = False) -> Iterator[Row]:
    """The same as :func:`iter_manifest` with the lines as they are written.

    Args:
        earlier: remembers ids; default: a dictionary of this file's ids.
        without_text: also read rows with audio and no transcript, see :class:`unislu_llm.data.rows.RowReader`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'manifest does not exist'}; "
                        "give a JSON-lines manifest")
    clash = [name for name in registry.names if name in FIELDS]
    if clash:
        raise UserError(f"task '{clash[0]}' has the name of a manifest field; rename the task")
    reader = RowReader(registry, path.parent, corpus or "default", check_audio, without_text)
    return _read(path, reader, earlier or _dictionary())


def read_manifest(path: str | Path, registry: TaskRegistry, *, corpus: str | None = None,
                  check_audio: bool = False) -> list[Utterance]:
    """Every row of a manifest; see :func:`iter_manifest` for the arguments.

    Raises:
        UserError: one for the whole file, with its number of problems and the first ten as `file:line: field: message`.
    """
    utterances: list[Utterance] = []
    shown: list[str] = []
    count = 0
    for item in iter_manifest(path, registry, corpus=corpus, check_audio=check_audio):
        if isinstance(item, Utterance):
            utterances.append(item)
            continue
        count += 1
        if count <= _SHOWN:
            shown.append(str(item))
    if count:
        more = f"\n... and {count - _SHOWN} more" if count > _SHOWN else ""
        listed = "\n".join(shown)
        raise UserError(f"{path}: {count} problem{'s' * (count > 1)}; correct the manifest:\n{listed}{more}")
    return utterances


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> int:
    """Write utterances as a manifest that :func:`read_manifest` reads back equal (but for `source`).

    Audio paths are written relative to the manifest. The file appears whole or not at all.

    Returns:
        Number of rows.

    Raises:
        UserError: a value cannot be written (a number that is not finite, text that is not Unicode).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as handle:
            for utterance in utterances:
                count += 1
                try:
                    line = json.dumps(_as_row(utterance, path.parent), ensure_ascii=False, allow_nan=False)
                    handle.write(line + "\n")
                except ValueError as error:
                    raise UserError(f"{path}: row '{utterance.id}' cannot be written: {error}") from error
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _dictionary() -> Earlier:
    seen: dict[str, int] = {}

    def earlier(name: str, line: int) -> str | None:
        first = seen.setdefault(name, line)
        return None if first == line else f"line {first}; ids must be unique in a manifest"

    return earlier


def _read(path: Path, rows: RowReader, earlier: Earlier) -> Iterator[Row]:
    empty = True
    with path.open("rb") as handle:
        for line, raw in enumerate(handle, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not raw.strip():
                continue
            empty = False
            faults: list[Fault] = []
            row = _parse(raw, faults)
            utterance = rows.read(row, f"{path}:{line}", faults) if row is not None else None
            name = row.get("id") if row is not None else None
            before = earlier(name, line) if isinstance(name, str) and name else None
            if before is not None:
                faults.append(Fault("id", "duplicate_id", f"'{shorten(str(name))}' is already the id of {before}"))
            found = tuple(Problem(path, line, *fault) for fault in faults)
            yield Row(line, raw.rstrip(b"\r\n"), row, None if faults else utterance, found)
    if empty:
        yield Row(0, b"", None, None, (Problem(path, 0, "file", "empty", "the manifest has no rows; give one a line"),))


class _RepeatedKeyError(ValueError):
    """A JSON object has one key twice, and JSON would keep the last in silence."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(f"key '{next(k for k in keys if keys.count(k) > 1)}' is given twice; keep one")
    return built


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(raw: bytes, faults: list[Fault]) -> dict[str, Any] | None:
    try:
        row = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        faults.append(Fault("line", "encoding", f"byte {error.start + 1} is not UTF-8; save the manifest as UTF-8"))
    except _RepeatedKeyError as error:
        faults.append(Fault("line", "json", str(error)))
    except json.JSONDecodeError as error:
        faults.append(Fault("line", "json", f"not valid JSON at column {error.colno} ({error.msg}); "
                            "a manifest has one JSON object a line"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        faults.append(Fault("line", "json", f"not usable JSON ({str(error).split(';')[0]})"))
    else:
        if isinstance(row, dict):
            return row
        faults.append(Fault("line", "json", f"expected a JSON object, found {type(row).__name__}; "
                            "a manifest has one JSON object a line"))
    return None


def _as_row(u: Utterance, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"id": u.id}
    if u.audio is not None:
        row["audio"] = relative(u.audio, folder)
    row["text"] = u.text
    row |= {name: _plain(value) for name, value in u.labels.items()}
    optional = {"start": u.start or None, "end": u.end, "speaker": u.speaker, "language": u.language,
                "corpus": u.corpus if u.corpus != "default" else None, "duration": u.duration, "draft": u.draft,
                "text_source": u.text_source, "segments": u.segments}
    return row | {key: value for key, value in optional.items() if value is not None}


def _plain(value: LabelValue) -> str | list[str] | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    return [v._asdict() if isinstance(v, Span) else v for v in value]  # type: ignore[return-value]


def relative(audio: Path, folder: Path) -> str:
    """Path from `folder`; absolute where there is none (another drive)."""
    with contextlib.suppress(ValueError):
        return audio.absolute().relative_to(folder.absolute()).as_posix()
    target = audio.parent.resolve() / audio.name  # `..` is only safe on paths without symbolic links
    try:
        return Path(os.path.relpath(target, folder.resolve())).as_posix()
    except ValueError:
        return target.as_posix()
