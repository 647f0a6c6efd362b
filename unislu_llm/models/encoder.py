"""Whisper's encoder at natural length: no 30-second padding, and no trace of the batch's padding.

Sinusoidal positions are sliced, invalid frames are zeroed before both convolutions (they look one
frame ahead) and masked in attention, so that a clip's frames do not depend on what it is batched
with. A `silence` of 30 s gives transformers' encoder back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.config import LoraConfig, ModelConfig
from unislu_llm.data.audio import ENCODER_RATE, MEL_RATE, encoder_length, with_silence
from unislu_llm.errors import UserError
from unislu_llm.models.lora import inject_lora

_TOGETHER = 4  # clips that a CPU encodes at one time in decoding


def valid_mask(lengths: Sequence[int], size: int, device: torch.device | None = None) -> Tensor:
    """`(batch, size)`, True at the first `lengths[i]` positions of row i."""
    mask = torch.arange(size)[None, :] < torch.tensor(list(lengths))[:, None]
    return mask.to(device, non_blocking=True)


def zero_beyond(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """`(batch, T, dim)` with zeros beyond the first `lengths[i]` positions of row i."""
    return x.masked_fill(~valid_mask(lengths, x.shape[1], x.device)[:, :, None], 0.0)


def attention_bias(lengths: Sequence[int], size: int, dtype: torch.dtype,
                   device: torch.device | None = None) -> Tensor | None:
    """Additive key mask `(batch, 1, 1, size)`; None where nothing is padding."""
    # Without a mask the fastest attention kernels stay in reach.
    if all(n == size for n in lengths):
        return None
    mask = valid_mask(lengths, size)[:, None, None, :]
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return bias.to(device, non_blocking=True)


class SpeechEncoder(nn.Module):
    """Log-mel to encoder frames; UserError: it has fewer layers than are to train."""

    def __init__(self, whisper: WhisperEncoder, config: ModelConfig) -> None:
        super().__init__()
        self.whisper = whisper
        self.in_parts = True  # on a CPU; not where all processes must call sharded layers alike
        self.mode, self.silence = config.encoder_mode, config.silence
        self.dim = int(whisper.config.d_model)
        whisper.requires_grad_(self.mode == "full")
        if self.mode == "lora":
            # A rank of 0 is meant for the LLM, which has the same settings.
            rank = config.lora.rank or LoraConfig().rank
            own = {"rank": rank, "target_modules": ["q_proj", "v_proj"]}
            inject_lora(whisper, config.lora.model_copy(update=own), "encoder")
        if self.mode == "top":
            first = len(whisper.layers) - config.encoder_top_layers
            if first < 0:
                raise UserError(f"model.encoder_top_layers {config.encoder_top_layers}: the "
                                f"encoder has {len(whisper.layers)} layers")
            for part in (*whisper.layers[first:], whisper.layer_norm):
                part.requires_grad_(True)
        # Sinusoids, not weights: Whisper never trains them.
        whisper.embed_positions.requires_grad_(False)

    def train(self, mode: bool = True) -> SpeechEncoder:
        """A frozen encoder stays in eval mode: dropout must not disturb what cannot adapt."""
        return super().train(mode and self.mode != "frozen")

    def forward(self, mel: Tensor, mel_lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Log-mel `(batch, n_mels, T_mel)` at 100 Hz to frames `(batch, T_enc, dim)` at 50 Hz.

        What stands beyond `mel_lengths` and the silence that follows does not matter, and frames
        are zero there. The lengths that come with them are the clips' own, without silence.

        Raises:
            UserError: more than 30 s of audio, or less than the clips and their silence.
        """
        size, most = encoder_length(mel.shape[-1]), self.whisper.config.max_source_positions
        used = [with_silence(n, self.silence, MEL_RATE) for n in mel_lengths]
        if size > most or max(used) > mel.shape[-1]:
            raise UserError(f"{mel.shape[-1] / MEL_RATE:.2f} s of mel; the encoder takes "
                            f"{most / ENCODER_RATE:g} s, and of these clips not less than "
                            f"{max(used) / MEL_RATE:g} s (model.silence)")
        lengths = tuple(encoder_length(n) for n in mel_lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode != "frozen"):
            if (mel.device.type == "cpu" and self.in_parts and not torch.is_grad_enabled()
                    and len(mel) > _TOGETHER):
                return self._by_length(mel, used, size), lengths
            return self._run(mel, used), lengths

    def _by_length(self, mel: Tensor, mel_lengths: Sequence[int], size: int) -> Tensor:
        # A CPU gains nothing from larger batches, and would pay for their padding: it encodes a few
        # clips of like length at one time.
        order, parts = sorted(range(len(mel)), key=lambda i: -mel_lengths[i]), []
        for start in range(0, len(order), _TOGETHER):
            rows = order[start:start + _TOGETHER]
            lengths = [mel_lengths[i] for i in rows]
            part = self._run(mel[rows, :, : lengths[0]], lengths)  # the first is the longest
            parts.append(F.pad(part, (0, 0, 0, size - part.shape[1])))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _run(self, mel: Tensor, mel_lengths: Sequence[int]) -> Tensor:
        net: Any = self.whisper
        mel = mel.to(net.conv1.weight.dtype)
        outside = ~valid_mask(mel_lengths, mel.shape[-1], mel.device)[:, None, :]
        x = F.gelu(net.conv1(mel.masked_fill(outside, 0.0)))
        x = F.gelu(net.conv2(x.masked_fill(outside, 0.0))).transpose(1, 2)
        lengths = [encoder_length(n) for n in mel_lengths]
        x = x + net.embed_positions.weight[: x.shape[1]]
        x = F.dropout(x, p=net.dropout, training=net.training)
        bias = attention_bias(lengths, x.shape[1], x.dtype, x.device)
        for layer in net.layers:
            x = layer(x, bias)
        return zero_beyond(net.layer_norm(x), lengths)
