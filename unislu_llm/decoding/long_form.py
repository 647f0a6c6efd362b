"""Audio longer than Whisper's 30 s: cut at pauses into windows, answered, and joined again.

A window ends 20 to 28 s after its start, in the middle of the longest pause there; what is left
and fits into 30 s is the last one. A model hears each window alone: an entity that a cut goes
through is lost or halved, which an overlap can mend.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from unislu_llm.data import audio
from unislu_llm.decoding.answer import Answer
from unislu_llm.errors import UserError
from unislu_llm.scoring.text import places_of, without_blanks, word_spans
from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance

# Samples after a window's start between which it ends.
SHORTEST, LONGEST = 20 * audio.SAMPLE_RATE, 28 * audio.SAMPLE_RATE
_SMOOTH = 0.1  # seconds over which the level is averaged, longer than the gaps inside a word
_RANGE = 60.0  # dB below the loudest place where silence is silence, digital or not
_QUIET = 0.25  # of the way from quiet places' level (10th percentile) to loud ones' (90th)


def split(wave: Tensor, overlap: float = 0.0) -> list[tuple[int, int]]:
    """Windows of up to 30 s that cover a recording `(samples,)`, each `overlap` seconds of the one
    before it: first sample of each, one behind its last. Raises UserError: an overlap that is
    negative or more than half of the shortest window."""
    _check(overlap)
    found, start = [], 0
    while len(wave) - start > audio.MAX_SAMPLES:
        end = start + SHORTEST + _pause(wave[start:start + LONGEST].numpy())
        found.append((start, end))
        start = end - int(overlap * audio.SAMPLE_RATE)
    return [*found, (start, len(wave))]


def _check(overlap: float) -> None:
    most = SHORTEST / 2 / audio.SAMPLE_RATE
    if not 0.0 <= overlap <= most:
        raise UserError(f"an overlap of windows must be 0 to {most:g} s, found {overlap:g}")


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


def windows(utterance: Utterance, overlap: float = 0.0) -> list[Utterance]:
    """The utterances of up to 30 s that make up a recording: itself, or its windows; raises as
    :func:`split`."""
    _check(overlap)  # also where nothing is cut
    if utterance.audio is None or utterance.seconds <= audio.MAX_SECONDS:
        return [utterance]
    borders = split(audio.load(utterance.audio, utterance.start, utterance.end,
                               samples=utterance.samples), overlap)
    # Crops are cut off to whole samples: half a sample more is safe from rounding.
    parts = [replace(utterance, start=utterance.start + (first + 0.5) / audio.SAMPLE_RATE,
                     end=utterance.start + (last + 0.5) / audio.SAMPLE_RATE,
                     duration=(last - first) / audio.SAMPLE_RATE) for first, last in borders]
    parts[0] = replace(parts[0], start=utterance.start)
    parts[-1] = replace(parts[-1], end=utterance.end)
    return parts


def join(registry: TaskRegistry, parts: Sequence[Utterance], answers: Sequence[Answer]) -> Answer:
    """The answer to a recording from those to its windows.

    Entities get their places in the joined transcript (`spans`, by task; None where there is none);
    one that two windows heard in an overlap stands once. Label sets are united. A single label has
    the highest probability, averaged over windows by length; one without it counts as sure.
    """
    offset = parts[0].start
    times = [(round(u.start - offset, 3), round(u.start - offset + u.seconds, 3)) for u in parts]
    shares = [((end - after) / (end - start), (end - after) / (last - after))
              for (start, end), (after, last) in pairwise(times)]
    stitched = Stitched([a.transcript for a in answers], shares)
    joined = Answer(stitched.text, times[-1][1])
    for name in answers[0].outputs:
        task, given = registry[name], [a.outputs[name] for a in answers]
        if isinstance(task, SpanTask):
            spans = joined.spans[name] = _spans(given, stitched, times)
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
        {"start": start, "end": end, "text_start": piece.at,
         "text_end": piece.at + piece.high - piece.low, **answer.to_dict()}
        for (start, end), piece, answer in zip(times, stitched.pieces, answers, strict=True)]
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


def _spans(given: Sequence[Any], stitched: Stitched,
           times: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    tails: Counter[tuple[str, str]] = Counter()  # of the window before, in an overlap
    for window, entities in enumerate(given):
        seen: Counter[str] = Counter()
        piece, before, said = stitched.pieces[window], list(found), tails
        tails = Counter()
        for label, phrase in entities or ():
            places = occurrences(phrase, piece.text)
            start = end = None
            if places:
                # Entities come in the order in which they are said: the second time that a phrase
                # is named, its second occurrence is meant.
                own = places[min(seen[phrase], len(places) - 1)]
                where, key = stitched.place(window, *own), (label, phrase.lower())
                seen[phrase] += 1
                # Where the texts of an overlap could not be joined, it stands in both.
                tails[key] += own[0] >= piece.tail
                if where is None or (own[1] <= piece.head and said[key]):
                    said[key] -= where is not None
                    continue
                start, end = where
                if any(s["label"] == label and s["start_char"] is not None and
                       s["start_char"] < end and start < s["end_char"] for s in before):
                    continue
                phrase = stitched.text[start:end]  # as the next window spells it, in an overlap
            found.append({"label": label, "phrase": phrase, "start_char": start, "end_char": end,
                          "window": window, "start_seconds": times[window][0],
                          "end_seconds": times[window][1]})
    return found


# ---- one text of many windows


@dataclass
class Piece:
    """A window's transcript, of which `text[low:high]` stands in the joined one."""

    text: str
    low: int
    high: int
    words: list[tuple[int, int]]  # start and end of each word of `text`
    at: int = 0  # where in the joined text the piece begins
    matched: dict[int, int] = field(default_factory=dict)  # words that stand as the next window's
    # Of an overlap that could not be joined: where it ends here, and where the next one begins.
    head: int = 0
    tail: float = math.inf


class Stitched:
    """Transcripts of windows in order, joined with a blank between them where their script has it.

    Where windows overlap, the longest run of words that ends one transcript's overlap and starts
    the next one's is looked for (case aside, two words or four characters at least, fewer where
    there are no more). Up to its start the joined text is the first window's, from there the
    second's: what is nearest to the edges, where words are cut, goes. Without a match both stay.

    `shares`: for each window but the first, what of the previous one and of it both heard (0 to 1).
    """

    def __init__(self, texts: Sequence[str], shares: Sequence[tuple[float, float]] = ()) -> None:
        self.pieces = [Piece(t, 0, len(t), list(word_spans(t))) for t in texts]
        for i, (tail, head) in enumerate(shares, 1):
            if tail > 0 and head > 0:
                _merge(self.pieces[i - 1], self.pieces[i], tail, head)
        self.text = ""
        for piece in self.pieces:
            kept = piece.text[piece.low:piece.high]
            both = self.text[-1:], kept[:1]
            blank = " " * (all(both) and not all(map(without_blanks, both)))
            piece.at = len(self.text) + len(blank)
            self.text += blank + kept

    def place(self, window: int, start: int, end: int) -> tuple[int, int] | None:
        """Where characters `start` to `end` of a window's transcript stand in the joined one; None
        where they do not."""
        first, last = self._character(window, start), self._character(window, end - 1)
        return None if first is None or last is None else (first, last + 1)

    def _character(self, window: int, char: int) -> int | None:
        piece = self.pieces[window]
        if char < piece.high:
            return piece.at + char - piece.low if char >= piece.low else None
        for word, other in piece.matched.items():
            start, end = piece.words[word]
            if start <= char < end:
                begin = self.pieces[window + 1].words[other][0]
                return self._character(window + 1, begin + char - start)
        return None


def occurrences(phrase: str, text: str) -> list[tuple[int, int]]:
    """Where a phrase stands in a text: as whole words; where it never does, anywhere."""
    anywhere = re.finditer(re.escape(phrase) if phrase else r"(?!)", text)
    return list(places_of(phrase, text)) or [match.span() for match in anywhere]


def _merge(left: Piece, right: Piece, tail: float, head: float) -> None:
    """Cut two pieces where their overlaps agree."""
    words = len(left.words)
    # What the window before has taken of the left piece is out of play.
    first = next((i for i, (start, _) in enumerate(left.words) if start >= left.low), words)
    ours = _words(left)[max(first, words - _expected(words, tail)):]
    theirs = _words(right)[:_expected(len(right.words), head)]
    match = SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match()
    # One word alone, `the`, is found in any two transcripts, as are two Chinese characters.
    least = 4 if match.size and without_blanks(ours[match.a][0]) else 2
    if not match.size or match.size < min(least, len(ours), len(theirs)):
        if ours and theirs:
            left.tail, right.head = left.words[-len(ours)][0], right.words[len(theirs) - 1][1]
        return
    start = words - len(ours) + match.a
    left.matched = {start + k: match.b + k for k in range(match.size)}
    left.high = max(left.low, left.words[start - 1][1]) if start > first else left.low
    right.low = right.words[match.b][0]


def _words(piece: Piece) -> list[str]:
    # Only case that keeps a word's length is set aside: characters of equal words correspond.
    words = [piece.text[a:b] for a, b in piece.words]
    return [w.lower() if len(w.lower()) == len(w) else w for w in words]


def _expected(words: int, share: float) -> int:
    """Words looked at: speaking rate varies, so half as many again as the share says."""
    return min(words, int(1.5 * share * words) + 2)
