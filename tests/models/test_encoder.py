"""The speech encoder: Whisper's own frames at 30 s, and frames that padding cannot reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WhisperModel

from unislu_llm import weights
from unislu_llm.config import LoraConfig, ModelConfig
from unislu_llm.data import audio
from unislu_llm.errors import UserError
from unislu_llm.models.encoder import SpeechEncoder, valid_mask

SECONDS = (0.5, 20.0, 3.37, 0.51)  # an odd number of mel frames among them
FEW = (0.5, 1.37)


def random_mels(seconds: tuple[float, ...] = SECONDS) -> tuple[Tensor, tuple[int, ...]]:
    """Random log-mel `(batch, 80, T_mel)`, zero beyond the lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = tuple(round(100 * s) for s in seconds)
    mel = torch.randn(len(seconds), 80, max(lengths), generator=generator)
    return mel.masked_fill(~valid_mask(lengths, mel.shape[-1])[:, None], 0.0), lengths


def make(factory: Callable[..., Any], mode: Any = "frozen", **options: Any,
         ) -> SpeechEncoder:
    """An encoder whose biases and norms are not at zero and one, as after training."""
    sizes = {k: options.pop(k) for k in list(options) if k in ("encoder_layers", "dropout")}
    whisper = factory(**sizes)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in whisper.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    if "top_layers" in options:
        options["encoder_top_layers"] = options.pop("top_layers")
    return SpeechEncoder(whisper, ModelConfig(encoder_mode=mode, **options)).eval()


# Whisper's own result


def test_at_30_seconds_it_is_whispers_encoder(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder, pad_to_30s=True)
    mel = torch.randn(2, 80, 3000)
    frames, lengths = encoder(mel, (1234, 3000))
    with torch.no_grad():
        expected = encoder.whisper(mel).last_hidden_state
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)
    assert lengths == (617, 1500)


@pytest.mark.weights
def test_real_whisper_base_is_transformers_encoder() -> None:
    path = weights.resolve("openai/whisper-base").path
    whisper = WhisperModel.from_pretrained(path, dtype=torch.float32).encoder
    wave = audio.load(Path(__file__).parents[1] / "data_files" / "librivox.flac")
    mel, lengths = audio.batch_log_mel([wave], pad_to_30s=True)
    frames, n = SpeechEncoder(whisper, ModelConfig(pad_to_30s=True)).eval()(mel, lengths)
    with torch.no_grad():
        expected = whisper.eval()(mel).last_hidden_state
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)
    assert n == (math.ceil(len(wave) / 160 / 2),)


# Padding


def test_batched_equals_serial_at_very_unequal_lengths(
        tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder)
    mel, lengths = random_mels()
    frames, n = encoder(mel, lengths)
    assert n == (25, 1000, 169, 26)
    assert frames.shape == (4, 1000, 32)
    for i, length in enumerate(lengths):
        alone, m = encoder(mel[i:i + 1, :, :length], [length])
        assert m == (alone.shape[1],) == (n[i],)
        torch.testing.assert_close(frames[i, :n[i]], alone[0], rtol=0, atol=1e-4)
        assert not frames[i, n[i]:].any(), "zero beyond the length"


@pytest.mark.parametrize("pad_to_30s", [True, False])
@torch.no_grad()
def test_clips_encoded_by_length_are_in_their_places(tiny_whisper_encoder: Callable[..., Any],
                                                     pad_to_30s: bool) -> None:
    """A CPU that decodes encodes a few clips of like length at a time."""
    encoder = make(tiny_whisper_encoder, "full", pad_to_30s=pad_to_30s)
    mel, lengths = random_mels((*SECONDS, 1.0, 0.7, 2.0, 0.5, 1.1))
    if pad_to_30s:
        mel = torch.nn.functional.pad(mel, (0, 3000 - mel.shape[-1]))
    frames, n = encoder(mel, lengths)
    with torch.enable_grad():  # where gradients are wanted the batch stays whole
        together, m = encoder(mel, lengths)
    assert n == m
    torch.testing.assert_close(frames, together, rtol=0, atol=1e-4)


@pytest.mark.parametrize("garbage", [1e4, -1e4, math.inf, math.nan])
def test_what_stands_in_the_padding_changes_nothing(tiny_whisper_encoder: Callable[..., Any],
                                                    garbage: float) -> None:
    encoder = make(tiny_whisper_encoder)
    mel, lengths = random_mels((0.5, 2.0, 1.37))
    dirty = mel.masked_fill(~valid_mask(lengths, mel.shape[-1])[:, None], garbage)
    assert torch.equal(encoder(dirty, lengths)[0], encoder(mel, lengths)[0])


def test_gradients_do_not_reach_the_padding(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder, "full")
    mel, lengths = random_mels(FEW)
    mel.requires_grad_()
    encoder(mel, lengths)[0].square().sum().backward()
    assert mel.grad is not None
    outside = ~valid_mask(lengths, mel.shape[-1])[:, None].expand_as(mel)
    assert not mel.grad[outside].any()
    assert mel.grad[~outside].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_with_padding(tiny_whisper_encoder: Callable[..., Any],
                                               dtype: torch.dtype) -> None:
    frames, _ = make(tiny_whisper_encoder).to(dtype)(*random_mels(FEW))
    assert frames.dtype == dtype
    assert frames.isfinite().all()


# Limits


def test_lengths_that_do_not_fit_are_refused(tiny_whisper_encoder: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"30\.02 s .* takes 30 s"):
        make(tiny_whisper_encoder)(torch.zeros(1, 80, 3002), [3002])
    with pytest.raises(UserError, match="pad_to_30s"):
        make(tiny_whisper_encoder, pad_to_30s=True)(torch.zeros(1, 80, 500), [500])


# What trains


def trainable(encoder: SpeechEncoder) -> set[str]:
    return {name.removeprefix("whisper.") for name, p in encoder.named_parameters()
            if p.requires_grad}


def test_modes_train_what_they_say(tiny_whisper_encoder: Callable[..., Any]) -> None:
    names = {name for name, _ in tiny_whisper_encoder(encoder_layers=3).named_parameters()}
    positions = {"embed_positions.weight"}
    assert positions <= names
    build = partial(make, tiny_whisper_encoder, encoder_layers=3)
    assert trainable(build("frozen")) == set()
    assert trainable(build("full")) == names - positions
    assert trainable(build("top", top_layers=2)) == {
        name for name in names if name.startswith(("layers.1.", "layers.2.", "layer_norm."))}
    adapters = trainable(build("lora"))
    assert len(adapters) == 3 * 2 * 2
    assert all(".lora_" in n and (".q_proj." in n or ".v_proj." in n) for n in adapters)


@pytest.mark.parametrize("mode", ["lora", "top", "full"])
def test_every_trainable_weight_gets_a_gradient(tiny_whisper_encoder: Callable[..., Any],
                                                mode: str) -> None:
    encoder = make(tiny_whisper_encoder, mode, top_layers=1, lora=LoraConfig(rank=2)).train()
    with torch.no_grad():  # LoRA's B starts at zero, which keeps gradients from A
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    encoder(*random_mels(FEW))[0].square().mean().backward()
    for name, parameter in encoder.named_parameters():
        grown = parameter.grad is not None and bool(parameter.grad.any())
        assert grown == parameter.requires_grad, name


def test_a_frozen_encoder_stays_in_eval_mode_and_builds_no_graph(
        tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder, dropout=0.5)
    mel, lengths = random_mels(FEW)
    before = encoder(mel, lengths)[0]
    parent = torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert parent.training
    after = encoder(mel, lengths)[0]
    assert torch.equal(after, before)
    assert not after.requires_grad


@pytest.mark.parametrize(("mode", "options", "message"), [
    ("frosen", {}, "'frozen', 'lora', 'top' or 'full'"),  # refused by the settings' own bounds
    ("top", {"top_layers": 3}, "encoder_top_layers 3: the encoder has 2 layers"),
    ("top", {"top_layers": 0}, "encoder_top_layers\\n"),
])
def test_bad_options_are_named(tiny_whisper_encoder: Callable[..., Any], mode: Any,
                               options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_whisper_encoder, mode, **options)
