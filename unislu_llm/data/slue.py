"""SLUE corpora: VoxPopuli (entities), VoxCeleb (sentiment), HarperValley (dialogue acts).

Two layouts are read: the TSV files of the benchmark beside folders of audio, and rows of the hub copies
(`asapp/slue`, `asapp/slue-phase-2`), whose audio stays undecoded until soundfile reads it. Sources: slue-toolkit,
arXiv 2111.10367 and 2212.10525.
"""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from unislu_llm.data.clips import save_clip
from unislu_llm.data.tally import Tally, tidy
from unislu_llm.errors import UserError
from unislu_llm.tasks import NER, SA, LabelValue, Span
from unislu_llm.utterance import Utterance

RAW_TO_COMBINED: dict[str, str | None] = {
    **dict.fromkeys(("DATE", "TIME"), "WHEN"),
    **dict.fromkeys(("CARDINAL", "ORDINAL", "QUANTITY", "MONEY", "PERCENT"), "QUANT"),
    **dict.fromkeys(("GPE", "LOC"), "PLACE"),
    **{label: label for label in ("NORP", "ORG", "LAW", "PERSON")},
    **dict.fromkeys(("FAC", "EVENT", "WORK_OF_ART", "PRODUCT", "LANGUAGE")),
}
"""The 18 OntoNotes tags of the raw annotation to the seven combined labels; None is dropped (toolkit)."""

DIALOGUE_ACTS = (
    "acknowledge", "answer_agree", "answer_dis", "answer_general", "apology", "backchannel", "disfluency", "other",
    "question_check", "question_general", "question_repeat", "self", "statement_close", "statement_general",
    "statement_instruct", "statement_open", "statement_problem", "thanks",
)
"""The 18 acts of SLUE-HarperValley (slue-toolkit); the task itself is `recipes/configs/tasks_hvb.yaml`."""

HUB: dict[str, tuple[str, str]] = {
    "voxpopuli": ("asapp/slue", "voxpopuli"),
    "voxceleb": ("asapp/slue", "voxceleb"),
    "hvb": ("asapp/slue-phase-2", "hvb"),
}
"""Dataset and config of each corpus on the hub."""

Row = Mapping[str, Any]
Variant = Literal["normalized", "raw"]
LabelSet = Literal["combined", "raw"]

_EMPTY = ("None", "[]", "nan")


def read_voxpopuli(tsv: str | Path, audio: str | Path | None, tally: Tally, *, text: Variant = "normalized",
                   labels: LabelSet = "combined") -> Iterator[Utterance]:
    """Entities from the original TSV; audio is `<audio>/<split>/<id>.ogg`, or `<audio>/<id>.ogg`.

    Args:
        audio: folder of the audio; None gives text-only rows. Files are not opened.
        text: which pair of transcript and entities: `normalized_*` or `raw_*`.
        labels: `combined` maps the 18 tags to seven (:data:`RAW_TO_COMBINED`) and takes `*_combined_ner` where the
            file has it; `raw` keeps the tags.

    Raises:
        UserError: no such file, a column is missing, or a field cannot be read.
    """
    for where, row in _tsv_rows(tsv, ("id", f"{text}_text"), tally):
        found = _voxpopuli(row, _find(audio, row, "{split}", ".ogg"), where, tally, text, labels)
        if found is not None:
            yield found


def read_voxceleb(tsv: str | Path, audio: str | Path | None, tally: Tally) -> Iterator[Utterance]:
    """Sentiment from the original TSV; audio is `<audio>/<split>_raw/<id>.flac` or `<audio>/<id>.flac`, uncropped.

    `start_second` and `end_second` become the crop of the manifest row. Rows whose label is none of Positive, Neutral
    and Negative (`Disagreement`, `<mixed>`) are dropped and counted by label.

    Raises:
        UserError: no such file, or a column is missing.
    """
    for where, row in _tsv_rows(tsv, ("id", "normalized_text", "start_second", "end_second"), tally):
        found = _voxceleb(row, _find(audio, row, "{split}_raw", ".flac"), where, tally)
        if found is not None:
            yield found


def read_hub(rows: Iterable[Row], corpus: str, tally: Tally, *, clips: Path | None = None,
             text: Variant = "normalized", labels: LabelSet = "combined") -> Iterator[Utterance]:
    """Utterances of hub rows; `audio` is undecoded: `{"bytes": ..., "path": ...}`.

    Args:
        rows: e.g. of :func:`load_hub`. corpus: key of :data:`HUB`.
        clips: folder where the bytes of the audio are written; None gives text-only rows.

    Raises:
        UserError: an unknown corpus, a row without a field, or audio that is decoded already.
    """
    if corpus not in HUB:
        raise UserError(f"unknown corpus '{corpus}'; known: {', '.join(HUB)}")
    name = "/".join(HUB[corpus])
    needed = {"voxpopuli": ("id", f"{text}_text"), "voxceleb": ("id", "normalized_text", "start_second", "end_second"),
              "hvb": ("text",)}[corpus]
    for index, given in enumerate(rows):
        tally.read += 1
        where = f"{name}[{index}]"
        missing = [key for key in needed if key not in given]
        if missing:
            raise UserError(f"{where}: no field '{missing[0]}'; it has {', '.join(given)}")
        row = {**given, "id": given.get("id") or _hvb_id(given, index)}
        audio = save_clip(given.get("audio"), clips, str(row["id"]), f"{where} ({row['id']})") if clips else None
        if corpus == "voxpopuli":
            found = _voxpopuli(row, audio, where, tally, text, labels)
        else:
            found = (_voxceleb if corpus == "voxceleb" else _harper_valley)(row, audio, where, tally)
        if found is not None:
            yield found


def load_hub(corpus: str, split: str, path: Path | None = None) -> Iterable[Row]:
    """Rows of a split of the hub copy, audio undecoded. The copies ask for a contact agreement on the hub first.

    Args:
        corpus: key of :data:`HUB`. split: its name on the hub.
        path: a copy on this machine, read without the network: a folder of `save_to_disk`, a parquet file, or a folder with
            parquet files as on the hub (:func:`parquet_files`).

    Raises:
        UserError: the package `datasets` is not installed, the hub refuses, or `path` has no such split.
    """
    if corpus not in HUB:
        raise UserError(f"unknown corpus '{corpus}'; known: {', '.join(HUB)}")
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UserError(f"the package `datasets` is not installed ({error}); run `pip install 'unislu_llm[hub]'` (or "
                        "`pip install datasets`), or read the original TSV files") from error
    name, config = HUB[corpus]
    try:
        encoded = _load_copy(datasets, path, corpus, split) if path else datasets.load_dataset(name, config, split=split)
        loaded: Iterable[Row] = encoded.cast_column("audio", datasets.Audio(decode=False))
    except UserError:
        raise
    except Exception as error:  # the package has no common class for no network, no agreement, no such split
        advice = "is it whole?" if path else ("accept the agreement on the hub and log in (`hf auth login`), or name a copy "
                                              "on this machine with --path")
        raise UserError(f"{path or f'{name}/{config}'}, split '{split}': {error}; {advice}") from error
    return loaded


def parquet_files(folder: Path, corpus: str, split: str) -> list[Path]:
    """Parquet files of a split, as the hub lays them out: `<split>-*.parquet` or `<split>/*.parquet`, in `folder` or in its
    folder of the corpus' config; else `<split>.parquet`."""
    config = HUB[corpus][1]
    for place in (folder / config, folder, folder / "data"):
        for pattern in (f"{split}-*.parquet", f"{split}/*.parquet", f"{split}.parquet"):
            if found := sorted(place.glob(pattern)):
                return found
    return []


def _load_copy(datasets: Any, path: Path, corpus: str, split: str) -> Any:
    if not path.exists():
        raise UserError(f"--path {path} does not exist; give a folder of save_to_disk, or parquet files of the hub")
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise UserError(f"--path {path} has no split '{split}'; it has {', '.join(splits)}")
        return splits[split]
    if path.is_dir() and (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if saved.split is not None and str(saved.split) != split:
            raise UserError(f"--path {path} is split '{saved.split}', not '{split}'; correct --split or --path")
        return saved
    files = [path] if path.is_file() else parquet_files(path, corpus, split)
    if not files:
        raise UserError(f"--path {path} is no folder of save_to_disk and has no parquet files of {corpus}, split '{split}' "
                        f"(looked for {HUB[corpus][1]}/{split}-*.parquet and {split}-*.parquet)")
    # As a stream: otherwise the package copies everything into its cache first.
    return datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split, streaming=True)


def entities(value: Any, where: str) -> list[Span] | None:
    """Entities of any layout as spans; None where there is no annotation.

    The TSV has `[['GPE', 37, 10]]`, `[]` or `None` (both: none there) as text, the hub has
    `{"type": [...], "start": [...], "length": [...]}` or a list of such items. Third is a length, not an end.

    Raises:
        UserError: it is none of them.
    """
    if value is None or value in _EMPTY:
        return []
    if value == "":
        return None
    try:
        if isinstance(value, str):
            value = ast.literal_eval(value)
        if isinstance(value, Mapping):
            value = list(zip(value["type"], value["start"], value["length"], strict=True))
        triples = [(e["type"], e["start"], e["length"]) if isinstance(e, Mapping) else tuple(e[:3]) for e in value]
        return [Span(str(label), int(start), int(start) + int(length)) for label, start, length in triples]
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise UserError(f"{where}: entities {str(value)[:80]!r} are not [[tag, start, length], ...] ({error})") from error


def combine(spans: Iterable[Span], tally: Tally, where: str) -> list[Span]:
    """Spans with combined labels; the types that SLUE drops are counted. Combined labels stay as they are.

    Raises:
        UserError: a label is neither raw nor combined.
    """
    combined = []
    for span in spans:
        _check_label(span.label, where)
        label = span.label if span.label in NER.labels else RAW_TO_COMBINED[span.label]
        if label is None:
            tally.drop_span(f"label {span.label} (not scored in SLUE)", where)
        else:
            combined.append(Span(label, span.start, span.end))
    return combined


def _check_label(label: str, where: str) -> None:
    if label not in RAW_TO_COMBINED and label not in NER.labels:
        raise UserError(f"{where}: '{label}' is neither a raw label ({', '.join(RAW_TO_COMBINED)}) nor a combined one "
                        f"({', '.join(NER.labels)})")


def _voxpopuli(row: Row, audio: Path | None, where: str, tally: Tally, text: Variant,
               labels: LabelSet) -> Utterance | None:
    where = f"{where} ({row['id']})"
    column = f"{text}_combined_ner" if labels == "combined" and f"{text}_combined_ner" in row else f"{text}_ner"
    spans = entities(row[column], f"{where}: {column}") if column in row else None
    values: dict[str, LabelValue] = {}
    if spans is None:
        tally.note("no entity annotation", where)
    elif labels == "combined":
        spans = combine(spans, tally, where)
    else:
        for span in spans:
            _check_label(span.label, where)
    transcript, kept = tidy(str(row[f"{text}_text"] or ""), spans or (), tally, where)
    if spans is not None:
        values["ner"] = kept
    return _utterance(row, audio, transcript, values, "slue-voxpopuli", where, tally)


def _voxceleb(row: Row, audio: Path | None, where: str, tally: Tally) -> Utterance | None:
    where = f"{where} ({row['id']})"
    sentiment = row.get("sentiment")
    if sentiment in (None, ""):
        tally.note("no sentiment annotation", where)
    elif sentiment not in SA.labels:
        tally.drop(f"sentiment {sentiment}", where)
        return None
    try:
        start, end = float(row["start_second"]), float(row["end_second"])
    except (TypeError, ValueError):
        start = end = math.nan
    if not (math.isfinite(end) and 0 <= start < end):
        tally.drop("start_second or end_second out of range", where)
        return None
    values: dict[str, LabelValue] = {"sa": str(sentiment)} if sentiment else {}
    transcript, _ = tidy(str(row["normalized_text"] or ""), (), tally, where)
    crop = (start, end) if audio else (0.0, None)
    return _utterance(row, audio, transcript, values, "slue-voxceleb", where, tally, *crop)


def _harper_valley(row: Row, audio: Path | None, where: str, tally: Tally) -> Utterance | None:
    where = f"{where} ({row['id']})"
    acts = row.get("dialog_acts")
    values: dict[str, LabelValue] = {}
    if acts is None:
        tally.note("no dialogue act annotation", where)
    else:
        unknown = [act for act in acts if act not in DIALOGUE_ACTS] if isinstance(acts, Sequence) else [acts]
        if unknown or isinstance(acts, str):
            raise UserError(f"{where}: dialog_acts {acts!r} must be a list of {', '.join(DIALOGUE_ACTS)}")
        if len(set(acts)) < len(acts):
            tally.note("dialogue act given twice", where)
        values["da"] = tuple(act for act in DIALOGUE_ACTS if act in acts)
    transcript, _ = tidy(str(row["text"] or ""), (), tally, where)
    return _utterance(row, audio, transcript, values, "slue-hvb", where, tally)


def _utterance(row: Row, audio: Path | None, text: str, values: dict[str, LabelValue], corpus: str, where: str,
               tally: Tally, start: float = 0.0, end: float | None = None) -> Utterance | None:
    if not text:
        tally.drop("empty transcript", where)
        return None
    speaker = row.get("speaker_id")
    return Utterance(str(row["id"]), audio, text, values, start, end, source=where, language="en", corpus=corpus,
                     speaker=None if speaker in (None, "", *_EMPTY) else str(speaker))


def _hvb_id(row: Row, index: int) -> str:
    """Rows of the dialogue act corpus have no id: the name of the clip has call, start and end in it."""
    path = row["audio"].get("path") if isinstance(row.get("audio"), Mapping) else None
    return Path(str(path)).stem if path else f"hvb-{index:05d}"


def _find(folder: str | Path | None, row: Row, layout: str, suffix: str) -> Path | None:
    if folder is None:
        return None
    nested = Path(folder) / layout.format(split=row.get("split") or ".") / f"{row['id']}{suffix}"
    flat = Path(folder) / f"{row['id']}{suffix}"
    return flat if flat.is_file() and not nested.is_file() else nested


def _tsv_rows(path: str | Path, needed: Sequence[str], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the TSV file of the corpus")
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)  # quotes in speech are no quoting
            missing = [column for column in needed if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}:1: no column '{missing[0]}'; it has {', '.join(reader.fieldnames or ()) or 'none'}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: another number of columns than the header; tabs inside a field?")
                tally.read += 1
                yield where, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
