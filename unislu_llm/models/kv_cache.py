"""What a decoder has read so far, as something to copy: several answers continue one text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache


@dataclass
class State:
    """Keys and values of every row of a decoder, and what its prompt held.

    Rows may hold tokens that do not count (padding, or what was fed after a row's end): they are
    masked and have no position. The next token's position is the number of tokens that count.
    """

    cache: Cache  # its tensors are never written in place, so that copies share them
    mask: Tensor  # (rows, length) bool, which tokens count
    hidden: Tensor  # (rows, dim) after the prompt: `SLUModel.logits` of it foretell what comes next
    # What a decoder with cross-attention listens to, (batch, frames, dim). After the prompt its
    # keys and values are in the cache, whose rows these need not be any more.
    frames: Tensor | None = None
    frame_bias: Tensor | None = None  # (rows, 1, 1, frames) added there; None: none is padding
    hypothesis: list[list[int]] | None = None  # ids without their prompt; None: it reads none
    ctc_hypothesis: list[list[int]] | None = None  # greedy ids of a `ctc` projector

    def __len__(self) -> int:
        return len(self.mask)

    def append(self, valid: Tensor) -> Tensor:
        """Note that tokens `(rows, n)` come, of which `valid` count; their positions."""
        positions = (self.mask.sum(-1, keepdim=True) + valid.cumsum(-1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, valid], dim=1)
        return positions

    def take(self, rows: Sequence[int] | Tensor) -> State:
        """A state of its own with these rows, `(n,)`; one may come several times."""
        numbers: list[int] = torch.as_tensor(rows).tolist()
        same = numbers == list(range(len(self)))  # nothing moves: the copy shares every tensor
        index = torch.tensor(numbers).to(self.mask.device, non_blocking=True)

        def taken(t: Tensor) -> Tensor:
            return t if same else t.index_select(0, index)

        def chosen(ids: list[list[int]] | None) -> list[list[int]] | None:
            return None if ids is None else [ids[i] for i in numbers]

        return replace(self, cache=_mapped(self.cache, taken, taken), mask=taken(self.mask),
                       hidden=taken(self.hidden),
                       frame_bias=None if self.frame_bias is None else taken(self.frame_bias),
                       hypothesis=chosen(self.hypothesis),
                       ctc_hypothesis=chosen(self.ctc_hypothesis))

    def compact(self) -> State:
        """The same without gaps: tokens that do not count stand before those that do."""
        # Sliding-window attention counts places, not positions. A masked token between two that
        # count would push a real one out of the window, and the answer would depend on the batch.
        length = int(self.mask.sum(-1).max())
        order = self.mask.long().argsort(dim=1, stable=True)[:, self.mask.shape[1] - length:]

        def moved(t: Tensor) -> Tensor:  # (rows, heads, length, dim)
            return t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))

        return replace(self, cache=_mapped(self.cache, moved), mask=self.mask.gather(1, order))


Change = Callable[[Tensor], Tensor]


def _mapped(cache: Cache, change: Change, cross: Change = lambda t: t) -> Cache:
    """A cache whose keys and values went through `change`, those of cross-attention `cross`."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(_mapped(cache.self_attention_cache, change),
                                   _mapped(cache.cross_attention_cache, cross))
    layers: list[Any] = cache.layers
    return DynamicCache([(change(layer.keys), change(layer.values)) for layer in layers])
