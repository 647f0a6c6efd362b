"""What a source is, and how sources read: lines, tables and JSON with the place of each row;
annotated text; audio."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from unislu_llm.data.row_reader import resolve
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry

Rows = Iterator[tuple[str, dict[str, Any]]]
"""What a source's `rows` gives: rows as a manifest has them, each with its place `file:line`."""
Dropped = defaultdict[str, list[str]]
"""By reason the places of what is not in the manifest: nothing is dropped uncounted."""

_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_GAP = re.compile(r"[\s,\[\]]*")  # between the objects of JSON lines or of an array
_MOST = 1 << 26  # characters of one JSON object


class Source:
    """A corpus in some layout. The fields of each kind are the flags of its subcommand, and the
    comments behind them their help."""

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        """The rows one by one; what is left out is named in `dropped`, clips go to a folder."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileSource(Source):
    """A corpus in one file or folder."""

    file: Path  # The file.
    # Folder of the audio files; where a row names none it is <audio>/<id>.wav, .flac, ...
    audio: Path | None = None


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            yield handle
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read in UTF-8: {error}") from error


@contextmanager
def as_published(where: str) -> Iterator[None]:
    """A row in another shape than its source has becomes one error with its place."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: not in the shape of this source ({error!r})") from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines without their ends, each with its place `file:line`; raises UserError: unreadable."""
    with _opened(path) as handle:
        for number, line in enumerate(handle, 1):
            yield f"{path}:{number}", line.rstrip("\r\n")


def read_objects(path: Path) -> Rows:
    """The objects of JSON lines or a JSON array, one in memory at a time; raises UserError: it is
    something else, or ends early."""
    decode, text, at, line, brackets = json.JSONDecoder().raw_decode, "", 0, 1, ""
    with _opened(path) as handle:
        while True:
            gap = str(_GAP.match(text, at)[0])  # type: ignore[index]  # it matches nothing as well
            at, line = at + len(gap), line + gap.count("\n")
            brackets += re.sub(r"[\s,]", "", gap)
            try:
                found, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                # What is not yet read may be all that is lacking.
                if len(text) - at < _MOST and (more := handle.read(max(1 << 20, len(text) - at))):
                    text, at = text[at:] + more, 0
                    continue
                if at == len(text) and brackets in ("", "[]"):
                    return
                line += text.count("\n", at, getattr(error, "pos", at))
                raise UserError(f"{path}:{line}: expected JSON lines or one whole JSON array "
                                f"({error})") from None
            if not isinstance(found, dict):
                raise UserError(f"{path}:{line}: expected a JSON object, found {str(found)[:60]!r}")
            yield f"{path}:{line}", found
            at, line = end, line + text.count("\n", at, end)


def read_table(path: Path, needed: Sequence[str]) -> Rows:
    """Rows of a CSV file, or by the suffix .tsv one parted by tabs. Raises UserError: no such file;
    a `needed` column is missing, or any is there twice; a row has another number of cells."""
    # In tab-separated text a quotation mark is speech, and often unpaired.
    dialect: Any = ({"delimiter": "\t", "quoting": csv.QUOTE_NONE}
                    if path.suffix.lower() == ".tsv" else {"strict": True})
    with _opened(path) as handle:
        reader = csv.DictReader(handle, **dialect)
        header = list(reader.fieldnames or ())
        if wrong := [name for name in (*needed, *header) if header.count(name) != 1]:
            raise UserError(f"{path}:1: needs one column '{wrong[0]}', has "
                            f"{', '.join(header) or 'none'}")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if None in cells or None in cells.values():  # so `csv` marks too many and too few
                raise UserError(f"{where}: another number of cells than the header; is there a "
                                "separator inside of one?")
            yield where, cells


def with_audio(row: dict[str, Any], folder: Path | None, file: Path) -> dict[str, Any]:
    """A row with its audio: what it names, from the folder (or the file's); or else its id's."""
    if row.get("audio"):
        return row | {"audio": str(resolve(folder or file.parent, str(row["audio"])))}
    if folder is None or "id" not in row:
        return row
    clips = [folder / f"{row['id']}{suffix}" for suffix in _SUFFIXES]
    return row | {"audio": str(next((clip for clip in clips if clip.is_file()), clips[0]))}


def tidy(text: str, spans: Iterable[Sequence[Any]] = ()) -> tuple[str, list[list[Any]]]:
    """A text with single blanks; its spans [label, start, end] move along, and begin and end with
    a word. A span that does not fit the text stays as it is, for the check of the row."""
    plain, places, moved = list[str](), list[int](), []  # places: where each character went
    for c in text:
        places.append(len(plain))
        if not c.isspace() or (plain and plain[-1] != " "):
            plain.append(" " if c.isspace() else c)
    places.append(len(plain))
    for label, start, end in spans:
        if isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text):
            start, end = places[start], places[end]
            start += plain[start:start + 1] == [" "]
            end -= end > start and plain[end - 1] == " "
        moved.append([label, start, end])
    return "".join(plain).rstrip(), moved
