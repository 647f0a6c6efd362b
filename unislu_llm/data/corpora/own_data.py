"""Own data in CoNLL text or a CSV file. It is checked as a manifest is; no row is dropped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from seqeval.metrics.sequence_labeling import get_entities

from unislu_llm.data.corpora.source import Dropped, Rows, read_table
from unislu_llm.data.row_reader import resolve
from unislu_llm.errors import UserError
from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry

_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_TAG = re.compile(r"O|[BIESLU]-\S+")
_META = re.compile(r"#\s*(\w+)\s*=\s*(.*\S)\s*$")


@dataclass(frozen=True)
class Csv:
    """Own rows in CSV (or, by the suffix .tsv, tab-separated), a column a key and a task.

    Spans and label sets are JSON, as a manifest has them; an empty cell is "not annotated".

    Args:
        file: Columns id, text, audio, start, end, speaker, ... and one for each task.
        audio: Folder of the audio files; where none is named it is <audio>/<id>.wav, .flac, ...
    """

    file: Path
    audio: Path | None = None

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        delimiter = "\t" if self.file.suffix == ".tsv" else ","
        span_tasks = [task.name for task in registry if isinstance(task, SpanTask)]
        for where, cells in read_table(self.file, ("id", "text"), delimiter=delimiter, strict=True):
            row = {key: _read_cell(key, value, registry, where) for key, value in cells.items()
                   if value.strip()}
            # Blanks are tidied where no span counts them; else the check of the row names them.
            if "text" in row and not any(row.get(name) for name in span_tasks):
                row["text"] = " ".join(row["text"].split())
            yield where, _with_audio(row, self.audio, self.file)


@dataclass(frozen=True)
class Conll:
    """Own sentences in CoNLL/BIO text, a blank line between two.

    Tags are BIO (also IOB1, and BIOES or BILOU), read as conlleval does: an `I-` without its `B-`
    opens a span. Columns are parted by tabs, or by blanks where a line has no tab. Comments
    `# id = ...`, `# audio = ...`, `# speaker = ...`, `# TASK = label` describe the sentence that
    follows; the id is else file name and number.

    Args:
        file: A token and a tag a line.
        audio: Folder of the audio files; where none is named it is <audio>/<id>.wav, .flac, ...
        token_column: Column of the token, from 0.
        tag_column: Column of the tag; negative from the end.
        task: The task of the tags.
    """

    file: Path
    audio: Path | None = None
    token_column: int = 0
    tag_column: int = -1
    task: str = "ner"

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        if not isinstance(registry[self.task], SpanTask):
            raise UserError(f"task '{self.task}' labels whole utterances; tags need a span task")
        for number, (line, meta, tokens, tags) in enumerate(self._sentences(), 1):
            where = f"{self.file}:{line}"
            row = {key: _read_cell(key, value, registry, where) for key, value in meta.items()
                   if key in ("id", "audio", "speaker") or key in registry}
            row = {"id": f"{self.file.stem}-{number}"} | row | {
                "text": " ".join(tokens), self.task: _spans(tokens, tags)}
            yield where, _with_audio(row, self.audio, self.file)

    def _sentences(self) -> Iterator[tuple[int, dict[str, str], list[str], list[str]]]:
        """First line, comments, tokens and tags of each sentence."""
        try:
            lines = self.file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.file}: cannot be read as UTF-8: {error}") from error
        first, meta, tokens, tags = 0, dict[str, str](), list[str](), list[str]()
        for number, line in enumerate([*lines, ""], 1):
            if not line.strip() and tokens:
                yield first, meta, tokens, tags
                meta, tokens, tags = {}, [], []
            if not line.strip() or line.startswith("-DOCSTART-"):
                continue  # comments above a blank line belong to the sentence that follows
            columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
            try:
                token, tag = columns[self.token_column], columns[self.tag_column]
            except IndexError:
                token = tag = ""
            found, good = _META.match(line), len(columns) > 1 and _TAG.fullmatch(tag)
            # A `#` may also be a token: then a tag follows it.
            if line.startswith("#") and not tokens and (found or not good):
                meta |= {found[1]: found[2]} if found else {}
            elif good:
                first = first if tokens else number
                tokens.append(token)
                tags.append(tag)
            else:
                raise UserError(f"{self.file}:{number}: expected a token (column "
                                f"{self.token_column}) and a tag (column {self.tag_column}) O, "
                                f"B-LABEL, I-LABEL, E-LABEL or S-LABEL, found {line[:60]!r}")


def _with_audio(row: dict[str, Any], folder: Path | None, file: Path) -> dict[str, Any]:
    """A row with its audio: what it names, from the folder (or the file's); or else its id's."""
    if "audio" in row:
        return row | {"audio": str(resolve(folder or file.parent, row["audio"]))}
    if folder is None or "id" not in row:
        return row
    clips = [folder / f"{row['id']}{suffix}" for suffix in _SUFFIXES]
    return row | {"audio": str(next((clip for clip in clips if clip.is_file()), clips[0]))}


def _read_cell(key: str, value: str, registry: TaskRegistry, where: str) -> Any:
    """A cell as the value that a manifest has."""
    task = next((task for task in registry if task.name == key), None)
    try:
        if key in ("start", "end", "duration"):
            return float(value)
        if isinstance(task, SpanTask) or (isinstance(task, LabelTask) and task.multi):
            return json.loads(value)
        return value if task is None else value.strip()
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {key}: expected seconds (start, end, duration) or a JSON list, "
                        f"found {value[:60]!r}") from None


def _spans(tokens: list[str], tags: list[str]) -> list[list[Any]]:
    """Spans of the text that joins the tokens by blanks."""
    starts = list(accumulate((len(token) + 1 for token in tokens), initial=0))
    # seqeval knows BIOES; BILOU is the same in other letters.
    tags = [re.sub("^L-", "E-", re.sub("^U-", "S-", tag)) for tag in tags]
    return [[label, starts[first], starts[last] + len(tokens[last])]
            for label, first, last in get_entities(tags)]
