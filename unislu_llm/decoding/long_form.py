"""Audio longer than Whisper's 30 s: cut at pauses into windows, answered, and joined again.

A window ends 20 to 28 s after its start, in the middle of the longest pause there; what is left
and fits into 30 s is the last one. A model hears each window alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from unislu_llm.data import audio
from unislu_llm.decoding.answer import Answer
from unislu_llm.scoring.text import places_of, without_blanks
from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance

# Samples after a window's start between which it ends.
SHORTEST, LONGEST = 20 * audio.SAMPLE_RATE, 28 * audio.SAMPLE_RATE
_SMOOTH = 0.1  # seconds over which the level is averaged, longer than the gaps inside a word
_RANGE = 60.0  # dB below the loudest place where silence is silence, digital or not
_QUIET = 0.25  # of the way from quiet places' level (10th percentile) to loud ones' (90th)


def split(wave: Tensor) -> list[tuple[int, int]]:
    """Windows of up to 30 s that make up a recording `(samples,)`: first sample of each, one behind
    its last."""
    found, start = [], 0
    while len(wave) - start > audio.MAX_SAMPLES:
        end = start + SHORTEST + _pause(wave[start:start + LONGEST].numpy())
        found.append((start, end))
        start = end
    return [*found, (start, len(wave))]


def _pause(wave: np.ndarray) -> int:
    """Samples behind `SHORTEST` to the middle of the longest pause after it, or, where there is
    none, to the quietest place."""
    hop = audio.HOP
    frames = len(wave) // hop
    power = (wave[:frames * hop].reshape(frames, hop).astype(np.float64) ** 2).mean(axis=1)
    width = int(_SMOOTH * audio.MEL_RATE)
    edges = (width // 2, width - 1 - width // 2)
    power = np.convolve(np.pad(power, edges, mode="edge"), np.ones(width) / width, "valid")
    # In digital silence the level would be minus infinity, and the percentiles with it.
    floor = max(power.max() * 10 ** (-_RANGE / 10), 1e-20)
    level = 10 * np.log10(np.maximum(power, floor))
    low, high = np.percentile(level, (10, 90))
    region = level[SHORTEST // hop:]
    # Steps up and down of "quiet", with loud places assumed outside, bracket the pauses.
    quiet = np.concatenate([[False], region <= low + _QUIET * (high - low), [False]])
    steps = np.diff(quiet.astype(np.int8))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    if not len(starts):
        return int(region.argmin()) * hop
    longest = int((ends - starts).argmax())
    return int(starts[longest] + ends[longest]) // 2 * hop


def windows(utterance: Utterance) -> list[Utterance]:
    """The utterances of up to 30 s that make up a recording: itself, or its windows."""
    if utterance.audio is None or utterance.seconds <= audio.MAX_SECONDS:
        return [utterance]
    borders = split(audio.load(utterance.audio, utterance.start, utterance.end,
                               samples=utterance.samples))
    # Crops are cut off to whole samples: half a sample more is safe from rounding.
    parts = [replace(utterance, start=utterance.start + (first + 0.5) / audio.SAMPLE_RATE,
                     end=utterance.start + (last + 0.5) / audio.SAMPLE_RATE,
                     duration=(last - first) / audio.SAMPLE_RATE) for first, last in borders]
    parts[0] = replace(parts[0], start=utterance.start)
    parts[-1] = replace(parts[-1], end=utterance.end)
    return parts


def join(registry: TaskRegistry, parts: Sequence[Utterance], answers: Sequence[Answer]) -> Answer:
    """The answer to a recording from those to its windows.

    Transcripts are joined with a blank where their script has it. Entities get their places in the
    joined one (`spans`, by task; None where there is none). Label sets are united. A single label
    has the highest probability, averaged over windows by length; one without it counts as sure.
    """
    offset = parts[0].start
    times = [(round(u.start - offset, 3), round(u.start - offset + u.seconds, 3)) for u in parts]
    text, begins = "", list[int]()
    for said in (a.transcript for a in answers):
        text += " " * (bool(text and said) and not all(map(without_blanks, (text[-1:], said[:1]))))
        begins.append(len(text))
        text += said
    joined = Answer(text, times[-1][1])
    for name in answers[0].outputs:
        task, given = registry[name], [a.outputs[name] for a in answers]
        if isinstance(task, SpanTask):
            spans = joined.spans[name] = _spans(given, answers, begins, times)
            joined.outputs[name] = tuple((s["label"], s["phrase"]) for s in spans)
        elif task.multi:
            held = {label for value in given for label in value or ()}
            joined.outputs[name] = tuple(label for label in task.labels if label in held)
        else:
            mean = _mean(task, answers, times)
            joined.outputs[name] = max(task.labels, key=mean.__getitem__)
            if all(name in a.probabilities or a.no_speech for a in answers):
                joined.probabilities[name] = mean
        if all(value is None for value in given):
            joined.outputs[name] = None
    for key in answers[0].problems:
        joined.problems[key] = tuple(f"{p} in window {i}" for i, a in enumerate(answers)
                                     for p in a.problems[key])
        joined.n_tokens[key] = sum(a.n_tokens[key] for a in answers)
    joined.warnings = tuple(f"{w} in window {i}" for i, a in enumerate(answers)
                            for w in ("no speech",) * a.no_speech + a.warnings)
    joined.windows = [
        {"start": start, "end": end, "text_start": begin,
         "text_end": begin + len(answer.transcript), **answer.to_dict()}
        for (start, end), begin, answer in zip(times, begins, answers, strict=True)]
    return joined.refused(registry) if all(a.no_speech for a in answers) else joined


def _mean(task: LabelTask, answers: Sequence[Answer],
          times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Probability of each label, the mean over the windows that have an answer."""
    votes: list[tuple[float, dict[Any, float]]] = [
        (end - start, a.probabilities.get(task.name) or {a.outputs[task.name]: 1.0})
        for a, (start, end) in zip(answers, times, strict=True)
        if a.outputs[task.name] is not None]
    total = sum(weight for weight, _ in votes) or 1.0
    return {label: round(sum(w * vote.get(label, 0.0) for w, vote in votes) / total, 6)
            for label in task.labels}


def _spans(given: Sequence[Any], answers: Sequence[Answer], begins: Sequence[int],
           times: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for window, entities in enumerate(given):
        seen: Counter[str] = Counter()
        for label, phrase in entities or ():
            places = occurrences(phrase, answers[window].transcript)
            start = end = None
            if places:
                # Entities come in the order in which they are said: the second time that a phrase
                # is named, its second occurrence is meant.
                start, end = (begins[window] + place
                              for place in places[min(seen[phrase], len(places) - 1)])
                seen[phrase] += 1
            found.append({"label": label, "phrase": phrase, "start_char": start, "end_char": end,
                          "window": window, "start_seconds": times[window][0],
                          "end_seconds": times[window][1]})
    return found


def occurrences(phrase: str, text: str) -> list[tuple[int, int]]:
    """Where a phrase stands in a text: as whole words; where it never does, anywhere."""
    anywhere = re.finditer(re.escape(phrase) if phrase else r"(?!)", text)
    return list(places_of(phrase, text)) or [match.span() for match in anywhere]
