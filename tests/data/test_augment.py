"""Augmentation: each effect does what it says, from its key alone, and only inside what is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from unislu_llm.data.audio import log_mel
from unislu_llm.data.augment import (
    AugmentConfig,
    AugmentedCollator,
    AugmentedSpeech,
    Augmenter,
    Key,
    add_noise,
    change_speed,
)
from unislu_llm.data.collate import SpeechDataset
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.utterance import Utterance

SAMPLE = Sample(Utterance("u", None, "hello", {"sa": "Positive"}), "sa")
ALL: dict[str, Any] = {"freq_masks": 2, "time_masks": 2, "speeds": [0.9, 1.0, 1.1], "gain_db": 6.0, "silence_share": 0.2}


def tone(seconds: float = 1.0, hertz: float = 440.0) -> torch.Tensor:
    """A sine of half amplitude at 16 kHz."""
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * 16_000)) / 16_000)


def rms(wave: torch.Tensor) -> float:
    return float(wave.double().pow(2).mean().sqrt())


@pytest.fixture
def noises(tmp_path: Path) -> Path:
    """A folder of noise: one file shorter, one longer than the clips, one at another rate."""
    rng = np.random.default_rng(0)
    (tmp_path / "noise" / "deep").mkdir(parents=True)
    for name, seconds, rate in (("a.wav", 0.3, 16_000), ("b.flac", 5.0, 16_000), ("deep/c.wav", 2.0, 8_000)):
        soundfile.write(tmp_path / "noise" / name, 0.1 * rng.standard_normal(int(seconds * rate)), rate)
    (tmp_path / "noise" / "README.txt").write_text("no audio")
    return tmp_path / "noise"


def test_off_by_default() -> None:
    assert not AugmentConfig().active
    sample, wave = Augmenter(AugmentConfig()).clip(SAMPLE, tone(), Key(0, 0, 0))
    assert sample is SAMPLE
    assert torch.equal(wave, tone())


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.5])
def test_speed_changes_length_and_pitch(factor: float) -> None:
    out = change_speed(tone(2.0), factor)
    assert out.dtype == torch.float32
    assert abs(len(out) - 32_000 / factor) <= 1
    peak = int(torch.fft.rfft(out).abs().argmax()) * 16_000 / len(out)
    assert peak == pytest.approx(440 * factor, abs=2)


def test_speed_never_passes_the_limit() -> None:
    augmenter = Augmenter(AugmentConfig(speeds=[0.9]), max_seconds=2.0)
    assert len(augmenter.clip(SAMPLE, tone(1.9), Key(0, 0, 0))[1]) == round(1.9 * 16_000)
    assert len(augmenter.clip(SAMPLE, tone(1.5), Key(0, 0, 0))[1]) > 1.6 * 16_000


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_noise_has_the_asked_ratio(snr: float) -> None:
    clean, noise = tone(), torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    added = add_noise(clean, noise, snr) - clean
    assert 20 * np.log10(rms(clean) / rms(added)) == pytest.approx(snr, abs=0.01)
    assert torch.equal(add_noise(torch.zeros(9), noise[:9], snr), torch.zeros(9)), "nothing to be relative to"


def test_noise_comes_from_the_folder_at_the_asked_share(noises: Path) -> None:
    augmenter = Augmenter(AugmentConfig(noise=str(noises), noise_share=0.5, snr_min=5, snr_max=10))
    assert len(augmenter.noises) == 3
    clean, ratios = tone(), []
    for i in range(80):
        sample, wave = augmenter.clip(SAMPLE, clean, Key(1, 0, i))
        assert sample is SAMPLE
        assert len(wave) == len(clean)
        if not torch.equal(wave, clean):
            ratios.append(20 * np.log10(rms(clean) / rms(wave - clean)))
    assert 25 <= len(ratios) <= 55
    assert min(ratios) >= 4.99
    assert max(ratios) <= 10.01
    assert max(ratios) - min(ratios) > 3


def test_gain_is_bounded() -> None:
    augmenter = Augmenter(AugmentConfig(gain_db=6))
    gains = [20 * np.log10(rms(augmenter.clip(SAMPLE, tone(0.1), Key(0, 0, i))[1]) / rms(tone(0.1))) for i in range(50)]
    assert min(gains) >= -6.001
    assert max(gains) <= 6.001
    assert min(gains) < -3 < 3 < max(gains)


@pytest.mark.parametrize("with_noise", [False, True])
def test_silence_gives_nothing(with_noise: bool, noises: Path) -> None:
    augmenter = Augmenter(AugmentConfig(silence_share=0.3, noise=str(noises) if with_noise else "", noise_share=0.0))
    out = [augmenter.clip(SAMPLE, tone(0.4), Key(0, 0, i)) for i in range(200)]
    silent = [(s, w) for s, w in out if s.task is None]
    assert 40 <= len(silent) <= 80
    for sample, wave in silent:
        assert (sample.utterance.text, dict(sample.utterance.labels)) == ("", {})
        assert wave.shape == (6400,)
        assert wave.dtype == torch.float32
        assert rms(wave) <= 10 ** (-30 / 20) * 1.001
    levels = [rms(w) for _, w in silent]
    assert 0.0 in levels
    assert any(level > 0 for level in levels)
    assert all(s is SAMPLE and torch.equal(w, tone(0.4)) for s, w in out if s.task is not None)


def test_silence_has_an_empty_target(tiny_speech_llm: Any) -> None:
    codec = tiny_speech_llm().codec
    sample, _ = Augmenter(AugmentConfig(silence_share=1.0)).clip(SAMPLE, tone(), Key(0, 0, 0))
    assert codec.target(sample).ids == (codec.eos_id,)


def test_masks_stay_inside_the_valid_frames() -> None:
    c = AugmentConfig(freq_masks=2, freq_mask_bins=20, time_masks=2, time_mask_seconds=0.2, time_mask_share=0.5)
    mel = torch.cat([log_mel(torch.randn(16_000)), torch.zeros(80, 30)], 1)
    before, touched_bins, touched_frames = mel.clone(), 0, 0
    for i in range(40):
        out = Augmenter(c).masks(mel, 100, Key(0, 0, i))
        assert torch.equal(mel, before), "the input is not changed"
        assert torch.equal(out[:, 100:], mel[:, 100:]), "padding stays padding"
        changed = out != mel
        touched_bins = max(touched_bins, int(changed[:, :100].all(1).sum()))
        touched_frames = max(touched_frames, int(changed[:, :100].all(0).sum()))
    assert 0 < touched_bins <= 40
    assert 0 < touched_frames <= 40


def test_time_masks_cover_a_part_of_the_clip_at_most() -> None:
    augmenter = Augmenter(AugmentConfig(time_masks=1, time_mask_seconds=5.0, time_mask_share=0.1))
    mel = torch.randn(80, 100)
    widths = [int((augmenter.masks(mel, 100, Key(0, 0, i)) != mel).any(0).sum()) for i in range(60)]
    assert max(widths) == 10


def test_randomness_follows_from_the_key_alone() -> None:
    """Any order, any augmenter object; every part of the key matters."""
    c = AugmentConfig(**ALL | {"silence_share": 0.0})
    first, second = Augmenter(c), Augmenter(c)
    key = Key(1, 2, 3, 0)
    for other in range(5):  # other draws in between change nothing
        second.clip(SAMPLE, tone(), Key(1, 2, other))
    assert torch.equal(first.clip(SAMPLE, tone(), key)[1], second.clip(SAMPLE, tone(), key)[1])
    mel = torch.randn(80, 100)
    assert torch.equal(first.masks(mel, 100, key), second.masks(mel, 100, key))
    for other_key in (Key(2, 2, 3), Key(1, 3, 3), Key(1, 2, 4), Key(1, 2, 3, 1)):
        assert not torch.equal(first.masks(mel, 100, key), first.masks(mel, 100, other_key)), other_key
        assert not torch.equal(first.clip(SAMPLE, tone(), key)[1], first.clip(SAMPLE, tone(), other_key)[1]), other_key


def test_an_effect_leaves_the_others_as_they_were() -> None:
    plain, more = Augmenter(AugmentConfig(gain_db=6)), Augmenter(AugmentConfig(gain_db=6, speeds=[1.0], freq_masks=1))
    for i in range(5):
        assert torch.equal(plain.clip(SAMPLE, tone(), Key(0, 0, i))[1], more.clip(SAMPLE, tone(), Key(0, 0, i))[1])


def test_batches_do_not_depend_on_what_is_beside(make_utterances: Any, tiny_speech_llm: Any) -> None:
    samples = [Sample(u, next(iter(u.labels), None)) for u in make_utterances()]
    augmenter = Augmenter(AugmentConfig(**ALL))
    dataset = AugmentedSpeech(SpeechDataset(samples), augmenter, seed=1, epoch=0)
    collate = AugmentedCollator(tiny_speech_llm().collator(), augmenter)
    whole = collate([dataset[(i, 0)] for i in range(4)])
    for i in (3, 1):
        alone = collate([dataset[(i, 0)]])
        n = int(alone.mel_lengths[0])
        assert n == int(whole.mel_lengths[i])
        torch.testing.assert_close(whole.mel[i, :, :n], alone.mel[0], rtol=1e-5, atol=1e-5)
        assert whole.samples[i] == alone.samples[0]
    assert not torch.equal(collate([dataset[(1, 1)]]).mel, collate([dataset[(1, 0)]]).mel), "drawn again, heard anew"


@pytest.mark.parametrize(("values", "message"), [
    ({"silence_share": 1.5}, r"augment\.silence_share"), ({"noise_share": -0.1}, r"augment\.noise_share"),
    ({"speeds": [0.1]}, r"augment\.speeds.*0\.1"), ({"speeds": ["fast"]}, r"augment\.speeds.*'fast'"),
    ({"snr_min": 20, "snr_max": 5}, r"augment\.snr_min"), ({"freq_masks": -1}, r"augment\.freq_masks"),
    ({"gain_db": float("inf")}, r"augment\.gain_db"), ({"noise": "nowhere"}, r"augment\.noise: nowhere is not a folder"),
])
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augmenter(AugmentConfig(**values))


def test_a_noise_folder_must_hold_readable_audio(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"augment\.noise: .*holds no audio"):
        Augmenter(AugmentConfig(noise=str(tmp_path)))
    (tmp_path / "x.wav").write_text("not audio")
    with pytest.raises(UserError, match=r"augment\.noise: .*x\.wav"):
        Augmenter(AugmentConfig(noise=str(tmp_path)))
