"""Drafts while training: some are left out, some words are spoilt, so that a model that can read also listens.

What happens to a draft follows from (seed, epoch, sample, how often the epoch has drawn it before) alone, as in
:mod:`unislu_llm.data.augment`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from unislu_llm.data.augment import Key
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError

_DRAFT, _WORDS = 206, 207  # last word of a seed, beside those of augment.py


class DraftDropout:
    """Leaves out drafts and spoils words of those that stay.

    Args:
        share: part of the samples whose draft is left out whole.
        words: part of the words that are spoilt: one half is deleted, one half replaced by other words.
        text_words: the same for samples without audio; None: as `words`.
        drafts: where these come from, in proportion to how often a word occurs.

    Raises:
        UserError: a part is not from 0 to 1.
    """

    def __init__(self, share: float, words: float, drafts: Iterable[str] = (), *, text_words: float | None = None) -> None:
        text_words = words if text_words is None else text_words
        for name, value in (("draft_dropout", share), ("draft_word_dropout", words), ("text_draft_word_dropout", text_words)):
            if not 0 <= value <= 1:
                raise UserError(f"train.{name}: is a part, from 0 to 1; found {value:g}")
        self.share, self.words, self.text_words = share, words, text_words
        counts = Counter(word for draft in drafts for word in draft.split()) if words or text_words else Counter()
        self._vocabulary = sorted(counts)  # the same on every machine, whatever the order of the manifests' rows
        self._cumulative = np.cumsum([counts[word] for word in self._vocabulary], dtype=np.int64)

    @property
    def active(self) -> bool:
        """Whether anything is switched on."""
        return self.share > 0 or self.words > 0 or self.text_words > 0

    def __call__(self, sample: Sample, key: Key) -> Sample:
        """The sample with what is left of its draft; None where it is left out."""
        draft = sample.utterance.draft
        if draft is None:
            return sample
        words = self.text_words if sample.utterance.audio is None else self.words
        left = None if key.rng(_DRAFT).random() < self.share else self._spoilt(draft, words, key)
        return sample if left == draft else Sample(dataclasses.replace(sample.utterance, draft=left), sample.task)

    def _spoilt(self, draft: str, words: float, key: Key) -> str:
        if not words or not self._vocabulary:
            return draft
        rng, kept = key.rng(_WORDS), []
        for word in draft.split():
            spoil, delete, place = rng.random(), rng.random(), int(rng.integers(self._cumulative[-1]))
            if spoil >= words:
                kept.append(word)
            elif delete >= 0.5:
                kept.append(self._vocabulary[int(np.searchsorted(self._cumulative, place, side="right"))])
        return " ".join(kept)


class DroppedDrafts(Dataset[tuple[Any, ...]]):
    """A data set whose items begin with a sample, with :class:`DraftDropout`. It is asked for `(index, times drawn before)`.

    Args:
        dataset: asked for an index, or with `draws` for the pair itself. dropout: what is done to the samples.
        seed, epoch: source of randomness.
    """

    def __init__(self, dataset: Any, dropout: DraftDropout, seed: int, epoch: int, *, draws: bool = False) -> None:
        self.dataset, self.dropout, self.seed, self.epoch, self.draws = dataset, dropout, seed, epoch, draws

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Any, ...]:
        sample, *rest = self.dataset[draw if self.draws else draw[0]]
        return self.dropout(sample, Key(self.seed, self.epoch, *draw)), *rest
