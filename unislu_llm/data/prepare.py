"""From a corpus as it is published to a manifest: read, find the audio, voice what has none, count everything, write.

A source is a dataclass with `read`; :func:`prepare` does the rest and is the same for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from tabulate import tabulate

from unislu_llm.data import convert, slue
from unislu_llm.data.audio import SAMPLE_RATE, count_samples
from unislu_llm.data.manifest import write_manifest
from unislu_llm.data.summary import Summary
from unislu_llm.data.tally import Tally
from unislu_llm.data.voicing import MILD, VOICES, ConditionMix, Line, voice_utterances
from unislu_llm.data.voicing import Voice as Speaker
from unislu_llm.errors import UserError
from unislu_llm.tasks import SpanTask, TaskRegistry
from unislu_llm.unified import check_text
from unislu_llm.utterance import Utterance

MIXES: dict[str, ConditionMix] = {"mild": MILD, "multi": ConditionMix(), "clean": ConditionMix(clean=1.0)}
"""How voiced clips are degraded: mostly clean, multi-condition (3 to 20 dB), not at all."""


class Source(Protocol):
    """A corpus in some layout."""

    def read(self, registry: TaskRegistry, tally: Tally, clips: Path) -> Iterator[Utterance]:
        """Utterances, counted in `tally`; audio files that the source makes go into `clips`."""
        ...


@dataclass(frozen=True)
class SlueVoxPopuli:
    """SLUE-VoxPopuli, original layout: see :func:`unislu_llm.data.slue.read_voxpopuli`.

    Args:
        tsv: slue-voxpopuli_<split>.tsv.
        audio: Folder with <split>/<id>.ogg; without it: text alone.
        text: Which transcript, with its entities.
        labels: The seven combined labels, or the 18 raw ones (tasks: recipes/configs/tasks_ontonotes.yaml).
    """

    tsv: Path
    audio: Path | None = None
    text: slue.Variant = "normalized"
    labels: slue.LabelSet = "combined"

    def read(self, registry: TaskRegistry, tally: Tally, clips: Path) -> Iterator[Utterance]:
        """See :class:`Source`."""
        return slue.read_voxpopuli(self.tsv, _folder(self.audio), tally, text=self.text, labels=self.labels)


@dataclass(frozen=True)
class SlueVoxCeleb:
    """SLUE-VoxCeleb, original layout: see :func:`unislu_llm.data.slue.read_voxceleb`.

    Args:
        tsv: slue-voxceleb_<split>.tsv.
        audio: Folder with <split>_raw/<id>.flac; without it: text alone.
    """

    tsv: Path
    audio: Path | None = None

    def read(self, registry: TaskRegistry, tally: Tally, clips: Path) -> Iterator[Utterance]:
        """See :class:`Source`."""
        return slue.read_voxceleb(self.tsv, _folder(self.audio), tally)


@dataclass(frozen=True)
class SlueHub:
    """A SLUE corpus from the hub (package datasets): see :func:`unislu_llm.data.slue.read_hub`.

    Args:
        corpus: voxpopuli (entities), voxceleb (sentiment) or hvb (dialogue acts, tasks: recipes/configs/tasks_hvb.yaml).
        split: Split on the hub: train, validation or test.
        path: A copy on this machine instead: folder of save_to_disk, parquet file, or folder of the hub's parquet files.
        with_audio: Write the audio beside the manifest; otherwise text alone.
        text: Which transcript, with its entities (voxpopuli).
        labels: The seven combined labels, or the 18 raw ones (voxpopuli).
    """

    corpus: Literal["voxpopuli", "voxceleb", "hvb"]
    split: str
    path: Path | None = None
    with_audio: bool = True
    text: slue.Variant = "normalized"
    labels: slue.LabelSet = "combined"

    def read(self, registry: TaskRegistry, tally: Tally, clips: Path) -> Iterator[Utterance]:
        """See :class:`Source`."""
        rows = slue.load_hub(self.corpus, self.split, self.path)
        folder = clips if self.with_audio else None
        for u in slue.read_hub(rows, self.corpus, tally, clips=folder, text=self.text, labels=self.labels):
            if self.with_audio and u.audio is None:
                tally.drop("no audio in the row", u.source)
            else:
                yield u


@dataclass(frozen=True)
class Conll:
    """Own sentences in CoNLL/BIO text: see :func:`unislu_llm.data.convert.read_conll`.

    Args:
        file: A token and a tag a line, a blank line between sentences.
        audio: Folder of the audio files.
        audio_map: File of id<TAB>audio lines.
        token_column: Column of the token, from 0.
        tag_column: Column of the tag; negative from the end.
        task: The task of the tags.
    """

    file: Path
    audio: Path | None = None
    audio_map: Path | None = None
    token_column: int = 0
    tag_column: int = -1
    task: str = "ner"

    def read(self, registry: TaskRegistry, tally: Tally, clips: Path) -> Iterator[Utterance]:
        """See :class:`Source`."""
        return convert.read_conll(self.file, registry, tally, audio=_folder(self.audio), audio_map=self.audio_map, task=self.task,
                                  token_column=self.token_column, tag_column=self.tag_column)


@dataclass(frozen=True)
class Csv:
    """Own rows in CSV or TSV: see :func:`unislu_llm.data.convert.read_csv`.

    Args:
        file: Columns id, text, audio, start, end, speaker, ... and one for each task.
        audio: Folder of the audio files.
    """

    file: Path
    audio: Path | None = None

    def read(self, registry: TaskRegistry, tally: Tally, clips: Path) -> Iterator[Utterance]:
        """See :class:`Source`."""
        return convert.read_csv(self.file, registry, tally, audio=_folder(self.audio))


@dataclass(frozen=True)
class Voice:
    """Synthetic speech for rows without audio (needs the `voices` extra and the program flite).

    Args:
        voices: Names of voice variants (rates and pitches differ), drawn by id; default: all of them.
        mix: Room and noise: mild (mostly clean), multi (3 to 20 dB on seven clips in ten) or clean.
        seed: Another seed draws other voices and conditions.
        workers: Processes.
    """

    voices: tuple[str, ...] = ()
    mix: Literal["mild", "multi", "clean"] = "mild"
    seed: int = 0
    workers: int = 1


@dataclass
class Prepared:
    """What was read, left out and written; `str()` is a table.

    Args:
        out: the manifest. rows: what is in it. tally: what happened to the rows of the source.
    """

    out: Path
    rows: Summary
    tally: Tally = field(default_factory=Tally)

    @property
    def written(self) -> int:
        """Rows of the manifest."""
        return self.rows.rows

    @property
    def hours(self) -> float:
        """Length of the audio in hours."""
        return self.rows.seconds / 3600

    @property
    def labels(self) -> dict[str, Counter[str]]:
        """Labels by task."""
        return self.rows.labels

    def __str__(self) -> str:
        t = self.tally
        table: list[tuple[str, str]] = [("rows read", str(t.read))]
        table += [(f"rows dropped: {reason}", str(n)) for reason, n in t.dropped.most_common()]
        table += [("rows written", str(self.written)), ("  without audio", str(self.rows.text_only)),
                  ("hours of audio", f"{self.hours:.2f}")]
        table += [(f"spans dropped: {reason}", str(n)) for reason, n in t.spans.most_common()]
        table += [(f"note: {what}", str(n)) for what, n in t.notes.most_common()]
        for task in self.rows.registry:
            if annotated := self.rows.annotated[task.name]:
                table.append((f"{task.name}: rows annotated", str(annotated)))
                if isinstance(task, SpanTask) or task.multi:
                    table.append((f"{task.name}: annotated, none there", str(self.rows.empty[task.name])))
                counts = self.labels[task.name]
                table += [(f"  {task.name} {label}", str(counts[label])) for label in task.labels]
                table.append((f"  {task.name} total", str(counts.total())))
        named = [f"{reason}:\n  " + "\n  ".join(places) for reason, places in t.named.items() if reason in t.dropped]
        return "\n".join([f"{self.out}", tabulate(table, tablefmt="plain", disable_numparse=True, colalign=("left", "right"),
                                                  preserve_whitespace=True), *named])


def prepare(source: Source, out: str | Path, *, registry: TaskRegistry | None = None, voice: Voice | None = None,
            corpus: str | None = None, max_seconds: float = 30.0, speakers: tuple[Speaker, ...] = VOICES,
            exclude: Iterable[Utterance] = ()) -> Prepared:
    """Write the manifest of a source; audio paths are relative to it. It appears whole or not at all.

    Rows are dropped, counted and (the first ten of a reason) named when their audio is missing, cannot be read, does not
    contain the crop or is longer than `max_seconds`, when an id comes again, or when a marker stands in the text.

    Args:
        source: e.g. :class:`SlueVoxPopuli`. out: the manifest; clips that are made go to the folder `<out>_audio`.
        registry: the tasks that are known.
        voice: voice the rows without audio. Files that are there already are kept, so a stopped run goes on.
        corpus: name that the rows carry, in place of the source's.
        max_seconds: longest utterance, 30 s being what Whisper takes; 0: any.
        speakers: the voices that `voice` chooses from.
        exclude: rows with the id or the text (case and blanks apart) of one of these are dropped: what a model is tested on must
            not train it, as text either.

    Raises:
        UserError: the source cannot be read, all of its audio is missing, or no row is left.
    """
    out, registry, tally = Path(out), registry or TaskRegistry(), Tally()
    clips = out.parent / f"{out.stem}_audio"
    chosen = _speakers(voice, speakers) if voice else ()
    found = _unlike(exclude, list(_sound(source.read(registry, tally, clips), registry, tally)), tally)
    kept = _present(found, tally)
    if voice:
        kept = _voiced(kept, clips, voice, chosen)
    rows = [u if corpus is None else replace(u, corpus=corpus) for u in _measured(kept, max_seconds, tally)]
    if not rows:
        reasons = "; ".join(f"{reason}: {n}, e.g. {tally.named[reason][0]}" for reason, n in tally.dropped.items())
        raise UserError(f"no row of {tally.read} is left ({reasons or 'the source is empty'}); nothing is written")
    prepared = Prepared(out, Summary(registry), tally)
    for u in rows:
        prepared.rows.add(u)
    write_manifest(out, rows)
    return prepared


def _unlike(excluded: Iterable[Utterance], utterances: list[Utterance], tally: Tally) -> list[Utterance]:
    """Without those that have the id or the text of an excluded one."""
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    others = list(excluded)
    ids, texts = {u.id for u in others}, {plain(u.text) for u in others}
    kept = []
    for u in utterances:
        if u.id in ids or plain(u.text) in texts:
            tally.drop("in an excluded manifest", f"{u.source}: id '{u.id}'")
        else:
            kept.append(u)
    return kept


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise UserError(f"--audio {path} is not a folder; correct it, or leave it out for text alone")
    return path


def _sound(utterances: Iterable[Utterance], registry: TaskRegistry, tally: Tally) -> Iterator[Utterance]:
    """Without what no manifest may have: an id twice, a marker in the text."""
    ids: set[str] = set()
    for u in utterances:
        marker = check_text(u.text, registry)
        if u.id in ids:
            tally.drop("id comes again", u.source)
        elif marker:
            tally.drop(f"marker {marker} in the text", u.source)
        else:
            ids.add(u.id)
            yield u


def _present(utterances: list[Utterance], tally: Tally) -> list[Utterance]:
    """Without rows whose audio file is missing; rows of text stay."""
    missing = [u for u in utterances if u.audio is not None and not u.audio.is_file()]
    if missing and len(missing) == sum(u.audio is not None for u in utterances):
        raise UserError(f"{missing[0].source}: audio file {missing[0].audio} does not exist, and neither does any other "
                        f"({len(missing)} are missing); correct the folder of the audio, or leave it out for text alone")
    for u in missing:
        tally.drop("missing audio file", f"{u.source}: {u.audio}")
    gone = {u.id for u in missing}
    return [u for u in utterances if u.id not in gone]


def _measured(utterances: Iterable[Utterance], max_seconds: float, tally: Tally) -> Iterator[Utterance]:
    """With the length of the audio, to the millisecond."""
    for u in utterances:
        if u.audio is None:
            yield u
            continue
        try:
            seconds = count_samples(u.audio, u.start, u.end) / SAMPLE_RATE
        except UserError as error:
            tally.drop("audio cannot be read or has no such stretch", f"{u.source}: {error}")
            continue
        if 0 < max_seconds < seconds:
            tally.drop(f"longer than {max_seconds:g} s", f"{u.source}: {seconds:.2f} s")
        else:
            yield replace(u, duration=round(seconds, 3))


def _speakers(voice: Voice, speakers: tuple[Speaker, ...]) -> tuple[Speaker, ...]:
    known = {speaker.name: speaker for speaker in speakers}
    unknown = [name for name in voice.voices if name not in known]
    if unknown:
        raise UserError(f"--voices: '{unknown[0]}' is not one of {', '.join(known)}")
    return tuple(known[name] for name in voice.voices) or speakers


def _voiced(utterances: list[Utterance], clips: Path, voice: Voice, speakers: tuple[Speaker, ...]) -> list[Utterance]:
    lines = [Line(u.id, u.text) for u in utterances if u.audio is None]
    made = voice_utterances(lines, clips, voices=speakers, mix=MIXES[voice.mix], seed=voice.seed, workers=voice.workers)
    by_id = {clip.id: clip for clip in made}
    return [replace(u, audio=by_id[u.id].audio, speaker=by_id[u.id].speaker, start=0.0, end=None) if u.id in by_id else u
            for u in utterances]
