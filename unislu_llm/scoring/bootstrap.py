"""Bootstrap intervals over utterances: of one system, and of the difference of two on the same.

A score is a function of sums of per-utterance counts, so that all resamples are one matrix product.
The paired test draws the same utterances for both systems (Efron and Tibshirani 1993; for speech:
Bisani and Ney 2004), and corpora each by itself (strata; Davison and Hinkley 1997, 3.2), for which
scipy.stats.bootstrap has nothing. Of a system that was trained several times its seeds are drawn as
well, with replacement, before the utterances (two levels; Davison and Hinkley 1997, 3.8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Summed counts `(resamples, columns)` to scores in percent `(resamples,)`."""

_CHUNK = 500  # resamples drawn at a time; of 2,000 utterances they take 8 MB


@dataclass(frozen=True)
class Counts:
    """What a score is made of."""

    utterances: tuple[tuple[str, str], ...]  # corpus and id
    matrix: NDArray[np.int64] | Floats  # (utterances, columns)
    statistic: Statistic  # of the sums over utterances

    @property
    def value(self) -> float:
        """The score of the utterances as they are."""
        return float(self.statistic(self.matrix.sum(axis=0, keepdims=True, dtype=np.float64))[0])


# The statistics take many resamples at one time, a row each; none may divide by zero, since a
# resample can lack what the corpus has.
def error_rate(sums: Floats) -> Floats:
    """WER from the columns errors and words; without words, of one word, as everywhere here."""
    return 100.0 * sums[:, 0] / np.maximum(sums[:, 1], 1.0)


def micro_f1(sums: Floats) -> Floats:
    """F1 from the columns right, reference and predicted."""
    return 100.0 * _ratio(2.0 * sums[:, 0], sums[:, 1] + sums[:, 2])


def macro_f1(sums: Floats) -> Floats:
    """Mean F1 over labels from the columns right, references and predictions of each."""
    tp, gold, pred = np.split(sums, 3, axis=1)
    # Labels that a resample lacks in both reference and prediction are left out of its mean.
    f1, present = _ratio(2.0 * tp, gold + pred), gold + pred > 0
    return 100.0 * _ratio(f1.sum(axis=1), present.sum(axis=1).astype(np.float64))


def slue_statistic(n_corpora: int) -> Statistic:
    """SLUE score from errors and words of each corpus, three NER columns and those of SA."""

    def score(sums: Floats) -> Floats:
        # Mean over corpora, not over words: a large corpus counts no more than a small one.
        wers = [error_rate(sums[:, 2 * i:2 * i + 2]) for i in range(n_corpora)]
        ner, sa = np.split(sums[:, 2 * n_corpora:], [3], axis=1)
        return (100.0 - np.mean(wers, axis=0) + micro_f1(ner) + macro_f1(sa)) / 3.0

    return score


def bootstrap(counts: Counts | Sequence[Counts], less: Sequence[Counts] = (), *,
              resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """The `value` of a score, its 95 % percentile interval `low` to `high`, and the two-sided
    `p_value` of zero: of no difference, where it is `less` the score of another system, on the same
    utterances in the same order. Of several seeds (a list) the score is the mean over them."""
    systems = [(1, [counts] if isinstance(counts, Counts) else counts), (-1, less)]
    every = [c for _, some in systems for c in some]
    assert all(c.utterances == every[0].utterances for c in every)
    # Side by side in one matrix, the rows of all are drawn together: that is the pairing.
    matrix = np.concatenate([c.matrix for c in every], axis=1).astype(np.float64)
    names = np.array([corpus for corpus, _ in every[0].utterances])
    corpora = [matrix[names == name] for name in np.unique(names)]
    # Seeds have a generator of their own, so that utterances are drawn alike with any number.
    rng, of_seeds = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    chunks = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        sums = np.zeros((size, matrix.shape[1]))
        for rows in corpora:
            n = len(rows)
            # One count over all draws of the chunk: those of draw i are shifted by i * n.
            drawn = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
            times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
            sums += times.astype(np.float64) @ rows
        parts = iter(np.split(sums, np.cumsum([c.matrix.shape[1] for c in every])[:-1], axis=1))
        scores = np.zeros(size)
        for sign, some in systems[:2 if less else 1]:
            # How often each seed is drawn: as many as there are, of which the mean is taken.
            times = of_seeds.multinomial(len(some), [1 / len(some)] * len(some), size)
            for often, c in zip(times.T, some, strict=True):
                scores += sign * often / len(some) * c.statistic(next(parts))
        chunks.append(scores)
    scores = np.concatenate(chunks).round(9)  # means over seeds are not exact, and 0 counts below
    low, high = np.percentile(scores, [2.5, 97.5]).tolist()
    # The observed sample is one more draw (Davison and Hinkley 1997), so that p is never 0.
    tail = (1 + min((scores <= 0).sum().item(), (scores >= 0).sum().item())) / (resamples + 1)
    value = sum(sign * sum(c.value for c in some) / len(some) for sign, some in systems if some)
    return {"value": value, "low": low, "high": high, "p_value": min(1.0, 2.0 * tail)}


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; 0/0 is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
