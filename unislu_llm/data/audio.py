"""Audio: a file -> samples at 16 kHz -> log-mel at 100 Hz, and the lengths along the way.

The log-mel is Whisper's (arXiv 2212.04356; `WhisperFeatureExtractor` of transformers) at the
natural length of a clip: its frames are the first ones of the clip zero-padded to 30 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.data.audio_file import crop, open_audio, read_frames
from unislu_llm.errors import UserError

SAMPLE_RATE = 16_000
N_FFT = 400  # samples: 25 ms window
HOP = 160  # samples: 10 ms between mel frames
MEL_RATE = SAMPLE_RATE // HOP  # 100 mel frames a second
ENCODER_RATE = MEL_RATE // 2  # 50 encoder frames a second: the second convolution has stride 2
MIN_SAMPLES = SAMPLE_RATE // 2  # of a shorter clip Whisper makes nothing (transformers#43838)
MAX_SECONDS = 30.0  # what Whisper's positions reach
MAX_SAMPLES = int(MAX_SECONDS * SAMPLE_RATE)
MAX_MEL_FRAMES = MAX_SAMPLES // HOP
MAX_ENCODER_FRAMES = MAX_MEL_FRAMES // 2

_LOG_FLOOR = 1e-10  # mel power below which Whisper's log10 is cut


def mel_length(n_samples: int) -> int:
    """Mel frames (100 Hz) of so many samples at 16 kHz, padded to the minimum length."""
    return -(-max(n_samples, MIN_SAMPLES) // HOP)


def encoder_length(n_mel: int) -> int:
    """Encoder frames (50 Hz) of so many mel frames: convolutions of width 3, strides 1 and 2."""
    return (n_mel + 1) // 2


def load(path: str | Path, start: float = 0.0, end: float | None = None, *,
         max_seconds: float = math.inf) -> Tensor:
    """Read a file of any rate, or a stretch of it in seconds: mono `(samples,)` float32 at 16 kHz.

    Raises:
        UserError: the file is missing, unreadable or truncated (which WAV, AIFF, AU, FLAC, Ogg and
            MP3 show), the stretch is empty, outside or longer than `max_seconds`, or samples are
            not usable.
    """
    path = Path(path)
    with open_audio(path) as sound:
        rate = sound.samplerate
        first, last = crop(path, sound.frames, rate, start, end)
        if (last - first) / rate > max_seconds:
            raise UserError(f"{path}: {(last - first) / rate:.2f} s is longer than the limit of "
                            f"{max_seconds:g} s; cut it with `start` and `end`, or drop it")
        mono = read_frames(path, sound, first, last).mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if mono.size == 0:
        raise UserError(f"{path}: holds {last - first} samples at {rate} Hz, none at "
                        f"{SAMPLE_RATE} Hz; drop it")
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


def count_samples(path: str | Path, start: float = 0.0, end: float | None = None) -> int:
    """Samples that :func:`load` returns, from the file's header alone; raises for a bad crop."""
    path = Path(path)
    with open_audio(path) as sound:
        first, last = crop(path, sound.frames, sound.samplerate, start, end)
        return math.floor((last - first) * SAMPLE_RATE / sound.samplerate + 0.5)


@torch.no_grad()
def log_mel(samples: Tensor, n_mels: int = 80, *, lengths: Sequence[int] | None = None,
            pad_to_30s: bool = False) -> Tensor:
    """Whisper's log-mel; frames past a clip's own length are zero, whatever is in the batch.

    Args:
        samples: `(samples,)` or `(batch, samples)`, float, 16 kHz.
        n_mels: mel bins, 80, or 128 for large-v3 and turbo.
        lengths: valid samples of each clip; None: all.
        pad_to_30s: give 3,000 frames, what 30 s of zero-padded samples give.

    Returns:
        `(n_mels, frames)` or `(batch, n_mels, frames)` float32.

    Raises:
        UserError: a clip is longer than 30 s.
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
    if pad_to_30s:
        # The spectrum of the zeros that follow is known without computing it.
        silence = (floor.clamp(min=math.log10(_LOG_FLOOR)) + 4.0) / 4.0
        out = silence.repeat(1, n_mels, MAX_MEL_FRAMES)
        out[..., : mel.shape[-1]] = mel
    else:
        valid = torch.tensor([mel_length(n) for n in n_samples], device=batch.device)[:, None]
        past = torch.arange(frames, device=batch.device) >= valid
        out = mel[..., :frames].masked_fill(past[:, None], 0.0)
    return out if samples.dim() == 2 else out[0]


def batch_log_mel(waves: Sequence[Tensor], n_mels: int = 80, *,
                  pad_to_30s: bool = False) -> tuple[Tensor, tuple[int, ...]]:
    """:func:`log_mel` of clips `(samples,)` of different lengths, on one device.

    Returns:
        `(batch, n_mels, frames)`, and each clip's own frames, also with `pad_to_30s`.
    """
    lengths = [len(wave) for wave in waves]
    waves = [wave if len(wave) else wave.new_zeros(1) for wave in waves]  # an empty clip is silence
    # On a CPU they are faster one by one: a clip fits the caches, and no padding is transformed.
    if waves[0].device.type == "cpu":
        mels = [log_mel(wave, n_mels, pad_to_30s=pad_to_30s).T for wave in waves]
        mel = pad_sequence(mels, batch_first=True).transpose(1, 2).contiguous()
    else:
        mel = log_mel(pad_sequence(list(waves), batch_first=True), n_mels, lengths=lengths,
                      pad_to_30s=pad_to_30s)
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
    return window, torch.from_numpy(filters).to(device, torch.float32).T.contiguous()
