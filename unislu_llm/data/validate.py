"""Check manifests to the end, say what is wrong and what is in them, and write mended copies.

To what :mod:`unislu_llm.data.row_reader` checks are added audio, segments, what rows share (texts,
audio), spans inside words, characters, and the pace of the speech.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unislu_llm.data.audio import MAX_SECONDS, SAMPLE_RATE, cancelled, crop, open_audio, read_frames
from unislu_llm.data.findings import UnreadFields
from unislu_llm.data.loading import read_segments
from unislu_llm.data.manifest import Ids, Row, iter_rows, moved
from unislu_llm.data.mending import CURLY, HIDDEN, Mender, misplaced
from unislu_llm.data.row_reader import Problem, RowReader
from unislu_llm.errors import UserError
from unislu_llm.io import atomic
from unislu_llm.tasks import Span, SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance

AudioCheck = Literal["none", "header", "full"]
"""Believe the manifest, read the headers, or decode the samples too."""

_SLACK = 0.2  # seconds between stated and measured length: durations are rounded
_BLOCK = 30  # seconds decoded at a time, so that memory does not follow the length of a recording
_FULL_SCALE = 0.999  # of the largest sample: from here on a sample may be clipped
_CLIPPED = 0.001  # share of clipped samples that is worth a look
_SILENT = 1e-3  # root mean square of near silence: -60 dB of full scale
_LEAK_WORDS = 4  # shorter texts ("yes", "thank you") are said again and again
_FAST, _SLOW = 35.0, 1.0  # characters a second; fast debates have 22
_SLOW_FROM = 5.0  # seconds: shorter clips may hold one word and a pause
_RARE, _RARE_FROM = 0.01, 200  # share of the most frequent label; annotations that it takes
_ODD = {"Cn": "is not assigned to any character", "Co": "is for private use",
        "\ufffd": "stands for a character that was lost when the text was decoded",
        **dict.fromkeys(map(chr, CURLY), "is a curly apostrophe (--fix makes it straight)")}
"""What speaks against a character or a Unicode category in a transcript."""


@dataclass
class Report:
    """What was found in some manifests."""

    manifests: Sequence[Path]
    summary: Summary  # of the rows without errors
    problems: list[Problem] = field(default_factory=list)  # errors and warnings, in order
    mended: list[str] = field(default_factory=list)  # what was mended in copies, a line each

    def status(self, strict: bool = False) -> int:
        """1 for errors (`strict`: or warnings), else 0."""
        return int(any(strict or not problem.warning for problem in self.problems))

    def page(self, max_warnings: int = 10) -> str:
        """Every error, `max_warnings` warnings of each kind and file, and the summary."""
        # An error is a row that training will not see; warnings may be one of each row.
        lines, shown = [], Counter[tuple[Path, str]]()
        for p in self.problems:
            shown[p.file, p.kind] += p.warning
            if not p.warning or shown[p.file, p.kind] <= max_warnings:
                lines.append(str(p))
        lines += [f"{file}: {n - max_warnings} more warnings of kind '{kind}' (--max-warnings {n} "
                  "shows them)" for (file, kind), n in shown.items() if n > max_warnings]
        warnings = shown.total()
        number = " and ".join(f"{n or 'no'} {name}{'s' * (n != 1)}" for n, name in (
            (len(self.problems) - warnings, "error"), (warnings, "warning")))
        return "\n".join([*lines, f"{number} in {', '.join(map(str, self.manifests))}",
                          *self.mended, "", str(self.summary)])


def validate(manifests: Sequence[Path], *, tasks_file: Path | None = None,
             audio: AudioCheck = "header", fix: Path | None = None) -> Report:
    """Check manifests, each to its end and against the others.

    `tasks_file` is a YAML list of tasks (default: named entities and sentiment); `fix` a file (for
    several manifests: a folder) for copies, whole or not at all, of which spans and characters are
    mended before rows are checked, without those that have errors.

    Raises UserError: no manifest, one missing or named twice, tasks that cannot be read, or a copy
    that is in the way or cannot be written.
    """
    # All before the first is read, which may take an hour.
    missing = [f" {path}" for path in manifests if not path.is_file()]
    if missing or not manifests:
        raise UserError(f"there is no manifest{','.join(missing)}; name JSON-lines files")
    if len({path.resolve() for path in manifests}) < len(manifests):
        raise UserError("a manifest is named twice; name each once")
    copies = {p: fix / p.name if len(manifests) > 1 else fix for p in manifests} if fix else {}
    if any(copy.exists() for copy in copies.values()) or len({*copies.values()}) < len(copies):
        raise UserError(f"--fix: {fix} or a file in it exists, or two manifests have one name; "
                        "name another")
    registry = TaskRegistry.from_yaml(tasks_file)
    report = Report(manifests, Summary(registry))
    checker = Checker(registry, audio, RowReader(registry))
    for path in manifests:
        copy = copies.get(path, path)
        try:
            # Copied as it is checked, so that a large corpus is read once.
            with atomic(copy, "wb") if copies else nullcontext() as handle:
                mender = Mender(path, registry)
                for row in checker.check(path, mender, bool(copies)):
                    report.problems += row.problems
                    if row.utterance is None:
                        report.summary.bad_rows += row.line > 0
                        continue
                    report.summary.add(row.utterance)
                    if handle is not None:
                        handle.write(moved(row.content, path.parent, copy.parent))
            report.mended += [f"{copy}: mended in {n} rows: {what}"
                              for what, n in mender.mended.items() if n]
        except OSError as error:
            raise UserError(f"{path} cannot be read, or --fix {fix} not be written ({error})"
                            ) from error
    return report


@dataclass
class Checker:
    """Checks manifests one after another, and against each other."""

    registry: TaskRegistry
    audio: AudioCheck
    reader: RowReader
    ids: Ids = field(default_factory=dict)
    seen: Ids = field(default_factory=dict)  # each audio and text, where first

    def check(self, path: Path, mender: Mender, mend: bool = False) -> Iterator[Row]:
        """Every row of a manifest, its duration measured; line 0 is for the file as a whole."""
        good, fields = Summary(self.registry), UnreadFields(str(path), self.registry)
        for row in iter_rows(path, self.registry, ids=self.ids, mend=mender if mend else dict):
            fields.add(row)
            checked = self._check(row, row.utterance, path) if row.utterance else row
            if checked.utterance:
                good.add(checked.utterance)
            yield checked
        unread = (Problem(field.name, "unread", field.told("--tasks-file"), line=field.line)
                  for field in fields.values())
        guess = [Problem("spans", "inside_word", f"all fit, if {mender.guess}; --fix FILE writes "
                         "them so")] if mender.guess and not mend else []
        yield Row(0, problems=tuple(p._replace(file=path)
                                    for p in (*guess, *unread, *_rare(good.labels))))

    def _check(self, row: Row, u: Utterance, path: Path) -> Row:
        problems, seconds, key = _check_audio(u, self.audio)
        if row.content.get("segments") is not None and all(p.warning for p in problems):
            # Audio that was not opened is believed to be long enough.
            end = math.inf if seconds is None else u.start + seconds
            pieces, found = read_segments(u, self.reader, end)
            problems += [*found, *(p for i, piece in enumerate(pieces)
                                   for p in _misplaced(piece, f"segments[{i}]."))]
        if seconds is not None and seconds > MAX_SECONDS:
            kind, what = ("long", "it is cut at its segments") if u.segments else (
                "too_long", "give it `start` and `end`, or `segments` to cut it at")
            problems.append(Problem("audio", kind, f"{seconds:.2f} s is longer than "
                                    f"{MAX_SECONDS:g} s; {what}"))
        good = all(p.warning for p in problems)
        if good:  # a row that is left out can neither leak nor repeat another
            problems += [*_characters(row.content), *_misplaced(u), *_pace(u, seconds),
                         *self._shared(u, key, path, row.line)]
        return replace(row, utterance=replace(u, duration=seconds) if good else None,
                       problems=tuple(p._replace(file=path, line=row.line) for p in problems))

    def _shared(self, u: Utterance, audio: str, path: Path, line: int) -> Iterator[Problem]:
        """The same audio or text in another manifest, and the same audio twice in one."""
        long_text = u.text if len(u.text.split()) >= _LEAK_WORDS else ""
        # Rows without audio, or with few words, share an empty key that says nothing.
        for what, key in (("audio", audio), ("text", long_text)):
            file, first = self.seen.setdefault(f"{what} {key}", (path, line))
            if key and file != path:
                yield Problem(what, "leak", f"the same {what} is in {file}:{first}; if one of the "
                              "manifests is there to test, take it out of the other")
            elif key and first != line and what == "audio":
                yield Problem(what, "same_row", f"line {first} has the same audio; keep one row")


def _rare(labels: Mapping[str, Counter[str]]) -> Iterator[Problem]:
    for task, counts in labels.items():
        [(most, top)] = counts.most_common(1)
        for label, n in counts.items():
            if counts.total() >= _RARE_FROM and n < _RARE * top:
                yield Problem(task, "rare_label", f"'{label}' is there {n} times, '{most}' {top} "
                              "times; annotate more, or leave the label out of the task")


def _characters(row: Mapping[str, Any]) -> Iterator[Problem]:
    texts = {"text": row["text"], "hypothesis": row.get("hypothesis")}
    texts |= {f"segments[{i}].text": s["text"] for i, s in enumerate(row.get("segments") or ())}
    for key, text in ((k, text) for k, text in texts.items() if text and not text.isascii()):
        odd = {c: why for c in text if (why := _ODD.get(c) or _ODD.get(unicodedata.category(c)))}
        odd |= dict.fromkeys(HIDDEN.findall(text), "is invisible (--fix takes it out)")
        named = [f"'{c}' (U+{ord(c):04X}) {why}" for c, why in odd.items()]
        if not unicodedata.is_normalized("NFC", text):
            named.append("letters and their marks are apart (Unicode NFD; --fix composes them)")
        if named:
            yield Problem(key, "characters", f"{'; '.join(named)}; look at the source")


def _misplaced(u: Utterance, place: str = "") -> Iterator[Problem]:
    spans = [(name, v) for name, value in u.labels.items() for v in value if isinstance(v, Span)]
    yield from (Problem(place + name, "inside_word", why) for name, span in spans
                if (why := misplaced(u.text, span.start, span.end)))


def _pace(u: Utterance, seconds: float | None) -> Iterator[Problem]:
    pace = len(u.text) / seconds if seconds else _SLOW
    if seconds and (pace > _FAST or (pace < _SLOW and seconds >= _SLOW_FROM)):
        doubt = "is the transcript whole?" if pace < _SLOW else "is it what is said there?"
        yield Problem("text", "pace", f"{pace:.2g} characters a second; {doubt}")


def _check_audio(u: Utterance, how: AudioCheck) -> tuple[list[Problem], float | None, str]:
    """What is wrong with the audio of a row; its seconds, None where not known; and a key that
    equal audio shares: a digest of the samples after a full check, else path and crop."""
    path, stated, faulty = u.audio, u.stated_seconds, "audio"
    if path is None:
        return [], None, ""
    key = f"{path.absolute()}|{u.start}|{u.end}"
    if how == "none":
        return [], stated, key
    doubts: dict[str, str] = {}
    try:
        frames, rate, channels = _header(path)
        faulty = "start" if u.start * rate >= frames else "end"
        first, last = crop(path, frames, rate, u.start, u.end)
        faulty, seconds = "audio", (last - first) / rate
        if stated is not None and abs(seconds - stated) > _SLACK:
            faulty = "end" if u.duration is None else "duration"
            raise UserError(f"the row says {stated:g} s, the audio has {seconds:.2f} s; correct "
                            "the row")
        if how == "full":
            key = _decode(path, first, last, doubts)
    except UserError as error:
        return [Problem(faulty, "audio", str(error))], stated, key
    if rate < SAMPLE_RATE:
        doubts["rate"] = f"{rate} Hz, nothing above {rate // 2} Hz; is there a source of 16 kHz?"
    if channels > 1:
        doubts.setdefault("channels", f"{channels} channels, which are averaged; has each its own "
                                      "speaker?")
    return [Problem("audio", kind, text) for kind, text in doubts.items()], seconds, key


@lru_cache(maxsize=1024)  # rows that are stretches of one recording follow one another
def _header(path: Path) -> tuple[int, int, int]:
    with open_audio(path) as sound:
        return sound.frames, sound.samplerate, sound.channels


def _decode(path: Path, first: int, last: int, doubts: dict[str, str]) -> str:
    """Digest of the frames `first` to `last`; what is to be doubted about them is added."""
    digest = hashlib.blake2b(digest_size=16)
    energies, mixed, clipped, count = np.zeros(1), 0.0, 0.0, 0
    with open_audio(path) as sound:
        step = _BLOCK * sound.samplerate
        for at in range(first, last, step):
            block = read_frames(path, sound, at, min(at + step, last))
            digest.update(np.ascontiguousarray(block).tobytes())
            energies = energies + np.square(block, dtype=np.float64).sum(axis=0)
            mixed += float(np.square(block.mean(axis=1), dtype=np.float64).sum())
            # A sample is clipped where its neighbours stand at full scale too: peaks do not.
            full = np.abs(block) >= _FULL_SCALE
            clipped += float((full[:-2] & full[1:-1] & full[2:]).sum())
            count += block.size
    # What models hear is checked, the mean of the channels, as :func:`to_mono` makes it.
    if why := cancelled(mixed, energies):
        mixed, doubts["channels"] = float(energies.max()), why
    level = math.sqrt(mixed * len(energies) / count)
    if clipped > _CLIPPED * count:
        doubts["clipping"] = f"{100 * clipped / count:.1f} % of the samples are clipped; listen"
    if level < _SILENT:
        how = f"{20 * math.log10(level):.0f} dB of full scale" if level else "zeros alone"
        doubts["silence"] = f"is nearly silent ({how}); listen, and drop it if nobody speaks"
    return digest.hexdigest()


class Summary:
    """What is in a manifest, on one page, counted row by row: hours, annotations by label."""

    def __init__(self, registry: TaskRegistry) -> None:
        self.read, self.rows, self.mute, self.bad_rows = 0, 0, 0, 0
        self._registry, self._n, self._seconds, self._longest = registry, Counter[str](), 0.0, 0.0
        self._corpora, self._speakers = Counter[str](), set[str]()
        # How often each label of a task is there.
        self.labels = {task.name: Counter(dict.fromkeys(task.labels, 0)) for task in registry}

    def add(self, u: Utterance) -> Utterance:
        """Count a row, and give it back."""
        seconds = u.stated_seconds if u.audio is not None else 0.0
        self.rows, self.mute = self.rows + 1, self.mute + (u.audio is None)
        self._n.update(pseudo=int(u.text_source is not None), words=len(u.text.split()),
                       unknown=int(seconds is None), bare=int(not u.labels))
        self._seconds += seconds or 0.0
        self._longest = max(self._longest, seconds or 0.0)
        self._corpora[u.corpus] += 1
        self._speakers.update({u.speaker} if u.speaker else ())
        for name in u.labels.keys() & self.labels.keys():
            value = u.labels[name]
            self.labels[name].update(label if isinstance(label, str) else label.label for label
                                     in ([value] if isinstance(value, str) else value))
            self._n.update({name: 1, f"no {name}": not value})
        return u

    def __str__(self) -> str:
        lines = {
            "rows": f"{self.rows + self.bad_rows} ({self.bad_rows} with errors, not counted below)",
            "text-only rows": self.mute,
            "pseudo-labels": f"{self._n['pseudo']} rows, transcribed by a recogniser",
            "audio": f"{self._seconds / 3600:.2f} h; longest {self._longest:.1f} s; "
                     f"{self._n['unknown']} rows of unknown length",
            "words": self._n["words"],
            "corpora": ", ".join(f"{name} {m}" for name, m in sorted(self._corpora.items())),
            "speakers": len(self._speakers) or "not given",
            **{task.name: f"{self._n[task.name]} rows"
               + f" ({self._n[f'no {task.name}']} of them empty)" * isinstance(task, SpanTask)
               + ": " + ", ".join(f"{label} {n}" for label, n in self.labels[task.name].items())
               for task in self._registry},
            "no annotation": self._n["bare"]}
        return "\n".join(f"{name:<15} {value}" for name, value in lines.items())
