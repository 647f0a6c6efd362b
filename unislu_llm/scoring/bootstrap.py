"""Bootstrap intervals over utterances: of one system, and of the difference of two on the same utterances.

A score of a corpus is a function of sums of per-utterance counts (errors and words; true positives,
references and predictions), so that a resample is a vector of how often each utterance was drawn, and all
resamples are one matrix product. The paired test draws the same utterances for both systems (Efron and
Tibshirani 1993; for speech: Bisani and Ney 2004). A score whose parts come from several corpora, as the SLUE
score does, draws each corpus' utterances by itself (strata; Davison and Hinkley 1997, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unislu_llm.errors import UserError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Summed counts `(resamples, columns)` to scores in percent `(resamples,)`."""

_CHUNK = 500
"""Resamples drawn at a time; 500 of 2,000 utterances take 8 MB."""


@dataclass(frozen=True)
class Interval:
    """A score, or a difference of two, in percent points.

    Args:
        value: on the utterances as they are. mean: over the resamples.
        low, high: percentile interval. p_value: two-sided, of no difference; None for a single system.
    """

    value: float
    mean: float
    low: float
    high: float
    p_value: float | None = None


@dataclass(frozen=True)
class Counts:
    """Per-utterance counts of one score: `matrix` is `(utterances, columns)`, `keys` name its rows.

    `strata` names the corpus of each row where corpora are resampled by themselves; None: all rows together.
    """

    keys: tuple[str, ...]
    matrix: NDArray[np.int64]
    statistic: Statistic
    strata: tuple[str, ...] | None = None


def error_rate(sums: Floats) -> Floats:
    """WER from the columns errors and words; without words, of one word, as everywhere in this package."""
    return 100.0 * sums[:, 0] / np.maximum(sums[:, 1], 1.0)


def micro_f1(sums: Floats) -> Floats:
    """F1 from the columns true positives, references and predictions; 0/0 is 0."""
    return 100.0 * _ratio(2.0 * sums[:, 0], sums[:, 1] + sums[:, 2])


def macro_f1(sums: Floats) -> Floats:
    """Mean F1 over labels from the columns of :func:`~unislu_llm.scoring.sentiment.label_counts`.

    Labels that occur neither in the reference nor in the prediction of a resample are left out of its mean.
    """
    tp, gold, pred = np.split(sums, 3, axis=1)
    present = gold + pred > 0
    return 100.0 * _ratio(_ratio(2.0 * tp, gold + pred).sum(axis=1), present.sum(axis=1).astype(np.float64))


def slue_statistic(n_corpora: int) -> Statistic:
    """SLUE score from errors and words of each corpus, three NER columns (:func:`micro_f1`), SA columns (:func:`macro_f1`)."""

    def score(sums: Floats) -> Floats:
        wers = [error_rate(sums[:, 2 * i : 2 * i + 2]) for i in range(n_corpora)]
        ner, sa = sums[:, 2 * n_corpora : 2 * n_corpora + 3], sums[:, 2 * n_corpora + 3 :]
        return (100.0 - np.mean(wers, axis=0) + micro_f1(ner) + macro_f1(sa)) / 3.0

    return score


def bootstrap(
    counts: ArrayLike,
    statistic: Statistic,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    strata: Sequence[str] | None = None,
) -> Interval:
    """Percentile interval of one system's score.

    Args:
        counts: `(utterances, columns)`. statistic: e.g. :func:`error_rate`.
        strata: corpus of each utterance; as many are drawn of each as it has. None draws from all together.

    Raises:
        UserError: no utterances, no resamples, or a confidence outside 0..1.
    """
    matrix = _matrix(counts)
    scores = np.concatenate([statistic(sums) for sums in _resampled(matrix, strata, n_resamples, seed, confidence)])
    return _interval(_observed(matrix, statistic), scores, confidence)


def paired_bootstrap(
    counts_a: ArrayLike,
    counts_b: ArrayLike,
    statistic: Statistic,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    strata: Sequence[str] | None = None,
) -> Interval:
    """Interval and two-sided p-value of the difference `a - b` of two systems' scores on the same utterances.

    Args:
        counts_a, counts_b: `(utterances, columns)`, row i of both being the same utterance.
        strata: as in :func:`bootstrap`.

    Raises:
        UserError: the shapes differ; no utterances, no resamples, or a confidence outside 0..1.
    """
    a, b = _matrix(counts_a), _matrix(counts_b)
    if a.shape != b.shape:
        raise UserError(
            f"paired bootstrap of {a.shape} and {b.shape} counts: both systems must be scored on the same "
            "utterances"
        )
    columns = a.shape[1]
    chunks = _resampled(np.concatenate([a, b], axis=1), strata, n_resamples, seed, confidence)
    scores = np.concatenate([statistic(sums[:, :columns]) - statistic(sums[:, columns:]) for sums in chunks])
    value = _observed(a, statistic) - _observed(b, statistic)
    # The observed sample is one more draw (Davison and Hinkley 1997), so that p is never 0.
    tail = (1 + min(int((scores <= 0).sum()), int((scores >= 0).sum()))) / (len(scores) + 1)
    return _interval(value, scores, confidence, p_value=min(1.0, 2.0 * tail))


def compare_counts(
    a: Counts, b: Counts, n_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """:func:`paired_bootstrap` of two systems' counts, rows paired by key whatever their order.

    Raises:
        UserError: the systems were not scored on the same utterances.
    """
    where = {key: i for i, key in enumerate(b.keys)}
    odd = sorted(set(a.keys) ^ set(b.keys))
    if odd:
        raise UserError(
            f"the two systems were not scored on the same utterances: {len(odd)} are in one of them alone, "
            f"e.g. '{odd[0]}'; score both on the same manifest"
        )
    order = [where[key] for key in a.keys]
    return paired_bootstrap(a.matrix, b.matrix[order], a.statistic, n_resamples, seed, confidence, a.strata)


def _resampled(
    matrix: Floats, strata: Sequence[str] | None, n_resamples: int, seed: int, confidence: float
) -> Iterator[Floats]:
    """Column sums of `n_resamples` draws of as many rows as there are, in chunks `(resamples, columns)`."""
    if n_resamples < 1 or not 0.0 < confidence < 1.0:
        raise UserError(
            f"bootstrap with n_resamples={n_resamples}, confidence={confidence}: give at least one resample "
            "and a confidence between 0 and 1"
        )
    if strata is not None and len(strata) != len(matrix):
        raise UserError(f"bootstrap of {len(matrix)} utterances with {len(strata)} strata; name the corpus of each")
    names = np.zeros(len(matrix)) if strata is None else np.asarray(strata)
    groups = [matrix[names == name] for name in np.unique(names)]
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, _CHUNK):
        size = min(_CHUNK, n_resamples - start)
        sums = np.zeros((size, matrix.shape[1]))
        for rows in groups:
            n = len(rows)
            drawn = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
            sums += weights.astype(np.float64) @ rows
        yield sums


def _matrix(counts: ArrayLike) -> Floats:
    matrix = np.asarray(counts, dtype=np.float64)
    if matrix.ndim != 2 or not len(matrix):
        raise UserError(
            f"bootstrap needs counts (utterances, columns) of one utterance or more, not {matrix.shape}"
        )
    return matrix


def _observed(matrix: Floats, statistic: Statistic) -> float:
    return float(statistic(matrix.sum(axis=0, keepdims=True))[0])


def _interval(value: float, scores: Floats, confidence: float, p_value: float | None = None) -> Interval:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(scores, [tail, 100.0 - tail])
    return Interval(value, float(scores.mean()), float(low), float(high), p_value)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
