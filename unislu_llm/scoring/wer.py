"""Word error rate of a corpus and of its utterances, with jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jiwer
import numpy as np
from numpy.typing import NDArray

from unislu_llm.errors import UserError
from unislu_llm.scoring.text import Protocol, normalise_transcript


@dataclass(frozen=True)
class WER:
    """Word errors pooled over utterances; counts are words.

    `ref_words` is hits + substitutions + deletions. An utterance with an empty reference (nothing said, or
    only words that the normaliser drops) counts every hypothesis word as an insertion.
    """

    substitutions: int
    deletions: int
    insertions: int
    hits: int
    ref_words: int

    @cached_property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @cached_property
    def wer(self) -> float:
        """Percent of the reference words (without any, of one word); above 100 with many insertions."""
        return 100.0 * self.errors / max(self.ref_words, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the rate in percent and the counts."""
        return {
            "wer": self.wer,
            "errors": self.errors,
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
            "hits": self.hits,
            "ref_words": self.ref_words,
        }


def corpus_wer(refs: Sequence[str], hyps: Sequence[str], protocol: Protocol) -> WER:
    """WER pooled over utterances: all errors over all reference words.

    Args:
        refs, hyps: transcripts as they are, one pair an utterance; normalised here under `protocol`.

    Raises:
        UserError: unequal numbers of references and hypotheses, or an unknown protocol.
    """
    subs, dels, ins, hits = (int(n) for n in edit_counts(refs, hyps, protocol).sum(axis=0))
    return WER(subs, dels, ins, hits, ref_words=subs + dels + hits)


def utterance_errors(refs: Sequence[str], hyps: Sequence[str], protocol: Protocol) -> NDArray[np.int64]:
    """`(utterances, 2)`: word errors and reference words of each, the input of a bootstrap."""
    subs, dels, ins, hits = edit_counts(refs, hyps, protocol).T
    return np.stack([subs + dels + ins, subs + dels + hits], axis=1)


def edit_counts(refs: Sequence[str], hyps: Sequence[str], protocol: Protocol) -> NDArray[np.int64]:
    """`(utterances, 4)`: substitutions, deletions, insertions and hits of each utterance.

    Raises:
        UserError: unequal numbers of references and hypotheses, or an unknown protocol.
    """
    if len(refs) != len(hyps):
        raise UserError(
            f"{len(refs)} reference transcripts but {len(hyps)} hypotheses; give one of each an utterance"
        )
    counts = np.zeros((len(refs), 4), dtype=np.int64)
    if not refs:
        return counts
    ref_words = [normalise_transcript(text, protocol) for text in refs]
    hyp_words = [normalise_transcript(text, protocol) for text in hyps]
    column = {"substitute": 0, "delete": 1, "insert": 2, "equal": 3}
    # Empty references are counted here, not by jiwer: some of its versions refuse them.
    spoken = [i for i, ref in enumerate(ref_words) if ref]
    for i in set(range(len(refs))) - set(spoken):
        counts[i, column["insert"]] = len(hyp_words[i].split())
    if spoken:
        aligned = jiwer.process_words([ref_words[i] for i in spoken], [hyp_words[i] for i in spoken])
        for i, chunks in zip(spoken, aligned.alignments, strict=True):
            for chunk in chunks:
                words = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                counts[i, column[chunk.type]] += words
    return counts
