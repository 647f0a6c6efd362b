"""Utterances to tensors: audio is read and turned into log-mel, text into target ids, and both are padded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from unislu_llm.data import audio
from unislu_llm.data.cache import AudioKey, Clip, FrameCache, load_clip
from unislu_llm.data.simulate import SparsePosteriors
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
        draft_ids: `(batch, L_draft)` ids of the drafts with the text before each, filled with the pad id, for models that read
            drafts. draft_lengths: `(batch,)`, 0 for a sample without.
        simulated_classes, simulated_shares: `(texts, T_ctc, 3)` posteriors of the samples without audio, in order, see
            :class:`~unislu_llm.data.simulate.SparsePosteriors`. simulated_lengths: `(batch,)` frames, 0 for a sample with audio.
            Where there are such samples, `mel` holds the others alone, in order, and `mel_lengths` is 0 for them. For a model
            that does not listen nothing is simulated, and the same holds of `mel`.
    """

    samples: list[Sample]
    mel: Tensor
    mel_lengths: Tensor
    target_ids: Tensor
    target_parts: Tensor
    frames: Tensor | None = None
    frame_lengths: Tensor | None = None
    missing: dict[int, AudioKey | None] = field(default_factory=dict)
    draft_ids: Tensor | None = None
    draft_lengths: Tensor | None = None
    simulated_classes: Tensor | None = None
    simulated_shares: Tensor | None = None
    simulated_lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def drafts(self) -> dict[str, Tensor]:
        """The drafts as arguments of a model; none where the batch was not made for a model that reads them."""
        if self.draft_ids is None or self.draft_lengths is None:
            return {}
        return {"draft_ids": self.draft_ids, "draft_lengths": self.draft_lengths}

    def extras(self) -> dict[str, Tensor]:
        """Drafts and simulated posteriors as arguments of a model's `forward`, where there are any."""
        simulated = {name: value for name in ("simulated_classes", "simulated_shares", "simulated_lengths")
                     if (value := getattr(self, name)) is not None}
        return self.drafts() | simulated

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
        raise UserError(f"{where}: field 'audio': the row has no audio; it can train some models (docs/ctc.md, docs/drafts.md), "
                        "but nothing is predicted for it")
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
        draft_prompt: ids before each draft, for a model that reads drafts; None for one that does not.
    """

    def __init__(self, codec: TextCodec, n_mels: int = 80, pad_to_30s: bool = False,
                 draft_prompt: Sequence[int] | None = None) -> None:
        self.codec = codec
        self.n_mels = n_mels
        self.pad_to_30s = pad_to_30s
        self.draft_prompt = draft_prompt

    def draft(self, sample: Sample) -> list[int]:
        """Ids of a sample's draft and the text before it, tokenised as transcripts are; none where there is no draft."""
        draft = sample.utterance.draft
        if self.draft_prompt is None or draft is None:
            return []
        return [*self.draft_prompt, *(self.codec.text_ids(draft) if draft else [])]

    def __call__(self, items: Sequence[tuple[Sample, Any]]) -> Batch:
        """Batch `(sample, audio (S,))` or `(sample, clip)` pairs, or for text `(sample, posteriors or None)`; order is kept."""
        batch = self._batch(items)
        if self.draft_prompt is None:
            return batch
        drafts = [torch.tensor(self.draft(sample), dtype=torch.long) for sample in batch.samples]
        return replace(batch, draft_ids=pad_sequence(drafts, batch_first=True, padding_value=self.codec.pad_id),
                       draft_lengths=torch.tensor([len(draft) for draft in drafts]))

    def _batch(self, items: Sequence[tuple[Sample, Any]]) -> Batch:
        samples = [sample for sample, _ in items]
        targets = [self.codec.target(sample) for sample in samples]
        ids = pad_sequence([torch.tensor(t.ids) for t in targets], batch_first=True, padding_value=self.codec.pad_id)
        parts = pad_sequence([torch.tensor(t.parts) for t in targets], batch_first=True, padding_value=NO_PART)
        sounds: list[Any] = [sound for _, sound in items]
        texts = {i: sound for i, sound in enumerate(sounds) if isinstance(sound, SparsePosteriors)}
        if texts or any(sound is None for sound in sounds):
            return self._with_texts(samples, sounds, texts, ids, parts)
        if all(isinstance(sound, Tensor) for sound in sounds):
            return Batch(samples, *self._mel(sounds), ids, parts)
        return self._cached(samples, sounds, ids, parts)

    def _with_texts(self, samples: list[Sample], sounds: list[Any], texts: Mapping[int, SparsePosteriors], ids: Tensor,
                    parts: Tensor) -> Batch:
        """A batch in which some samples have no audio."""
        heard = {i: sound for i, sound in enumerate(sounds) if i not in texts and sound is not None}
        if any(isinstance(sound, Clip) for sound in heard.values()):
            batch = self._cached(samples, [heard.get(i) for i in range(len(sounds))], ids, parts)
        else:
            mel, lengths = torch.zeros(0, self.n_mels, 0), torch.zeros(len(sounds), dtype=torch.long)
            if heard:
                mel, lengths[list(heard)] = self._mel(list(heard.values()))
            batch = Batch(samples, mel, lengths, ids, parts)
        if not texts:
            return batch
        counts = torch.zeros(len(sounds), dtype=torch.long)
        counts[list(texts)] = torch.tensor([len(text) for text in texts.values()])
        return replace(batch, simulated_classes=pad_sequence([t.classes for t in texts.values()], batch_first=True),
                       simulated_shares=pad_sequence([t.shares for t in texts.values()], batch_first=True),
                       simulated_lengths=counts)

    def _mel(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return audio.batch_log_mel(waves, self.n_mels, pad_to_30s=self.pad_to_30s)

    def _cached(self, samples: list[Sample], clips: Sequence[Clip | None], ids: Tensor, parts: Tensor) -> Batch:
        """A batch of clips (None: no audio): the frames that are there, and the log-mel of the others."""
        silent = [i for i, clip in enumerate(clips) if clip is None]
        every = [Clip(0) if clip is None else clip for clip in clips]
        missing = {i: clip.key for i, clip in enumerate(every) if clip.frames is None and i not in silent}
        waves = [clip.wave for clip in every if clip.wave is not None]
        mel = self._mel(waves)[0] if waves else torch.zeros(0, self.n_mels, 0)
        known = next((c.frames for c in every if c.frames is not None), torch.zeros(0, 0))
        frames = pad_sequence([known[:0] if c.frames is None else c.frames for c in every], batch_first=True)
        n_mel = torch.tensor([clip.n_mel for clip in every])
        lengths = audio.encoder_length(n_mel)
        lengths[[*missing, *silent]] = 0
        return Batch(samples, mel, n_mel, ids, parts, frames, lengths, missing)
