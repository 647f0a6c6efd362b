"""Log-mel: lengths, values equal to those of transformers, batches, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperFeatureExtractor

from unislu_llm.data.audio import MAX_SAMPLES, batch_log_mel, encoder_length, log_mel, mel_length
from unislu_llm.errors import UserError


def speech_like(n: int, seed: int = 0) -> torch.Tensor:
    """Noise whose loudness moves, with a silence: `(n,)`."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(n, generator=generator)
    loudness = torch.sin(torch.arange(n) / 3000.0 + seed).clamp(min=0)
    return noise * loudness


# Lengths


@pytest.mark.parametrize(("samples", "frames"), [
    (0, 50), (1, 50), (8000, 50), (8001, 51), (16000, 100), (16001, 101), (MAX_SAMPLES - 1, 3000),
    (MAX_SAMPLES, 3000)])
def test_lengths_drop_nothing_and_short_clips_are_padded(samples: int, frames: int) -> None:
    assert mel_length(samples) == frames
    first = torch.nn.Conv1d(2, 2, 3, padding=1)  # those of Whisper
    second = torch.nn.Conv1d(2, 2, 3, stride=2, padding=1)
    assert second(first(torch.zeros(1, 2, frames))).shape[-1] == encoder_length(frames)


# Log-mel against transformers


@pytest.fixture(scope="module", params=[80, 128])
def extractor(request: pytest.FixtureRequest) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=request.param)


def reference(extractor: WhisperFeatureExtractor, samples: torch.Tensor) -> torch.Tensor:
    """`(n_mels, 3000)` of transformers, padded to 30 s."""
    features = extractor(samples.numpy(), sampling_rate=16_000, return_tensors="np")
    return torch.from_numpy(features.input_features[0])


@pytest.mark.parametrize("n", [
    1600, 8000, 12345, 16000, 16039, 16041, 70001, MAX_SAMPLES - 250, MAX_SAMPLES - 100,
    MAX_SAMPLES - 1, MAX_SAMPLES])
def test_log_mel_equals_transformers(extractor: WhisperFeatureExtractor, n: int) -> None:
    samples = speech_like(n)
    expected = reference(extractor, samples)
    natural = log_mel(samples, extractor.feature_size)
    torch.testing.assert_close(natural, expected[:, : mel_length(n)], atol=1e-5, rtol=0)
    padded = log_mel(samples, extractor.feature_size, pad_to_30s=True)
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [16000, 16001, 16030, 16159])
@pytest.mark.parametrize("click", [0.0, 1.0])
def test_silence_and_a_click_at_the_very_end_are_those_of_transformers(n: int,
                                                                       click: float) -> None:
    """The loudest window, which sets the floor, may be centred past the last valid frame."""
    samples = click * 1e-4 * speech_like(n)
    samples[-1] = click
    expected = reference(WhisperFeatureExtractor(), samples)
    torch.testing.assert_close(log_mel(samples), expected[:, : mel_length(n)], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_mel(samples, pad_to_30s=True), expected, atol=1e-5, rtol=0)


# Log-mel in batches


LENGTHS = [3000, 8000, 8001, 16041, 47999, 160000]


@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_batch_equals_one_by_one(pad_to_30s: bool) -> None:
    waves = [10.0 ** -i * speech_like(n, seed=i) for i, n in enumerate(LENGTHS)]
    mel, lengths = batch_log_mel(waves, pad_to_30s=pad_to_30s)
    assert lengths == tuple(mel_length(n) for n in LENGTHS)
    for row, length, wave in zip(mel, lengths, waves, strict=True):
        single = log_mel(wave, pad_to_30s=pad_to_30s)
        torch.testing.assert_close(row[:, : single.shape[-1]], single, atol=1e-5, rtol=0)
        if not pad_to_30s:
            assert single.shape[-1] == length
            assert (row[:, length:] == 0).all()


@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_what_stands_in_the_padding_changes_nothing(pad_to_30s: bool) -> None:
    lengths = (9000, 20000)
    clean = torch.zeros(2, 30000)
    for row, n in zip(clean, lengths, strict=True):
        row[:n] = speech_like(n)
    dirty = clean.clone()
    dirty[0, 9000:] = 1e3 * torch.randn(21000)
    dirty[1, 20000:] = float("nan")
    expected = log_mel(clean, lengths=lengths, pad_to_30s=pad_to_30s)
    assert torch.equal(log_mel(dirty, lengths=lengths, pad_to_30s=pad_to_30s), expected)
    assert expected.shape[-1] == (3000 if pad_to_30s else mel_length(20000))


def test_autocast_does_not_lower_the_precision() -> None:
    wave = speech_like(16000)
    expected = log_mel(wave)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(wave), expected)


def test_log_mel_refuses_more_than_30_seconds() -> None:
    with pytest.raises(UserError, match=r"30\.00 s; Whisper takes 30 s"):
        log_mel(torch.zeros(MAX_SAMPLES + 1))
