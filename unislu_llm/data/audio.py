"""Audio: a file, checked for damage -> samples at 16 kHz -> log-mel at 100 Hz, and the lengths.

The log-mel is Whisper's (arXiv 2212.04356; `WhisperFeatureExtractor` of transformers) at the
natural length of a clip: its frames are the first ones of the clip zero-padded to 30 s.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.errors import UserError

SAMPLE_RATE = 16_000
RATES = (1_000, 1_000_000)  # Hz that files and arrays may have
N_FFT = 400  # samples: 25 ms window
HOP = 160  # samples: 10 ms between mel frames
MEL_RATE = SAMPLE_RATE // HOP  # 100 mel frames a second
ENCODER_RATE = MEL_RATE // 2  # 50 encoder frames a second: the second convolution has stride 2
MIN_SAMPLES = SAMPLE_RATE // 2  # of a shorter clip Whisper makes nothing (transformers#43838)
MAX_SECONDS = 30.0  # what Whisper's positions reach
MAX_SAMPLES = int(MAX_SECONDS * SAMPLE_RATE)
MAX_MEL_FRAMES = MAX_SAMPLES // HOP
END_SLACK = 0.1  # seconds that a crop may pass the end of its file: corpora round their time stamps

_SUFFIXES = {*(f".{name.lower()}" for name in soundfile.available_formats()), ".opus", ".oga",
             ".aif"}
_ADDRESS = re.compile(r"\b([A-Za-z][\w+.-]+):/+(.+)")  # `C:/` is a drive
_MAX_PEAK = 100.0  # above it, samples are integers written as floats rather than loud audio
_CANCELLED = 1e-3  # of the loudest channel's energy, below which the mean has lost it: -30 dB
_MOST_VALUES = 1 << 31  # of all channels, read at once: 8 GB, 6 hours in stereo at 48 kHz
_BLOCK = 1 << 24  # of them at a time, so that memory is taken for what is there
_MP3_PREROLL = 1 << 14  # samples decoded and dropped: an MP3 frame needs the bits of earlier ones
_STREAM_SIZE = 0x7FFF0000  # a chunk size from here on stands for "not known": written to a pipe
_OGG_TAIL = 1 << 17  # bytes; an Ogg page has 65,307 at most
_DECLARED = re.compile(r"(?:data|SSND|BODY|Data Size)\s*: (\d+) \(should be (\d+)\)")
# Of sizes of 64 bits it tells what is declared alone; W64 counts the
# 24 bytes that say so, and padding to eight.
_DECLARED_64 = {"RF64": (re.compile(r"Data size : (\d+)"), 0),
                "W64": (re.compile(r"^data : (\d+)", re.MULTILINE), 24)}
_FRAME_BYTES = re.compile(r"Block Align\s*: (\d+)")
_LOG_FLOOR = 1e-10  # mel power below which Whisper's log10 is cut


def mel_length(n_samples: int) -> int:
    """Mel frames (100 Hz) of so many samples at 16 kHz, padded to the minimum length."""
    return -(-max(n_samples, MIN_SAMPLES) // HOP)


def encoder_length(n_mel: int) -> int:
    """Encoder frames (50 Hz) of so many mel frames: convolutions of width 3, strides 1 and 2."""
    return (n_mel + 1) // 2


def with_silence(frames: int, silence: float, rate: int = ENCODER_RATE) -> int:
    """Frames, at a `rate` a second, of a clip and the seconds of silence that are heard behind it,
    30 s at most."""
    return min(frames + round(silence * ENCODER_RATE) * (rate // ENCODER_RATE),
               int(MAX_SECONDS * rate))


def load(path: str | Path, start: float = 0.0, end: float | None = None, *,
         max_seconds: float = math.inf, samples: Tensor | None = None) -> Tensor:
    """Read a file of any rate, or a stretch of it in seconds: mono `(samples,)` float32 at 16 kHz.
    Of `samples`, which are that already, the stretch alone; `path` is then their name. Raises
    UserError: the file is missing, unreadable or truncated, the stretch is empty, outside or longer
    than `max_seconds`, or samples are not usable."""
    path = Path(path)
    if samples is not None:
        first, last = crop(path, len(samples), SAMPLE_RATE, start, end, max_seconds)
        return samples[first:last]
    with open_audio(path) as sound:
        rate = sound.samplerate
        first, last = crop(path, sound.frames, rate, start, end, max_seconds)
        return to_mono(path, read_frames(path, sound, first, last), rate)


def from_bytes(content: bytes, name: str) -> Tensor:
    """:func:`load` from the content of a file, which messages call `name`."""
    with open_audio(name, content) as sound:
        return to_mono(name, read_frames(name, sound, 0, sound.frames), sound.samplerate)


def to_mono(name: object, block: np.ndarray, rate: float) -> Tensor:
    """Samples `(frames, channels)`: their mean at 16 kHz, or the loudest where they cancel out."""
    mono = block.mean(axis=1)
    energies = np.einsum("fc,fc->c", block, block)
    if why := cancelled(float(mono @ mono), energies):
        mono = block[:, energies.argmax()]
        warnings.warn(f"{name}: {why}", stacklevel=2)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if mono.size == 0:
        raise UserError(f"{name}: holds {len(block)} samples at {rate:g} Hz, none at "
                        f"{SAMPLE_RATE} Hz; drop it")
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


def cancelled(mixed: float, energies: np.ndarray) -> str:
    """What to say where next to nothing of the energies `(channels,)` is left in their mean."""
    silent = len(energies) > 1 and mixed < _CANCELLED * energies.max()
    return "its channels cancel each other out; the louder one is taken" if silent else ""


def count_samples(path: str | Path, start: float = 0.0, end: float | None = None) -> int:
    """Samples that :func:`load` returns, from the file's header alone; raises for a bad crop."""
    path = Path(path)
    with open_audio(path) as sound:
        first, last = crop(path, sound.frames, sound.samplerate, start, end)
        return math.floor((last - first) * SAMPLE_RATE / sound.samplerate + 0.5)


def files_below(folder: Path, more: Collection[str] = ()) -> list[Path]:
    """Audio files in a folder and below it, by their suffix (or one of `more`), in one order."""
    # What begins with a dot was left by some system, and is no audio.
    return sorted((p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")
                   and (p.suffix.lower() in _SUFFIXES or p.suffix.lower() in more)),
                  key=Path.as_posix)


def open_audio(name: str | Path, content: bytes | None = None) -> soundfile.SoundFile:
    """Open a file, or the content of one, for reading; refuse what is not there, not audio,
    truncated or without a length."""
    if content is None and not os.path.isfile(name):  # of a name that cannot be, unlike `is_file()`
        if address := _ADDRESS.search(Path(name).as_posix()):  # `pathlib` makes two slashes one
            url = f"{address[1]}://{address[2]}"
            how = f": curl -LO '{url}'" if url.startswith("http") else " first"
            raise UserError(f"{url}: is an address, not a file; download it{how}")
        raise UserError(f"{name}: not a file; give an audio file" if os.path.exists(name) else
                        f"{name}: audio file does not exist; correct the path (in a manifest: from "
                        "its folder)")
    try:
        # As bytes: a name may be none of UTF-8.
        sound = soundfile.SoundFile(os.fsencode(name) if content is None else io.BytesIO(content))
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        raise UserError(f"{name}: cannot be read as audio ({getattr(error, 'error_string', error)})"
                        "; convert it to WAV, FLAC or Ogg/Opus") from error
    if problem := _damage(name, content, sound):
        sound.close()
        raise UserError(f"{name}: {problem}")
    return sound


def _damage(name: str | Path, content: bytes | None, sound: soundfile.SoundFile) -> str:
    """What libsndfile passes over in silence: data cut off, or a length that nobody wrote."""
    cut = ""
    if sound.format == "OGG":
        with open(name, "rb") if content is None else io.BytesIO(content) as handle:
            cut = "its last page is incomplete" if _ogg_cut(handle) else ""
    # Its log is the only place where it says that a chunk is shorter than declared.
    for declared, found in _DECLARED.findall(sound.extra_info):
        if int(found) < int(declared) < _STREAM_SIZE:
            cut = f"{found} of {declared} bytes of audio"
    pattern, head = _DECLARED_64.get(sound.format, (None, 0))
    if pattern and (said := pattern.search(sound.extra_info)) and (
            size := _FRAME_BYTES.search(sound.extra_info)):
        declared, found = int(said[1]) - head, sound.frames * int(size[1])
        if found + max(8, int(size[1])) <= declared < (1 << 63) - head:
            cut = f"{found} of {declared} bytes of audio"
    if cut:
        return f"the file is truncated ({cut}); fetch or convert it again"
    if sound.frames > 1 << 48:
        return "the header does not say how long it is (written to a pipe); convert it again"
    if not RATES[0] <= sound.samplerate <= RATES[1]:
        return (f"a sampling rate of {sound.samplerate} Hz is not between {RATES[0]} and "
                f"{RATES[1]}; its header is damaged, convert it again")
    return "" if sound.frames else "holds no samples; drop it"


def _ogg_cut(handle: BinaryIO) -> bool:
    """Whether the last Ogg page (RFC 3533: 27 bytes, segment table, segments) is incomplete."""
    size = handle.seek(0, 2)
    handle.seek(max(0, size - _OGG_TAIL))
    tail = handle.read()
    page = tail[tail.rfind(b"OggS"):]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27:27 + page[26]])


def crop(path: object, frames: int, rate: int, start: float, end: float | None,
         max_seconds: float = math.inf) -> tuple[int, int]:
    """First and last (exclusive) frame of a stretch in seconds, as slue-toolkit crops. Raises
    UserError: it is empty, outside of the file, or longer than `max_seconds`."""
    total = frames / rate
    last = total if end is None else end
    # Written so that a time that is not a number is outside, too.
    if not (0 <= start < total and last <= total + END_SLACK):
        key, value = ("end", last) if 0 <= start < total else ("start", start)
        raise UserError(f"{path}: {key} {value:g} s is outside the file, which has {total:.2f} s")
    begin, stop = int(start * rate), frames if end is None else min(int(end * rate), frames)
    if stop <= begin:
        raise UserError(f"{path}: the stretch from {start:g} s to {last:g} s is empty; `end` must "
                        "be after `start`")
    if (seconds := (stop - begin) / rate) > max_seconds:
        raise UserError(f"{path}: {seconds:.2f} s is longer than the limit of {max_seconds:g} s; "
                        "cut it with `start` and `end`, or drop it")
    return begin, stop


def read_frames(path: object, sound: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """`(frames, channels)` float32, usually in -1..1, of frames `first` to `last`; raises
    UserError: they cannot be decoded, are fewer than the header says, not finite, or integers."""
    skip = min(first, _MP3_PREROLL) if sound.format == "MP3" else 0
    step, left = max(1, _BLOCK // sound.channels), last - first + skip
    if left * sound.channels > _MOST_VALUES:
        raise UserError(f"{path}: {left} frames of {sound.channels} channels, as its header says, "
                        "are too many to be read at once; cut it with `start` and `end`")
    try:
        if first > skip:
            sound.seek(first - skip)
        parts = [sound.read(min(step, left), dtype="float32", always_2d=True)]
        while (left := left - step) > 0 and len(parts[-1]):
            parts.append(sound.read(min(step, left), dtype="float32", always_2d=True))
        block = (parts[0] if len(parts) == 1 else np.concatenate(parts))[skip:]
    except (soundfile.SoundFileError, MemoryError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); fetch or convert it again"
                        ) from error
    if len(block) == 0 or len(block) < last - first - END_SLACK * sound.samplerate:
        raise UserError(f"{path}: the file is truncated: {len(block)} of {last - first} samples can"
                        " be decoded; fetch or convert it again")
    return check_samples(path, block)


def check_samples(name: object, block: np.ndarray) -> np.ndarray:
    """Samples as they are; raises UserError: they are not finite, or integers written as floats."""
    if not np.isfinite(block).all():
        raise UserError(f"{name}: has samples that are NaN or infinite; decode it again or drop it")
    if (peak := float(np.abs(block).max())) > _MAX_PEAK:
        raise UserError(f"{name}: samples reach {peak:g}, expected -1 to 1; divide 16-bit samples "
                        "by 32768")
    return block


@torch.no_grad()
def log_mel(samples: Tensor, n_mels: int = 80, *, lengths: Sequence[int] | None = None,
            silence: float = 0.0) -> Tensor:
    """Whisper's log-mel `(n_mels, frames)` or `(batch, n_mels, frames)`, float32; frames past a
    clip's own length are zero, whatever is in the batch. Raises UserError: a clip is over 30 s.

    Args:
        samples: `(samples,)` or `(batch, samples)`, float, 16 kHz.
        n_mels: mel bins, 80, or 128 for large-v3 and turbo.
        lengths: valid samples of each clip; None: all.
        silence: seconds of zeros that follow each clip, up to 30 s with it; 30 gives 3,000
            frames, what transformers' feature extractor gives.
    """
    batch = samples.float().reshape(-1, samples.shape[-1])
    n_samples = [batch.shape[1]] * len(batch) if lengths is None else list(lengths)
    if max(n_samples) > MAX_SAMPLES:
        raise UserError(f"a clip has {max(n_samples) / SAMPLE_RATE:.2f} s; Whisper takes "
                        f"{MAX_SECONDS:g} s at most: cut it (`start`, `end`) or drop it")
    frames = mel_length(max(n_samples))
    ends = torch.tensor(n_samples, device=batch.device)[:, None]
    # A window centred up to 12.5 ms past a clip's end still touches the clip, and transformers
    # counts it for the maximum below: hence two frames more than the valid ones.
    logs = _log_power(_framed(batch, ends, min(frames + 2, MAX_MEL_FRAMES)), n_mels)
    # Whisper cuts 8 (80 dB) below the loudest bin of a clip. Frames of zeros have the lowest value
    # there is, so that the maximum is each clip's own whatever the batch.
    floor = logs.amax(dim=(1, 2), keepdim=True) - 8.0
    mel = (torch.maximum(logs, floor) + 4.0) / 4.0
    size = with_silence(frames, silence, MEL_RATE)
    if size > mel.shape[-1]:
        # The spectrum of the zeros that follow is known without computing it.
        zeros = (floor.clamp(min=math.log10(_LOG_FLOOR)) + 4.0) / 4.0
        mel = torch.cat([mel, zeros.expand(-1, n_mels, size - mel.shape[-1])], -1)
    valid = torch.tensor([with_silence(mel_length(n), silence, MEL_RATE) for n in n_samples])
    past = torch.arange(size, device=batch.device) >= valid.to(batch.device)[:, None]
    out = mel[..., :size].masked_fill(past[:, None], 0.0)
    return out if samples.dim() == 2 else out[0]


def batch_log_mel(waves: Sequence[Tensor], n_mels: int = 80, *,
                  silence: float = 0.0) -> tuple[Tensor, tuple[int, ...]]:
    """:func:`log_mel` of clips `(samples,)` of different lengths, on one device: `(batch, n_mels,
    frames)`, and each clip's own frames, without those of `silence`."""
    lengths = [len(wave) for wave in waves]
    waves = [wave if len(wave) else wave.new_zeros(1) for wave in waves]  # an empty clip is silence
    # On a CPU they are faster one by one: a clip fits the caches, and no padding is transformed.
    if waves[0].device.type == "cpu":
        mels = [log_mel(wave, n_mels, silence=silence).T for wave in waves]
        mel = pad_sequence(mels, batch_first=True).transpose(1, 2).contiguous()
    else:
        mel = log_mel(pad_sequence(list(waves), batch_first=True), n_mels, lengths=lengths,
                      silence=silence)
    return mel, tuple(mel_length(n) for n in lengths)


def _framed(batch: Tensor, ends: Tensor, frames: int) -> Tensor:
    """Samples under centred windows: zeros past each clip, reflected at 0 s and at 30 s."""
    half = N_FFT // 2
    reach = (frames - 1) * HOP + half  # end of the last window, exclusive
    width = min(reach, MAX_SAMPLES)
    inside = torch.arange(min(width, batch.shape[1]), device=batch.device) < ends
    clean = batch[:, :width].masked_fill(~inside, 0.0)
    return pad(pad(clean, (0, width - clean.shape[1])), (half, reach - width), mode="reflect")


def _log_power(framed: Tensor, n_mels: int) -> Tensor:
    """`(batch, n_mels, frames)` log10 of the mel power."""
    # In float32 also where the model runs under autocast: powers span ten orders of magnitude.
    with torch.autocast(framed.device.type, enabled=False):
        window, filters = _constants(n_mels, framed.device)
        spectrum = torch.stft(framed, N_FFT, HOP, window=window, center=False, return_complex=True)
        return (filters @ (spectrum.abs() ** 2)).clamp(min=_LOG_FLOOR).log10()


@lru_cache(maxsize=16)
def _constants(n_mels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Periodic Hann window `(400,)` and Slaney mel filters `(n_mels, 201)`."""
    from transformers.audio_utils import mel_filter_bank  # heavy, and not needed to read audio

    filters: Any = mel_filter_bank(1 + N_FFT // 2, n_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE,
                                   norm="slaney", mel_scale="slaney")
    window = torch.hann_window(N_FFT, device=device)
    # In float32 before it moves: Apple GPUs have no float64.
    return window, torch.from_numpy(filters.astype("f4")).to(device).T.contiguous()
