"""Published corpora, in the layouts of their authors.

LibriSpeech; SLURP (arXiv 2011.13205) and Speech-MASSIVE (2408.03900), whose intents and slots are
the tasks of recipes/configs/tasks_slurp.yaml; MSNER (2405.11519); and SLUE: VoxPopuli has entities,
VoxCeleb sentiment, HarperValley (on the hub alone) dialogue acts (slue-toolkit, 2111.10367 and
2212.10525).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

from unislu_llm.data.corpora import source
from unislu_llm.data.corpora.own_data import CommonVoice, Hub, load_split, read_cell, save_clip
from unislu_llm.data.corpora.source import Dropped, FileSource, Rows, Source
from unislu_llm.errors import UserError
from unislu_llm.tasks import RAW_TO_COMBINED, Task, TaskRegistry

_SLOT = re.compile(r"\[\s*(\w+)\s*:\s*([^\[\]]*?)\s*\]")
_MSNER = {"geopolitical area": "GPE", "location": "LOC", "group": "NORP", "organization": "ORG",
          "facility": "FAC", "cardinal number": "CARDINAL", "ordinal number": "ORDINAL",
          "work of art": "WORK_OF_ART"}  # others are OntoNotes' or SLUE's, in small letters


@dataclass(frozen=True)
class LibriSpeech(Source):
    """LibriSpeech: folders of FLAC with *.trans.txt, of one split or all; text in lower case."""

    folder: Path  # E.g. LibriSpeech/dev-clean.

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        for file in sorted(self.folder.rglob("*.trans.txt")):
            for where, line in source.read_lines(file):
                name, _, text = line.partition(" ")
                yield where, {"id": name, "audio": str(file.with_name(f"{name}.flac")),
                              "text": text.strip().lower(), "speaker": name.partition("-")[0],
                              "language": "en", "corpus": "librispeech"}


class Slurp(FileSource):
    """SLURP: intents (scenario_action) and slots; a row for each recording in --audio."""

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        for where, item in source.read_objects(self.file):
            with source.as_published(where):
                row = _understood(item["sentence"], item["sentence_annotation"],
                                  f"{item['scenario']}_{item['action']}", where, registry, dropped)
                row |= {"id": str(item["slurp_id"]), "language": "en", "corpus": "slurp"}
                files = [self.audio / r["file"] for r in item["recordings"]] if self.audio else []
            if self.audio is None:
                yield where, row
            elif not files:
                dropped["row dropped: no recording"].append(where)
            yield from ((where, row | {"id": f.stem, "audio": str(f)}) for f in files)


class SpeechMassive(Hub):
    """Speech-MASSIVE: intents and slots (--name FBK-MT/Speech-MASSIVE --config de-DE)."""

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        for i, item in enumerate(load_split(self.name, self.config, self.split)):
            with source.as_published(where := f"{self.name}[{i}]"):
                row = {"id": f"{item['locale']}-{item['id']}", "language": item["locale"][:2],
                       "corpus": "speech-massive", "speaker": item.get("speaker_id")}
                row |= _understood(item["utt"], item["annot_utt"], item["intent_str"], where,
                                   registry, dropped)
                row["audio"] = save_clip(item["audio"], clips, row["id"])
            yield where, row


class Msner(FileSource):
    """MSNER: entities of VoxPopuli; clips are in --audio, or in its folders of years."""

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        task = registry["ner"]
        for where, item in source.read_objects(self.file):
            with source.as_published(where):
                ends = [*accumulate(map(len, item["input"]), initial=0)]  # with their blanks
                labels = [_span_label(_MSNER.get(raw, raw.upper()), task, where, dropped)
                          for raw in (given["type"] for given in item["annotation"])]
                places = [given["position"] for given in item["annotation"]]
                text, spans = source.tidy("".join(item["input"]), (
                    (label, ends[place[0]], ends[place[-1] + 1])
                    for label, place in zip(labels, places, strict=True) if label))
                language = re.search(r"-([a-z]{2})_", item["id"])
                year = self.audio and self.audio / item["id"][:4]
                folder = year if year and year.is_dir() else self.audio
            row = {"id": item["id"], "text": text, "ner": spans, "corpus": "msner",
                   "language": language and language[1]}
            yield where, source.with_audio(row, folder, self.file)


def _understood(text: str, annotated: str, intent: str, where: str, registry: TaskRegistry,
                dropped: Dropped) -> dict[str, Any]:
    """Text, intent and slots, which are given as `wake me at [time : nine]`."""
    if "intent" not in registry and "slots" not in registry:
        raise UserError("the corpus has intents and slots; name a tasks file with `intent` or "
                        "`slots`: --tasks-file recipes/configs/tasks_slurp.yaml")
    # What is before the first slot; then label and phrase of each, and what follows it.
    bare, *rest = _SLOT.split(annotated)
    spans = []
    for label, phrase, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        spans.append((label, len(bare), len(bare) + len(phrase)))
        bare += phrase + after
    bare, slots = source.tidy(bare, spans)
    row: dict[str, Any] = {"text": " ".join(text.split()), "intent": intent, "slots": slots}
    if bare.lower() != row["text"].lower():  # case may differ, and places do not
        dropped["annotation dropped: slots of another text"].append(where)
        row["slots"] = None
    return {key: value for key, value in row.items() if key == "text" or key in registry}


def _span_label(raw: str, task: Task, where: str, dropped: Dropped) -> str | None:
    """The task's name for a label of OntoNotes, which may be the raw one; None, and counted, where
    SLUE does not score it."""
    label = raw if raw in task.labels else RAW_TO_COMBINED.get(raw, raw)
    if label is None:
        dropped[f"span dropped: label {raw} (not scored in SLUE)"].append(where)
    return label


Corpus = Literal["voxpopuli", "voxceleb", "hvb"]
_SLUE = {"voxpopuli": ("asapp/slue", "ner"), "voxceleb": ("asapp/slue", "sa"),
         "hvb": ("asapp/slue-phase-2", "da")}  # name on the hub, and task


@dataclass(frozen=True)
class _Tsv(Source):
    """A corpus in its original layout."""

    tsv: Path  # slue-<corpus>_<split>.tsv.
    # Folder with <split>/<id>.ogg (VoxPopuli) or <split>_raw/<id>.flac (VoxCeleb); without it: text
    # alone.
    audio: Path | None = None
    corpus: ClassVar[Corpus]
    columns: ClassVar[tuple[str, ...]] = ("id", "normalized_text")
    clip: ClassVar[str]  # its file in `audio`

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        for where, row in source.read_table(self.tsv, self.columns):
            audio = self.audio and self.audio / self.clip.format(**{"split": "", **row})
            yield where, _row(self.corpus, row, audio, where, registry, dropped)


class SlueVoxPopuli(_Tsv):
    """Entities of SLUE-VoxPopuli, original layout.

    In the seven combined labels, or where tasks have them (tasks_ontonotes.yaml) the 18 raw ones.
    """

    corpus = "voxpopuli"
    clip = "{split}/{id}.ogg"


class SlueVoxCeleb(_Tsv):
    """Sentiment of SLUE-VoxCeleb, original layout; the audio is cropped by the manifest."""

    corpus = "voxceleb"
    columns = ("id", "normalized_text", "start_second", "end_second")
    clip = "{split}_raw/{id}.flac"


@dataclass(frozen=True)
class SlueHub(Source):
    """A SLUE corpus from the hub (package datasets), whose agreement is to be accepted first."""

    # voxpopuli (entities), voxceleb (sentiment) or hvb (dialogue acts: tasks_hvb.yaml).
    corpus: Corpus
    split: str  # Split on the hub: train, validation or test.
    # A copy on this machine: the folder with the hub's parquet files of the corpus.
    path: Path | None = None
    with_audio: bool = True  # Whether audio is written beside the manifest; otherwise text alone.

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        if self.path is not None and not self.path.exists():  # or the hub is asked for this name
            raise UserError(f"--path {self.path} does not exist; correct it")
        name, config = ((str(self.path), "") if self.path else
                        (_SLUE[self.corpus][0], self.corpus))
        for i, row in enumerate(load_split(name, config, self.split)):
            clip = row.get("audio") or {}
            # Rows of dialogue acts have no id: the name of the clip has call, start and end in it.
            name = row.get("id") or Path(clip.get("path") or f"row-{i:05d}").stem
            # A copy may hold another data set.
            with source.as_published(where := f"{self.corpus}[{i}]"):
                audio = save_clip(clip, clips, name) if self.with_audio else None
                made = _row(self.corpus, {**row, "id": name}, audio, where, registry, dropped)
            yield where, made


def _row(corpus: Corpus, row: Mapping[str, Any], audio: Path | str | None, where: str,
         registry: TaskRegistry, dropped: Dropped) -> dict[str, Any]:
    """A row of the corpus as a manifest has it; who reads it finds what is wrong with it."""
    task = registry[_SLUE[corpus][1]]
    text = str(row["text" if corpus == "hvb" else "normalized_text"] or "")
    speaker = row.get("speaker_id")
    # The TSV files write `None`, pandas writes `nan` where a speaker is not known.
    values = {"id": str(row["id"]), "text": text, "corpus": f"slue-{corpus}", "language": "en",
              "speaker": str(speaker) if str(speaker) not in ("None", "nan", "") else None,
              "audio": audio and str(audio)}
    if corpus == "voxpopuli":
        return values | {"ner": _entities(row.get("normalized_ner", ""), where, task, dropped)}
    values["text"] = " ".join(text.split())  # no span counts its blanks
    if corpus == "hvb":
        acts = row.get("dialog_acts")
        return values | {"da": acts and [*dict.fromkeys(acts)]}  # some are given twice
    if audio:
        values |= {key: read_cell(key, row[f"{key}_second"], registry, where)
                   for key in ("start", "end")}
    return values | {"sa": row.get("sentiment") or None}


def _entities(value: Any, where: str, task: Task, dropped: Dropped) -> list[list[Any]] | None:
    """Entities of any layout as spans; None where there is no annotation."""
    if value == "":
        return None
    found = value
    try:
        # The TSV has `[['GPE', 37, 10]]`, `[]`, `None` or `nan` (none there) as text, the hub has
        # `{"type": [...], "start": [...], "length": [...]}`. Third is a length, not an end.
        if isinstance(value, Mapping):
            found = zip(value["type"], value["start"], value["length"], strict=True)
        elif isinstance(value, str):
            found = ast.literal_eval(value) if value != "nan" else None
        return [[label, int(start), int(start) + int(length)] for raw, start, length in found or ()
                if (label := _span_label(raw, task, where, dropped)) is not None]
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise UserError(f"{where}: normalized_ner: {str(value)[:80]!r} is not [[tag, start, "
                        f"length], ...] ({error})") from error


SOURCES: dict[str, type[Source]] = {
    "common-voice": CommonVoice, "librispeech": LibriSpeech, "slurp": Slurp,
    "speech-massive": SpeechMassive, "msner": Msner, "slue-voxpopuli": SlueVoxPopuli,
    "slue-voxceleb": SlueVoxCeleb, "slue-hub": SlueHub}
