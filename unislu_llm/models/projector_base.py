"""What all projectors share: the base class, its output norm and the grouping of frames."""

from __future__ import annotations

from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unislu_llm.models.encoder import valid_mask

Length = TypeVar("Length", int, Tensor)


class OutputNorm(nn.Module):
    """RMS norm to a fixed scale, times a gain that starts at one.

    Args:
        dim: size of an embedding. scale: RMS of the output at the start.
    """

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to `(..., dim)`."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * (self.gain * self.scale)


class Projector(nn.Module):
    """Base of all projectors.

    Args:
        in_dim: size of an encoder frame, D.
        out_dim: size of an LLM embedding, H.
        scale: RMS at which the output starts.

    Attributes:
        needs_embeddings: whether it must be given the LLM's embeddings and a vocabulary, by
            `attach(embeddings, token_ids)`, before it works.
    """

    needs_embeddings: ClassVar[bool] = False

    def __init__(self, in_dim: int, out_dim: int, scale: float) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        self.norm = OutputNorm(out_dim, scale)

    def output_length(self, frames: Length) -> Length:
        """Speech tokens that `frames` encoder frames (50 Hz) become; ints or integer tensors."""
        raise NotImplementedError

    def project(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Un-normalised embeddings, `(batch, T_enc, D) -> (batch, T_sp, H)`; `frames` are zero beyond `lengths`."""
        raise NotImplementedError

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Speech embeddings and their lengths.

        Args:
            frames: `(batch, T_enc, D)` at 50 Hz. lengths: `(batch,)` valid frames.

        Returns:
            `(batch, T_sp, H)`, zero beyond the lengths, and lengths `(batch,)`.
        """
        # A frozen encoder may compute in bf16; the projector's own weights stay fp32.
        frames = frames.to(self.norm.gain.dtype).masked_fill(~valid_mask(lengths, frames.shape[1])[:, :, None], 0.0)
        speech = self.norm(self.project(frames, lengths))
        out = self.output_length(lengths)
        return speech.masked_fill(~valid_mask(out, speech.shape[1])[:, :, None], 0.0), out


def ceil_div(n: Length, k: int) -> Length:
    """Groups of k that n things fill, the last perhaps in part."""
    return cast(Length, (n + k - 1) // k)


def stack_frames(frames: Tensor, k: int) -> Tensor:
    """Concatenate k neighbours: `(batch, T, D) -> (batch, ceil(T / k), k D)`, zeros at the end."""
    batch, length, dim = frames.shape
    frames = F.pad(frames, (0, 0, 0, -length % k))
    return frames.reshape(batch, -1, k * dim)
