"""Audio longer than Whisper's 30 s: cut at pauses into windows, answered together by `understand`, and joined again.

A window ends 20 to 28 s after its start, in the middle of the longest pause there; what is left and fits into 30 s is the
last one. A model hears each window alone: an entity that a cut goes through is lost or halved, which an overlap can mend.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from unislu_llm.data import audio
from unislu_llm.decoding.generate import DecodeOptions, understand
from unislu_llm.decoding.probabilities import label_probabilities
from unislu_llm.decoding.stitching import Stitched, occurrences
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import LabelTask, SpanTask

_SMOOTH = 0.1  # seconds over which the level is averaged: a pause is longer than the gaps inside a word
_RANGE = 60.0  # dB below the loudest place where silence is silence, digital or not
_QUIET = 0.25  # of the way from the quiet places' level (10th percentile) to the loud ones' (90th) a pause ends


@dataclass(frozen=True)
class WindowOptions:
    """Where long audio is cut.

    Args:
        shortest, longest: seconds after a window's start between which it ends.
        overlap: seconds by which a window starts before the end of the one before it.
    """

    shortest: float = 20.0
    longest: float = 28.0
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.shortest < self.longest <= audio.MAX_SECONDS:
            raise UserError(f"windows must end between 1 s and {audio.MAX_SECONDS} s after their start, the shortest before the "
                            f"longest; found {self.shortest:g} s to {self.longest:g} s")
        if not 0.0 <= self.overlap <= self.shortest / 2:
            raise UserError(f"an overlap of windows must be 0 s to {self.shortest / 2:g} s, half of the shortest window; found "
                            f"{self.overlap:g} s")


def split(wave: Tensor, options: WindowOptions | None = None) -> list[tuple[int, int]]:
    """Windows that cover a recording, `(first, last)` samples at 16 kHz, `last` exclusive; none is longer than 30 s.

    Args:
        wave: `(samples,)`.
    """
    options = options or WindowOptions()
    shortest, longest, overlap = (int(s * audio.SAMPLE_RATE) for s in (options.shortest, options.longest, options.overlap))
    windows, start = [], 0
    while len(wave) - start > audio.MAX_SAMPLES:
        end = start + shortest + _pause(wave[start:start + longest].numpy(), shortest)
        windows.append((start, end))
        start = end - overlap
    return [*windows, (start, len(wave))]


def understand_long(model: SLUModel, files: Sequence[str | Path], tasks: Sequence[str] = ("ner", "sa"),
                    options: DecodeOptions | None = None, windows: WindowOptions | None = None, *, confidences: bool = False,
                    n_best: int = 1) -> list[dict[str, Any]]:
    """Transcript and annotations of audio files of any length; the windows of all files share batches.

    Args:
        model, files, tasks, options, confidences, n_best: see :func:`understand`; the last three hold for each window.
        windows: where to cut.

    Returns:
        A file of up to 30 s: exactly what :func:`understand` gives. A longer one, besides `file`:

        * `text`: the windows' transcripts joined; with an overlap, at the longest run of words that both have in it.
        * a span task: `[[label, phrase], ...]`, and in `spans[task]`, in the same order, `label`, `phrase`, `start_char` and
          `end_char` in `text` (both None for a phrase that is not in its window's transcript), `window`, and that window's
          `start_seconds` and `end_seconds`: the phrase was said between them. Of an entity that two windows found at one
          place one is kept; one whose words the joining left out is left out too.
        * a task with one label: the likeliest one by `probabilities[task]`, the mean of the windows' label probabilities
          weighted by their seconds. With several labels: those of any window.
        * `problems`: each with its window, `no_end in window 2`, counted from 0.
        * `windows`: of each its `start` and `end` in seconds, `text_start` and `text_end` in `text`, and its own answer.

    Raises:
        UserError: as :func:`understand`.
    """
    windows = windows or WindowOptions()
    for name in tasks:
        model.codec.registry[name]  # an unknown task is named before anything is read
    with tempfile.TemporaryDirectory(prefix="unislu-") as folder:
        parts = [list(_parts(Path(f), Path(folder) / str(i), windows)) for i, f in enumerate(files)]
        found = iter(understand(model, [path for of_file in parts for path, _ in of_file], tasks, options,
                                confidences=confidences, n_best=n_best))
        answers = [[next(found) for _ in of_file] for of_file in parts]
        results = []
        for file, of_file, of_windows in zip(files, parts, answers, strict=True):
            borders = [span for _, span in of_file if span]
            if not borders:
                results.append(of_windows[0])
                continue
            _complete(model, [path for path, _ in of_file], of_windows, tasks, (options or DecodeOptions()).batch_size)
            results.append({"file": str(file), **_combine(model, borders, of_windows, tasks)})
    return results


def is_long(file: str | Path) -> bool:
    """Whether a file is longer than 30 s, from its header.

    Raises:
        UserError: it cannot be read.
    """
    audio.count_samples(file)
    info = soundfile.info(str(file))
    return info.frames / info.samplerate > audio.MAX_SECONDS


def _parts(file: Path, stem: Path, options: WindowOptions) -> Iterator[tuple[Path, tuple[int, int] | None]]:
    """Files of up to 30 s that make up a file: itself, or its windows (as floats, so nothing is lost) and their samples."""
    if not is_long(file):
        yield file, None
        return
    wave = audio.load(file)
    for i, (first, last) in enumerate(split(wave, options)):
        path = stem.with_name(f"{stem.name}-{i}.wav")
        soundfile.write(path, wave[first:last].numpy(), audio.SAMPLE_RATE, subtype="FLOAT")
        yield path, (first, last)


def _complete(model: SLUModel, paths: Sequence[Path], answers: Sequence[dict[str, Any]], tasks: Sequence[str],
              batch_size: int) -> None:
    """Give windows the label probabilities that they lack: without the grammar they have none."""
    for name in tasks:
        task = model.codec.registry[name]
        lacking = [i for i, a in enumerate(answers) if name not in a.get("probabilities", {})]
        if not lacking or not isinstance(task, LabelTask) or task.multi:
            continue
        was_training = model.training
        model.eval()
        try:
            waves, texts = [audio.load(paths[i]) for i in lacking], [answers[i]["text"] for i in lacking]
            each = label_probabilities(model, waves, texts, name, batch_size=batch_size)
        finally:
            model.train(was_training)
        for i, values in zip(lacking, each.tolist(), strict=True):
            given = {label: round(value, 6) for label, value in zip(task.labels, values, strict=True)}
            answers[i]["probabilities"] = {**answers[i].get("probabilities", {}), name: given}


def _combine(model: SLUModel, borders: Sequence[tuple[int, int]], answers: Sequence[dict[str, Any]],
             tasks: Sequence[str]) -> dict[str, Any]:
    """The answer for a file from those for its windows."""
    stitched = Stitched([a["text"] for a in answers], list(_shares(borders)))
    times = [(round(first / audio.SAMPLE_RATE, 3), round(last / audio.SAMPLE_RATE, 3)) for first, last in borders]
    result: dict[str, Any] = {"text": stitched.text, "problems": []}
    spans: dict[str, Any] = {}
    probabilities: dict[str, dict[str, float]] = {}
    for name in tasks:
        task = model.codec.registry[name]
        given = [a[name] for a in answers]
        answered = any(value is not None for value in given)
        if isinstance(task, SpanTask):
            spans[name] = _spans(given, stitched, times)
            result[name] = [[s["label"], s["phrase"]] for s in spans[name]] if answered else None
        elif task.multi:
            held = {label for value in given for label in value or ()}
            result[name] = [label for label in task.labels if label in held] if answered else None
        else:
            weights = [last - first for first, last in borders]
            probabilities[name] = {label: round(float(np.average([a["probabilities"][name][label] for a in answers],
                                                                 weights=weights)), 6) for label in task.labels}
            result[name] = max(task.labels, key=probabilities[name].__getitem__)
    result["problems"] = [f"{p} in window {i}" for i, a in enumerate(answers) for p in a["problems"]]
    result |= {"spans": spans, "probabilities": probabilities}
    result["windows"] = [
        {"start": start, "end": end, "text_start": piece.at, "text_end": piece.at + piece.high - piece.low,
         **{key: value for key, value in answer.items() if key != "file"}}
        for (start, end), piece, answer in zip(times, stitched.pieces, answers, strict=True)]
    return result


def _shares(borders: Sequence[tuple[int, int]]) -> Iterator[tuple[float, float]]:
    """Of each two neighbours, what share of either both heard."""
    for (start, end), (after, last) in pairwise(borders):
        yield (end - after) / (end - start), (end - after) / (last - after)


def _spans(answers: Sequence[Any], stitched: Stitched, times: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before: set[tuple[str, int, int]] = set()  # of earlier windows
    for window, entities in enumerate(answers):
        seen: Counter[str] = Counter()
        here: set[tuple[str, int, int]] = set()
        for label, phrase in entities or ():
            places = occurrences(phrase, stitched.pieces[window].text)
            start = end = None
            if places:
                # The second time that a phrase is named, its second occurrence is meant.
                where = stitched.place(window, *places[min(seen[phrase], len(places) - 1)])
                seen[phrase] += 1
                if where is None or (label, *where) in before:
                    continue
                here.add((label, *where))
                start, end = where
                phrase = stitched.text[start:end]  # the next window's spelling, where the overlap was joined
            found.append({"label": label, "phrase": phrase, "start_char": start, "end_char": end, "window": window,
                          "start_seconds": times[window][0], "end_seconds": times[window][1]})
        before |= here
    return found


def _pause(wave: np.ndarray, earliest: int) -> int:
    """Samples from `earliest` to the middle of the longest pause after it; to the quietest place where there is no pause."""
    hop = audio.HOP
    frames = len(wave) // hop
    power = (wave[:frames * hop].reshape(frames, hop).astype(np.float64) ** 2).mean(axis=1)
    width = int(_SMOOTH * audio.MEL_RATE)
    power = np.convolve(np.pad(power, (width // 2, width - 1 - width // 2), mode="edge"), np.ones(width) / width, "valid")
    level = 10 * np.log10(np.maximum(power, max(power.max() * 10 ** (-_RANGE / 10), 1e-20)))
    low, high = np.percentile(level, (10, 90))
    region = level[earliest // hop:]
    quiet = np.concatenate([[False], region <= low + _QUIET * (high - low), [False]])
    starts, ends = np.flatnonzero(np.diff(quiet.astype(np.int8)) == 1), np.flatnonzero(np.diff(quiet.astype(np.int8)) == -1)
    if not len(starts):
        return int(region.argmin()) * hop
    longest = int((ends - starts).argmax())
    return int(starts[longest] + ends[longest]) // 2 * hop
