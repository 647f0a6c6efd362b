"""What a decoder has read so far, as something to copy: several answers continue one text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, EncoderDecoderCache


class NoCache(DynamicCache):
    """A cache that keeps nothing, for a forward pass without one."""

    # Given none, transformers looks in the positions for several texts packed in a row, and a GPU
    # that is asked for the result is waited for.
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any,
               **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values as they come."""
        return key_states, value_states


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
    # (rows, dim) after Whisper's first token, of the rows that the prompt had.
    start: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mask)

    def append(self, valid: Tensor) -> Tensor:
        """Note that tokens `(rows, n)` come, of which `valid` count; their positions."""
        positions = (self.mask.sum(-1, keepdim=True) + valid.cumsum(-1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, valid], dim=1)
        return positions

    def take(self, rows: Sequence[int] | Tensor, beams: int = 1) -> State:
        """A state of its own with these rows, `(n,)`; one may come several times. So many `beams`
        in turn are of one clip."""
        numbers: list[int] = torch.as_tensor(rows).tolist()
        same = numbers == list(range(len(self)))  # nothing moves: the copy shares every tensor
        index = torch.tensor(numbers).to(self.mask.device, non_blocking=True)

        def taken(t: Tensor) -> Tensor:
            return t if same else t.index_select(0, index)

        # Frames are far more than tokens: they stay in place where beams of one clip change theirs.
        alike = [n // beams for n in numbers] == [n // beams for n in range(len(self))]
        of_clips: Change = (lambda t: t) if alike else taken

        def chosen(ids: list[list[int]] | None) -> list[list[int]] | None:
            return None if ids is None else [ids[i] for i in numbers]

        return replace(self, cache=_mapped(self.cache, taken, of_clips), mask=taken(self.mask),
                       hidden=taken(self.hidden),
                       frame_bias=None if self.frame_bias is None else of_clips(self.frame_bias),
                       hypothesis=chosen(self.hypothesis),
                       ctc_hypothesis=chosen(self.ctc_hypothesis))

    def drop(self, counts: Tensor) -> None:
        """Take back the last tokens that count, `(rows,)` of each row."""
        behind = self.mask.flip(-1).cumsum(-1).flip(-1)  # 1 at the last one that counts
        self.mask = self.mask & (behind > counts[:, None])
        self.compact()

    def compact(self) -> None:
        """Close gaps: tokens that do not count come to stand before those that do, or go."""
        # Sliding-window attention counts places, not positions. A masked token between two that
        # count would push a real one out of the window, and the answer would depend on the batch.
        width = self.mask.shape[1] - int(self.mask.flip(-1).any(0).int().argmax())
        self.mask = self.mask[:, :width]
        _change(self.cache, lambda t: t[:, :, :width])  # a view: nothing is copied
        if bool((self.mask[:, :-1] & ~self.mask[:, 1:]).any()):
            length = int(self.mask.sum(-1).max())
            order = self.mask.long().argsort(dim=1, stable=True)[:, width - length:]
            self.mask = self.mask.gather(1, order)
            order = order[:, None, :, None]
            _change(self.cache, lambda t: t.gather(2, order.expand(-1, t.shape[1], -1, t.shape[3])))

    @staticmethod
    def join(states: Sequence[State], rows: Sequence[Sequence[int]]) -> State:
        """One state of several, of which each row comes to stand at its number in `rows`."""
        if len(states) == 1 and list(rows[0]) == list(range(len(states[0]))):
            return states[0]
        length = max(state.mask.shape[1] for state in states)
        for state in states:
            more = length - state.mask.shape[1]
            state.mask = F.pad(state.mask, (more, 0))
            _change(state.cache, partial(F.pad, pad=(0, 0, more, 0)))
        first, bias = states[0], [s.frame_bias for s in states if s.frame_bias is not None]
        both = replace(
            first, cache=_joined([state.cache for state in states]),
            mask=torch.cat([s.mask for s in states]), hidden=torch.cat([s.hidden for s in states]),
            frame_bias=torch.cat(bias) if bias else None,
            hypothesis=_lists([s.hypothesis for s in states]),
            ctc_hypothesis=_lists([s.ctc_hypothesis for s in states]))
        order = [row for some in rows for row in some]
        return both.take(sorted(range(len(order)), key=order.__getitem__))


Change = Callable[[Tensor], Tensor]


def _change(cache: Cache, change: Change) -> None:
    """Change keys and values of self-attention in place: only one layer exists twice at a time."""
    own: Any = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in own.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)


def _joined(caches: Sequence[Any]) -> Cache:
    """A cache with the rows of all."""
    if isinstance(caches[0], EncoderDecoderCache):
        return EncoderDecoderCache(_joined([c.self_attention_cache for c in caches]),
                                   _joined([c.cross_attention_cache for c in caches]))
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return DynamicCache([(torch.cat([layer.keys for layer in some]),
                          torch.cat([layer.values for layer in some])) for some in layers])


def _lists(ids: Sequence[list[list[int]] | None]) -> list[list[int]] | None:
    return None if ids[0] is None else [row for some in ids for row in some or ()]


def _mapped(cache: Cache, change: Change, cross: Change = lambda t: t) -> Cache:
    """A cache whose keys and values went through `change`, those of cross-attention `cross`."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(_mapped(cache.self_attention_cache, change),
                                   _mapped(cache.cross_attention_cache, cross))
    layers: list[Any] = cache.layers
    return DynamicCache([(change(layer.keys), change(layer.values)) for layer in layers])
