"""SLUE corpora: in their original layout, TSV files beside folders of audio, or from the hub.

VoxPopuli has entities, VoxCeleb sentiment, HarperValley (on the hub alone) dialogue acts.
Sources: slue-toolkit, arXiv 2111.10367 and 2212.10525.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

from unislu_llm.data.corpora.source import Dropped, Rows, read_table
from unislu_llm.errors import UserError
from unislu_llm.io import atomic
from unislu_llm.tasks import RAW_TO_COMBINED, Task, TaskRegistry

Corpus = Literal["voxpopuli", "voxceleb", "hvb"]

_HUB = {"voxpopuli": "asapp/slue", "voxceleb": "asapp/slue", "hvb": "asapp/slue-phase-2"}
_TASKS = {"voxpopuli": "ner", "voxceleb": "sa", "hvb": "da"}


@dataclass(frozen=True)
class _Tsv:
    """A corpus in its original layout.

    Args:
        tsv: slue-<corpus>_<split>.tsv.
        audio: Folder with <split>/<id>.ogg (VoxPopuli) or <split>_raw/<id>.flac (VoxCeleb);
            without it: text alone.
    """

    tsv: Path
    audio: Path | None = None
    corpus: ClassVar[Corpus]
    columns: ClassVar[tuple[str, ...]] = ("id", "normalized_text")
    clip: ClassVar[str]  # its file in `audio`

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        # Quotation marks in speech are no quoting.
        for where, row in read_table(self.tsv, self.columns, delimiter="\t",
                                     quoting=csv.QUOTE_NONE):
            audio = self.audio and self.audio / self.clip.format(**{"split": "", **row})
            yield where, _row(self.corpus, row, audio, where, registry, dropped)


class SlueVoxPopuli(_Tsv):
    """Entities of SLUE-VoxPopuli, original layout.

    Their labels are the seven combined ones, or where the tasks have them (tasks_ontonotes.yaml)
    the 18 raw ones.
    """

    corpus = "voxpopuli"
    clip = "{split}/{id}.ogg"


class SlueVoxCeleb(_Tsv):
    """Sentiment of SLUE-VoxCeleb, original layout; the audio is cropped by the manifest."""

    corpus = "voxceleb"
    columns = ("id", "normalized_text", "start_second", "end_second")
    clip = "{split}_raw/{id}.flac"


@dataclass(frozen=True)
class SlueHub:
    """A SLUE corpus from the hub (package datasets), whose agreement is to be accepted first.

    Args:
        corpus: voxpopuli (entities), voxceleb (sentiment) or hvb (dialogue acts: tasks_hvb.yaml).
        split: Split on the hub: train, validation or test.
        path: A copy on this machine: the folder with the hub's parquet files of the corpus.
        with_audio: Whether the audio is written beside the manifest; otherwise text alone.
    """

    corpus: Corpus
    split: str
    path: Path | None = None
    with_audio: bool = True

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        for i, row in enumerate(load_hub(self.corpus, self.split, self.path)):
            where, clip = f"{self.corpus}[{i}]", row.get("audio") or {}
            # Rows of dialogue acts have no id: the name of the clip has call, start and end in it.
            name = row.get("id") or Path(clip.get("path") or f"row-{i:05d}").stem
            audio = _save_clip(clip, clips, name) if self.with_audio else None
            try:  # a copy may hold another data set
                row = _row(self.corpus, {**row, "id": name}, audio, where, registry, dropped)
            except KeyError as error:
                raise UserError(f"{where}: no field {error}; it has {', '.join(row)}") from error
            yield where, row


def load_hub(corpus: Corpus, split: str, path: Path | None = None) -> Iterable[Mapping[str, Any]]:
    """Rows of a split of the hub's data set or of a copy, audio undecoded; see :class:`SlueHub`.

    Raises UserError: no package `datasets`, no agreement with the hub, or no such split.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UserError(f"the package `datasets` is not installed ({error}); run `pip install "
                        "'unislu_llm[hub]'`, or read the original TSV files") from error
    if path is not None and not path.exists():  # or the package would ask the hub for this name
        raise UserError(f"--path {path} does not exist; correct it")
    name = (_HUB[corpus], corpus) if path is None else (str(path),)
    try:  # a copy is streamed: the package would first write all of it to its cache
        rows = datasets.load_dataset(*name, split=split, streaming=path is not None)
        raw: Any = rows.cast_column("audio", datasets.Audio(decode=False))
        return raw
    except Exception as error:  # the package has no common class: no network, no agreement, ...
        advice = "is the copy whole?" if path else ("accept the agreement on the hub and log in "
                                                    "(`hf auth login`), or name a copy (--path)")
        raise UserError(f"{name[0]}, split '{split}': {error}; {advice}") from error


def _save_clip(audio: Mapping[str, Any], folder: Path, name: str) -> Path | None:
    """File of an undecoded audio field `{"bytes", "path"}`: its own, or its bytes in `folder`."""
    data, path = audio.get("bytes"), audio.get("path")
    if data is None:
        return Path(path) if path else None
    target = folder / (re.sub(r"[^A-Za-z0-9._-]+", "-", name) + Path(path or "").suffix)
    if not (target.is_file() and target.stat().st_size == len(data)):  # by an earlier call
        with atomic(target, "wb") as handle:
            handle.write(data)
    return target


def _row(corpus: Corpus, row: Mapping[str, Any], audio: Path | None, where: str,
         registry: TaskRegistry, dropped: Dropped) -> dict[str, Any]:
    """A row of the corpus as a manifest has it; who reads it finds what is wrong with it."""
    task = registry[_TASKS[corpus]]
    text = str(row["text" if corpus == "hvb" else "normalized_text"] or "")
    # The TSV files write `None`, pandas writes `nan` where a speaker is not known.
    speaker = str(row.get("speaker_id") or "None")
    values = {"id": str(row["id"]), "text": text, "corpus": f"slue-{corpus}", "language": "en",
              "speaker": None if speaker in ("None", "nan") else speaker,
              "audio": audio and str(audio)}
    if corpus == "voxpopuli":
        return values | {"ner": _entities(row.get("normalized_ner", ""), where, task, dropped)}
    values["text"] = " ".join(text.split())  # no span counts its blanks
    if corpus == "hvb":
        acts = row.get("dialog_acts")
        return values | {"da": acts and [*dict.fromkeys(acts)]}  # some are given twice
    if audio:
        values |= {"start": _number(row["start_second"]), "end": _number(row["end_second"])}
    return values | {"sa": row.get("sentiment") or None}


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)  # of the wrong type for a manifest


def _entities(value: Any, where: str, task: Task, dropped: Dropped) -> list[list[Any]] | None:
    """Entities of any layout as spans; None where there is no annotation."""
    if value == "":
        return None
    found, spans = value, []
    try:
        # The TSV has `[['GPE', 37, 10]]`, `[]`, `None` or `nan` (none there) as text, the hub has
        # `{"type": [...], "start": [...], "length": [...]}`. Third is a length, not an end.
        if isinstance(value, Mapping):
            found = zip(value["type"], value["start"], value["length"], strict=True)
        elif isinstance(value, str):
            found = ast.literal_eval(value) if value != "nan" else None
        for raw, start, length in found or ():
            # Tasks with the raw labels keep them.
            label = raw if raw in task.labels else RAW_TO_COMBINED.get(raw, raw)
            if label is None:
                dropped[f"span dropped: label {raw} (not scored in SLUE)"].append(where)
            else:
                spans.append([label, int(start), int(start) + int(length)])
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise UserError(f"{where}: normalized_ner: {str(value)[:80]!r} is not [[tag, start, "
                        f"length], ...] ({error})") from error
    return spans
