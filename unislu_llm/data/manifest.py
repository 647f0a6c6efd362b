"""Manifests: JSON lines, one utterance a row, checked row by row. `docs/data.md` lists the keys.

    {"id": "a", "audio": "wav/a.flac", "text": "...", "sa": "Neutral",
     "ner": [{"label": "ORG", "start": 4, "end": 11}]}

Any other key is not read, which is said; one that would change the audio, its crop or its labels is
an error.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unislu_llm.data.row_reader import FIELDS, Problem, RowReader, resolve
from unislu_llm.errors import UserError, shorten
from unislu_llm.io import atomic
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.utterance import Utterance

Ids = dict[str, tuple[Path, int]]
"""Manifest and line where each id was seen first."""

_MOST_BYTES = 1 << 26  # of a line; it is read whole, and takes ten times that
_SPLITS = ("train", "dev", "devel", "test", "valid", "validation", "fine-tune", "all")


@dataclass(frozen=True)
class Row:
    """One line of a manifest, as written and as read."""

    line: int  # counted from 1; 0 for the file as a whole
    content: dict[str, Any] = field(default_factory=dict)  # its JSON object; empty if it is none
    utterance: Utterance | None = None  # None where there is a problem that is no warning
    problems: tuple[Problem, ...] = ()


def iter_rows(path: str | Path, registry: TaskRegistry, *, corpus: str | None = None,
              check_audio: bool = False, ids: Ids | None = None, without_text: bool = False,
              language: str = "", mend: Callable[[Any], Any] = dict) -> Iterator[Row]:
    """The rows of a manifest in one pass, good ones and bad ones, as :class:`RowReader` reads them.
    `ids` are those of manifests read before, to find repetitions; `mend` changes rows before they
    are read. Raises UserError: there is no such file."""
    path, ids = Path(path), {} if ids is None else ids
    if not path.is_file():
        raise UserError(f"{path}: manifest does not exist or is no file; give a JSON-lines file")
    reader = RowReader(registry, path.parent, corpus or "default", check_audio, without_text,
                       language)
    line = 0
    with path.open("rb") as handle:
        for number, raw in enumerate(iter(lambda: handle.readline(_MOST_BYTES), b""), 1):
            if len(raw) == _MOST_BYTES:
                raise UserError(f"{path}:{number}: the line has over {_MOST_BYTES >> 20} MB; a "
                                "manifest has one JSON object a line")
            raw = raw.removeprefix(codecs.BOM_UTF8)  # some editors begin a file with it
            if not raw.strip():
                continue
            if not line and re.match(rb"\s*\[\s*(\{|$)", raw):  # else a fault of every line
                yield Row(0, problems=(Problem("file", "json", "is one JSON array; write one object"
                                               " a line (`unislu prepare table` does)", path),))
                return
            line, utterance = number, None
            content, problems = _parse(raw)
            if not problems:
                content = mend(content)
                utterance, problems = reader.read(content, f"{path}:{line}")
                # Also of a bad row: it will be corrected, and its id is taken all the same.
                problems += _repeated_id(content.get("id"), path, line, ids)
            yield Row(line, content, None if problems else utterance,
                      tuple(problem._replace(file=path, line=line) for problem in problems))
    if not line:
        yield Row(0, problems=(Problem("file", "empty", "the manifest has no rows", path),))


def read_rows(path: str | Path, registry: TaskRegistry, **options: Any) -> list[Row]:
    """All rows of a manifest, each with its utterance; `options` are those of :func:`iter_rows`.
    Raises UserError: one for the whole file, with its number of problems and the first ten."""
    rows = list(iter_rows(path, registry, **options))
    if problems := [str(problem) for row in rows for problem in row.problems]:
        raise UserError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}; correct the "
                        f"manifest:\n{first_ten(problems)}")
    return rows


def read_manifest(path: str | Path, registry: TaskRegistry, **options: Any) -> list[Utterance]:
    """Every utterance of a manifest; options and errors are those of :func:`read_rows`."""
    rows = read_rows(path, registry, **options)
    return [row.utterance for row in rows if row.utterance is not None]


def first_ten(lines: Sequence[str]) -> str:
    """The first ten lines, and how many more there are."""
    more = f"\n... and {len(lines) - 10} more" * (len(lines) > 10)
    return "\n".join(lines[:10]) + more


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write utterances as a manifest, whole or not at all. :func:`read_manifest` reads them back
    equal but for `source`. Audio paths are relative. Raises UserError: a value cannot be written (a
    number that is not finite, text not Unicode)."""
    path = Path(path)
    with atomic(path) as handle:
        for u in utterances:
            try:  # JSON has no word for a number that is not finite
                row = json.dumps(_as_row(u, path.parent), ensure_ascii=False, allow_nan=False)
                handle.write(row + "\n")
            except ValueError as error:
                raise UserError(f"{path}: row '{u.id}' cannot be written: {error}") from error


def manifest_name(path: str | Path) -> str:
    """Corpus of rows that name none: the manifest's stem, or its folder if that names a split."""
    path = Path(path)
    return path.resolve().parent.name if path.stem in _SPLITS else path.stem


def moved(content: dict[str, Any], old: Path, new: Path) -> bytes:
    """A row of a manifest in folder `old` as a line for one in folder `new`."""
    if isinstance(name := content.get("audio"), str) and not os.path.isabs(name):
        content = content | {"audio": _relative(resolve(old, name), new)}
    # Half a surrogate pair, which JSON can escape and UTF-8 cannot hold, stays escaped.
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _repeated_id(name: Any, path: Path, line: int, ids: Ids) -> list[Problem]:
    if not isinstance(name, str) or not name:
        return []  # which is a problem of its own
    file, first = ids.setdefault(name, (path, line))
    if (file, first) == (path, line):
        return []
    where = (f"line {first}; ids must be unique in a manifest" if file == path else
             f"{file}:{first}; an id may be in one of the manifests only")
    return [Problem("id", "duplicate_id", f"'{shorten(name)}' is already the id of {where}")]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a key twice is refused, because JSON would keep the last silently."""
    built: dict[str, Any] = {}
    for key, value in pairs:
        if key in built:
            raise ValueError(f"key '{shorten(key)}' is given twice")
        built[key] = value
    return built


def _parse(raw: bytes) -> tuple[dict[str, Any], list[Problem]]:
    """The JSON object of a line, or what is wrong with it."""
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
        if isinstance(row, dict):
            return row, []
        reason = f"expected a JSON object, found {type(row).__name__}"
    except UnicodeDecodeError as error:
        return {}, [Problem("line", "encoding", f"byte {error.start + 1} is not UTF-8; save the "
                            "manifest as UTF-8")]
    except json.JSONDecodeError as error:
        reason = f"not valid JSON at column {error.colno} ({error.msg})"
    except (ValueError, RecursionError) as error:  # thousands of digits, or of nested brackets
        reason = f"not usable JSON ({str(error).split(';')[0]})"
    return {}, [Problem("line", "json", f"{reason}; a manifest has one JSON object a line")]


def _as_row(u: Utterance, folder: Path) -> dict[str, Any]:
    labels = {name: value if isinstance(value, str) else
              [v._asdict() if isinstance(v, Span) else v for v in value]
              for name, value in u.labels.items()}
    row = {key: getattr(u, key) for key in FIELDS} | labels | {
        "audio": u.audio and _relative(u.audio, folder), "start": u.start or None,
        "corpus": None if u.corpus == "default" else u.corpus}
    return {key: value for key, value in row.items() if value is not None}


def _relative(audio: Path, folder: Path) -> str:
    # As written where that is below the folder: a link inside of it may be there on purpose.
    if audio.absolute().is_relative_to(folder.absolute()):
        return audio.absolute().relative_to(folder.absolute()).as_posix()
    target = audio.parent.resolve() / audio.name  # `..` is only safe without symbolic links
    with contextlib.suppress(ValueError):  # another drive
        target = Path(os.path.relpath(target, folder.resolve()))
    return target.as_posix()
