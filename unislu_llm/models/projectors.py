"""Projectors: encoder frames to speech embeddings, `(batch, T_enc, D) -> (batch, T_sp, H)`.

All stand behind one registry (:func:`build_projector`), say how long their output is
(:meth:`Projector.output_length`), give every clip the same result whatever it is batched with, and
end in a norm whose scale starts at the RMS of the LLM's embeddings: a projector that starts ten
times too loud or too quiet costs thousands of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn
from torch.nn import functional as F

from unislu_llm.errors import UserError, dotted, explain, hint
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.models.encoder import valid_mask
from unislu_llm.models.projector_base import Projector, ceil_div, stack_frames
from unislu_llm.setting_types import Few, Width


class LinearProjector(Projector):
    """Concatenate `stack` frames and map them linearly (SLAM-ASR's simplest, arXiv 2402.08846)."""

    def __init__(self, in_dim: int, out_dim: int, scale: float, stack: Few = 5) -> None:
        super().__init__(in_dim, out_dim, scale)
        self.stack = stack
        self.proj = nn.Linear(stack * in_dim, out_dim)

    def project(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.proj(stack_frames(frames, self.stack))


class MLPProjector(Projector):
    """Stack, RMS norm, SwiGLU of width `hidden`, by default twice the LLM's (ultravox's recipe)."""

    def __init__(self, in_dim: int, out_dim: int, scale: float, stack: Few = 5,
                 hidden: Width = 0) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or 2 * out_dim
        self.stack = stack
        self.norm_in = nn.RMSNorm(stack * in_dim, eps=1e-6)
        self.up = nn.Linear(stack * in_dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, out_dim, bias=False)

    def project(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        gate, value = self.up(self.norm_in(stack_frames(frames, self.stack))).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class ConvProjector(Projector):
    """Convolutions of kernel 2 * stride - 1, then a linear map; `hidden` 0 is the LLM's size."""

    def __init__(self, in_dim: int, out_dim: int, scale: float,
                 strides: Annotated[tuple[Few, ...], Field(min_length=1, max_length=8)] = (5,),
                 hidden: Width = 0) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or out_dim
        dims = [in_dim] + [hidden] * len(strides)
        self.strides = tuple(strides)
        self.norm_in = nn.LayerNorm(in_dim)
        self.layers = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size=2 * s - 1, stride=s, padding=s - 1)
            for a, b, s in zip(dims, dims[1:], self.strides, strict=False))
        self.proj = nn.Linear(dims[-1], out_dim)

    def output_length(self, frames: int) -> int:
        for stride in self.strides:
            frames = ceil_div(frames, stride)
        return frames

    def project(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        x = self.norm_in(frames).transpose(1, 2)
        for layer, stride in zip(self.layers, self.strides, strict=True):
            # The norm's bias (and each layer's) fills the padding, and a kernel reaches into it.
            outside = ~valid_mask(lengths, x.shape[-1], x.device)[:, None, :]
            x = F.gelu(layer(x.masked_fill(outside, 0.0)))
            lengths = [ceil_div(n, stride) for n in lengths]
        return self.proj(x.transpose(1, 2))


class QFormerProjector(Projector):
    """Windowed Q-Former (SALMONN, arXiv 2310.13289): queries attend to one window at a time.

    A `window` of 15 frames is 0.3 s and becomes as many speech tokens as there are `queries`;
    `hidden` 0 is the encoder's size.
    """

    def __init__(self, in_dim: int, out_dim: int, scale: float, window: Few = 15,
                 queries: Few = 3, layers: Few = 2, heads: Few = 8,
                 hidden: Width = 0) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or in_dim
        if hidden % heads:
            raise UserError(f"qformer: hidden={hidden} must be a multiple of heads={heads}")
        self.window, self.n_queries = window, queries
        self.norm_in = nn.LayerNorm(in_dim)
        self.proj_in = nn.Linear(in_dim, hidden)
        self.positions = nn.Parameter(torch.randn(window, hidden) * 0.02)
        self.queries = nn.Parameter(torch.randn(queries, hidden) * 0.02)
        layer = nn.TransformerDecoderLayer(hidden, heads, 4 * hidden, dropout=0.0,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.proj = nn.Linear(hidden, out_dim)

    def output_length(self, frames: int) -> int:
        return ceil_div(frames, self.window) * self.n_queries

    def project(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        batch, length, _ = frames.shape
        n_windows = ceil_div(length, self.window)
        rows, pad = batch * n_windows, n_windows * self.window - length
        x = F.pad(self.proj_in(self.norm_in(frames)), (0, 0, 0, pad))
        x = x.reshape(rows, self.window, -1) + self.positions
        blank = ~valid_mask(lengths, n_windows * self.window).reshape(rows, self.window)
        # A window of nothing but padding attends to it: no NaN, and its result is not used.
        blank = blank & ~blank.all(-1, keepdim=True)
        blank = blank.to(x.device, non_blocking=True)
        queries = self.queries.to(x.dtype).expand(rows, -1, -1)
        out = self.decoder(queries, x, memory_key_padding_mask=blank)
        return self.proj(out).reshape(batch, n_windows * self.n_queries, -1)


NONE = "none"
"""In place of a projector's name: the LLM reads a hypothesis and no speech."""

PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector, "mlp": MLPProjector, "conv": ConvProjector,
    "qformer": QFormerProjector, "ctc": CTCProjector}


def check_projector(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a projector takes them.

    Raises UserError: an unknown name or option, with the nearest known one; or a wrong value.
    """
    if name not in (known := [*PROJECTORS, NONE]):
        raise UserError(f"model.projector: unknown projector '{name}'; known: {', '.join(known)}"
                        f"{hint(name, known)}")
    if name == NONE:
        return {}
    # The constructor's own annotations say what each option may be.
    kinds = get_type_hints(PROJECTORS[name].__init__, include_extras=True)
    fields: dict[str, Any] = {key: (kind, None) for key, kind in kinds.items()
                              if key not in ("in_dim", "out_dim", "scale", "return")}
    checked = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    try:
        return checked.model_validate(options).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise explain(error, checked,
                      lambda place: f"projector '{name}': option {dotted(place)}") from None


def build_projector(name: str, in_dim: int, out_dim: int, scale: float,
                    options: Mapping[str, Any]) -> Projector:
    """Build a registered projector; `options` are further keyword arguments of its class.

    Raises UserError: as :func:`check_projector`, or sizes that do not fit each other.
    """
    given = check_projector(name, options)
    return PROJECTORS[name](in_dim, out_dim, scale, **given)
