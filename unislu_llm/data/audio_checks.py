"""Checks on the audio of a manifest row: by the file's header, or by its samples."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from unislu_llm.data import audio
from unislu_llm.data.rows import Fault
from unislu_llm.errors import UserError
from unislu_llm.utterance import Utterance

AudioCheck = Literal["none", "header", "full"]
"""Believe the manifest, read the headers, or decode the samples too."""

_SLACK = 0.2  # seconds between stated and measured length: durations are rounded
_BLOCK = 30  # seconds decoded at a time, so that memory does not follow the length of a recording
_FULL_SCALE = 0.999  # of the largest sample: from here on a sample counts as clipped when its neighbours do
_CLIPPED = 0.001  # share of clipped samples that is worth a look
_SILENT = 1e-3  # root mean square of near silence: -60 dB of full scale
_SUFFIXES = {"WAV": ("wav", "wave"), "WAVEX": ("wav", "wave"), "FLAC": ("flac",), "OGG": ("ogg", "oga", "opus"),
             "MP3": ("mp3",), "MPEG": ("mp3",), "AIFF": ("aif", "aiff", "aifc"), "AU": ("au", "snd")}
"""Endings of the formats that corpora use; others are not judged."""


@dataclass(frozen=True)
class Header:
    """What the head of an audio file says: frames at `rate` Hz, channels, libsndfile's name of the format."""

    frames: int
    rate: int
    channels: int
    format: str


@dataclass(frozen=True)
class Heard:
    """What was found out about a row's audio.

    Args:
        seconds: its length; None where it is not known. key: equal for equal audio: of the samples after a full check, else
            of path and crop; None for a text-only row and where the audio is at fault.
        errors, warnings: what is wrong.
    """

    seconds: float | None
    key: str | None
    errors: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()


def stated_seconds(utterance: Utterance) -> float | None:
    """Length that the manifest row gives; None where it does not."""
    if utterance.duration is not None:
        return utterance.duration
    return None if utterance.end is None else utterance.end - utterance.start


def check_audio(utterance: Utterance, how: AudioCheck) -> Heard:
    """Check the audio of a row; never raises for what a file holds."""
    if utterance.audio is None:
        return Heard(None, None)
    stated = stated_seconds(utterance)
    crop = f"{utterance.audio}|{utterance.start}|{utterance.end}"
    if how == "none":
        return Heard(stated, crop)
    try:
        header = _header(utterance.audio)
    except (UserError, OSError, ValueError) as error:
        missing = isinstance(error, UserError) and "does not exist" in str(error)
        return Heard(stated, None, (Fault("audio", "audio_missing" if missing else "audio", _advised(error)),))
    try:
        first, last = audio._crop(utterance.audio, header.frames, header.rate, utterance.start, utterance.end)
    except UserError as error:
        at_start = utterance.start * header.rate >= header.frames
        hint = "correct it, or name the right file"
        return Heard(stated, None, (Fault("start" if at_start else "end", "crop", f"{error}; {hint}"),))
    seconds = (last - first) / header.rate
    if stated is not None and abs(seconds - stated) > _SLACK:
        name = "end" if utterance.duration is None else "duration"
        message = f"the row says {stated:g} s, the audio has {seconds:.2f} s; correct the row"
        return Heard(seconds, None, (Fault(name, "length", message),))
    warnings = _doubts(utterance.audio, header)
    if how == "header":
        return Heard(seconds, crop, (), warnings)
    errors, more, key = _samples(utterance.audio, first, last)
    return Heard(seconds, None if errors else key, errors, (*warnings, *more))


@lru_cache(maxsize=1024)  # rows that are stretches of one recording follow one another
def _header(path: Path) -> Header:
    with audio._open(path) as sound:
        return Header(sound.frames, sound.samplerate, sound.channels, sound.format)


def _advised(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"cannot be opened ({error}); correct the path"


def _doubts(path: Path, header: Header) -> tuple[Fault, ...]:
    found = []
    if header.rate < audio.SAMPLE_RATE:
        found.append(Fault("audio", "rate", f"{header.rate} Hz; above {header.rate // 2} Hz there is nothing to hear: look for "
                           "a source of 16 kHz, or keep it if what the model will hear is like this"))
    if header.channels > 1:
        found.append(Fault("audio", "channels", f"{header.channels} channels, which are averaged; take the speaker's channel "
                           "out, if each has one of its own"))
    known = _SUFFIXES.get(header.format)
    suffix = path.suffix[1:].lower()
    if known and suffix not in known:
        found.append(Fault("audio", "suffix", f"is {header.format} by its content and '.{suffix}' by its name; rename it"))
    return tuple(found)


def _samples(path: Path, first: int, last: int) -> tuple[tuple[Fault, ...], tuple[Fault, ...], str]:
    """Errors, warnings and the digest of the frames `first` to `last`."""
    digest = hashlib.blake2b(digest_size=16)
    energy = clipped = count = 0.0
    try:
        with audio._open(path) as sound:
            step = _BLOCK * sound.samplerate
            for at in range(first, last, step):
                block = audio._to_float(audio._read(path, sound, at, min(at + step, last)), str(path))
                digest.update(np.ascontiguousarray(block).tobytes())
                energy += float(np.square(block, dtype=np.float64).sum())
                clipped += _clipped(block)
                count += block.size
    except UserError as error:
        kind = "samples" if "NaN" in str(error) or "samples reach" in str(error) else "audio"
        return (Fault("audio", kind, str(error)),), (), ""
    level = math.sqrt(energy / count)
    warnings = []
    if clipped > _CLIPPED * count:
        warnings.append(Fault("audio", "clipping", f"{100 * clipped / count:.1f} % of the samples are clipped; look for a "
                              "source that is not, or listen whether it can stay"))
    if level < _SILENT:
        how = f"{20 * math.log10(level):.0f} dB of full scale" if level else "zeros alone"
        warnings.append(Fault("audio", "silence", f"is nearly silent ({how}); listen to it, and drop it if nobody speaks"))
    return (), tuple(warnings), digest.hexdigest()


def _clipped(block: np.ndarray) -> int:
    """Samples of `(frames, channels)` in the middle of three that stand at full scale; a single peak is none."""
    full = np.abs(block) >= _FULL_SCALE
    return int((full[:-2] & full[1:-1] & full[2:]).sum()) if len(full) > 2 else 0
