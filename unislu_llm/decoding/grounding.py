"""Grounded phrases: an entity is a run of whole words of the transcript that was just written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.data.targets import TextCodec
from unislu_llm.decoding.vocabulary import Vocabulary

_NONE = 1 << 30


class Grounding:
    """Which transcript tokens may come next in each row's phrase.

    A word starts or ends where two tokens are not of one word: at blanks, at punctuation, at either end. As the codec
    tokenises a phrase the way it stands in the sentence, the phrases of the training targets are such runs.

    Args:
        codec: of the model. vocabulary: its tokens. rows: of the decoder, beams included. device: of the scores.

    Attributes:
        entry: `(rows,)` index of each row's transcript, -1 before it is complete.
        candidates: `(rows, positions)` bool, transcript positions of which the next phrase token may be a copy.
        closable: `(rows,)` bool, whether the phrase so far is whole words.
    """

    def __init__(self, codec: TextCodec, vocabulary: Vocabulary, rows: int, device: torch.device) -> None:
        self.codec = codec
        self.vocabulary = vocabulary
        self.entry = torch.full((rows,), -1, device=device)
        self.candidates = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.closable = torch.zeros(rows, dtype=torch.bool, device=device)
        self._known: dict[tuple[int, ...], int] = {}
        self.ids = torch.full((0, 1), -1, device=device)
        self.starts, self.ends = (torch.zeros(0, 1, dtype=torch.bool, device=device) for _ in range(2))
        self.distance = torch.zeros(0, 1, dtype=torch.long, device=device)

    def reorder(self, parents: Tensor) -> None:
        """Take over the rows that beam search kept."""
        self.entry, self.candidates, self.closable = self.entry[parents], self.candidates[parents], self.closable[parents]

    def learn(self, row: int, transcript: Sequence[int]) -> None:
        """Note a row's complete transcript."""
        key = tuple(transcript)
        if key not in self._known:
            self._known[key] = len(self._known)
            self._append(key)
        self.entry[row] = self._known[key]

    def step(self, tokens: Tensor, opened: Tensor, inside: Tensor) -> None:
        """After one token a row.

        Args:
            tokens: `(rows,)`. opened: rows whose token opened a phrase. inside: rows whose token is of a phrase.
        """
        if not len(self.ids):
            return
        at = self.entry.clamp(min=0)
        hit = self.candidates & (self.ids[at] == tokens[:, None]) & inside[:, None]
        self.closable = (hit & self.ends[at]).any(-1)
        following = F.pad(hit[:, :-1], (1, 0)) & (self.ids[at] >= 0)
        self.candidates = torch.where(opened[:, None], self.starts[at], following)

    def allowed(self, remaining: Tensor) -> tuple[Tensor, Tensor]:
        """`(rows, tokens)` of every token that may come next in a phrase and leaves room for its end.

        Args:
            remaining: `(rows,)` tokens that may still come.
        """
        # This token, those to the word's end, the closing marker and the end of text.
        fits = self.candidates & (self.distance[self.entry.clamp(min=0)] + 3 <= remaining[:, None]) if len(self.ids) \
            else torch.zeros_like(self.candidates)
        rows, positions = fits.nonzero(as_tuple=True)
        return rows, self.ids[self.entry[rows], positions] if len(rows) else rows

    def shortest(self) -> Tensor:
        """`(rows,)` tokens of each transcript's shortest word; a very large number where there is none."""
        if not len(self.ids):
            return torch.full_like(self.entry, _NONE)
        lengths = torch.where(self.starts, self.distance + 1, _NONE).amin(-1)
        return lengths[self.entry.clamp(min=0)].masked_fill(self.entry < 0, _NONE)

    def _append(self, ids: tuple[int, ...]) -> None:
        starts, ends, distance = self._words(ids)
        width = max(len(ids), 1, self.ids.shape[1])
        self.ids = _stack(self.ids, list(ids), width, -1)
        self.starts = _stack(self.starts, starts, width, False)
        self.ends = _stack(self.ends, ends, width, False)
        self.distance = _stack(self.distance, distance, width, _NONE)
        self.candidates = F.pad(self.candidates, (0, width - self.candidates.shape[1]))

    def _words(self, ids: tuple[int, ...]) -> tuple[list[bool], list[bool], list[int]]:
        """Of each token: is it the first of a word, the last of one, and how far is the next last one."""
        n = len(ids)
        borders = [0, *(i for i in range(1, n) if not self.vocabulary.joins(ids[i - 1], ids[i])), n] if n else []
        starts, ends = [False] * n, [False] * n
        for first, after in pairwise(borders):
            if self.codec.decode(ids[first:after]):
                starts[first] = ends[after - 1] = True
        distance, far = [_NONE] * n, _NONE
        for i in range(n - 1, -1, -1):
            far = 0 if ends[i] else min(far + 1, _NONE)
            distance[i] = far
        return starts, ends, distance


def _stack(table: Tensor, row: Sequence[int] | Sequence[bool], width: int, fill: int | bool) -> Tensor:
    new = torch.full((len(table) + 1, width), fill, dtype=table.dtype, device=table.device)
    new[:len(table), :table.shape[1]] = table
    new[-1, :len(row)] = torch.tensor(row, dtype=table.dtype, device=table.device)
    return new
