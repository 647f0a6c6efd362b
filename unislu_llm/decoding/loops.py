"""Repetition: a decoder that says the same few tokens again and again says nothing more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 32
"""Longest n-gram, in tokens, whose repetition is looked for."""
REPEATS = 4
"""An n-gram so often in a row is a loop..."""
LEAST = 16
"""...if together it is at least so many tokens long: `no no no no` is speech."""


class LoopTracker:
    """For each n-gram length, how many last tokens equal the token one n-gram before.

    Args:
        device: where the ids are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sizes = torch.arange(1, LONGEST + 1, device=device)
        self.least = torch.maximum((REPEATS - 1) * self.sizes, LEAST - self.sizes)

    def start(self, rows: int) -> Tensor:
        """Counts before the first token, `(rows, LONGEST)`."""
        return self.sizes.new_zeros(rows, LONGEST)

    def step(self, counts: Tensor, ids: Tensor) -> Tensor:
        """Counts after the last token of `ids` `(rows, length)`."""
        back = ids.shape[1] - 1 - self.sizes
        same = (ids[:, back.clamp(min=0)] == ids[:, -1:]) & (back >= 0)
        return torch.where(same, counts + 1, 0)

    def looping(self, counts: Tensor) -> Tensor:
        """Rows whose last tokens are a loop, `(rows,)` bool."""
        return (counts >= self.least).any(-1)


def has_loop(ids: Sequence[int]) -> bool:
    """Whether somewhere in `ids` an n-gram is repeated in a row as often as the grammar lets it be."""
    row = torch.tensor([list(ids)], dtype=torch.long)
    tracker = LoopTracker()
    for size, least in zip(tracker.sizes.tolist(), tracker.least.tolist(), strict=True):
        if row.shape[1] < size + least:
            continue
        same = (row[0, size:] == row[0, :-size]).long()
        if bool((same.unfold(0, least, 1).sum(-1) == least).any()):
            return True
    return False
