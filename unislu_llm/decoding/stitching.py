"""Join the transcripts of neighbouring windows into one, and find words of a window in it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

_LEAST_WORDS = 2  # in a row that are a match: one word alone, `the`, is found in any two transcripts


@dataclass
class Piece:
    """What of a window's transcript stands in the joined one: `text[low:high]`, from character `at` on.

    Args:
        text: transcript of the window.
        words: start and end of each word of it.
        matched: index of the next window's word for words of this one that stand in the joined text as the next one's.
    """

    text: str
    low: int = 0
    high: int = 0
    at: int = 0
    words: list[tuple[int, int]] = field(default_factory=list)
    matched: dict[int, int] = field(default_factory=dict)


class Stitched:
    """Transcripts of windows in order, joined with a blank between them.

    Where windows overlap, the longest run of words that ends one transcript's overlap and starts the next one's is looked
    for (case aside, two words at least; one where the overlap has no more). Up to its start the joined text is the first
    window's, from there the second's: what either says nearest to its own edge, where words are cut, goes. Without a match
    both stay whole, so that words may stand twice but none is lost.

    Args:
        texts: transcript of each window.
        shares: for each but the first, `(share of the previous window, share of this one)`, 0 to 1, that both heard.

    Attributes:
        text: the joined transcript. pieces: one a window.
    """

    def __init__(self, texts: Sequence[str], shares: Sequence[tuple[float, float]] = ()) -> None:
        self.pieces = [Piece(t, 0, len(t), 0, [m.span() for m in re.finditer(r"\S+", t)]) for t in texts]
        for i, (tail, head) in enumerate(shares, 1):
            if tail > 0 and head > 0:
                _merge(self.pieces[i - 1], self.pieces[i], tail, head)
        self.text = ""
        for piece in self.pieces:
            kept = piece.text[piece.low:piece.high]
            blank = " " if self.text and kept else ""
            piece.at = len(self.text) + len(blank)
            self.text += blank + kept

    def place(self, window: int, start: int, end: int) -> tuple[int, int] | None:
        """Where characters `start` to `end` of a window's transcript stand in :attr:`text`; None where they do not."""
        if end <= start:
            return None
        first, last = self._character(window, start), self._character(window, end - 1)
        return None if first is None or last is None else (first, last + 1)

    def _character(self, window: int, char: int) -> int | None:
        piece = self.pieces[window]
        if char < piece.low:
            return None
        if char < piece.high:
            return piece.at + char - piece.low
        for word, other in piece.matched.items():
            start, end = piece.words[word]
            if start <= char < end:
                return self._character(window + 1, self.pieces[window + 1].words[other][0] + char - start)
        return None


def occurrences(phrase: str, text: str) -> list[tuple[int, int]]:
    """Where a phrase stands in a text: as whole words; where it never does, anywhere."""
    if not phrase:
        return []
    found = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text)]
    return [(i, i + len(phrase)) for i in found or [m.start() for m in re.finditer(re.escape(phrase), text)]]


def _merge(left: Piece, right: Piece, tail: float, head: float) -> None:
    """Cut two pieces where their overlaps agree; speaking rate varies, so half as many words again are looked at."""
    first = next((i for i, (start, _) in enumerate(left.words) if start >= left.low), len(left.words))
    ours = _words(left)[max(first, len(left.words) - _expected(len(left.words), tail)):]
    theirs = _words(right)[:_expected(len(right.words), head)]
    match = SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match()
    if match.size < min(_LEAST_WORDS, len(ours), len(theirs)) or not match.size:
        return
    start = len(left.words) - len(ours) + match.a
    left.matched = {start + k: match.b + k for k in range(match.size)}
    left.high = max(left.low, left.words[start - 1][1]) if start > first else left.low
    right.low = right.words[match.b][0]


def _words(piece: Piece) -> list[str]:
    # Only case that keeps a word's length is set aside, so that characters of equal words correspond.
    words = [piece.text[a:b] for a, b in piece.words]
    return [w.lower() if len(w.lower()) == len(w) else w for w in words]


def _expected(words: int, share: float) -> int:
    return min(words, int(1.5 * share * words) + 2)
