"""Word and character error rates of a corpus and of its utterances, with jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jiwer
import numpy as np
from numpy.typing import NDArray

from unislu_llm.scoring.predictions import Prediction
from unislu_llm.scoring.text import Protocol, normalise_transcript, written_in_characters

_COLUMNS = {"substitute": 0, "delete": 1, "insert": 2, "equal": 3}


class WER(NamedTuple):
    """Word errors pooled over utterances; all but `wer` are numbers of words. Where the reference
    is empty, every word is an insertion. Where words are characters, its WER is a CER."""

    wer: float  # percent of the reference words (without any, of one); insertions may lead over 100
    errors: int
    substitutions: int
    deletions: int
    insertions: int
    hits: int
    ref_words: int

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> WER:
        """Sum of counts of :func:`edit_counts`."""
        subs, dels, ins, hits = counts.sum(axis=0).tolist()
        errors, words = subs + dels + ins, subs + dels + hits
        return cls(100.0 * errors / max(words, 1), errors, subs, dels, ins, hits, words)


def corpus_wer(refs: Sequence[str], hyps: Sequence[str], protocol: Protocol,
               languages: Sequence[str] = ()) -> WER:
    """All errors over all reference words of transcripts (English by default), normalised here."""
    return WER.of(edit_counts(refs, hyps, protocol, languages))


def rate_of(languages: Sequence[str]) -> str:
    """Name of the error rate: `cer` where no language has blanks between words."""
    return "cer" if languages and all(map(written_in_characters, languages)) else "wer"


def edits(some: Sequence[Prediction], protocol: Protocol, field: str = "hyp_text",
          characters: bool = False) -> NDArray[np.int64]:
    """:func:`edit_counts` of predictions, with the transcripts of a field."""
    return edit_counts([p.ref_text for p in some], [getattr(p, field) for p in some],
                       protocol, [p.language for p in some], characters)


def edit_counts(refs: Sequence[str], hyps: Sequence[str], protocol: Protocol,
                languages: Sequence[str] = (), characters: bool = False) -> NDArray[np.int64]:
    """`(utterances, 4)`: substitutions, deletions, insertions and hits of words, or of `characters`
    (a blank between words is one); as :func:`corpus_wer`."""
    codes = languages or [""] * len(refs)

    def words(text: str, code: str) -> str:
        normal = normalise_transcript(text, protocol, code)
        spelt = characters and not written_in_characters(code)  # else they are characters already
        return " ".join(normal.replace(" ", "_")) if spelt else normal

    sides = [list(map(words, side, codes)) for side in (refs, hyps)]
    # By utterance, since a bootstrap needs them; the corpus is their sum.
    counts = np.zeros((len(refs), 4), dtype=np.int64)
    for row, chunks in zip(counts, align(*sides), strict=True):
        for c in chunks:  # a substitution has as many words on both sides
            row[_COLUMNS[c.type]] += max(c.ref_end_idx - c.ref_start_idx,
                                         c.hyp_end_idx - c.hyp_start_idx)
    return counts


def align(refs: Sequence[str], hyps: Sequence[str]) -> list[list[jiwer.AlignmentChunk]]:
    """Align normalised texts word by word, each with its reference, with fewest errors."""
    # Of no utterances jiwer makes one.
    return jiwer.process_words(list(refs), list(hyps)).alignments if refs else []
