"""Utterances to tensors: audio is read and turned into log-mel, text into target ids, and both are padded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from unislu_llm.data import audio
from unislu_llm.data.cache import AudioKey, Clip, FrameCache, load_clip
from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART
from unislu_llm.utterance import Utterance


@dataclass
class Batch:
    """Padded tensors of some samples.

    Args:
        samples: what they were made of, in order.
        mel: `(batch, n_mels, T_mel)` log-mel at 100 Hz. mel_lengths: `(batch,)`.
        target_ids: `(batch, L)`, filled with the pad id. target_parts: `(batch, L)`, see :mod:`unislu_llm.loss`.
        frames: `(batch, T_enc, D)` encoder frames at 50 Hz, where the samples come with a cache. frame_lengths: `(batch,)`
            valid ones. missing: rows that the cache lacked, and the name to store them under; `mel` holds these rows alone
            then, in order. See :func:`unislu_llm.models.frames.complete`.
    """

    samples: list[Sample]
    mel: Tensor
    mel_lengths: Tensor
    target_ids: Tensor
    target_parts: Tensor
    frames: Tensor | None = None
    frame_lengths: Tensor | None = None
    missing: dict[int, AudioKey | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str) -> Batch:
        """A copy with every tensor on `device`."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            moved[f.name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        return Batch(**moved)

    @property
    def padding_share(self) -> float:
        """Share of mel frames and target tokens that are padding."""
        used = int(self.mel_lengths.sum()) + int((self.target_parts != NO_PART).sum())
        width = self.mel.shape[-1] if self.frames is None else int(self.mel_lengths.max())
        return 1.0 - used / (len(self) * (width + self.target_ids.shape[-1]))


class SpeechDataset(Dataset[tuple[Sample, Tensor]]):
    """Samples with their audio: item i is `(sample, samples at 16 kHz (S,))`.

    Args:
        samples: in the order of their indices. max_seconds: longer audio is refused.

    Raises:
        UserError: on access, when a file is missing, unreadable or too long; the message names manifest line and file.
    """

    def __init__(self, samples: Sequence[Sample], max_seconds: float = audio.MAX_SECONDS) -> None:
        self.samples = list(samples)
        self.max_seconds = max_seconds

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, Tensor]:
        sample = self.samples[index]
        u = sample.utterance
        with _named(u):
            assert u.audio is not None
            return sample, audio.load(u.audio, u.start, u.end, max_seconds=self.max_seconds)


class CachedSpeech(Dataset[tuple[Sample, Clip]]):
    """As :class:`SpeechDataset`, item i being `(sample, clip)`: with its encoder frames where the cache has them."""

    def __init__(self, samples: Sequence[Sample], cache: FrameCache, max_seconds: float = audio.MAX_SECONDS) -> None:
        self.samples, self.cache, self.max_seconds = list(samples), cache, max_seconds

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, Clip]:
        sample = self.samples[index]
        with _named(sample.utterance):
            return sample, load_clip(self.cache, sample.utterance, self.max_seconds)


@contextlib.contextmanager
def _named(utterance: Utterance) -> Iterator[None]:
    """Name the manifest line in errors about its audio."""
    where = utterance.source or utterance.id
    if utterance.audio is None:
        raise UserError(f"{where}: field 'audio': the row has no audio; only a model trained on text can use it")
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: field 'audio': {error}") from error


class Collator:
    """Make batches for a model.

    Args:
        codec: text codec of the model.
        n_mels: mel bins its encoder takes.
        pad_to_30s: pad every clip to 30 s of silence before the mel, as Whisper was trained.
    """

    def __init__(self, codec: TextCodec, n_mels: int = 80, pad_to_30s: bool = False) -> None:
        self.codec = codec
        self.n_mels = n_mels
        self.pad_to_30s = pad_to_30s

    def __call__(self, items: Sequence[tuple[Sample, Tensor]] | Sequence[tuple[Sample, Clip]]) -> Batch:
        """Batch `(sample, audio (S,))` or `(sample, clip)` pairs; order is kept."""
        samples = [sample for sample, _ in items]
        targets = [self.codec.target(sample) for sample in samples]
        ids = pad_sequence([torch.tensor(t.ids) for t in targets], batch_first=True, padding_value=self.codec.pad_id)
        parts = pad_sequence([torch.tensor(t.parts) for t in targets], batch_first=True, padding_value=NO_PART)
        waves = [wave for _, wave in items if isinstance(wave, Tensor)]
        if len(waves) == len(items):
            return Batch(samples, *self._mel(waves), ids, parts)
        return self._cached(samples, [clip for _, clip in items if isinstance(clip, Clip)], ids, parts)

    def _mel(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return audio.batch_log_mel(waves, self.n_mels, pad_to_30s=self.pad_to_30s)

    def _cached(self, samples: list[Sample], clips: Sequence[Clip], ids: Tensor, parts: Tensor) -> Batch:
        """A batch of clips: the frames that are there, and the log-mel of the others."""
        missing = {i: clip.key for i, clip in enumerate(clips) if clip.frames is None}
        waves = [clip.wave for clip in clips if clip.wave is not None]
        mel = self._mel(waves)[0] if waves else torch.zeros(0, self.n_mels, 0)
        known = next((c.frames for c in clips if c.frames is not None), torch.zeros(0, 0))
        frames = pad_sequence([known[:0] if c.frames is None else c.frames for c in clips], batch_first=True)
        n_mel = torch.tensor([clip.n_mel for clip in clips])
        lengths = audio.encoder_length(n_mel)
        lengths[list(missing)] = 0
        return Batch(samples, mel, n_mel, ids, parts, frames, lengths, missing)
