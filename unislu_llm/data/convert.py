"""Own data in common formats: CoNLL/BIO text and CSV. It is checked as strictly as a manifest; nothing is dropped."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from seqeval.metrics.sequence_labeling import get_entities

from unislu_llm.data.clips import find_clip
from unislu_llm.data.rows import FIELDS, Fault, RowReader, resolve
from unislu_llm.data.tally import Tally, tidy
from unislu_llm.errors import UserError
from unislu_llm.tasks import LabelTask, Span, SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance

_TAG = re.compile(r"O|[BIESLU]-\S+")
_META = re.compile(r"#\s*(\w+)\s*=\s*(.*\S)\s*$")
_COMPACT = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*:\s*(\S+)\s*")
_NUMBERS = ("start", "end", "duration")
_SHOWN = 10


@dataclass
class _Sentence:
    line: int = 0
    meta: dict[str, str] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def read_conll(path: str | Path, registry: TaskRegistry, tally: Tally, *, audio: str | Path | None = None,
               audio_map: str | Path | None = None, token_column: int = 0, tag_column: int = -1,
               task: str = "ner") -> Iterator[Utterance]:
    """Sentences of CoNLL text: a token and its tag a line, a blank line between sentences; tokens joined by a blank.

    Tags are BIO (also IOB1, and BIOES or BILOU), read as conlleval does: an `I-` without its `B-` opens a span and is
    counted. Columns are parted by tabs, or by blanks where a line has no tab. `# id = ...`, `# audio = ...`,
    `# speaker = ...` and `# TASK = label` before a sentence describe it; the id is else file name and number.

    Args:
        registry: the tasks that are known. task: the span task of the tags.
        audio: folder of the audio, `<audio>/<id>.wav` or .flac, .ogg, .opus, .mp3; names in comments and in the map
            start here too (default for them: the folder of the file that holds them).
        audio_map: file of `id<TAB or comma>audio` lines.
        token_column, tag_column: counted from 0; negative from the end.

    Raises:
        UserError: no such file, or the first ten things that are wrong with it as `file:line: field: message`.
    """
    path = Path(path)
    if not isinstance(registry[task], SpanTask):
        raise UserError(f"task '{task}' labels whole utterances; tags need a span task")
    names = _read_map(Path(audio_map)) if audio_map else {}
    checker = _Checker(registry, path.parent)
    for number, sentence in enumerate(_sentences(path, token_column, tag_column), 1):
        tally.read += 1
        where = f"{path}:{sentence.line}"
        text, spans = _joined(sentence, tally, where)
        name = sentence.meta.get("id", f"{path.stem}-{number}")
        row: dict[str, Any] = {"id": name, "text": text, task: [list(span) for span in spans]}
        row |= {key: _cell(value, key, registry, where) for key, value in sentence.meta.items()
                if key == "speaker" or (key in registry and key != task)}
        if "audio" in sentence.meta:
            row["audio"] = str(resolve(Path(audio or path.parent), sentence.meta["audio"]))
        elif name in names:
            row["audio"] = str(resolve(Path(audio or Path(str(audio_map)).parent), names[name]))
        elif audio is not None:
            row["audio"] = str(find_clip(Path(audio), name))
        yield from checker.check(row, where)
    checker.finish()


def read_csv(path: str | Path, registry: TaskRegistry, tally: Tally, *, audio: str | Path | None = None) -> Iterator[Utterance]:
    """Rows of a CSV file (or, by its suffix .tsv, tab-separated) with a header: `id`, `text`, and what there is of
    `audio`, `start`, `end`, `duration`, `speaker`, `language`, `corpus`, and a column for each task.

    A cell of a span task (`entities` is another name of `ner`) is a JSON list as in a manifest, or
    `start:end:label;start:end:label`; of a multi-label task `label;label` or a JSON list. An empty cell is "not
    annotated", `[]` is "annotated, there is none". Blanks out of place in the text are tidied and offsets moved along.

    Args:
        audio: folder where the names in column `audio` start (default: the folder of the file); rows without such a
            column take `<audio>/<id>.wav` or .flac, .ogg, .opus, .mp3.

    Raises:
        UserError: no such file, or the first ten things that are wrong with it as `file:line: field: message`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a CSV file with the columns id, text, audio, ...")
    checker = _Checker(registry, path.parent)
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            _check_header(reader.fieldnames, path, registry)
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                tally.read += 1
                if None in cells or None in cells.values():
                    raise UserError(f"{where}: another number of cells than the header; put text with commas in quotes")
                row = _csv_row(cells, registry, where)
                _tidy_row(row, registry, tally, where)
                if "audio" in row:
                    row["audio"] = str(resolve(Path(audio or path.parent), row["audio"]))
                elif audio is not None and "id" in row:
                    row["audio"] = str(find_clip(Path(audio), row["id"]))
                yield from checker.check(row, where)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 CSV: {error}") from error
    checker.finish()


class _Checker:
    """A manifest's checks on rows, reported together."""

    def __init__(self, registry: TaskRegistry, folder: Path) -> None:
        self._rows = RowReader(registry, folder, "default", check_audio=False)
        self._count = 0
        self._shown: list[str] = []

    def check(self, row: Mapping[str, Any], where: str) -> Iterator[Utterance]:
        faults: list[Fault] = []
        utterance = self._rows.read(row, where, faults)
        self._count += len(faults)
        self._shown += [f"{where}: {fault.field}: {fault.message}" for fault in faults[:_SHOWN - len(self._shown)]]
        if utterance is not None:
            yield utterance

    def finish(self) -> None:
        if self._count:
            listed = "\n".join(self._shown)
            more = f"\n... and {self._count - len(self._shown)} more" if self._count > len(self._shown) else ""
            raise UserError(f"{self._count} problem{'s' * (self._count > 1)}; correct the source:\n{listed}{more}")


def _sentences(path: Path, token_column: int, tag_column: int) -> Iterator[_Sentence]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a CoNLL file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    sentence = _Sentence()
    for number, line in enumerate([*lines, ""], 1):
        if not line.strip():
            if sentence.tokens:
                yield sentence
                sentence = _Sentence()  # comments alone belong to the sentence that follows
            continue
        if line.startswith("-DOCSTART-"):
            continue
        columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
        tag = columns[tag_column] if -len(columns) <= tag_column < len(columns) else ""
        meta = _META.match(line)
        if line.startswith("#") and not sentence.tokens and (meta or not _TAG.fullmatch(tag)):
            if meta:
                sentence.meta[meta[1]] = meta[2]
            continue
        if not -len(columns) <= token_column < len(columns) or len(columns) < 2 or not _TAG.fullmatch(tag):
            raise UserError(f"{path}:{number}: expected a token (column {token_column}) and a tag (column {tag_column}) O, "
                            f"B-LABEL, I-LABEL, E-LABEL or S-LABEL, found {line[:60]!r}")
        sentence.line = sentence.line or number
        sentence.tokens.append(columns[token_column])
        sentence.tags.append(tag)


def _joined(sentence: _Sentence, tally: Tally, where: str) -> tuple[str, list[Span]]:
    starts = [0, *accumulate(len(token) + 1 for token in sentence.tokens)]
    tags = [re.sub("^L-", "E-", re.sub("^U-", "S-", tag)) for tag in sentence.tags]
    before = "O"
    for tag in tags:
        if tag[0] in "IE" and (before[1:] != tag[1:] or before[0] in "ES"):
            tally.note("I- tag without its B-", f"{where}: {tag}")
        before = tag
    spans = [Span(label, starts[first], starts[last] + len(sentence.tokens[last])) for label, first, last in get_entities(tags)]
    return " ".join(sentence.tokens), spans


def _read_map(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of `id<TAB>audio` lines")
    names = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        name, separator, audio = line.partition("\t" if "\t" in line else ",")
        if line.strip() and not (separator and name.strip() and audio.strip()):
            raise UserError(f"{path}:{number}: expected `id<TAB>audio` or `id,audio`, found {line[:60]!r}")
        names[name.strip()] = audio.strip()
    return names


def _check_header(columns: Any, path: Path, registry: TaskRegistry) -> None:
    header = list(columns or ())
    missing = [column for column in ("id", "text") if column not in header]
    if missing:
        raise UserError(f"{path}:1: no column '{missing[0]}'; it has {', '.join(header) or 'none'}")
    if len(set(header)) < len(header):
        raise UserError(f"{path}:1: column '{next(c for c in header if header.count(c) > 1)}' is there twice; keep one")
    if "entities" in header and ("ner" in header or "ner" not in registry):
        raise UserError(f"{path}:1: column 'entities' stands for 'ner', which is "
                        f"{'a column too; keep one' if 'ner' in header else 'not a task; rename the column'}")


def _csv_row(cells: Mapping[str, str], registry: TaskRegistry, where: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column, value in cells.items():
        key = "ner" if column == "entities" else column
        if value.strip() and (key in registry or key in _NUMBERS):
            row[key] = _cell(value, key, registry, where)
        elif value.strip():
            row[key] = value
    return row


def _cell(value: str, key: str, registry: TaskRegistry, where: str) -> Any:
    """A cell as the value that a manifest has."""
    if key in _NUMBERS:
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{where}: {key}: must be a number of seconds, found {value!r}") from None
    if key in FIELDS:
        return value
    task = registry[key]
    if isinstance(task, LabelTask) and not task.multi:
        return value.strip()
    if value.strip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: {key}: not valid JSON ({error.msg} at character {error.pos})") from error
    parts = [part for part in value.split(";") if part.strip()]
    if isinstance(task, LabelTask):
        return [part.strip() for part in parts]
    spans = [_COMPACT.fullmatch(part) for part in parts]
    if not all(spans):
        raise UserError(f"{where}: {key}: expected a JSON list or start:end:label;start:end:label, found {value[:60]!r}")
    return [[m[3], int(m[1]), int(m[2])] for m in spans if m]


def _tidy_row(row: dict[str, Any], registry: TaskRegistry, tally: Tally, where: str) -> None:
    """Tidy blanks and move well-formed spans along; others stay for the checks to name."""
    text = row.get("text", "")
    moved, _ = tidy(text, (), Tally(), where)
    if moved == text:
        return
    for task in registry:
        if isinstance(task, SpanTask) and task.name in row:
            spans = [_as_span(item) for item in row[task.name]] if isinstance(row[task.name], list) else [None]
            known = [span for span in spans if span and 0 <= span.start < span.end <= len(text)]
            if len(known) < len(spans):
                return
            shifted = [tidy(text, [span], Tally(), where)[1] for span in known]
            if not all(shifted):
                return
            row[task.name] = [list(span) for one in shifted for span in one]
    row["text"] = moved
    tally.note("blanks of the text tidied", where)


def _as_span(item: Any) -> Span | None:
    values = [item.get(key) for key in ("label", "start", "end")] if isinstance(item, dict) else item
    if isinstance(values, list) and len(values) == 3 and isinstance(values[0], str) and all(type(v) is int for v in values[1:]):
        return Span(*values)
    return None
