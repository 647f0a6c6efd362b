"""What training does to its examples: speed, gain, noise, silence and SpecAugment masks of audio;
hypotheses that are left out or spoilt, so that a model listens too. Off by default.

What happens to an example follows from its :class:`Key` alone. Each effect has random numbers of
its own, so that switching one on leaves the others as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor

from unislu_llm.config import AugmentConfig, Config, TrainConfig
from unislu_llm.data import audio
from unislu_llm.errors import UserError
from unislu_llm.tokenizer import Example

# Last number of a seed; never 0, which numpy ignores there. 208 is that of text_injection.py.
_SILENCE, _SPEED, _GAIN, _NOISE, _MASK, _WHOLE, _WORDS = range(201, 208)
_SILENT_DBFS = (-70.0, -30.0)  # level of audio without speech
_PURE_SILENCE = 1 / 3  # part of it that is digital silence
_NOISE_SHARE = 0.5  # part of the clips that get noise
_FREQ_BINS = 27  # mel bins that a mask covers at most: SpecAugment's F
_TIME_SECONDS, _TIME_SHARE = 0.5, 0.1  # of a clip that a mask covers at most
# The hypothesis of a row without audio is a copy of the transcript, and a model that reads nothing
# but perfect hypotheses learns to trust them: at least about a recogniser's WER has to be wrong.
_LEAST_WORDS_OF_TEXT = 0.15


class Key(NamedTuple):
    """What the randomness of one drawn example follows from."""

    seed: int
    epoch: int
    example: int  # its index
    times: int = 0  # that the epoch has drawn it before

    def rng(self, effect: int) -> np.random.Generator:
        return np.random.default_rng((*self, effect))


@dataclass(frozen=True)
class Masks:
    """SpecAugment (arXiv 1904.08779) of one clip, without time warping."""

    freq: int  # number of frequency masks
    time: int  # number of time masks
    key: Key

    def mel(self, mel: Tensor, length: int) -> Tensor:
        """A copy of log-mel `(n_mels, T_mel)` whose masked stretches have the clip's mean."""
        rng, mel = self.key.rng(_MASK), mel.clone()
        valid = mel[:, :length]
        mean = valid.mean()
        for _ in range(self.freq):
            valid[_stretch(rng, len(mel), _FREQ_BINS)] = mean
        longest = int(min(_TIME_SECONDS * audio.MEL_RATE, _TIME_SHARE * length))
        for _ in range(self.time):
            valid[:, _stretch(rng, length, longest)] = mean
        return mel

    def frames(self, frames: Tensor, length: int) -> Tensor:
        """A copy of encoder frames `(T_enc, D)` whose masked stretches are zero."""
        # So many time masks for every 5 s, of 0.4 s at most, and masks of a tenth of the features:
        # an encoder has mixed time and frequency, and its frames bear masks that are narrower.
        rng, frames = self.key.rng(_MASK), frames.clone()
        for _ in range(self.time * max(1, round(length / audio.ENCODER_RATE / 5))):
            frames[_stretch(rng, length, min(length, int(0.4 * audio.ENCODER_RATE)))] = 0
        for _ in range(self.freq):
            frames[:, _stretch(rng, frames.shape[1], max(1, frames.shape[1] // 10))] = 0
        return frames


def _stretch(rng: np.random.Generator, size: int, longest: int) -> slice:
    width = int(rng.integers(longest + 1))
    first = int(rng.integers(size - width + 1))
    return slice(first, first + width)


class Augmenter:
    """The effects on a clip; raises UserError: a folder without noise."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        # Files with their samples at 16 kHz, in the same order everywhere.
        self.noises = [(path, audio.count_samples(path)) for path in (
            audio.files_below(Path(config.noise)) if config.noise else ())]
        if config.noise and not self.noises:
            raise UserError(f"augment.noise: {config.noise} is no folder with audio files")

    def clip(self, example: Example, wave: Tensor, key: Key) -> tuple[Example, Tensor]:
        """Speed, gain and noise on samples `(S,)` at 16 kHz; or no speech, no text and no task."""
        c = self.config
        # First, since nothing else matters to a clip without speech.
        if c.silence_share and key.rng(_SILENCE).random() < c.silence_share:
            u = example.utterance
            # A recogniser that hears nothing gives an empty hypothesis, not none.
            hypothesis = None if u.hypothesis is None else ""
            silent = replace(u, text="", labels={}, hypothesis=hypothesis)
            return Example(silent, None), self._no_speech(len(wave), key.rng(_NOISE))
        if c.speeds:
            factor = float(key.rng(_SPEED).choice(c.speeds))
            # A clip is not slowed down beyond what the encoder takes.
            if factor != 1 and len(wave) / factor <= audio.MAX_SAMPLES - 1:
                wave = change_speed(wave, factor)
        if c.gain_db:
            wave = wave * 10 ** (key.rng(_GAIN).uniform(-c.gain_db, c.gain_db) / 20)
        if self.noises and (rng := key.rng(_NOISE)).random() < _NOISE_SHARE:
            snr = rng.uniform(min(c.snr), max(c.snr))
            wave = add_noise(wave, self._noise(len(wave), rng), snr)
        return example, wave

    def masks(self, key: Key) -> Masks | None:
        """Masks of one clip; None where none are asked for."""
        c = self.config
        return Masks(c.freq_masks, c.time_masks, key) if c.freq_masks or c.time_masks else None

    def _no_speech(self, n: int, rng: np.random.Generator) -> Tensor:
        if rng.random() < _PURE_SILENCE:
            return torch.zeros(n)
        noise = (self._noise(n, rng) if self.noises
                 else torch.from_numpy(rng.standard_normal(n, dtype=np.float32)))
        # A noise file may be silent for as long as the clip.
        return noise * (10 ** (rng.uniform(*_SILENT_DBFS) / 20) / max(_rms(noise), 1e-8))

    def _noise(self, n: int, rng: np.random.Generator) -> Tensor:
        """`n` samples from a random place of a random noise file; a short file is repeated."""
        path, available = self.noises[int(rng.integers(len(self.noises)))]
        first = int(rng.integers(max(1, available - n)))
        # To the end of the file where that is near: its length at 16 kHz is rounded.
        end = (first + n) / audio.SAMPLE_RATE if first + n < available else None
        noise = audio.load(path, first / audio.SAMPLE_RATE, end)
        return noise.repeat(-(-n // len(noise)))[:n]


def change_speed(wave: Tensor, factor: float) -> Tensor:
    """`(samples,)` at `factor` times its speed and pitch (Ko et al., Interspeech 2015)."""
    # As a recording at another rate: resampled, it is shorter by the factor.
    rate = audio.SAMPLE_RATE
    return torch.from_numpy(soxr.resample(wave.numpy(), factor * rate, rate, quality="HQ"))


def add_noise(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """`wave` with `noise`, both `(samples,)`, at a ratio in dB; as it is where either is silent."""
    loud, noise_loud = _rms(wave), _rms(noise)
    if loud == 0 or noise_loud == 0:
        return wave
    return wave + noise * (loud / noise_loud * 10 ** (-snr / 20))


def _rms(wave: Tensor) -> float:
    return float(wave.double().pow(2).mean().sqrt())  # fp32 would lose what is quiet


class HypothesisDropout:
    """Leaves out hypotheses and spoils words of those that stay: one half is deleted, one half
    replaced by words of the examples' hypotheses, in proportion to how often they occur."""

    def __init__(self, train: TrainConfig, examples: Sequence[Example]) -> None:
        self.share, self.words = train.hypothesis_dropout, train.hypothesis_word_dropout
        counts = Counter(word for e in examples for word in (e.utterance.hypothesis or "").split())
        # Sorted: the same on every machine, whatever the order of the manifests' rows.
        self._vocabulary = sorted(counts)
        self._cumulative = np.cumsum([counts[w] for w in self._vocabulary], dtype=np.int64)

    def __call__(self, example: Example, key: Key) -> Example:
        """The example with what is left of its hypothesis; None where it is left out."""
        u = example.utterance
        if u.hypothesis is None:
            return example
        left = None
        if key.rng(_WHOLE).random() >= self.share:
            share = max(self.words, _LEAST_WORDS_OF_TEXT) if u.audio is None else self.words
            left = self._spoilt(u.hypothesis, share, key) if self.words else u.hypothesis
        return Example(replace(u, hypothesis=left), example.task)

    def _spoilt(self, hypothesis: str, share: float, key: Key) -> str:
        rng, left = key.rng(_WORDS), []
        for word in hypothesis.split():
            # All three are drawn for every word: what becomes of one leaves the others alone.
            spoil, delete = rng.random(), rng.random()
            place = int(rng.integers(self._cumulative[-1]))
            if spoil >= share:
                left.append(word)
            elif delete >= 0.5:
                found = int(np.searchsorted(self._cumulative, place, side="right"))
                left.append(self._vocabulary[found])
        return " ".join(left)


def build_dropout(config: Config, examples: Sequence[Example]) -> HypothesisDropout | None:
    """What a run does to hypotheses, if it does."""
    train = config.train
    drops = train.hypothesis_dropout or train.hypothesis_word_dropout
    return HypothesisDropout(train, examples) if drops else None
