"""Repetition: a decoder that says the same few tokens again and again says nothing more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 32  # tokens of an n-gram whose repetition is looked for
REPEATS = 4  # an n-gram so often in a row is a loop...
LEAST = 16  # ...if together it is at least so many tokens long: `no no no no` is speech

_SIZES = torch.arange(1, LONGEST + 1)
# Of each n-gram length: how many tokens in a row, each equal to the one an n-gram before, are a
# loop. The n-gram's first occurrence is not among them.
_ENOUGH = torch.maximum((REPEATS - 1) * _SIZES, LEAST - _SIZES)


class LoopTracker:
    """For each n-gram length, how many last tokens of `rows` answers equal the token one n-gram
    before."""

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self._enough = _ENOUGH.to(device)
        self._last = torch.full((rows, LONGEST), -1, device=device)  # the newest first
        self._counts = torch.zeros_like(self._last)

    def reorder(self, rows: Tensor) -> None:
        self._last, self._counts = self._last[rows], self._counts[rows]

    def step(self, tokens: Tensor) -> None:
        """Read one token a row, `(rows,)`; a negative one is none."""
        token, live = tokens[:, None], tokens[:, None] >= 0
        counts = torch.where(self._last == token, self._counts + 1, 0)
        self._counts = torch.where(live, counts, self._counts)
        self._last = torch.where(live, torch.cat([token, self._last[:, :-1]], dim=1), self._last)

    def looping(self) -> Tensor:
        """Rows whose last tokens are a loop, `(rows,)` bool."""
        return (self._counts >= self._enough).any(-1)


def loop_start(ids: Sequence[int]) -> int | None:
    """Where the first repetition of a loop begins, behind the n-gram's first occurrence; None
    where there is no loop."""
    row, starts = torch.tensor(list(ids), dtype=torch.long), []
    for size, enough in zip(_SIZES.tolist(), _ENOUGH.tolist(), strict=True):
        if len(row) >= size + enough:
            same = (row[size:] == row[:-size]).long()
            runs = (same.unfold(0, enough, 1).sum(-1) == enough).nonzero()
            starts += [size + int(runs[0])] if len(runs) else []
    return min(starts, default=None)
