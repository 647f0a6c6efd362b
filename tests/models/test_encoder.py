"""The speech encoder: Whisper's own frames at 30 s, and at natural length frames that padding cannot reach."""

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

from unislu_llm.data import audio
from unislu_llm.errors import UserError
from unislu_llm.models import weights
from unislu_llm.models.encoder import EncoderMode, SpeechEncoder, attention_bias, valid_mask
from unislu_llm.models.lora import LoraOptions

SECONDS = (0.5, 20.0, 3.37, 0.51)  # an odd number of mel frames among them
LORA = LoraOptions(rank=2, target_modules=["q_proj", "v_proj"])


def random_mels(seconds: tuple[float, ...] = SECONDS, n_mels: int = 80) -> tuple[Tensor, Tensor]:
    """Random log-mel `(batch, n_mels, T_mel)`, zero beyond the lengths `(batch,)`."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([round(100 * s) for s in seconds])
    mel = torch.randn(len(seconds), n_mels, int(lengths.max()), generator=generator)
    return mel.masked_fill(~valid_mask(lengths, mel.shape[-1])[:, None], 0.0), lengths


def make(factory: Callable[..., Any], mode: EncoderMode = "frozen", **options: Any) -> SpeechEncoder:
    """An encoder whose biases and norms are not at zero and one, as after training."""
    sizes = {key: options.pop(key) for key in list(options) if key in ("encoder_layers", "dropout")}
    whisper = factory(**sizes)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in whisper.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return SpeechEncoder(whisper, mode, **options).eval()


# Whisper's own result


def test_at_30_seconds_it_is_whispers_encoder(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder, pad_to_30s=True)
    mel = torch.randn(2, 80, 3000)
    frames, lengths = encoder(mel, torch.tensor([1234, 3000]))
    with torch.no_grad():
        expected = encoder.whisper(mel).last_hidden_state
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)
    assert lengths.tolist() == [617, 1500]


def test_a_full_30_seconds_need_no_padding(tiny_whisper_encoder: Callable[..., Any]) -> None:
    natural, padded = make(tiny_whisper_encoder), make(tiny_whisper_encoder, pad_to_30s=True)
    mel, lengths = torch.randn(1, 80, 3000), torch.tensor([3000])
    torch.testing.assert_close(natural(mel, lengths)[0], padded(mel, lengths)[0], rtol=0, atol=1e-5)


@pytest.mark.weights
def test_real_whisper_base_is_transformers_encoder() -> None:
    path = weights.resolve("openai/whisper-base").path
    whisper = WhisperModel.from_pretrained(path, dtype=torch.float32).encoder
    wave = audio.load(Path(__file__).parents[1] / "data_files" / "librivox.flac")
    mel, lengths = audio.batch_log_mel([wave], pad_to_30s=True)
    frames, n = SpeechEncoder(whisper, pad_to_30s=True).eval()(mel, lengths)
    with torch.no_grad():
        expected = whisper.eval()(mel).last_hidden_state
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)
    assert n.tolist() == [math.ceil(len(wave) / 160 / 2)]


# Padding


def test_batched_equals_serial_at_very_unequal_lengths(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder)
    mel, lengths = random_mels()
    frames, n = encoder(mel, lengths)
    assert n.tolist() == [25, 1000, 169, 26]
    assert frames.shape == (4, 1000, 32)
    for i, length in enumerate(lengths.tolist()):
        alone, m = encoder(mel[i:i + 1, :, :length], lengths[i:i + 1])
        assert m.tolist() == [alone.shape[1]] == [n[i]]
        torch.testing.assert_close(frames[i, : int(n[i])], alone[0], rtol=0, atol=1e-4)
        assert not frames[i, int(n[i]):].any(), "zero beyond the length"


@pytest.mark.parametrize("garbage", [1e4, -1e4, math.inf, math.nan])
def test_what_stands_in_the_padding_changes_nothing(tiny_whisper_encoder: Callable[..., Any], garbage: float) -> None:
    encoder = make(tiny_whisper_encoder)
    mel, lengths = random_mels((0.5, 2.0, 1.37))
    dirty = mel.masked_fill(~valid_mask(lengths, mel.shape[-1])[:, None], garbage)
    assert torch.equal(encoder(dirty, lengths)[0], encoder(mel, lengths)[0])


def test_more_padding_changes_nothing(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder)
    mel, lengths = random_mels((0.5, 1.37))
    wider = torch.nn.functional.pad(mel, (0, 555), value=7.0)
    frames, n = encoder(wider, lengths)
    plain, m = encoder(mel, lengths)
    assert n.tolist() == m.tolist()
    torch.testing.assert_close(frames[:, :plain.shape[1]], plain, rtol=0, atol=1e-5)
    assert not frames[:, plain.shape[1]:].any()


def test_gradients_do_not_reach_the_padding(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder, "full")
    mel, lengths = random_mels((0.5, 1.37))
    mel.requires_grad_()
    encoder(mel, lengths)[0].square().sum().backward()
    assert mel.grad is not None
    outside = ~valid_mask(lengths, mel.shape[-1])[:, None].expand_as(mel)
    assert not mel.grad[outside].any()
    assert mel.grad[~outside].any()


def test_no_mask_where_nothing_is_padded() -> None:
    assert attention_bias(torch.tensor([5, 5]), 5, torch.float32) is None
    bias = attention_bias(torch.tensor([5, 2]), 5, torch.float32)
    assert bias is not None
    assert bias.shape == (2, 1, 1, 5)
    assert (bias == 0).flatten(1).sum(-1).tolist() == [5, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_with_padding(tiny_whisper_encoder: Callable[..., Any], dtype: torch.dtype) -> None:
    encoder = make(tiny_whisper_encoder).to(dtype)
    mel, lengths = random_mels((0.5, 1.37))
    frames, _ = encoder(mel, lengths)
    assert frames.dtype == dtype
    assert frames.isfinite().all()


# Limits


def test_more_than_30_seconds_are_refused(tiny_whisper_encoder: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"30\.02 s .* takes 30 s"):
        make(tiny_whisper_encoder)(torch.zeros(1, 80, 3002), torch.tensor([3002]))


def test_with_pad_to_30s_less_than_30_seconds_of_mel_are_refused(tiny_whisper_encoder: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="pad_to_30s"):
        make(tiny_whisper_encoder, pad_to_30s=True)(torch.zeros(1, 80, 500), torch.tensor([500]))


# What trains


def trainable(encoder: SpeechEncoder) -> set[str]:
    return {name.removeprefix("whisper.") for name, p in encoder.named_parameters() if p.requires_grad}


def test_modes_train_what_they_say(tiny_whisper_encoder: Callable[..., Any]) -> None:
    names = {name for name, _ in tiny_whisper_encoder(encoder_layers=3).named_parameters()}
    positions = {"embed_positions.weight"}
    assert positions <= names
    build = partial(make, tiny_whisper_encoder, encoder_layers=3)
    assert trainable(build("frozen")) == set()
    assert trainable(build("full")) == names - positions
    assert trainable(build("top", top_layers=2)) == {
        name for name in names if name.startswith(("layers.1.", "layers.2.", "layer_norm."))}
    adapters = trainable(build("lora", lora=LORA))
    assert len(adapters) == 3 * 2 * 2
    assert all(".lora_" in name and (".q_proj." in name or ".v_proj." in name) for name in adapters)


@pytest.mark.parametrize("mode", ["lora", "top", "full"])
def test_every_trainable_weight_gets_a_gradient(tiny_whisper_encoder: Callable[..., Any], mode: EncoderMode) -> None:
    encoder = make(tiny_whisper_encoder, mode, top_layers=1, lora=LORA).train()
    with torch.no_grad():  # LoRA's B starts at zero, which keeps gradients from A
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    mel, lengths = random_mels((0.5, 1.37))
    encoder(mel, lengths)[0].square().mean().backward()
    for name, parameter in encoder.named_parameters():
        grown = parameter.grad is not None and bool(parameter.grad.any())
        assert grown == parameter.requires_grad, name


def test_lora_starts_as_the_plain_encoder(tiny_whisper_encoder: Callable[..., Any]) -> None:
    mel, lengths = random_mels((0.5, 1.37))
    torch.testing.assert_close(make(tiny_whisper_encoder, "lora", lora=LORA)(mel, lengths)[0],
                               make(tiny_whisper_encoder)(mel, lengths)[0], rtol=0, atol=1e-6)


def test_a_frozen_encoder_stays_in_eval_mode_and_builds_no_graph(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder, dropout=0.5)
    mel, lengths = random_mels((0.5, 1.37))
    before = encoder(mel, lengths)[0]
    parent = torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert parent.training
    after = encoder(mel, lengths)[0]
    assert torch.equal(after, before)
    assert not after.requires_grad


def test_a_training_encoder_uses_dropout_in_train_mode_alone(tiny_whisper_encoder: Callable[..., Any]) -> None:
    encoder = make(tiny_whisper_encoder, "full", dropout=0.5)
    mel, lengths = random_mels((0.5, 1.37))
    assert torch.equal(encoder(mel, lengths)[0], encoder(mel, lengths)[0])
    encoder.train()
    assert not torch.equal(encoder(mel, lengths)[0], encoder(mel, lengths)[0])


@pytest.mark.parametrize(("mode", "options", "message"), [
    ("frosen", {}, "unknown encoder_mode 'frosen'; known: frozen, lora, top, full"),
    ("top", {"top_layers": 3}, "encoder_top_layers=3: the encoder has 2 layers"),
    ("top", {"top_layers": 0}, "encoder_top_layers=0"),
    ("lora", {"lora": LoraOptions(target_modules=["q_prj"])}, r"\['q_prj'\] match no .* of the encoder.*q_proj"),
])
def test_bad_options_are_named(
        tiny_whisper_encoder: Callable[..., Any], mode: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tiny_whisper_encoder, mode, **options)
