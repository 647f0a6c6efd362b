"""What people give to be understood: files, folders, patterns, bytes, arrays; one or many."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from unislu_llm.data import audio
from unislu_llm.errors import UserError
from unislu_llm.utterance import Utterance

One = (str | os.PathLike[str] | bytes | bytearray | BinaryIO | tuple[Any, float]
       | Mapping[str, Any] | Utterance)
"""A path, an audio file's content or the open file, or samples with their rate in Hz: a pair, or a
mapping with `array` and `sampling_rate` (of an audio column of the package `datasets`). Samples are
`(samples,)`, or have up to 8 channels on their shorter axis; floats in -1..1, or integers of 8, 16
or 32 bits over their whole range."""

# Of a folder these are taken as well: that they cannot be read should be said, not passed over.
_OTHER_AUDIO = frozenset({".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr"})
_RATES = audio.RATES  # `16` is kHz, written by mistake
_MAX_CHANNELS = 8  # of an array; with more, it is rather a batch of clips


def utterances_of(inputs: One | Iterable[One], language: str | None = None
                  ) -> tuple[Iterator[Utterance], bool]:
    """Utterances without text of the inputs, read as they are asked for, and whether it is one.

    Raises:
        UserError: no audio, unreadable, empty or unusable; it says which of the inputs.
    """
    # A file is an iterable as well, of its lines, and an array one of its samples.
    one = (isinstance(inputs, (str, bytes, bytearray, memoryview, os.PathLike, Mapping, Tensor,
                               Utterance))
           or not isinstance(inputs, Iterable) or hasattr(inputs, "read") or _is_pair(inputs)
           or (isinstance(inputs, np.ndarray) and inputs.dtype.kind not in "OU"))
    several: Iterable[Any] = [inputs] if one else inputs  # type: ignore[assignment]
    return (_utterance(each, "the input" if one else f"inputs[{i}]", i, language)
            for i, each in enumerate(several)), one


def _is_pair(given: Any) -> bool:
    """Whether it is samples and their rate: two, of which one is a number."""
    return (isinstance(given, tuple) and len(given) == 2
            and sum(isinstance(part, Real) for part in given) == 1)


def _utterance(given: Any, name: str, index: int, language: str | None) -> Utterance:
    if isinstance(given, Utterance):  # read before
        return given
    if isinstance(given, Mapping):  # decoded by the package `datasets`, or not
        found = next((given[key] for key in ("array", "bytes", "path") if given.get(key) is not None
                      ), None)
        given = (found, given.get("sampling_rate")) if "array" in given else found
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        # By the header alone; samples are read when their turn has come.
        seconds = audio.count_samples(path) / audio.SAMPLE_RATE
        return Utterance(str(index), path, "", duration=seconds, language=language)
    if hasattr(given, "read"):
        name = f"{name} ({getattr(given, 'name', type(given).__name__)})"
        given = given.read()
        if isinstance(given, str):
            raise UserError(f"{name}: is open as text; open it with mode 'rb'")
    if isinstance(given, (bytes, bytearray, memoryview)):
        samples = audio.from_bytes(bytes(given), name)
    elif _is_pair(given):
        # scipy.io.wavfile gives the rate first; there is no other way to read that.
        array, rate = reversed(given) if isinstance(given[0], Real) else given
        samples = _from_array(array, float(rate), name)
    else:
        what = "an array without its rate" if hasattr(given, "shape") else type(given).__name__
        raise UserError(f"{name}: is {what}; give a path, the bytes of an audio file, an open "
                        "file, or (array, rate)")
    return Utterance(str(index), Path(name), "", samples=samples, language=language,
                     duration=len(samples) / audio.SAMPLE_RATE)


def _from_array(samples: Any, rate: float, name: str) -> Tensor:
    """Samples of numpy, torch or a list, as a file of them would give."""
    if isinstance(samples, Tensor):
        # numpy has no bfloat16.
        samples = (samples.float() if samples.is_floating_point() else samples).detach().cpu()
    try:
        array = np.asarray(samples)
    except (ValueError, TypeError) as error:  # lists of different lengths
        raise UserError(f"{name}: is no array of samples ({error})") from error
    if not _RATES[0] <= rate <= _RATES[1]:
        raise UserError(f"{name}: a sampling rate of {rate:g} Hz is not between {_RATES[0]} and "
                        f"{_RATES[1]}; give (array, rate) with the rate in Hz, e.g. 16000")
    if array.size == 0:
        raise UserError(f"{name}: holds no samples; drop it")
    rows = array[:, None] if array.ndim == 1 else array
    if rows.ndim == 2 and rows.shape[0] < rows.shape[1]:
        rows = rows.T
    if rows.ndim != 2 or not rows.shape[1] <= min(_MAX_CHANNELS, max(1, rows.shape[0] - 1)):
        raise UserError(f"{name}: shape {array.shape} is not (samples,), (samples, channels) or "
                        f"(channels, samples) with up to {_MAX_CHANNELS} channels; give several "
                        "clips as a list of (array, rate)")
    return audio.to_mono(name, audio.check_samples(name, _as_float(name, rows)), rate)


def _as_float(name: str, array: np.ndarray) -> np.ndarray:
    """Samples as float32, integers divided by the largest of their type."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, and refused
            return array.astype(np.float32)
    if array.dtype.kind not in "iu" or array.dtype.itemsize > 4 or array.dtype in ("u2", "u4"):
        # Nobody knows of 64-bit integers which of the others they were.
        raise UserError(f"{name}: samples are {array.dtype}; give floats in -1 to 1, or int16")
    centre = 128 if array.dtype == np.uint8 else 0  # as in WAV files of 8 bits
    return ((array.astype(np.float64) - centre) / 2 ** (8 * array.dtype.itemsize - 1)).astype("f4")


def expand(name: str) -> Iterator[str]:
    """Files that a name on the command line stands for, in order: itself, the audio files below a
    folder, or those that a pattern (`*`, `?`, `**`) matches.

    Raises:
        UserError: there are none.
    """
    pattern = glob.has_magic(name) and "://" not in name  # an address is refused when it is opened
    # A file may have such characters in its name.
    found = (sorted(glob.glob(name, recursive=True)) if pattern and not os.path.exists(name)
             else [name])
    files: dict[str, str] = {}  # `**` matches folders, and what is in them
    for path in found:
        below = [path] if not os.path.isdir(path) else map(
            str, audio.files_below(Path(path), _OTHER_AUDIO))
        files |= {os.path.normpath(file): file for file in below}
    if not files:
        raise UserError(f"{name}: no audio file is in this folder, or below it" if found else
                        f"{name}: no file is named like this")
    yield from files.values()
