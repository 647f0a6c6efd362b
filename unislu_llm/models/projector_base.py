"""What all projectors share: the base class, its result, its output norm and frame stacking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unislu_llm.models.encoder import zero_beyond


class Projected(NamedTuple):
    """Speech as an LLM takes it in."""

    embeddings: Tensor  # (batch, T_sp, H), zero beyond the lengths
    lengths: tuple[int, ...]
    ids: list[list[int]] | None = None  # greedy transcripts, where a ctc projector was asked


class OutputNorm(nn.Module):
    """RMS norm of `(..., dim)` to a fixed `scale`, times a gain that starts at one."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.gain, self.scale = nn.Parameter(torch.ones(dim)), scale

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * (self.gain * self.scale)


class Projector(nn.Module):
    """Base of all projectors: frames of size `in_dim` (D) to embeddings of `out_dim` (H), whose RMS
    starts at `scale`."""

    stack = 1

    def __init__(self, in_dim: int, out_dim: int, scale: float) -> None:
        super().__init__()
        self.norm = OutputNorm(out_dim, scale)

    def output_length(self, frames: int) -> int:
        """Speech tokens that `frames` encoder frames (50 Hz) become, at most."""
        return ceil_div(frames, self.stack)

    def project(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        """Un-normalised embeddings `(batch, T_sp, H)` of frames, which are zero beyond lengths."""
        raise NotImplementedError

    def forward(self, frames: Tensor, lengths: Sequence[int], *,
                transcribe: bool = False) -> Projected:
        """Speech embeddings of frames `(batch, T_enc, D)` at 50 Hz.

        What stands beyond the lengths does not matter. With `transcribe` come greedy transcripts,
        where the projector knows them.
        """
        speech = self.norm(self.project(self._clean(frames, lengths), lengths))
        out = tuple(self.output_length(n) for n in lengths)
        return Projected(zero_beyond(speech, out), out)

    def _clean(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        # A frozen encoder may compute in bf16, and a cache holds fp16; projectors stay fp32.
        return zero_beyond(frames.to(self.norm.gain.dtype), lengths)


def ceil_div(n: int, k: int) -> int:
    """Groups of k that n things fill, the last perhaps in part."""
    return -(-n // k)


def stack_frames(frames: Tensor, k: int) -> Tensor:
    """Concatenate k neighbours: `(batch, T, D) -> (batch, ceil(T / k), k D)`, zeros at the end."""
    batch, length, dim = frames.shape
    return F.pad(frames, (0, 0, 0, -length % k)).reshape(batch, -1, k * dim)
