"""Own data: tables, CoNLL text, Kaldi folders, data sets of the hub; checked as a manifest is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

from unislu_llm.data.corpora import source
from unislu_llm.data.corpora.source import Dropped, FileSource, Rows, Source
from unislu_llm.data.row_reader import FIELDS, resolve
from unislu_llm.errors import UserError, hint
from unislu_llm.io import atomic
from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry

_TAG = re.compile(r"O|[BIMESLU]-\S+")
_META = re.compile(r"#\s*(\w+)\s*=\s*(.*\S)\s*$")


@dataclass(frozen=True)
class Table(FileSource):
    """Own rows in CSV, TSV (.tsv), JSON lines or a JSON array, a column a key and a task.

    Spans and label sets in a cell are JSON, as a manifest has them; an empty cell is "not
    annotated". Without a column `id` the ids are the file's name and a number."""

    names: ClassVar[Mapping[str, str]] = {}  # columns by key of another tool, where it has them
    # Where columns have other names: KEY=COLUMN ..., e.g. audio=path text=sentence.
    columns: tuple[str, ...] = ()

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        given = column_names(self.columns, registry)
        names, absent = {"text": "text", **self.names, **given}, {*given.values()}
        table = self.file.suffix.lower() not in (".json", ".jsonl", ".ndjson")
        rows = (source.read_table(self.file, [names["text"], *absent]) if table
                else source.read_objects(self.file))
        for number, (where, cells) in enumerate(rows, 1):
            absent -= cells.keys()
            if table:
                cells = {key: value for key, value in cells.items()
                         if value.strip() or key == names.get("id", "id")}
            row = {"id": f"{self.file.stem}-{number}"} | renamed(cells, names, registry, where)
            yield where, source.with_audio(row, self.audio, self.file)
        if absent:
            raise UserError(f"{self.file}: no row has '{absent.pop()}'; correct --columns")


class Nemo(Table):
    """Own data in a NeMo manifest: audio_filepath, text, duration, offset; and tasks."""

    names: ClassVar[Mapping[str, str]] = {"audio": "audio_filepath", "start": "offset",
                                          "hypothesis": "pred_text", "language": "lang"}


class CommonVoice(Table):
    """Common Voice: a split's TSV; its clips are in --audio, or in the folder clips beside it."""

    names: ClassVar[Mapping[str, str]] = {"id": "path", "audio": "path", "text": "sentence",
                                          "speaker": "client_id", "language": "locale"}

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        beside = self.file.parent / "clips"
        given = self if self.audio or not beside.is_dir() else replace(self, audio=beside)
        return super(CommonVoice, given).rows(registry, dropped, clips)


def column_names(columns: Sequence[str], registry: TaskRegistry) -> dict[str, str]:
    """Column by key of `--columns KEY=COLUMN ...`; raises UserError: not of this form, no key."""
    known = (*FIELDS, *registry.names)
    for given in columns:
        if "=" not in given or given.partition("=")[0] not in known:
            raise UserError(f"--columns {given}: give KEY=COLUMN, with a key of a manifest"
                            f"{hint(given.partition('=')[0], known)}; keys: {', '.join(known)}")
    return {key: column for key, _, column in (given.partition("=") for given in columns)}


def renamed(cells: Mapping[str, Any], names: Mapping[str, str], registry: TaskRegistry,
            where: str) -> dict[str, Any]:
    """A row by a manifest's keys, its text tidied where no span counts the blanks: there the check
    of the row names them."""
    row = {key: value for key, value in cells.items() if key not in names.values()} | {
        key: cells[column] for key, column in names.items() if column in cells}
    row = {key: read_cell(key, value, registry, where) for key, value in row.items()
           if value is not None}
    spans = any(row.get(task.name) for task in registry if isinstance(task, SpanTask))
    if isinstance(row.get("text"), str) and not spans:
        row["text"] = " ".join(row["text"].split())
    # Other tools give start and length of a stretch, manifests its start and end.
    times = [row.get(key) for key in ("start", "duration")]
    if row.get("end") is None and all(isinstance(seconds, int | float) for seconds in times):
        row["end"] = sum(times)
    return row


@dataclass(frozen=True)
class Conll(FileSource):
    """Own sentences in CoNLL text: a token and its tag a line, a blank line between two.

    Tags are BIO, IOB1, BIOES, BILOU or BMES, read as conlleval does: an `I-` without its `B-` opens
    a span. Columns are parted by tabs, or by blanks where a line has no tab. Comments `# KEY = ...`
    (id, audio, speaker, language, a task) describe the sentence that follows; the id is else file
    name and number. No blank follows a token with `SpaceAfter=No` in its line."""

    token_column: int = 0  # Column of the token, from 0.
    tag_column: int = -1  # Column of the tag; negative from the end.
    task: str = "ner"  # The task of the tags.
    no_blanks: bool = False  # No blanks between tokens, as in Chinese and Japanese.

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        if not isinstance(registry[self.task], SpanTask):
            raise UserError(f"task '{self.task}' labels whole utterances; tags need a span task")
        for number, (where, meta, tokens, tags) in enumerate(self._sentences(), 1):
            row = {key: read_cell(key, value, registry, where) for key, value in meta.items()
                   if key in ("id", "audio", "speaker", "language") or key in registry}
            starts = [*accumulate(map(len, tokens), initial=0)]
            text, spans = source.tidy("".join(tokens), ((label, starts[first], starts[last + 1])
                                                 for label, first, last in _chunks(tags)))
            yield where, source.with_audio({"id": f"{self.file.stem}-{number}"} | row | {
                "text": text, self.task: spans}, self.audio, self.file)

    def _sentences(self) -> Iterator[tuple[str, dict[str, str], list[str], list[str]]]:
        """First line, comments, tokens (with what follows them) and tags of each sentence."""
        first, meta, tokens, tags = "", dict[str, str](), list[str](), list[str]()
        for where, line in chain(source.read_lines(self.file), [("", "")]):
            if not line.strip() and tokens:
                yield first, meta, tokens, tags
                meta, tokens, tags = {}, [], []
            if not line.strip() or line.startswith("-DOCSTART-"):
                continue  # comments above a blank line belong to the sentence that follows
            columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
            inside = max(self.token_column, self.tag_column, 1) < len(columns)
            good = inside and _TAG.fullmatch(columns[self.tag_column])
            # A `#` may also be a token: then a tag follows it.
            if line.startswith("#") and not tokens and ((found := _META.match(line)) or not good):
                meta |= {found[1]: found[2]} if found else {}
            elif good:
                first = first if tokens else where
                blank = not self.no_blanks and "SpaceAfter=No" not in line
                tokens.append(columns[self.token_column] + " " * blank)
                tags.append(columns[self.tag_column])
            else:
                raise UserError(f"{where}: expected a token (column {self.token_column}) and a tag "
                                f"(column {self.tag_column}) O or e.g. B-ORG, found {line[:60]!r}")


def _chunks(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Label, first and last token of each span, in any of the schemes."""
    begun = 0
    for i, (tag, after) in enumerate(pairwise([*tags, "O"])):
        kind, _, label = tag.partition("-")
        if i == 0 or kind in "BSU" or label != tags[i - 1][2:] or tags[i - 1][0] in "ESLU":
            begun = i
        # The next token goes on with the span, or this one is its last.
        if kind != "O" and (kind in "ESLU" or after[0] in "OBSU" or after[2:] != label):
            yield label, begun, i


def read_cell(key: str, value: Any, registry: TaskRegistry, where: str) -> Any:
    """A cell as the value that a manifest has; what JSON has typed stays, but for a name."""
    if not isinstance(value, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if number and key in ("id", "speaker", "text") else value
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


@dataclass(frozen=True)
class Kaldi(Source):
    """Own data in a Kaldi folder: text, wav.scp, segments, utt2spk, utt2lang."""

    folder: Path  # The folder with these files.
    audio: Path = Path()  # Folder from which the paths of wav.scp start; default: the current one.

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        waves, crops, speakers, languages = (
            {name: (where, rest) for where, name, rest in self._lines(file)}
            for file in ("wav.scp", "segments", "utt2spk", "utt2lang"))
        left = dict(crops or waves)
        for where, name, text in self._lines("text"):
            place, crop = left.pop(name, (where, ""))
            try:
                recording, start, end = crop.split() if crops else (name, "0", "-1")
                row = {"id": name, "text": " ".join(text.split()), "start": float(start),
                       "end": float(end) if float(end) >= 0 else None}  # -1: to the end
                place, file = waves[recording]
            except (ValueError, KeyError):
                raise UserError(f"{place}: '{name}' needs a recording of wav.scp, and in segments "
                                "its start and end in seconds") from None
            file = re.sub(r"^flac (?:-[cds]+ )+(\S+) *\|$", r"\1", file)  # as LibriSpeech has it
            if file.endswith("|"):
                raise UserError(f"{place}: a command is not run; write what it gives to a file")
            yield where, row | {"audio": str(resolve(self.audio, file)),
                                "speaker": speakers.get(name, ("", None))[1],
                                "language": languages.get(name, ("", None))[1]}
        dropped["row dropped: no line in text"] += [where for where, _ in left.values()]

    def _lines(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Place, first word and the rest of each line."""
        there = name in ("text", "wav.scp") or (self.folder / name).is_file()
        for where, line in source.read_lines(self.folder / name) if there else ():
            if words := line.split(maxsplit=1):
                yield where, words[0], "".join(words[1:]).strip()


@dataclass(frozen=True)
class Hub(Source):
    """A data set of the Hugging Face hub, or of its package `datasets`."""

    # Name on the hub; or a folder that `save_to_disk` wrote, of data files, or of clips beside
    # metadata.csv or metadata.jsonl.
    name: str
    split: str = "train"  # Split of it.
    config: str = ""  # Configuration (a language, a subset), where there are several.
    # Where columns have other names: KEY=COLUMN ..., e.g. text=sentence.
    columns: tuple[str, ...] = ()

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        metadata = [path for ending in ("csv", "jsonl") for part in (self.split, "")
                    if (path := Path(self.name, part, f"metadata.{ending}")).is_file()]
        if metadata:
            folder = Path(self.name, self.split)
            if metadata[0].parent != folder and not folder.is_dir() and self.split != "train":
                raise UserError(f"{metadata[0]} is of one split, 'train', as there is no folder "
                                f"{folder}; give --split train")
            for where, row in Table(metadata[0], columns=("audio=file_name", *self.columns)).rows(
                    registry, dropped, clips):
                if not folder.is_dir() or Path(row.get("audio", folder)).is_relative_to(folder):
                    yield where, row
            return
        names = {"audio": "audio", **column_names(self.columns, registry)}
        for i, cells in enumerate(load_split(self.name, self.config, self.split)):
            where = f"{self.name}[{i}]"
            row = {"id": f"{self.split}-{i}"} | renamed(cells, names, registry, where)
            if isinstance(row.get("audio"), Mapping):
                row["audio"] = save_clip(row["audio"], clips, str(row["id"]))
            yield where, row


def load_split(name: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a split of a data set, by its name on the hub or from a folder; audio undecoded, and
    classes by their names. Raises UserError: it is not there, or cannot be read."""
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            rows: Any = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:  # or the package would first fetch every split, and write all of it to its cache
            rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        features = rows.features or {}
        for column in [c for c, kind in features.items() if isinstance(kind, datasets.Audio)]:
            rows = rows.cast_column(column, datasets.Audio(decode=False))
        classes = {c: kind.names for c, kind in features.items() if hasattr(kind, "names")}
        for row in rows:
            yield row | {c: every[n] if n is not None and n >= 0 else None  # -1 is for none
                         for c, every in classes.items() for n in [row[c]]}
    except Exception as error:  # the package has no common class: no network, no agreement, ...
        raise UserError(f"{name}, split '{split}': {error}; is the copy whole, or the name right, "
                        "its agreement accepted on the hub, and `hf auth login` done?") from error


def save_clip(audio: Mapping[str, Any], folder: Path, name: str) -> str | None:
    """File of an undecoded audio field `{"bytes", "path"}`: its own, or its bytes in `folder`."""
    data, path = audio.get("bytes"), audio.get("path")
    if data is None:
        return path or None
    mark = hashlib.sha256(name.encode() + b"\0" + data).hexdigest()[:12]
    target = folder / (re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80] + f"-{mark}"
                       + Path(path or "").suffix)
    if not target.is_file():  # by an earlier call
        with atomic(target, "wb") as handle:
            handle.write(data)
    return str(target)
