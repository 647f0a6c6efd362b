"""Whisper's encoder at natural length: no 30-second padding, and none of the batch's padding in the result.

Whisper pads every clip to 30 s. Here a clip keeps its own length: sinusoidal positions are sliced, invalid frames are
zeroed before both convolutions (they look one frame ahead) and masked in attention, so that a clip's frames do not
depend on what it is batched with. `pad_to_30s` gives transformers' encoder back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.data.audio import ENCODER_RATE, MEL_RATE, encoder_length
from unislu_llm.errors import UserError
from unislu_llm.models.lora import LoraOptions, inject_lora

EncoderMode = Literal["frozen", "lora", "top", "full"]


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """`(batch, size)`, True at the first `lengths[i]` positions of row i."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


def attention_bias(lengths: Tensor, size: int, dtype: torch.dtype) -> Tensor | None:
    """Additive key mask `(batch, 1, 1, size)`; None where nothing is padded, so that fast kernels stay in reach."""
    if bool((lengths == size).all()):
        return None
    mask = valid_mask(lengths, size)[:, None, None, :]
    return torch.zeros(mask.shape, dtype=dtype, device=lengths.device).masked_fill(~mask, torch.finfo(dtype).min)


class SpeechEncoder(nn.Module):
    """Log-mel to encoder frames with one of Whisper's encoders.

    Args:
        whisper: the encoder module, any size.
        mode: `frozen`, `lora` (adapters in attention), `top` (the last `top_layers` layers and the final norm), `full`.
        top_layers: with `top`.
        lora: with `lora`.
        pad_to_30s: expect 3,000 mel frames and leave everything unmasked, as Whisper was trained.

    Raises:
        UserError: unknown mode, or `top_layers` outside the encoder.
    """

    def __init__(self, whisper: WhisperEncoder, mode: EncoderMode = "frozen", *, top_layers: int = 2,
                 lora: LoraOptions | None = None, pad_to_30s: bool = False) -> None:
        super().__init__()
        self.whisper = whisper
        self.mode = mode
        self.pad_to_30s = pad_to_30s
        self._set_trainable(mode, top_layers, lora or LoraOptions(target_modules=["q_proj", "v_proj"]))

    @property
    def dim(self) -> int:
        """Size of a frame."""
        return int(self.whisper.config.d_model)

    @property
    def max_frames(self) -> int:
        """Frames of 30 s; longer input has no positions."""
        return int(self.whisper.config.max_source_positions)

    def _set_trainable(self, mode: str, top_layers: int, lora: LoraOptions) -> None:
        self.whisper.requires_grad_(mode == "full")
        if mode == "lora":
            inject_lora(self.whisper, lora, "encoder")
        elif mode == "top":
            layers = self.whisper.layers
            if not 0 < top_layers <= len(layers):
                raise UserError(f"encoder_top_layers={top_layers}: the encoder has {len(layers)} layers")
            for layer in layers[len(layers) - top_layers:]:
                layer.requires_grad_(True)
            self.whisper.layer_norm.requires_grad_(True)
        elif mode not in ("frozen", "full"):
            raise UserError(f"unknown encoder_mode '{mode}'; known: frozen, lora, top, full")
        # Sinusoids, not weights: Whisper never trains them.
        self.whisper.embed_positions.requires_grad_(False)

    def train(self, mode: bool = True) -> SpeechEncoder:
        """A frozen encoder stays in eval mode: its dropout must not disturb what cannot adapt."""
        return super().train(mode and self.mode != "frozen")

    def forward(self, mel: Tensor, mel_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            mel: `(batch, n_mels, T_mel)` at 100 Hz; what stands beyond the lengths does not matter.
            mel_lengths: `(batch,)` valid mel frames.

        Returns:
            frames `(batch, T_enc, dim)` at 50 Hz, zero beyond their lengths unless `pad_to_30s`, and lengths
            `(batch,)`.

        Raises:
            UserError: more than 30 s of audio; with `pad_to_30s`, also less.
        """
        seconds, limit = mel.shape[-1] / MEL_RATE, self.max_frames / ENCODER_RATE
        if encoder_length(mel.shape[-1]) > self.max_frames:
            raise UserError(f"{seconds:.2f} s of audio in one clip; the encoder takes {limit:g} s")
        if self.pad_to_30s and encoder_length(mel.shape[-1]) < self.max_frames:
            raise UserError(f"pad_to_30s: found mel of {seconds:.2f} s; make the batch with pad_to_30s as well")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode != "frozen"):
            if self.pad_to_30s:
                full = torch.full_like(mel_lengths, mel.shape[-1])
                return self._run(mel, full)[0], encoder_length(mel_lengths)
            return self._run(mel, mel_lengths)

    def _run(self, mel: Tensor, mel_lengths: Tensor) -> tuple[Tensor, Tensor]:
        net: Any = self.whisper
        mel = mel.to(net.conv1.weight.dtype) if not torch.is_autocast_enabled(mel.device.type) else mel
        mel_mask = valid_mask(mel_lengths, mel.shape[-1])[:, None, :]
        x = F.gelu(net.conv1(mel.masked_fill(~mel_mask, 0.0)))
        x = F.gelu(net.conv2(x.masked_fill(~mel_mask, 0.0))).transpose(1, 2)
        lengths = encoder_length(mel_lengths)
        x = x + net.embed_positions.weight[: x.shape[1]]
        x = F.dropout(x, p=net.dropout, training=net.training)
        bias = attention_bias(lengths, x.shape[1], x.dtype)
        for layer in net.layers:
            x = layer(x, bias)
        x = net.layer_norm(x)
        return x.masked_fill(~valid_mask(lengths, x.shape[1])[:, :, None], 0.0), lengths
