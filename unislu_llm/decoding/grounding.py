"""Grounded phrases: an entity is a run of whole words of the transcript just written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.tokenizer import UnifiedTokenizer

_NONE = 1 << 30


class Grounding:
    """Which transcript tokens may come next in each row's phrase.

    A word starts or ends where two tokens are not of one word: at blanks, at punctuation, at
    either end. As a phrase is tokenised the way it stands in the sentence, the phrases of the
    training targets are such runs.

    Attributes:
        starts: `(rows, positions)` bool, first tokens of words in each row's transcript.
        candidates: `(rows, positions)` bool, positions of which the next token may be a copy.
        closable: `(rows,)` bool, whether the phrase so far is whole words.
    """

    def __init__(self, tokenizer: UnifiedTokenizer, rows: int, device: torch.device | str) -> None:
        self._tokenizer = tokenizer
        # Of each transcript, once it is complete: its ids, and how far the next word's end is.
        self._ids = torch.full((rows, 1), -1, device=device)
        self._distance = torch.full((rows, 1), _NONE, device=device)
        self.starts = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.candidates = torch.zeros_like(self.starts)
        self.closable = torch.zeros(rows, dtype=torch.bool, device=device)

    def reorder(self, rows: Tensor) -> None:
        self._ids, self._distance, self.starts = (
            self._ids[rows], self._distance[rows], self.starts[rows])
        self.candidates, self.closable = self.candidates[rows], self.closable[rows]

    def learn(self, row: int, transcript: Sequence[int]) -> None:
        starts, distance = self._words(transcript)
        more = max(0, len(transcript) - self._ids.shape[1])
        self._ids = F.pad(self._ids, (0, more), value=-1)
        self._distance = F.pad(self._distance, (0, more), value=_NONE)
        self.starts, self.candidates = (F.pad(t, (0, more)) for t in (self.starts, self.candidates))
        for table, values in ((self._ids, transcript), (self._distance, distance),
                              (self.starts, starts)):
            table[row, :len(values)] = torch.tensor(values, dtype=table.dtype, device=table.device)

    def step(self, tokens: Tensor, opened: Tensor, inside: Tensor) -> None:
        """After one token a row, `(rows,)`, that `opened` a phrase, or stands `inside` one."""
        hit = self.candidates & (self._ids == tokens[:, None]) & inside[:, None]
        self.closable = (hit & (self._distance == 0)).any(-1)
        following = F.pad(hit[:, :-1], (1, 0)) & (self._ids >= 0)
        self.candidates = torch.where(opened[:, None], self.starts, following)

    def allowed(self, remaining: Tensor) -> tuple[Tensor, Tensor]:
        """Row and token, `(n,)` each, of all that may come next where `remaining` `(rows,)` tokens
        are enough for the rest of its word and of the answer."""
        # This token, those to the word's end, the closing marker and the end of text.
        fits = self._distance + 3 <= remaining[:, None]
        rows, positions = (self.candidates & fits).nonzero(as_tuple=True)
        return rows, self._ids[rows, positions]

    def shortest(self) -> Tensor:
        """`(rows,)` tokens of each transcript's shortest word; very many where there is none."""
        return torch.where(self.starts, self._distance + 1, _NONE).amin(-1)

    def _words(self, ids: Sequence[int]) -> tuple[list[bool], list[int]]:
        """Of each token: whether it is the first of a word, how far the next last one is."""
        n, joins = len(ids), vocabulary_of(self._tokenizer).joins
        inner = [i for i in range(1, n) if not joins(ids[i - 1], ids[i])]
        starts, distance, far = [False] * n, [_NONE] * n, _NONE
        for first, after in reversed(list(pairwise([0, *inner, n]))):
            word = bool(self._tokenizer.decode(ids[first:after]))  # not blanks alone
            for i in reversed(range(first, after)):
                distance[i] = far = 0 if word and i == after - 1 else min(far + 1, _NONE)
            if word:
                starts[first] = True
        return starts, distance
