"""Audio front end: file or array -> samples at 16 kHz -> log-mel at 100 Hz, and the lengths along the way.

The log-mel is Whisper's (arXiv 2212.04356; `WhisperFeatureExtractor` of transformers), computed at the natural length
of a clip: its frames are the first frames of the clip zero-padded to 30 s, so both give a model the same features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.errors import UserError

SAMPLE_RATE = 16_000
N_FFT = 400  # samples: 25 ms window
HOP = 160  # samples: 10 ms between mel frames
MEL_RATE = SAMPLE_RATE // HOP  # 100 mel frames a second
CONV_STRIDE = 2  # of the encoder's second convolution
ENCODER_RATE = MEL_RATE // CONV_STRIDE  # 50 encoder frames a second
MIN_SECONDS = 0.5  # shorter clips give Whisper nothing (transformers#43838): zeros are added, in training as in use
MIN_SAMPLES = int(MIN_SECONDS * SAMPLE_RATE)  # 8,000 samples
MAX_SECONDS = 30  # what Whisper's positions reach
MAX_SAMPLES = MAX_SECONDS * SAMPLE_RATE  # 480,000 samples
MAX_MEL_FRAMES = MAX_SAMPLES // HOP  # 3,000 mel frames
MAX_ENCODER_FRAMES = MAX_MEL_FRAMES // CONV_STRIDE  # 1,500 encoder frames

END_SLACK = 0.1  # seconds by which a crop's end may pass the end of the file: corpora round their time stamps
_MAX_PEAK = 100.0  # above it, samples are integers written as floats rather than loud audio
_LOG_FLOOR = 1e-10  # mel power below which Whisper's log10 is cut
_MP3_PREROLL = 1 << 14  # samples decoded and dropped: right after a seek MP3 lacks the bits of the frames before
_STREAM_SIZE = 0x7FFF0000  # a chunk size from here on stands for "not known": the file was written to a pipe
_OGG_TAIL = 1 << 17  # bytes; an Ogg page has 65,307 at most
_DECLARED = re.compile(r"(?:data|SSND|BODY|Data Size)\s*: (\d+) \(should be (\d+)\)")

Count = TypeVar("Count", int, Tensor)


def mel_length(n_samples: Count) -> Count:
    """Mel frames (100 Hz) of `n_samples` at 16 kHz, padded to the minimum length; an int or an integer tensor."""
    if isinstance(n_samples, Tensor):
        return -(-n_samples.clamp(min=MIN_SAMPLES) // HOP)
    return -(-max(n_samples, MIN_SAMPLES) // HOP)


def encoder_length(n_mel: Count) -> Count:
    """Encoder frames (50 Hz) of `n_mel` mel frames: two convolutions of width 3, padding 1, strides 1 and 2."""
    return (n_mel + 1) // CONV_STRIDE


def load(path: str | Path, start: float = 0.0, end: float | None = None, *, max_seconds: float | None = None) -> Tensor:
    """Read a file of any soundfile format, or a stretch of it, as mono at 16 kHz.

    A stretch is `[int(start * rate) : int(end * rate)]` at the file's own rate, as the SLUE toolkit crops.

    Args:
        path: audio file (wav, flac, ogg, opus, mp3, ...), any rate, any number of channels (averaged).
        start, end: seconds; `end` None reads to the end. `end` may pass the end of the file by :data:`END_SLACK`.
        max_seconds: refuse a longer stretch.

    Returns:
        `(samples,)` float32 on the CPU, not padded.

    Raises:
        UserError: the file is missing, unreadable or truncated, the stretch is empty, too long or outside the file, or
            samples are not finite. Truncation shows in WAV, AIFF, AU, FLAC, Ogg and MP3; other formats hide it.
    """
    path = Path(path)
    with _open(path) as sound:
        rate = sound.samplerate
        first, last = _crop(path, sound.frames, rate, start, end)
        _check_seconds(str(path), (last - first) / rate, max_seconds)
        samples = _read(path, sound, first, last)
    return prepare(samples, rate, name=str(path))


def prepare(samples: np.ndarray | Tensor, rate: float, *, name: str = "audio array",
            max_seconds: float | None = None) -> Tensor:
    """Turn samples in memory into mono at 16 kHz.

    Args:
        samples: `(samples,)` or `(samples, channels)` as soundfile gives them; floats in -1..1, or full-scale integers.
        rate: sampling rate, Hz.
        name: what error messages call it.
        max_seconds: refuse a longer clip.

    Returns:
        `(samples,)` float32 on the CPU, not padded.

    Raises:
        UserError: wrong shape or rate, no samples, samples not finite or far outside -1..1, or a clip too long.
    """
    array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if not math.isfinite(rate) or rate <= 0:
        raise UserError(f"{name}: sampling rate {rate} is not a positive number of Hz")
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > array.shape[0] > 0):
        raise UserError(f"{name}: shape {array.shape} is not (samples,) or (samples, channels); transpose or squeeze")
    if array.size == 0:
        raise UserError(f"{name}: holds no samples")
    _check_seconds(name, len(array) / rate, max_seconds)
    array = _to_float(array, name)
    mono = array if array.ndim == 1 else array.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if mono.size == 0:
        raise UserError(f"{name}: holds {len(array)} samples at {rate:g} Hz, none at {SAMPLE_RATE} Hz; drop it")
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


def count_samples(path: str | Path, start: float = 0.0, end: float | None = None) -> int:
    """Samples (16 kHz) that :func:`load` returns, from the file's header alone; the same errors for a bad crop."""
    path = Path(path)
    with _open(path) as sound:
        first, last = _crop(path, sound.frames, sound.samplerate, start, end)
        return math.floor((last - first) * SAMPLE_RATE / sound.samplerate + 0.5)


@torch.no_grad()
def log_mel(samples: Tensor, n_mels: int = 80, *, lengths: Tensor | None = None, pad_to_30s: bool = False) -> Tensor:
    """Whisper's log-mel spectrogram; one STFT for the batch, on the device of `samples`.

    At natural length the valid frames equal those of the clip padded to 30 s, and frames past a clip's own length are
    zero. What `samples` holds beyond `lengths`, and what else is in the batch, changes nothing.

    Args:
        samples: `(samples,)` or `(batch, samples)`, float, 16 kHz.
        n_mels: mel bins, 80, or 128 for large-v3 and turbo.
        lengths: `(batch,)` valid samples of each clip; None: all.
        pad_to_30s: give 3,000 frames, those past the clip being what 30 s of zero-padded samples give.

    Returns:
        `(n_mels, frames)` or `(batch, n_mels, frames)` float32; frames = `mel_length(max(lengths))`, or 3,000.

    Raises:
        UserError: a clip is longer than 30 s.
        ValueError: samples are not float, or shapes do not fit.
    """
    batch, lengths = _as_batch(samples, lengths)
    longest = int(lengths.max())
    if longest > MAX_SAMPLES:
        raise UserError(f"a clip has {longest / SAMPLE_RATE:.2f} s; Whisper takes {MAX_SECONDS} s at most: cut it "
                        "(`start` and `end` in the manifest) or drop it")
    frames = mel_length(longest)
    logs = _log_power(_framed(batch, lengths, min(frames + 2, MAX_MEL_FRAMES)), n_mels)
    # Frames of zeros have the lowest value there is, so the maximum is each clip's own whatever the batch.
    floor = logs.amax(dim=(1, 2), keepdim=True) - 8.0
    mel = (torch.maximum(logs, floor) + 4.0) / 4.0
    if pad_to_30s:
        silence = (floor.clamp(min=math.log10(_LOG_FLOOR)) + 4.0) / 4.0
        out = silence.repeat(1, n_mels, MAX_MEL_FRAMES)
        out[..., : mel.shape[-1]] = mel
    else:
        valid = torch.arange(frames, device=batch.device) < mel_length(lengths)[:, None]
        out = mel[..., :frames].masked_fill(~valid[:, None], 0.0)
    return out if samples.dim() == 2 else out[0]


def batch_log_mel(waves: Sequence[Tensor], n_mels: int = 80, *, pad_to_30s: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`log_mel` of clips of different lengths.

    Args:
        waves: samples `(samples,)` of each clip, float, 16 kHz, on one device.
        n_mels, pad_to_30s: see :func:`log_mel`.

    Returns:
        mel `(batch, n_mels, frames)` and `(batch,)` its valid frames, also with `pad_to_30s` those of the clip.
    """
    lengths = torch.tensor([len(wave) for wave in waves], device=waves[0].device)
    waves = [wave if len(wave) else wave.new_zeros(1) for wave in waves]  # an empty clip is silence
    if waves[0].device.type == "cpu":  # faster one by one: no padding is transformed, and caches hold a clip
        mels = [log_mel(wave, n_mels, pad_to_30s=pad_to_30s).T for wave in waves]
        return pad_sequence(mels, batch_first=True).transpose(1, 2).contiguous(), mel_length(lengths)
    mel = log_mel(pad_sequence(waves, batch_first=True), n_mels, lengths=lengths, pad_to_30s=pad_to_30s)
    return mel, mel_length(lengths)


def _as_batch(samples: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    if samples.dim() not in (1, 2) or not samples.is_floating_point() or samples.numel() == 0:
        raise ValueError("expected float samples (samples,) or (batch, samples), "
                         f"got {samples.dtype} {tuple(samples.shape)}")
    batch = samples.float().reshape(-1, samples.shape[-1])
    if lengths is None:
        lengths = torch.full((len(batch),), batch.shape[1], device=batch.device)
    lengths = lengths.to(batch.device).reshape(-1)
    if len(lengths) != len(batch) or int(lengths.max()) > batch.shape[1] or int(lengths.min()) < 0:
        raise ValueError(f"lengths {lengths.tolist()} do not fit samples {tuple(samples.shape)}")
    return batch, lengths


def _framed(batch: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """Samples under `frames` centred windows: zeros past each clip, reflection at 0 s and at 30 s as in Whisper.

    The windows centred up to 1.25 ms past the last valid frame's hop still touch the clip and count for its maximum,
    hence `frames` is two more than the valid ones.
    """
    half = N_FFT // 2
    reach = (frames - 1) * HOP + half  # end of the last window, exclusive
    width = min(reach, MAX_SAMPLES)
    inside = torch.arange(min(width, batch.shape[1]), device=batch.device) < lengths[:, None]
    clean = batch[:, :width].masked_fill(~inside, 0.0)
    padded = torch.nn.functional.pad(clean, (0, width - clean.shape[1]))
    return torch.nn.functional.pad(padded, (half, reach - width), mode="reflect")


def _log_power(framed: Tensor, n_mels: int) -> Tensor:
    """`(batch, n_mels, frames)` log10 of the mel power; in float32 also under autocast."""
    with torch.autocast(framed.device.type, enabled=False):
        window, filters = _constants(n_mels, framed.device)
        spectrum = torch.stft(framed, N_FFT, HOP, window=window, center=False, return_complex=True)
        return (filters @ (spectrum.abs() ** 2)).clamp(min=_LOG_FLOOR).log10()


@lru_cache(maxsize=16)
def _constants(n_mels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Periodic Hann window `(400,)` and Slaney mel filters `(n_mels, 201)`."""
    from transformers.audio_utils import mel_filter_bank  # heavy, and not needed to read audio

    filters: Any = mel_filter_bank(
        num_frequency_bins=1 + N_FFT // 2, num_mel_filters=n_mels, min_frequency=0.0, max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.hann_window(N_FFT, device=device), torch.from_numpy(filters).to(device, torch.float32).T.contiguous()


def _check_seconds(name: str, seconds: float, limit: float | None) -> None:
    if limit is not None and seconds > limit:
        raise UserError(f"{name}: {seconds:.2f} s is longer than the limit of {limit:g} s; "
                        "cut it with `start` and `end`, or drop it")


def _open(path: Path) -> soundfile.SoundFile:
    """Open for reading; refuse what is not there, not audio, truncated or without a length."""
    if not path.exists():
        raise UserError(f"{path}: audio file does not exist; correct the path (in a manifest: from its folder)")
    if not path.is_file():
        raise UserError(f"{path}: not a file; give an audio file")
    try:
        sound = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        raise UserError(f"{path}: cannot be read as audio ({error}); convert it to WAV, FLAC or Ogg/Opus") from error
    problem = _damage(path, sound)
    if problem:
        sound.close()
        raise UserError(f"{path}: {problem}")
    return sound


def _damage(path: Path, sound: soundfile.SoundFile) -> str | None:
    """What libsndfile passes over in silence, reading what is left: data cut off, or a length that nobody wrote."""
    truncated = "the file is truncated ({}); fetch or convert it again"
    for declared, found in _DECLARED.findall(sound.extra_info):
        if int(found) < int(declared) < _STREAM_SIZE:
            return truncated.format(f"{found} of {declared} bytes of audio")
    if sound.format == "OGG" and _ogg_cut(path):
        return truncated.format("its last page is incomplete")
    if sound.frames == 0:
        return "holds no samples; drop it"
    if sound.frames > 1 << 48:
        return "the header does not say how long it is (written to a pipe); convert it again into a file"
    return None


def _ogg_cut(path: Path) -> bool:
    """Whether the last Ogg page (RFC 3533: 27 bytes, segment table, segments) ends after the file does."""
    with path.open("rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(max(0, size - _OGG_TAIL))
        tail = handle.read()
    page = tail[tail.rfind(b"OggS"):]
    table = page[27: 27 + page[26]] if len(page) > 26 else b""
    return len(page) <= 26 or len(table) < page[26] or len(page) < 27 + len(table) + sum(table)


def _crop(path: Path, frames: int, rate: int, start: float, end: float | None) -> tuple[int, int]:
    """First and last (exclusive) frame of the stretch, at the file's rate."""
    total = frames / rate
    bad = [f"{key} {value}" for key, value in (("start", start), ("end", end))
           if value is not None and (not math.isfinite(value) or value < 0)]
    if bad:
        raise UserError(f"{path}: {' and '.join(bad)} is not a time in seconds")
    if start >= total or (end is not None and end > total + END_SLACK):
        key, value = ("start", start) if start >= total else ("end", end)
        raise UserError(f"{path}: {key} {value:g} s is outside the file, which has {total:.2f} s")
    first, last = int(start * rate), frames if end is None else min(int(end * rate), frames)
    if last <= first:
        raise UserError(f"{path}: the stretch from {start:g} s to {end:g} s is empty; `end` must be after `start`")
    return first, last


def _read(path: Path, sound: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """`(frames, channels)` float32 of frames `first` to `last`."""
    skip = min(first, _MP3_PREROLL) if sound.format == "MP3" else 0
    try:
        if first > skip:
            sound.seek(first - skip)
        block = sound.read(last - first + skip, dtype="float32", always_2d=True)[skip:]
    except (soundfile.SoundFileError, MemoryError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); fetch or convert it again") from error
    if len(block) == 0 or len(block) < last - first - END_SLACK * sound.samplerate:
        raise UserError(f"{path}: the file is truncated: {len(block) / sound.samplerate:.2f} s of "
                        f"{(last - first) / sound.samplerate:.2f} s can be decoded; fetch or convert it again")
    return block


def _to_float(array: np.ndarray, name: str) -> np.ndarray:
    """float32 in -1..1 from floats or from integers of full scale."""
    if array.dtype.kind == "u":
        middle = (np.iinfo(array.dtype).max + 1) / 2
        return ((array - middle) / middle).astype(np.float32)
    if array.dtype.kind == "i":
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if array.dtype.kind != "f":
        raise UserError(f"{name}: samples are {array.dtype}; give float or integer samples")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: has samples that are NaN or infinite; decode it again or drop it")
    peak = float(np.abs(array).max())
    if peak > _MAX_PEAK:
        raise UserError(f"{name}: samples reach {peak:g}, expected -1 to 1; divide 16-bit samples by 32768")
    return array.astype(np.float32, copy=False)
