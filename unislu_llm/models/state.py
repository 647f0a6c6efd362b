"""What a decoder has read so far, as something that can be copied, so that several answers continue one beginning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache


@dataclass(frozen=True)
class Encoded:
    """Speech as a decoder takes it in, computed once for any number of answers.

    Args:
        frames: `(rows, frames, dim)`, projected for an LLM; what stands beyond the lengths does not matter.
        lengths: `(rows,)` valid frames.
        drafts: `(rows, L)` ids of the draft and the text before it, padded on the right, where the model reads drafts.
        draft_lengths: `(rows,)` how many count.
        heard: ids of each row's greedy CTC transcript, where a `ctc` projector heard it.
    """

    frames: Tensor
    lengths: Tensor
    drafts: Tensor | None = None
    draft_lengths: Tensor | None = None
    heard: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class DecoderState:
    """Cached keys and values of every row of a decoder.

    Rows may hold tokens that do not count (padding, or what was fed after a row's end): they are masked, and have no
    position. The next token's position is the number of tokens that count.

    Args:
        cache: never written in place, so that copies share its tensors.
        mask: `(rows, length)` bool, tokens that count.
        frames: what a decoder with cross-attention listens to, `(rows, frames, dim)`. It is looked at once; then its keys
            and values are in the cache, whose rows these need not be any more.
        frame_bias: its additive mask, `(rows, 1, 1, frames)`; None where no frame is padding.
    """

    cache: Cache
    mask: Tensor
    frames: Tensor | None = None
    frame_bias: Tensor | None = None

    def append(self, valid: Tensor) -> Tensor:
        """Note that tokens come, `(rows, n)` bool: those that count; positions `(rows, n)` for all of them."""
        positions = (self.mask.sum(-1, keepdim=True) + valid.cumsum(-1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, valid], dim=1)
        return positions

    def take(self, rows: Tensor) -> DecoderState:
        """A state of its own with these rows, `(n,)`; one may come several times."""
        everything = len(rows) == len(self.mask) and bool((rows == torch.arange(len(rows), device=rows.device)).all())

        def rows_of(t: Tensor) -> Tensor:
            return t if everything else t.index_select(0, rows)

        if isinstance(self.cache, EncoderDecoderCache):
            cache: Cache = EncoderDecoderCache(*(DynamicCache([(rows_of(k), rows_of(v)) for k, v in _layers(c)])
                                                 for c in (self.cache.self_attention_cache, self.cache.cross_attention_cache)))
        else:
            cache = DynamicCache([(rows_of(k), rows_of(v)) for k, v in _layers(self.cache)])
        return replace(self, cache=cache, mask=rows_of(self.mask),
                       frame_bias=None if self.frame_bias is None else rows_of(self.frame_bias))

    def compact(self) -> DecoderState:
        """The same without gaps: tokens that do not count stand before those that do, as few as can be.

        Sliding-window attention counts places, not positions: a gap would take the place of a token.
        """
        length = int(self.mask.sum(-1).max())
        order = self.mask.long().argsort(dim=1, stable=True)[:, self.mask.shape[1] - length:]

        def moved(t: Tensor) -> Tensor:
            return t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))

        cache = self.cache.self_attention_cache if isinstance(self.cache, EncoderDecoderCache) else self.cache
        new: Cache = DynamicCache([(moved(k), moved(v)) for k, v in _layers(cache)])
        if isinstance(self.cache, EncoderDecoderCache):
            new = EncoderDecoderCache(new, self.cache.cross_attention_cache)
        return replace(self, cache=new, mask=self.mask.gather(1, order))


def _layers(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
