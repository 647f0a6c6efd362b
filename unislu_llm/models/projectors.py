"""Projectors: encoder frames to speech embeddings in the LLM's space, `(batch, T_enc, D) -> (batch, T_sp, H)`.

All stand behind one registry (:func:`build_projector`), say how long their output is (:meth:`Projector.output_length`),
give every clip the same result whatever it is batched with, and end in a norm whose scale starts at the RMS of the
LLM's embeddings: a projector that starts ten times too loud or too quiet costs thousands of steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unislu_llm.errors import UserError, hint
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.models.encoder import valid_mask
from unislu_llm.models.projector_base import Length, Projector, ceil_div, stack_frames


class LinearProjector(Projector):
    """Concatenate `stack` frames and map them linearly (SLAM-ASR's simplest, arXiv 2402.08846).

    Args:
        stack: frames a speech token; 5 gives 10 Hz.
    """

    def __init__(self, in_dim: int, out_dim: int, scale: float, stack: int = 5) -> None:
        super().__init__(in_dim, out_dim, scale)
        self.stack = stack
        self.proj = nn.Linear(stack * in_dim, out_dim)

    def output_length(self, frames: Length) -> Length:
        return ceil_div(frames, self.stack)

    def project(self, frames: Tensor, lengths: Tensor) -> Tensor:
        return self.proj(stack_frames(frames, self.stack))


class MLPProjector(Projector):
    """Stack, RMS norm, SwiGLU (ultravox's recipe).

    Args:
        stack: frames a speech token. hidden: width of the SwiGLU layer; 0 means twice the LLM's.
    """

    def __init__(self, in_dim: int, out_dim: int, scale: float, stack: int = 5, hidden: int = 0) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or 2 * out_dim
        self.stack = stack
        self.norm_in = nn.RMSNorm(stack * in_dim, eps=1e-6)
        self.up = nn.Linear(stack * in_dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, out_dim, bias=False)

    def output_length(self, frames: Length) -> Length:
        return ceil_div(frames, self.stack)

    def project(self, frames: Tensor, lengths: Tensor) -> Tensor:
        gate, value = self.up(self.norm_in(stack_frames(frames, self.stack))).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class ConvProjector(Projector):
    """Strided convolutions, padding zeroed before each, then a linear map.

    Args:
        strides: stride of each layer, of kernel 2 * stride - 1; (5,) or (2, 2) and so on.
        hidden: channels; 0 means the LLM's size.
    """

    def __init__(self, in_dim: int, out_dim: int, scale: float, strides: tuple[int, ...] = (5,),
                 hidden: int = 0) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or out_dim
        dims = [in_dim] + [hidden] * len(strides)
        self.strides = tuple(strides)
        self.norm_in = nn.LayerNorm(in_dim)
        self.layers = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size=2 * s - 1, stride=s, padding=s - 1)
            for a, b, s in zip(dims, dims[1:], self.strides, strict=False))
        self.proj = nn.Linear(hidden, out_dim)

    def output_length(self, frames: Length) -> Length:
        for stride in self.strides:
            frames = ceil_div(frames, stride)
        return frames

    def project(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = self.norm_in(frames).transpose(1, 2)
        for layer, stride in zip(self.layers, self.strides, strict=True):
            x = F.gelu(layer(x.masked_fill(~valid_mask(lengths, x.shape[-1])[:, None, :], 0.0)))
            lengths = ceil_div(lengths, stride)
        return self.proj(x.transpose(1, 2))


class QFormerProjector(Projector):
    """Windowed Q-Former (SALMONN, arXiv 2310.13289): learned queries attend to one window of frames at a time.

    Args:
        window: frames a window; 15 is 0.3 s. queries: speech tokens a window.
        layers, heads, hidden: of the query transformer; hidden 0 means the encoder's size.
    """

    def __init__(self, in_dim: int, out_dim: int, scale: float, window: int = 15, queries: int = 3,
                 layers: int = 2, heads: int = 8, hidden: int = 0) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or in_dim
        if hidden % heads:
            raise UserError(f"qformer: hidden={hidden} must be a multiple of heads={heads}")
        self.window, self.n_queries = window, queries
        self.norm_in = nn.LayerNorm(in_dim)
        self.proj_in = nn.Linear(in_dim, hidden)
        self.positions = nn.Parameter(torch.randn(window, hidden) * 0.02)
        self.queries = nn.Parameter(torch.randn(queries, hidden) * 0.02)
        layer = nn.TransformerDecoderLayer(hidden, heads, 4 * hidden, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.proj = nn.Linear(hidden, out_dim)

    def output_length(self, frames: Length) -> Length:
        return cast(Length, ceil_div(frames, self.window) * self.n_queries)

    def project(self, frames: Tensor, lengths: Tensor) -> Tensor:
        batch, length, _ = frames.shape
        n_windows = ceil_div(length, self.window)
        pad = n_windows * self.window - length
        x = F.pad(self.proj_in(self.norm_in(frames)), (0, 0, 0, pad))
        x = x.reshape(batch * n_windows, self.window, -1) + self.positions
        blank = ~valid_mask(lengths, n_windows * self.window).reshape(batch * n_windows, self.window)
        blank = blank & ~blank.all(-1, keepdim=True)  # a window of padding attends to itself: no NaN, result unused
        bias = torch.zeros(blank.shape, dtype=x.dtype, device=x.device).masked_fill(blank, float("-inf"))
        queries = self.queries.to(x.dtype).expand(batch * n_windows, -1, -1)
        out = self.decoder(queries, x, memory_key_padding_mask=bias)
        return self.proj(out).reshape(batch, n_windows * self.n_queries, -1)


PROJECTORS: dict[str, Callable[..., Projector]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "conv": ConvProjector,
    "qformer": QFormerProjector,
    "ctc": CTCProjector,
}


def build_projector(name: str, in_dim: int, out_dim: int, scale: float,
                    options: Mapping[str, Any] | None = None) -> Projector:
    """Build a registered projector.

    Args:
        name: key of :data:`PROJECTORS`. in_dim: D. out_dim: H. scale: RMS of the LLM's embeddings.
        options: keyword arguments of the projector's class beyond these.

    Raises:
        UserError: unknown name or option; the message names the nearest known one.
    """
    if name not in PROJECTORS:
        raise UserError(f"unknown projector '{name}'; known: {', '.join(PROJECTORS)}{hint(name, list(PROJECTORS))}")
    build = PROJECTORS[name]
    known = {key: p.default for key, p in inspect.signature(build).parameters.items()
             if key not in ("in_dim", "out_dim", "scale")}
    for key, value in (options or {}).items():
        if key not in known:
            raise UserError(f"projector '{name}' has no option '{key}'; known: {', '.join(known)}"
                            f"{hint(key, list(known))}")
        if problem := _misfit(value, known[key]):
            raise UserError(f"projector '{name}': option {key}={value!r} must be {problem}")
    return build(in_dim, out_dim, scale, **(options or {}))


def _misfit(value: Any, default: Any) -> str | None:
    """What a value must be to stand for `default`, where it is not; other kinds than these pass."""
    if isinstance(default, tuple):
        good = isinstance(value, list | tuple) and len(value) > 0 and all(type(v) is int and v > 0 for v in value)
        return None if good else "a list of whole numbers from 1 up"
    if type(default) is int:
        least = min(default, 1)
        return None if type(value) is int and value >= least else f"a whole number from {least} up"
    return None
