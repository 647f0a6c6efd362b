"""Augmentation: each effect does what it says, from its key alone, and only where it may."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from unislu_llm.config import AugmentConfig, TrainConfig
from unislu_llm.data.audio import log_mel
from unislu_llm.data.augment import (
    Augmenter,
    HypothesisDropout,
    Key,
    Masks,
    add_noise,
    change_speed,
)
from unislu_llm.errors import UserError
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

EXAMPLE = Example(Utterance("u", Path("u.wav"), "hello", {"sa": "Positive"}), "sa")


def tone(seconds: float = 1.0) -> torch.Tensor:
    """A sine of half amplitude at 16 kHz."""
    return 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(round(seconds * 16_000)) / 16_000)


def rms(wave: torch.Tensor) -> float:
    return float(wave.double().pow(2).mean().sqrt())


def decibels(wave: torch.Tensor, other: torch.Tensor) -> float:
    return float(20 * np.log10(rms(wave) / rms(other)))


@pytest.fixture
def noises(tmp_path: Path) -> str:
    """A folder of noise: one file shorter, one longer than the clips, one at another rate."""
    rng = np.random.default_rng(0)
    (tmp_path / "noise" / "deep").mkdir(parents=True)
    for name, seconds, rate in (("a.wav", 0.3, 16_000), ("b.flac", 5.0, 16_000),
                                ("deep/c.wav", 2.0, 8_000)):
        soundfile.write(tmp_path / "noise" / name,
                        0.1 * rng.standard_normal(int(seconds * rate)), rate)
    (tmp_path / "noise" / "README.txt").write_text("no audio")
    return str(tmp_path / "noise")


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.5])
def test_speed_changes_length_and_pitch(factor: float) -> None:
    out = change_speed(tone(2.0), factor)
    assert out.dtype == torch.float32
    assert abs(len(out) - 32_000 / factor) <= 1
    peak = int(torch.fft.rfft(out).abs().argmax()) * 16_000 / len(out)
    assert peak == pytest.approx(440 * factor, abs=2)
    augmenter = Augmenter(AugmentConfig(speeds=[factor]))
    assert len(augmenter.clip(EXAMPLE, tone(2.0), Key(0, 0, 0))[1]) == len(out)
    longest = len(augmenter.clip(EXAMPLE, tone(28), Key(0, 0, 0))[1])
    assert longest == 28 * 16_000 or factor > 1, "the encoder takes no more"


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_noise_has_the_asked_ratio(snr: float) -> None:
    clean, noise = tone(), torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    assert decibels(clean, add_noise(clean, noise, snr) - clean) == pytest.approx(snr, abs=0.01)
    assert torch.equal(add_noise(torch.zeros(9), noise[:9], snr), torch.zeros(9)), "relative to 0"


def test_noise_comes_from_the_folder_to_half_of_the_clips(noises: str) -> None:
    augmenter = Augmenter(AugmentConfig(noise=noises, snr=(5, 10)))
    assert len(augmenter.noises) == 3
    waves = [augmenter.clip(EXAMPLE, tone(), Key(1, 0, i))[1] for i in range(80)]
    assert {len(wave) for wave in waves} == {16_000}
    ratios = [decibels(tone(), w - tone()) for w in waves if not torch.equal(w, tone())]
    assert 25 <= len(ratios) <= 55
    assert 4.99 <= min(ratios) < 7 < max(ratios) <= 10.01


def test_gain_is_bounded() -> None:
    augmenter = Augmenter(AugmentConfig(gain_db=6))
    gains = [decibels(augmenter.clip(EXAMPLE, tone(0.1), Key(0, 0, i))[1], tone(0.1))
             for i in range(50)]
    assert -6.001 <= min(gains) < -3 < 3 < max(gains) <= 6.001


@pytest.mark.parametrize("with_noise", [False, True])
def test_silence_gives_nothing(with_noise: bool, noises: str) -> None:
    augmenter = Augmenter(AugmentConfig(silence_share=0.3, noise=noises if with_noise else ""))
    read = Example(Utterance("u", Path("u.wav"), "hello", {"sa": "Positive"}, hypothesis="hallo"),
                   "sa")
    out = [augmenter.clip(read if i % 2 else EXAMPLE, tone(0.4), Key(0, 0, i)) for i in range(200)]
    silent = [(e.utterance, w) for e, w in out if e.task is None]
    assert 40 <= len(silent) <= 80
    for u, wave in silent:
        assert (u.text, dict(u.labels)) == ("", {})
        assert (wave.shape, wave.dtype) == ((6400,), torch.float32)
        assert rms(wave) <= 10 ** (-30 / 20) * 1.001
    assert {rms(w) > 0 for _, w in silent} == {True, False}
    assert {u.hypothesis for u, _ in silent} == {"", None}, "a recogniser finds nothing in silence"
    assert all(e in (EXAMPLE, read) for e, w in out if e.task is not None)


def test_masks_stay_inside_the_valid_frames() -> None:
    mel = torch.cat([log_mel(torch.randn(16_000)), torch.zeros(80, 30)], 1)
    before, bins, frames = mel.clone(), 0, []
    for i in range(60):
        out = Masks(2, 1, Key(0, 0, i)).mel(mel, 100)
        assert torch.equal(mel, before), "the input is not changed"
        assert torch.equal(out[:, 100:], mel[:, 100:]), "padding stays padding"
        changed = (out != mel)[:, :100]
        bins = max(bins, int(changed.all(1).sum()))
        frames.append(int(changed.all(0).sum()))
    assert 0 < bins <= 54
    assert max(frames) == 10, "a tenth of the clip"


def test_masks_of_frames_are_zero() -> None:
    """For every 5 s so many time masks of 0.4 s at most, and a tenth of the features."""
    values = torch.rand(600, 40) + 1
    widths = []
    for i in range(60):
        out = Masks(1, 1, Key(0, 0, i)).frames(values, 500)
        assert torch.equal(out[out != 0], values[out != 0])
        assert (out[500:] == values[500:]).all(0).sum() >= 36, "time masks are in what is valid"
        widths.append((int((out == 0).all(1).sum()), int((out == 0).all(0).sum())))
    times, features = zip(*widths, strict=True)
    assert 20 < max(times) <= 2 * 20
    assert max(features) == 4
    assert torch.equal(Masks(0, 1, Key(0, 0, 0)).frames(torch.ones(1, 4), 1)[:, :0],
                       torch.ones(1, 0)), "one frame is enough"


def test_randomness_follows_from_the_key_alone() -> None:
    """Any order, any augmenter object, whatever other effects; every part of the key matters."""
    config = AugmentConfig(freq_masks=2, time_masks=2, speeds=[0.9, 1.0, 1.1], gain_db=6)
    first, second = Augmenter(config), Augmenter(config)
    key, mel = Key(1, 2, 3, 0), torch.randn(80, 100)

    def both(augmenter: Augmenter, key: Key) -> tuple[bytes, bytes]:
        masks = augmenter.masks(key)
        return (augmenter.clip(EXAMPLE, tone(), key)[1].numpy().tobytes(),
                masks.mel(mel, 100).numpy().tobytes())

    for other in range(5):  # other draws in between change nothing
        both(second, Key(1, 2, other))
    assert both(first, key) == both(second, key)
    for other_key in (Key(2, 2, 3), Key(1, 3, 3), Key(1, 2, 4), Key(1, 2, 3, 1)):
        found = both(first, other_key)
        assert found[0] != both(first, key)[0], other_key
        assert found[1] != both(first, key)[1], other_key
    plain, more = (Augmenter(AugmentConfig(gain_db=6, **effects))
                   for effects in ({}, {"speeds": [1.0], "freq_masks": 1}))
    assert torch.equal(plain.clip(EXAMPLE, tone(), key)[1], more.clip(EXAMPLE, tone(), key)[1])


def test_a_seed_keeps_its_draws() -> None:
    """What runs drew before; of numbers that no resampling has touched."""
    config = AugmentConfig(gain_db=6, silence_share=0.2, freq_masks=2, time_masks=1)
    augmenter, digest = Augmenter(config), hashlib.sha256()
    mel = torch.arange(8000.0).reshape(80, 100) / 8000
    for i in range(20):
        example, wave = augmenter.clip(EXAMPLE, tone(0.1), Key(3, 1, i))
        changed = (Masks(2, 1, Key(3, 1, i)).mel(mel, 90) != mel).numpy()
        digest.update(f"{example.task} {rms(wave):.4f}".encode() + changed.tobytes())
    assert digest.hexdigest()[:16] == "7f2678969d099f3c"


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"augment\.noise: {tmp_path} is no folder with audio"):
        Augmenter(AugmentConfig(noise=str(tmp_path)))
    (tmp_path / "x.wav").write_text("not audio")
    with pytest.raises(UserError, match=r"x\.wav"):
        Augmenter(AugmentConfig(noise=str(tmp_path)))


# Hypotheses


def example(hypothesis: str | None, audio: str | None = "a.wav") -> Example:
    path = None if audio is None else Path(audio)
    return Example(Utterance("a", path, "x", hypothesis=hypothesis), None)


WORDS = [example("five six"), example("six"), example(None)]
LONG = " ".join(["one two three four"] * 50)


def dropout(share: float, words: float, *examples: Example) -> HypothesisDropout:
    train = TrainConfig(hypothesis_dropout=share, hypothesis_word_dropout=words)
    return HypothesisDropout(train, examples or WORDS)


def left(it: HypothesisDropout, example: Example) -> list[str | None]:
    return [it(example, Key(1, 0, i)).utterance.hypothesis for i in range(400)]


def test_dropout_follows_from_the_draw() -> None:
    spoil = dropout(0.25, 0.4)
    found = left(spoil, example(LONG))
    assert found == left(dropout(0.25, 0.4, *reversed(WORDS)), example(LONG)), "in any order"
    assert 0.15 < found.count(None) / 400 < 0.35
    words = [word for hypothesis in found if hypothesis for word in hypothesis.split()]
    n = 200 * sum(hypothesis is not None for hypothesis in found)
    new = [word for word in words if word in ("five", "six")]
    assert 0.19 < len(new) / n < 0.21  # replaced
    assert 0.19 < 1 - len(words) / n < 0.21  # deleted
    assert 0.6 < new.count("six") / len(new) < 0.73  # as often as in the hypotheses
    keys = [Key(1, 0, 0), Key(1, 0, 0, 1), Key(1, 1, 0), Key(2, 0, 0)]
    assert len({spoil(example(LONG), key).utterance.hypothesis for key in keys}) == 4
    assert spoil(WORDS[2], keys[0]) is WORDS[2]


def test_rows_without_audio_are_spoilt_by_15_percent_at_least() -> None:
    """Their hypotheses are copies of the transcripts."""
    speech, text = example(LONG), example(LONG, audio=None)
    assert left(dropout(0, 0.05), text) == left(dropout(0, 0.15), speech)
    assert left(dropout(0, 0.4), text) == left(dropout(0, 0.4), speech)
    assert left(dropout(0, 0), text) == [LONG] * 400
