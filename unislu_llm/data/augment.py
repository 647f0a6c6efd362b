"""Augmentation while training: speed, gain, noise, silence, and SpecAugment masks on the log-mel. Everything is off by default.

What happens to a sample follows from (seed, epoch, sample, how often the epoch has drawn it before) alone: loader processes,
the number of processes and a resumed run change nothing. Each effect has random numbers of its own, so that switching one on
leaves the others as they were.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unislu_llm.data import audio
from unislu_llm.data.collate import Batch, Collator, SpeechDataset
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError

_SILENCE, _SPEED, _GAIN, _NOISE, _MASK = 201, 202, 203, 204, 205  # last word of a seed; never 0, which seeds ignore
_SILENT_DBFS = (-70.0, -30.0)  # level of audio without speech
_PURE_SILENCE = 1 / 3  # part of it that is digital silence
_EXTENSIONS = frozenset(f".{name.lower()}" for name in soundfile.available_formats()) | {".opus", ".aif", ".mp3"}


@dataclass
class AugmentConfig:
    """Augmentation of training samples, on the fly; never in validation. Everything is off by default."""

    freq_masks: int = 0
    """SpecAugment: frequency masks a clip."""
    freq_mask_bins: int = 27
    """SpecAugment: mel bins a mask covers at most."""
    time_masks: int = 0
    """SpecAugment: time masks a clip."""
    time_mask_seconds: float = 0.5
    """SpecAugment: seconds a mask covers at most..."""
    time_mask_share: float = 0.1
    """...and part of the clip it covers at most."""
    speeds: list[float] = field(default_factory=list)
    """Speed (and pitch) factors, drawn evenly, e.g. 0.9 1.0 1.1."""
    gain_db: float = 0.0
    """Loudness changes by up to this many dB, up or down."""
    noise: str = ""
    """Folder of audio to add as noise, with its subfolders; also what clips without speech are made of."""
    noise_share: float = 0.5
    """Part of the samples that get noise, where there is a folder."""
    snr_min: float = 5.0
    """Signal-to-noise ratio, dB: lowest..."""
    snr_max: float = 20.0
    """...and highest."""
    silence_share: float = 0.0
    """Part of the samples replaced by silence or noise with an empty transcript and no task: hearing nothing, say nothing."""

    @property
    def active(self) -> bool:
        """Whether anything is switched on."""
        return bool(self.freq_masks or self.time_masks or self.speeds or self.gain_db or self.silence_share
                    or (self.noise and self.noise_share))


@dataclass(frozen=True)
class Key:
    """What the randomness of one drawn sample follows from."""

    seed: int
    epoch: int
    index: int
    times: int = 0

    def rng(self, effect: int) -> np.random.Generator:
        """Random numbers for one effect on this sample."""
        return np.random.default_rng((self.seed, self.epoch, self.index, self.times, effect))


class Augmenter:
    """The effects on one clip and on one log-mel.

    Args:
        config: which effects, and how strong. max_seconds: clips are not slowed down beyond this.

    Raises:
        UserError: a setting out of range, or a noise folder without readable audio.
    """

    def __init__(self, config: AugmentConfig, max_seconds: float = audio.MAX_SECONDS) -> None:
        _check(config)
        self.config = config
        self.max_samples = int(min(max_seconds, audio.MAX_SECONDS) * audio.SAMPLE_RATE)
        self.noises = _scan(Path(config.noise)) if config.noise else []

    def clip(self, sample: Sample, wave: Tensor, key: Key) -> tuple[Sample, Tensor]:
        """Speed, gain and noise; or, for a share of samples, no speech at all.

        Args:
            sample: what is said. wave: `(samples,)` at 16 kHz. key: source of randomness.

        Returns:
            Sample and wave; a clip without speech has as many samples as the one it replaces, an empty transcript and no task.
        """
        c = self.config
        if c.silence_share and key.rng(_SILENCE).random() < c.silence_share:
            return _speechless(sample), self._no_speech(len(wave), key)
        if c.speeds:
            factor = float(key.rng(_SPEED).choice(c.speeds))
            if factor != 1 and len(wave) / factor <= self.max_samples - 1:
                wave = change_speed(wave, factor)
        if c.gain_db:
            wave = wave * 10 ** (key.rng(_GAIN).uniform(-c.gain_db, c.gain_db) / 20)
        if self.noises:
            rng = key.rng(_NOISE)
            if rng.random() < c.noise_share:
                snr = rng.uniform(c.snr_min, c.snr_max)
                wave = add_noise(wave, self._noise(len(wave), rng), snr)
        return sample, wave

    def masks(self, mel: Tensor, length: int, key: Key) -> Tensor:
        """SpecAugment (arXiv 1904.08779) without time warping: masked stretches take the clip's mean.

        Args:
            mel: `(n_mels, frames)` log-mel at 100 Hz. length: valid frames; nothing past them changes.
        """
        c = self.config
        if not (c.freq_masks or c.time_masks) or length == 0:
            return mel
        rng, mel = key.rng(_MASK), mel.clone()
        valid = mel[:, :length]
        mean = valid.mean()
        for _ in range(c.freq_masks):
            first, last = _stretch(rng, len(mel), min(c.freq_mask_bins, len(mel)))
            valid[first:last] = mean
        longest = int(min(c.time_mask_seconds * audio.MEL_RATE, c.time_mask_share * length))
        for _ in range(c.time_masks):
            first, last = _stretch(rng, length, longest)
            valid[:, first:last] = mean
        return mel

    def _no_speech(self, n: int, key: Key) -> Tensor:
        rng = key.rng(_NOISE)
        if rng.random() < _PURE_SILENCE:
            return torch.zeros(n)
        noise = self._noise(n, rng) if self.noises else torch.from_numpy(rng.standard_normal(n, dtype=np.float32))
        return noise * (10 ** (rng.uniform(*_SILENT_DBFS) / 20) / max(_rms(noise), 1e-8))

    def _noise(self, n: int, rng: np.random.Generator) -> Tensor:
        """`n` samples from a random place of a random noise file; a short file is repeated."""
        path, available = self.noises[int(rng.integers(len(self.noises)))]
        first = int(rng.integers(max(1, available - n)))
        last = min(first + n, available)
        noise = audio.load(path, first / audio.SAMPLE_RATE, last / audio.SAMPLE_RATE if last < available else None)
        return noise.repeat(-(-n // len(noise)))[:n]


class AugmentedSpeech(Dataset[tuple[Sample, Tensor, Key]]):
    """Samples with augmented audio. It is asked for `(index, times drawn before)` and gives `(sample, wave (S,), key)`.

    Args:
        dataset: the samples. augmenter: what is done to them. seed, epoch: source of randomness.
    """

    def __init__(self, dataset: SpeechDataset, augmenter: Augmenter, seed: int, epoch: int) -> None:
        self.dataset, self.augmenter, self.seed, self.epoch = dataset, augmenter, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Sample, Tensor, Key]:
        key = Key(self.seed, self.epoch, *draw)
        return *self.augmenter.clip(*self.dataset[draw[0]], key), key


class AugmentedCollator:
    """A collator whose log-mel has SpecAugment masks.

    Args:
        collator: makes the batches. augmenter: masks them.
    """

    def __init__(self, collator: Collator, augmenter: Augmenter) -> None:
        self.collator, self.augmenter = collator, augmenter

    def __call__(self, items: Sequence[tuple[Sample, Tensor, Key]]) -> Batch:
        """Batch `(sample, audio (S,), key)` triples; order is kept."""
        batch = self.collator([(sample, wave) for sample, wave, _ in items])
        heard = [(n, key) for n, (_, _, key) in zip(batch.mel_lengths.tolist(), items, strict=True) if n]
        for row, (length, key) in enumerate(heard):
            batch.mel[row] = self.augmenter.masks(batch.mel[row], length, key)
        return batch


def change_speed(wave: Tensor, factor: float) -> Tensor:
    """Play `(samples,)` at `factor` times its speed, pitch included: `samples / factor` of them come back.

    Speed perturbation as in Ko et al., Audio Augmentation for Speech Recognition, Interspeech 2015.
    """
    return torch.from_numpy(soxr.resample(wave.numpy(), factor * audio.SAMPLE_RATE, audio.SAMPLE_RATE, quality="HQ"))


def add_noise(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """`wave` with `noise` (both `(samples,)`) at a signal-to-noise ratio in dB; unchanged where either is silent."""
    loud, noise_loud = _rms(wave), _rms(noise)
    if loud == 0 or noise_loud == 0:
        return wave
    return wave + noise * (loud / noise_loud * 10 ** (-snr / 20))


def _rms(wave: Tensor) -> float:
    return float(wave.double().pow(2).mean().sqrt())


def _speechless(sample: Sample) -> Sample:
    draft = None if sample.utterance.draft is None else ""
    return Sample(dataclasses.replace(sample.utterance, text="", labels={}, draft=draft), None)


def _stretch(rng: np.random.Generator, size: int, longest: int) -> tuple[int, int]:
    width = int(rng.integers(longest + 1))
    first = int(rng.integers(size - width + 1))
    return first, first + width


def _scan(folder: Path) -> list[tuple[Path, int]]:
    """Audio files below a folder with their samples at 16 kHz, in an order that every machine has."""
    if not folder.is_dir():
        raise UserError(f"augment.noise: {folder} is not a folder; give one with audio files")
    paths = sorted((p for p in folder.rglob("*") if p.suffix.lower() in _EXTENSIONS and p.is_file()),
                   key=lambda p: p.relative_to(folder).as_posix())
    if not paths:
        raise UserError(f"augment.noise: {folder} holds no audio files")
    try:
        return [(path, audio.count_samples(path)) for path in paths]
    except UserError as error:
        raise UserError(f"augment.noise: {error}") from error


def _check(c: AugmentConfig) -> None:
    whole = {"freq_masks": c.freq_masks, "freq_mask_bins": c.freq_mask_bins, "time_masks": c.time_masks}
    lows: dict[str, float] = {**whole, "time_mask_seconds": c.time_mask_seconds, "gain_db": c.gain_db}
    shares = {"time_mask_share": c.time_mask_share, "noise_share": c.noise_share, "silence_share": c.silence_share}
    for name, value in lows.items():
        if not math.isfinite(value) or value < 0:
            raise UserError(f"augment.{name}: must be 0 or more, found {value:g}")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"augment.{name}: is a part, from 0 to 1; found {value:g}")
    for speed in c.speeds:
        if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0.5 <= speed <= 2:
            raise UserError(f"augment.speeds: factors must be from 0.5 to 2, found {speed!r}")
    if not (math.isfinite(c.snr_min) and math.isfinite(c.snr_max) and c.snr_min <= c.snr_max):
        raise UserError(f"augment.snr_min: {c.snr_min:g} dB and snr_max: {c.snr_max:g} dB are no range; give the lower first")
