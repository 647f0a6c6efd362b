"""Rooms and noise: how clean synthetic speech is degraded by `make_voices.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unislu_llm.errors import UserError

SAMPLE_RATE = 16_000  # Hz
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Condition:
    """How a clip is degraded; as text `clean`, `pink12dB` or `reverb0.36+babble8dB`.

    Args:
        t60: reverberation time of the room in seconds (decay by 60 dB), or None for no room.
        noise: `pink`, `babble` or None.
        snr: signal-to-noise ratio over the whole clip in dB; needs `noise`.
    """

    t60: float | None = None
    noise: str | None = None
    snr: float | None = None

    def __str__(self) -> str:
        parts = [f"reverb{self.t60:g}"] if self.t60 is not None else []
        if self.noise is not None:
            parts.append(f"{self.noise}{self.snr:g}dB")
        return "+".join(parts) or "clean"


@dataclass(frozen=True)
class ConditionMix:
    """How conditions are drawn.

    Args:
        clean: share of clips left as they are. Every other clip gets noise, pink or babble alike.
        reverb: share of the degraded clips that also get room echo.
        snr: range of whole dB, both ends included.
        t60: range of reverberation times, seconds.
    """

    clean: float = 0.3
    reverb: float = 0.5
    snr: tuple[int, int] = (3, 20)
    t60: tuple[float, float] = (0.25, 0.5)

    def draw(self, rng: np.random.Generator) -> Condition:
        """One condition; always consumes the same number of draws."""
        is_clean, has_room, is_pink = rng.random(3) < (self.clean, self.reverb, 0.5)
        t60 = round(float(rng.uniform(*self.t60)), 2)
        snr = int(rng.integers(self.snr[0], self.snr[1] + 1))
        if is_clean:
            return Condition()
        return Condition(t60 if has_room else None, "pink" if is_pink else "babble", snr)


MILD = ConditionMix(clean=0.6, snr=(15, 20))
MIXES = {"mild": MILD, "multi": ConditionMix(), "clean": ConditionMix(clean=1.0)}
"""Mostly clean and never below 15 dB; multi-condition, 3 to 20 dB; not degraded."""


def add_reverb(speech: Samples, t60: float, rng: np.random.Generator) -> Samples:
    """Convolve `(samples,)` with a synthetic room: the direct sound, then decaying noise.

    The tail starts 3 ms after the direct sound and carries a third of its energy (a
    direct-to-reverberant ratio of about 5 dB). The length stays; the echo after the end is cut.
    """
    tail = rng.standard_normal(max(int(t60 * SAMPLE_RATE), 1))
    tail *= 10.0 ** (-3.0 * np.arange(len(tail)) / (t60 * SAMPLE_RATE))  # -60 dB at t60
    tail *= np.sqrt((1 / 3) / np.sum(tail**2))
    response = np.concatenate([[1.0], np.zeros(int(0.003 * SAMPLE_RATE) - 1), tail])
    size = len(speech) + len(response) - 1
    wet = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)
    return wet[: len(speech)].astype(np.float32)


def pink_noise(length: int, rng: np.random.Generator) -> Samples:
    """Noise whose power falls by 3 dB an octave, `(length,)`, unit power."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[0] = 0.0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return _unit_power(np.fft.irfft(spectrum, length))


def babble_noise(length: int, rng: np.random.Generator, talkers: Sequence[Samples],
                 count: int = 6) -> Samples:
    """Several people talking at once, `(length,)`, unit power.

    `count` of the given clips, equally loud, each from a random place on, repeated to the length.
    """
    chosen = rng.choice(len(talkers), size=count, replace=count > len(talkers))
    starts = [int(rng.integers(len(talkers[i]))) for i in chosen]
    voices = [np.resize(np.roll(talkers[i], -start), length)
              for i, start in zip(chosen, starts, strict=True)]
    return _unit_power(np.sum([_unit_power(voice) for voice in voices], axis=0))


def mix_at_snr(speech: Samples, noise: Samples, snr: float) -> Samples:
    """Add noise of the same length so that the power of the speech is `snr` dB above it.

    Raises:
        UserError: either signal is silent.
    """
    powers = [float(np.mean(np.square(x, dtype=np.float64))) for x in (speech, noise)]
    if min(powers) == 0.0:
        raise UserError("cannot set a signal-to-noise ratio: the speech or the noise is silent")
    gain = np.sqrt(powers[0] / powers[1] * 10.0 ** (-snr / 10.0))
    return (speech + gain * noise).astype(np.float32)


def degrade(speech: Samples, condition: Condition, rng: np.random.Generator,
            talkers: Callable[[], Sequence[Samples]]) -> Samples:
    """Clean speech in a condition: the room, then noise at the SNR of the reverberant speech.

    Args:
        speech: `(samples,)` at 16 kHz.
        condition: what to do to it.
        rng: draws the room and the noise.
        talkers: gives the clips that babble is made of; called for babble alone.
    """
    if condition.t60 is not None:
        speech = add_reverb(speech, condition.t60, rng)
    if condition.noise is None or condition.snr is None:
        return speech
    noise = (pink_noise(len(speech), rng) if condition.noise == "pink"
             else babble_noise(len(speech), rng, talkers()))
    return mix_at_snr(speech, noise, condition.snr)


def _unit_power(samples: NDArray[Any]) -> Samples:
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return (samples / np.sqrt(power) if power else samples).astype(np.float32)
