"""Examples to batches: audio becomes log-mel, text becomes token ids, and both are padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from unislu_llm.data import audio
from unislu_llm.data.augment import Augmenter, HypothesisDropout, Key, Masks
from unislu_llm.data.batch import Batch, InputKind
from unislu_llm.data.frame_cache import FrameCache, Frames, load_clip
from unislu_llm.data.sampler import Draw, MicroBatch
from unislu_llm.data.text_injection import SparsePosteriors, TextInjector
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART
from unislu_llm.tokenizer import Example, UnifiedTokenizer

_CHARACTERS_PER_SECOND = 15.0  # a guess at speech; it only decides which examples share a batch


@dataclass(frozen=True)
class Item:
    """What a data set yields: an example with its input."""

    example: Example  # after augmentation and hypothesis dropout
    kind: InputKind
    input: Tensor | Frames | SparsePosteriors | None = None  # samples (S,) at 16 kHz for `audio`
    masks: Masks | None = None  # laid over log-mel and frames by the collator, which makes the mel
    counted: bool = True  # whether the example weighs in the loss


@dataclass(eq=False)
class SpeechDataset(Dataset[Item]):
    """Examples with their input, asked by `(index, times drawn before)` or by a micro-batch. Access
    raises UserError: audio is missing, unreadable or too long, or frames are lost."""

    examples: Sequence[Example]
    listens: bool = True  # whether the model takes speech; otherwise no audio is read
    frame_cache: FrameCache | None = None  # frames in place of audio
    augmenter: Augmenter | None = None
    injector: TextInjector | None = None  # posteriors in place of audio that is not there
    dropout: HypothesisDropout | None = None
    seed: int = 0
    epoch: int = 0

    def kind(self, example: Example) -> InputKind:
        """Kind of input that an example will be."""
        if not self.listens:
            return "text"
        if example.utterance.audio is None and self.injector is not None:
            return "posteriors"
        return "audio" if self.frame_cache is None else "frames"

    def seconds(self, example: Example) -> float:
        """Length of an example's audio, or of what its text stands for."""
        u = example.utterance
        if u.audio is None and self.injector is not None:
            return self.injector.seconds(example)
        return len(u.text) / _CHARACTERS_PER_SECOND if u.audio is None else u.seconds

    def __getitem__(self, draw: Draw) -> Item:
        example, key = self.examples[draw[0]], Key(self.seed, self.epoch, *draw)
        kind, augmenter = self.kind(example), self.augmenter
        found: Any = None
        if kind == "posteriors" and self.injector is not None:
            found = self.injector(example, key)
        elif kind == "frames" and self.frame_cache is not None:
            found = self.frame_cache.get(example.utterance)
            if found is None:
                raise UserError(f"{example.utterance.where}: {self.frame_cache.folder} has lost "
                                "its frames; start the run again, which computes them")
        elif kind == "audio":
            found = load_clip(example.utterance)
            if augmenter is not None:
                example, found = augmenter.clip(example, found, key)
        masks = augmenter.masks(key) if augmenter and kind in ("audio", "frames") else None
        # Last: a clip made silent has an empty hypothesis, which may go as well.
        if self.dropout is not None:
            example = self.dropout(example, key)
        return Item(example, kind, found, masks)

    def __getitems__(self, batch: MicroBatch) -> list[Item]:
        """All of a micro-batch; torch's DataLoader calls this with what its batch sampler gives."""
        return [replace(self[draw], counted=batch.counted) for draw in batch.members]


@dataclass(frozen=True)
class Collator:
    """Makes the batches of a model. It holds no weights: loader processes get a copy of it."""

    tokenizer: UnifiedTokenizer
    n_mels: int = 80  # mel bins that the encoder takes
    silence: float = 0.0  # seconds of it that Whisper hears behind each clip, up to 30 s with it
    hypothesis_prompt: Sequence[int] | None = None  # ids before each hypothesis; None reads none
    listens: bool = True  # whether the model takes speech
    ctc_vocabulary: Any = None  # a CtcVocabulary, for the targets of objective `ctc`

    def hypothesis_ids(self, example: Example) -> list[int]:
        """Ids of an example's hypothesis after those of the prompt; none where there is none."""
        text = example.utterance.hypothesis
        if self.hypothesis_prompt is None or text is None:
            return []
        return [*self.hypothesis_prompt, *self.tokenizer.text_ids(text)]

    def from_waves(self, examples: Sequence[Example], waves: Sequence[Tensor]) -> Batch:
        """A batch of samples `(S,)` at 16 kHz of each example, for decoding."""
        kind: InputKind = "audio" if self.listens else "text"
        batch = self([Item(e, kind, wave) for e, wave in zip(examples, waves, strict=True)])
        return replace(batch, durations=tuple(len(wave) / audio.SAMPLE_RATE for wave in waves))

    def __call__(self, items: Sequence[Item]) -> Batch:
        """A batch of items of one kind; their order is kept."""
        kind, examples = items[0].kind, tuple(item.example for item in items)
        if any(item.kind != kind for item in items):
            raise ValueError(f"a batch has one kind of input, found {[i.kind for i in items]}")
        targets = [self.tokenizer.target(example) for example in examples]
        # What is not counted belongs to no part, so that it weighs nothing. Its length stays: it
        # runs through every layer, as it must where processes wait for each other's gradients.
        parts = [torch.tensor(target.parts if item.counted else [NO_PART] * len(target))
                 for item, target in zip(items, targets, strict=True)]
        read = [self.hypothesis_ids(e) for e in examples if self.hypothesis_prompt is not None]
        vocabulary = self.ctc_vocabulary
        return Batch(
            examples, kind,
            target_ids=self._padded([target.ids for target in targets]),
            target_parts=pad_sequence(parts, True, NO_PART),
            target_lengths=tuple(map(len, targets)),
            hypothesis_ids=self._padded(read) if read else None,
            hypothesis_lengths=tuple(map(len, read)),
            ctc_targets=tuple(tuple(vocabulary.classes(e.utterance.text)) for e in examples
                              if vocabulary is not None),
            counted=items[0].counted, **self._speech(kind, items))

    def _speech(self, kind: InputKind, items: Sequence[Item]) -> dict[str, Any]:
        """The fields of a batch that depend on its kind."""
        inputs: list[Any] = [item.input for item in items]
        found: dict[str, Any] = {"speech_lengths": (0,) * len(items)}
        if kind == "audio":
            mel, lengths = audio.batch_log_mel(inputs, self.n_mels, silence=self.silence)
            for i, item in enumerate(items):
                if item.masks is not None:
                    mel[i] = item.masks.mel(mel[i], lengths[i])
            # Seconds of the samples themselves: speed changes them.
            return {"mel": mel, "speech_lengths": lengths,
                    "durations": tuple(len(wave) / audio.SAMPLE_RATE for wave in inputs)}
        if kind == "frames":
            frames = [f.values if item.masks is None else item.masks.frames(*f)
                      for item, f in zip(items, inputs, strict=True)]
            found = {"frames": pad_sequence(frames, True),
                     "speech_lengths": tuple(f.length for f in inputs)}
        elif kind == "posteriors":
            found = {"posterior_classes": pad_sequence([p.classes for p in inputs], True),
                     "posterior_shares": pad_sequence([p.shares for p in inputs], True),
                     "speech_lengths": tuple(len(p.shares) for p in inputs)}
        utterances = [item.example.utterance for item in items]
        return found | {"durations": tuple(u.seconds if u.audio else 0.0 for u in utterances)}

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Ids `(batch, longest)`, filled with the pad id."""
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True,
                            self.tokenizer.pad_id)
