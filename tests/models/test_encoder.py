"""The speech encoder: Whisper's own frames at 30 s, and frames that padding cannot reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import make_whisper_encoder
from unislu_llm.config import LoraConfig, ModelConfig
from unislu_llm.data.audio import MEL_RATE, with_silence
from unislu_llm.errors import UserError
from unislu_llm.models.encoder import SpeechEncoder, valid_mask

SECONDS = (0.5, 20.0, 3.37, 0.51, 1.0, 0.7, 2.0)  # an odd number of mel frames among them
FEW = (0.5, 1.37)


def random_mels(seconds: tuple[float, ...] = SECONDS) -> tuple[Tensor, tuple[int, ...]]:
    """Random log-mel `(batch, 80, T_mel)`, zero beyond the lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = tuple(round(100 * s) for s in seconds)
    mel = torch.randn(len(seconds), 80, max(lengths), generator=generator)
    return mel.masked_fill(~valid_mask(lengths, mel.shape[-1])[:, None], 0.0), lengths


def make(mode: Any = "frozen", sizes: dict[str, Any] | None = None,
         **options: Any) -> SpeechEncoder:
    """An encoder whose biases and norms are not at zero and one, as after training."""
    whisper = make_whisper_encoder(**sizes or {})
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in whisper.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return SpeechEncoder(whisper, ModelConfig(encoder_mode=mode, **options)).eval()


def test_at_30_seconds_it_is_whispers_encoder() -> None:
    encoder, mel = make(silence=30), torch.randn(2, 80, 3000)
    frames, lengths = encoder(mel, (1234, 3000))
    with torch.no_grad():
        expected = encoder.whisper(mel).last_hidden_state
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)
    assert lengths == (617, 1500)


@pytest.mark.parametrize("silence", [30.0, 2.0, 0.0])
@pytest.mark.parametrize("gradients", [True, False])
def test_batched_equals_serial_at_very_unequal_lengths(gradients: bool, silence: float) -> None:
    """Also where a CPU encodes a few clips of like length at a time, without gradients."""
    encoder = make("full", silence=silence)
    mel, lengths = random_mels()
    longest = with_silence(mel.shape[-1], silence, MEL_RATE)
    mel = torch.nn.functional.pad(mel, (0, longest - mel.shape[-1]))
    with torch.set_grad_enabled(gradients):
        frames, n = encoder(mel, lengths)
        assert n == (25, 1000, 169, 26, 50, 35, 100)
        for i, length in enumerate(lengths):
            used = with_silence(length, silence, MEL_RATE)
            alone, m = encoder(mel[i:i + 1, :, :used], [length])
            assert m == (n[i],)
            torch.testing.assert_close(frames[i, : alone.shape[1]], alone[0], rtol=0, atol=1e-4)
            assert alone.shape[1] == with_silence(n[i], silence)
            assert not frames[i, alone.shape[1]:].any(), "zero beyond the length"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_with_padding(dtype: torch.dtype) -> None:
    frames, _ = make().to(dtype)(*random_mels(FEW))
    assert frames.dtype == dtype
    assert frames.isfinite().all()


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"30\.02 s .* takes 30 s"):
        make()(torch.zeros(1, 80, 3002), [3002])
    with pytest.raises(UserError, match=r"not less than 7 s \(model.silence\)"):
        make(silence=2)(torch.zeros(1, 80, 500), [500])
    with pytest.raises(UserError, match="encoder_top_layers 3: the encoder has 2 layers"):
        make("top", encoder_top_layers=3)


@pytest.mark.parametrize("mode", ["frozen", "lora", "top", "full"])
def test_modes_train_what_they_say(mode: str) -> None:
    """Just that gets a gradient."""
    encoder = make(mode, {"encoder_layers": 3}, lora=LoraConfig(rank=2)).train()
    names = {name.removeprefix("whisper.") for name, p in encoder.named_parameters()
             if p.requires_grad}
    every = {name for name, _ in make_whisper_encoder(encoder_layers=3).named_parameters()}
    if mode == "lora":
        assert len(names) == 3 * 2 * 2
        assert all(".lora_" in n and (".q_proj." in n or ".v_proj." in n) for n in names)
    else:
        top = ("layers.1.", "layers.2.", "layer_norm.")
        assert names == {"frozen": set(), "full": every - {"embed_positions.weight"},
                         "top": {name for name in every if name.startswith(top)}}[mode]
    with torch.no_grad():  # LoRA's B starts at zero, which keeps gradients from A
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    frames = encoder(*random_mels(FEW))[0]
    assert frames.requires_grad == bool(names)
    if names:
        frames.square().mean().backward()
    for name, parameter in encoder.named_parameters():
        grown = parameter.grad is not None and bool(parameter.grad.any())
        assert grown == parameter.requires_grad, name


def test_a_sharded_encoder_takes_a_batch_as_a_whole(tiny_whisper_encoder: Any) -> None:
    """On a CPU it goes through in parts, of which processes would have different numbers."""
    encoder = SpeechEncoder(tiny_whisper_encoder(), ModelConfig()).eval()
    calls = list[int]()
    encoder.whisper.layers[0].register_forward_hook(lambda *_: calls.append(1))
    mel = torch.randn(7, 80, 120)
    with torch.no_grad():
        parts = encoder(mel, [120] * 7)[0]
        encoder.in_parts = False
        whole = encoder(mel, [120] * 7)[0]
    assert len(calls) == 2 + 1
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
