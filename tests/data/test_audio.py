"""Audio: what is decoded, how bad input is refused, and a log-mel equal to that of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from unislu_llm.data.audio import (
    MAX_SAMPLES,
    SAMPLE_RATE,
    batch_log_mel,
    count_samples,
    encoder_length,
    load,
    log_mel,
    mel_length,
    with_silence,
)
from unislu_llm.errors import UserError

TONE = 440.0  # Hz
RATES = (8000, 22050, 44100, 48000)
LOSSY = ("OGG-VORBIS", "OGG-OPUS", "MP3")
KINDS = ("WAV", "WAV-FLOAT", "WAVEX", "FLAC", "AIFF", "AU", "CAF", "W64", "RF64", *LOSSY)


def tone(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    """`(frames, channels)`, the same sine in every channel."""
    wave = 0.4 * np.sin(2 * np.pi * TONE * np.arange(int(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def write(path: Path, wave: np.ndarray, kind: str = "WAV", rate: int = SAMPLE_RATE) -> Path:
    """Write samples as FORMAT[-SUBTYPE]."""
    form, _, subtype = kind.partition("-")
    soundfile.write(path, wave, rate, format=form, subtype=subtype or None)
    return path


def noise(seconds: float) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(int(SAMPLE_RATE * seconds))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of WAV at 16 kHz, sample i being i / 65536."""
    path = tmp_path_factory.mktemp("clip") / "ramp.wav"
    return write(path, np.arange(32000, dtype=np.float32) / 65536, "WAV-FLOAT")


# Decoding


def check_tone(samples: torch.Tensor, kind: str) -> None:
    assert samples.dtype == torch.float32
    assert samples.dim() == 1
    lossy_ends = 0.06 if kind in LOSSY else 0.001  # encoder delay, seconds
    assert len(samples) == pytest.approx(SAMPLE_RATE, abs=lossy_ends * SAMPLE_RATE)
    spectrum = torch.fft.rfft(samples * torch.hann_window(len(samples))).abs()
    loudest = float(spectrum.argmax()) * SAMPLE_RATE / len(samples)
    assert loudest == pytest.approx(TONE, abs=2.5)
    middle = samples[4000:12000]
    assert float(middle.abs().max()) == pytest.approx(0.4, rel=0.1)  # mean of channels, not sum


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_rate_and_number_of_channels(kind: str, tmp_path: Path) -> None:
    rates = (8000, 48000) if kind == "OGG-OPUS" else RATES
    for rate in rates:
        for channels in (1, 2) if kind == "MP3" else (1, 2, 8):
            # Extension unlike the format: content decides, not the name.
            path = write(tmp_path / "a.audio", tone(rate, channels=channels), kind, rate)
            samples = load(path)
            check_tone(samples, kind)
            assert count_samples(path) == len(samples)


@pytest.mark.parametrize(("start", "end"), [
    (0.0, None), (0.25, 1.5), (1.2345, None), (0.0, 0.50004), (1.99999, None), (1.0, 2.05)])
def test_a_stretch_is_cut_as_slue_cuts(clip: Path, start: float, end: float | None) -> None:
    """Its end may pass that of the file by a rounding."""
    whole = load(clip)
    last = None if end is None else int(end * SAMPLE_RATE)
    assert torch.equal(load(clip, start, end), whole[int(start * SAMPLE_RATE):last])
    assert count_samples(clip, start, end) == len(load(clip, start, end))


@pytest.mark.parametrize("kind", ["WAV", "FLAC", *LOSSY])
def test_a_stretch_read_by_seeking_equals_a_cut_of_the_whole(kind: str, tmp_path: Path) -> None:
    """The bits of an MP3 frame may stand in earlier ones: decoding begins before a stretch."""
    path = write(tmp_path / "a.audio", tone(SAMPLE_RATE, 6.0) + noise(6.0)[:, None], kind)
    whole = load(path)
    for start, end in ((0.5, 0.7), (2.345, 4.0), (5.0, None)):
        last = len(whole) if end is None else int(end * SAMPLE_RATE)
        # Codec states settle after a seek, so the last bits may differ.
        expected = whole[int(start * SAMPLE_RATE):last]
        torch.testing.assert_close(load(path, start, end), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("rate", [*RATES, 11025, 96000])
def test_header_count_equals_decoded_count(rate: int, tmp_path: Path) -> None:
    for n in (4000, 4001, 12347):
        path = write(tmp_path / "a.wav", np.zeros(n), rate=rate)
        assert count_samples(path) == len(load(path))


# Bad input: one clear message each


@pytest.mark.parametrize(("start", "end", "message"), [
    (2.0, None, "start 2 s is outside the file, which has 2.00 s"),
    (0.0, 2.2, "end 2.2 s is outside the file"),
    (1.0, 0.5, "from 1 s to 0.5 s is empty"),
    (-0.1, None, "start -0.1 s is outside"),
    (float("nan"), None, "start nan s is outside"),
    (0.0, float("inf"), "end inf s is outside"),
    (0.0, -0.1, "from 0 s to -0.1 s is empty"),
])
def test_bad_stretches_are_refused(clip: Path, start: float, end: float | None,
                                   message: str) -> None:
    for function in (load, count_samples):
        with pytest.raises(UserError, match=rf"ramp\.wav: .*{message}"):
            function(clip, start, end)


def test_max_seconds_counts_the_stretch(clip: Path) -> None:
    assert len(load(clip, 0.0, 1.0, max_seconds=1.0)) == SAMPLE_RATE
    with pytest.raises(UserError, match=r"ramp\.wav: 2\.00 s is longer than the limit of 1 s"):
        load(clip, max_seconds=1.0)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.wav", None, "does not exist"), ("x" * 300, None, "does not exist"),
    ("a.wav", b"", "cannot be read as audio"), ("a.flac", b"no audio at all", "cannot be read"),
    ("a.raw", b"\0" * 64, "cannot be read"), ("a.mp3", bytes(2000), "cannot be read")])
def test_what_is_no_audio_is_refused(name: str, content: bytes | None, message: str,
                                     tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)
    assert "not a file" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["WAV", "WAV-FLOAT", "WAVEX", "AIFF", "AU", "FLAC", *LOSSY])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kind: str, share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "cut.audio", noise(6.0), kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = refused(path)
    assert "truncated" in message or "cannot be decoded" in message or "cannot be read" in message


def test_a_length_that_a_pipe_did_not_write(tmp_path: Path) -> None:
    """A program cannot go back and fill it in: WAV is read to its end, FLAC is refused."""
    path = write(tmp_path / "pipe.wav", tone(SAMPLE_RATE))
    content = bytearray(path.read_bytes())
    at = content.find(b"data") + 4
    content[at:at + 4] = content[4:8] = b"\xff" * 4
    path.write_bytes(content)
    check_tone(load(path), "WAV")
    path = write(tmp_path / "pipe.flac", tone(SAMPLE_RATE), "FLAC")
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert "does not say how long" in refused(path)


def test_files_without_samples_are_refused(tmp_path: Path) -> None:
    assert "holds no samples" in refused(write(tmp_path / "empty.wav", np.zeros(0)))
    assert "none at 16000 Hz" in refused(write(tmp_path / "one.wav", np.zeros(1), rate=96000))


@pytest.mark.parametrize(("value", "message"), [
    (float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"),
    (-float("inf"), "NaN or infinite"), (20_000.0, "divide 16-bit samples by 32768")])
def test_samples_that_are_none_are_refused(value: float, message: str, tmp_path: Path) -> None:
    wave = tone(SAMPLE_RATE)
    wave[777] = value
    assert message in refused(write(tmp_path / "bad.wav", wave, "WAV-FLOAT"))


# Log-mel


def speech_like(n: int, seed: int = 0) -> torch.Tensor:
    """Noise whose loudness moves, with a silence: `(n,)`."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(n, generator=generator)
    loudness = torch.sin(torch.arange(n) / 3000.0 + seed).clamp(min=0)
    return noise * loudness


@pytest.mark.parametrize(("samples", "frames"), [
    (0, 50), (1, 50), (8000, 50), (8001, 51), (16000, 100), (16001, 101), (MAX_SAMPLES - 1, 3000),
    (MAX_SAMPLES, 3000)])
def test_lengths_drop_nothing_and_short_clips_are_padded(samples: int, frames: int) -> None:
    assert mel_length(samples) == frames
    first = torch.nn.Conv1d(2, 2, 3, padding=1)  # those of Whisper
    second = torch.nn.Conv1d(2, 2, 3, stride=2, padding=1)
    assert second(first(torch.zeros(1, 2, frames))).shape[-1] == encoder_length(frames)


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
    padded = log_mel(samples, extractor.feature_size, silence=30)
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
    torch.testing.assert_close(log_mel(samples, silence=30), expected, atol=1e-5, rtol=0)


LENGTHS = [3000, 8000, 8001, 16041, 47999, 160000]


@pytest.mark.parametrize("silence", [0.0, 2.0, 30.0])
def test_batch_equals_one_by_one(silence: float) -> None:
    waves = [10.0 ** -i * speech_like(n, seed=i) for i, n in enumerate(LENGTHS)]
    mel, lengths = batch_log_mel(waves, silence=silence)
    assert lengths == tuple(mel_length(n) for n in LENGTHS)
    for row, length, wave in zip(mel, lengths, waves, strict=True):
        single = log_mel(wave, silence=silence)
        torch.testing.assert_close(row[:, : single.shape[-1]], single, atol=1e-5, rtol=0)
        assert single.shape[-1] == with_silence(length, silence, 100)
        assert (row[:, single.shape[-1]:] == 0).all()


@pytest.mark.parametrize("silence", [0.0, 2.0, 30.0])
def test_what_stands_in_the_padding_changes_nothing(silence: float) -> None:
    lengths = (9000, 20000)
    clean = torch.zeros(2, 30000)
    for row, n in zip(clean, lengths, strict=True):
        row[:n] = speech_like(n)
    dirty = clean.clone()
    dirty[0, 9000:] = 1e3 * torch.randn(21000)
    dirty[1, 20000:] = float("nan")
    expected = log_mel(clean, lengths=lengths, silence=silence)
    assert torch.equal(log_mel(dirty, lengths=lengths, silence=silence), expected)
    assert expected.shape[-1] == with_silence(mel_length(20000), silence, 100)


def test_autocast_does_not_lower_the_precision() -> None:
    wave = speech_like(16000)
    expected = log_mel(wave)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(wave), expected)


def test_log_mel_refuses_more_than_30_seconds() -> None:
    with pytest.raises(UserError, match=r"30\.00 s; Whisper takes 30 s"):
        log_mel(torch.zeros(MAX_SAMPLES + 1))
