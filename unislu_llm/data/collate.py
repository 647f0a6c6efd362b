"""Utterances to tensors: audio is read and turned into log-mel, text into target ids, and both are padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from unislu_llm.data import audio
from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART


@dataclass
class Batch:
    """Padded tensors of some samples.

    Args:
        samples: what they were made of, in order.
        mel: `(batch, n_mels, T_mel)` log-mel at 100 Hz. mel_lengths: `(batch,)`.
        target_ids: `(batch, L)`, filled with the pad id. target_parts: `(batch, L)`, see :mod:`unislu_llm.loss`.
    """

    samples: list[Sample]
    mel: Tensor
    mel_lengths: Tensor
    target_ids: Tensor
    target_parts: Tensor

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
        return 1.0 - used / (self.mel.shape[0] * (self.mel.shape[-1] + self.target_ids.shape[-1]))


class SpeechDataset(Dataset[tuple[Sample, Tensor]]):
    """Samples with their audio: item i is `(sample, samples at 16 kHz (S,))`.

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
        where = u.source or u.id
        if u.audio is None:
            raise UserError(f"{where}: field 'audio': the row has no audio; only a model trained on text can use it")
        try:
            return sample, audio.load(u.audio, u.start, u.end, max_seconds=self.max_seconds)
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

    def __call__(self, items: Sequence[tuple[Sample, Tensor]]) -> Batch:
        """Batch `(sample, audio (S,))` pairs; order is kept."""
        samples = [sample for sample, _ in items]
        mel, mel_lengths = audio.batch_log_mel([wave for _, wave in items], self.n_mels, pad_to_30s=self.pad_to_30s)
        targets = [self.codec.target(sample) for sample in samples]
        return Batch(
            samples, mel, mel_lengths,
            pad_sequence([torch.tensor(t.ids) for t in targets], batch_first=True, padding_value=self.codec.pad_id),
            pad_sequence([torch.tensor(t.parts) for t in targets], batch_first=True, padding_value=NO_PART),
        )
