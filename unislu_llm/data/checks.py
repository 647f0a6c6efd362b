"""Every check on manifests: errors (a row is not to be trained on) and warnings (worth a look).

What a row says is checked by :mod:`unislu_llm.data.row_reader`; here are added its audio, what rows
share (texts, audio), the segments of long recordings, the characters, and the pace of the speech.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from unislu_llm.data.audio import MAX_SECONDS, SAMPLE_RATE
from unislu_llm.data.audio_file import crop, open_audio, read_frames
from unislu_llm.data.long_rows import read_segments
from unislu_llm.data.manifest import Ids, Row, iter_rows
from unislu_llm.data.row_reader import Problem, RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

AudioCheck = Literal["none", "header", "full"]
"""Believe the manifest, read the headers, or decode the samples too."""

_SLACK = 0.2  # seconds between stated and measured length: durations are rounded
_BLOCK = 30  # seconds decoded at a time, so that memory does not follow the length of a recording
_FULL_SCALE = 0.999  # of the largest sample: from here on a sample may be clipped
_CLIPPED = 0.001  # share of clipped samples that is worth a look
_SILENT = 1e-3  # root mean square of near silence: -60 dB of full scale
_SUFFIXES = {"WAV": ("wav", "wave"), "WAVEX": ("wav", "wave"), "FLAC": ("flac",),
             "OGG": ("ogg", "oga", "opus"), "MP3": ("mp3",), "MPEG": ("mp3",),
             "AIFF": ("aif", "aiff", "aifc"), "AU": ("au", "snd")}  # others are not judged
_LEAK_WORDS = 4  # shorter texts ("yes", "thank you") are said again and again
_FAST, _SLOW = 7.0, 0.2  # words a second; fast debates have 4
_FAST_LETTERS, _SLOW_LETTERS = 35.0, 1.0  # characters a second, for scripts without blanks
_SLOW_FROM = 5.0  # seconds: shorter clips may hold one word and a pause
_RARE, _RARE_FROM = 0.01, 200  # share of the most frequent label; annotations that it takes
_ODD = {"Cn": "is not assigned to any character", "Co": "is for private use",
        "\ufffd": "stands for a character that was lost when the text was decoded",
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff", "is invisible")}
"""What speaks against a character or a Unicode category in a transcript."""


class Checker:
    """Checks manifests one after another, and against each other."""

    def __init__(self, registry: TaskRegistry, audio: AudioCheck = "header") -> None:
        self._registry, self._audio = registry, audio
        self._reader = RowReader(registry)
        self._ids: Ids = {}
        # Where an audio or a text was seen first, and the text of that row.
        self._seen: dict[tuple[str, str], tuple[Path, int, str]] = {}

    def check(self, path: Path) -> Iterator[Row]:
        """Every row of a manifest, its duration measured; line 0 is for the file as a whole."""
        good: list[Utterance] = []
        for row in iter_rows(path, self._registry, ids=self._ids):
            checked = self._check(row, row.utterance, path) if row.utterance else row
            good += [checked.utterance] if checked.utterance else []
            yield checked
        yield Row(0, problems=tuple(p._replace(file=path) for p in self._rare(good)))

    def _check(self, row: Row, u: Utterance, path: Path) -> Row:
        problems, seconds, key = _check_audio(u, self._audio)
        if row.content.get("segments") is not None and all(p.warning for p in problems):
            # Audio that was not opened is believed to be long enough.
            end = math.inf if seconds is None else u.start + seconds
            problems += read_segments(u, self._reader, end)[1]
        if seconds is not None and seconds > MAX_SECONDS:
            cut = ("too_long", "give it `start` and `end`, or `segments` to cut it at")
            kind, what = cut if u.segments is None else ("long", "it is cut at its segments")
            problems.append(Problem("audio", kind, f"{seconds:.2f} s is longer than "
                                    f"{MAX_SECONDS:g} s; {what}"))
        good = all(p.warning for p in problems)
        if good:  # a row that is left out can neither leak nor repeat another
            problems += [*_characters(u), *_pace(u, seconds), *self._shared(u, key, path, row.line)]
        return replace(row, utterance=replace(u, duration=seconds) if good else None,
                       problems=tuple(p._replace(file=path, line=row.line) for p in problems))

    def _shared(self, u: Utterance, audio: str, path: Path, line: int) -> Iterator[Problem]:
        """The same audio in an earlier row, and the same audio or text in another manifest."""
        long_text = u.text if len(u.text.split()) >= _LEAK_WORDS else ""
        for what, key in (("audio", audio), ("text", long_text)):
            # Rows without audio, or with few words, share an empty key that says nothing.
            file, first, other = self._seen.setdefault((what, key), (path, line, u.text))
            if key and file != path:
                yield Problem(what, "leak", f"the same {what} is in {file}:{first}; if one of the "
                              "manifests is there to test, take it out of the other")
            elif key and first != line and what == "audio":
                same = "the same text" if other == u.text else "another text"
                yield Problem(what, "same_row", f"line {first} has the same audio and {same}; keep "
                              "the row that is right")

    def _rare(self, utterances: Sequence[Utterance]) -> Iterator[Problem]:
        for task in self._registry:
            counts = label_counts(utterances, task.name)
            most, top = counts.most_common(1)[0] if counts else ("", 0)
            for label in task.labels:
                if counts.total() >= _RARE_FROM and counts[label] < _RARE * top:
                    yield Problem(task.name, "rare_label", f"'{label}' is there {counts[label]} "
                                  f"times, '{most}' {top} times; annotate more, or leave the label "
                                  "out of the task")


def label_counts(utterances: Sequence[Utterance], task: str) -> Counter[str]:
    """How often each label of a task is there."""
    values = [u.labels[task] for u in utterances if task in u.labels]
    return Counter(label if isinstance(label, str) else label.label for value in values
                   for label in ([value] if isinstance(value, str) else value))


def _characters(u: Utterance) -> Iterator[Problem]:
    texts = {"text": u.text}
    texts |= {f"segments[{i}].text": s["text"] for i, s in enumerate(u.segments or ())}
    for field, text in texts.items():
        odd = {} if text.isascii() else {
            c: why for c in text if (why := _ODD.get(c) or _ODD.get(unicodedata.category(c)))}
        if odd:
            named = "; ".join(f"'{c}' (U+{ord(c):04X}) {why}" for c, why in odd.items())
            yield Problem(field, "characters", f"{named}; look at the source")


def _pace(u: Utterance, seconds: float | None) -> Iterator[Problem]:
    if not seconds:
        return
    words, letters = len(u.text.split()) / seconds, len(u.text) / seconds
    if words > _FAST or letters > _FAST_LETTERS:
        yield Problem("text", "pace", f"{words:.1f} words and {letters:.0f} characters a second; "
                      "text and audio hardly belong together")
    elif seconds >= _SLOW_FROM and words < _SLOW and letters < _SLOW_LETTERS:
        yield Problem("text", "pace", f"{len(u.text.split())} words in {seconds:.1f} s; is the "
                      "transcript whole?")


def _check_audio(u: Utterance, how: AudioCheck) -> tuple[list[Problem], float | None, str]:
    """What is wrong with the audio of a row; never raises.

    Returns:
        Problems; seconds of the audio, None where that is not known; and a key that equal audio
        shares: a digest of the samples after a full check, else path and crop; empty for text.
    """
    path, stated, frames = u.audio, u.stated_seconds, 0
    if path is None:
        return [], None, ""
    key = f"{path.absolute()}|{u.start}|{u.end}"
    if how == "none":
        return [], stated, key
    try:
        frames, rate, channels, form = _header(path)
        first, last = crop(path, frames, rate, u.start, u.end)
    except (UserError, OSError, ValueError) as error:
        if frames:
            field = "start" if u.start * rate >= frames else "end"
            return [Problem(field, "crop", str(error))], stated, key
        kind = "audio_missing" if "does not exist" in str(error) else "audio"
        return [Problem("audio", kind, f"{error}; correct the path or the file")], stated, key
    seconds = (last - first) / rate
    if stated is not None and abs(seconds - stated) > _SLACK:
        field = "end" if u.duration is None else "duration"
        return [Problem(field, "length", f"the row says {stated:g} s, the audio has {seconds:.2f} "
                        "s; correct the row")], seconds, key
    suffix, doubts = path.suffix[1:].lower(), {}
    if rate < SAMPLE_RATE:
        doubts["rate"] = f"{rate} Hz, nothing above {rate // 2} Hz; is there a source of 16 kHz?"
    if channels > 1:
        doubts["channels"] = f"{channels} channels, which are averaged; has each its own speaker?"
    if suffix not in _SUFFIXES.get(form, suffix):
        doubts["suffix"] = f"is {form} by its content and '.{suffix}' by its name; rename it"
    problems = []
    if how == "full":
        try:
            key = _decode(path, first, last, doubts)
        except UserError as error:
            bad = "NaN" in str(error) or "samples reach" in str(error)
            problems.append(Problem("audio", "samples" if bad else "audio", str(error)))
    problems += [Problem("audio", kind, text) for kind, text in doubts.items()]
    return problems, seconds, key


@lru_cache(maxsize=1024)  # rows that are stretches of one recording follow one another
def _header(path: Path) -> tuple[int, int, int, str]:
    with open_audio(path) as sound:
        return sound.frames, sound.samplerate, sound.channels, sound.format


def _decode(path: Path, first: int, last: int, doubts: dict[str, str]) -> str:
    """Digest of the frames `first` to `last`; what is to be doubted about them is added."""
    digest = hashlib.blake2b(digest_size=16)
    energy = clipped = count = 0.0
    with open_audio(path) as sound:
        step = _BLOCK * sound.samplerate
        for at in range(first, last, step):
            block = read_frames(path, sound, at, min(at + step, last))
            digest.update(np.ascontiguousarray(block).tobytes())
            energy += float(np.square(block, dtype=np.float64).sum())
            # A sample is clipped where its neighbours stand at full scale too: peaks do not.
            full = np.abs(block) >= _FULL_SCALE
            clipped += float((full[:-2] & full[1:-1] & full[2:]).sum())
            count += block.size
    level = math.sqrt(energy / count)
    if clipped > _CLIPPED * count:
        doubts["clipping"] = f"{100 * clipped / count:.1f} % of the samples are clipped; listen"
    if level < _SILENT:
        how = f"{20 * math.log10(level):.0f} dB of full scale" if level else "zeros alone"
        doubts["silence"] = f"is nearly silent ({how}); listen, and drop it if nobody speaks"
    return digest.hexdigest()
