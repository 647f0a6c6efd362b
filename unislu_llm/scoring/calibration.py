"""Calibration of label tasks: does a label that is given 70 % hold in 70 % of cases?

Scores are fractions, not percent, of the probabilities of every label of a single-label task:

* ECE, expected calibration error of the likeliest label (Naeini et al. 2015; Guo et al., arXiv 1706.04599): mean over
  utterances of |accuracy - mean confidence| of the bin that an utterance is in. `ece` has 15 bins of equal width,
  `(k / 15, (k + 1) / 15]`; `ece_adaptive` 15 bins of equal mass (Nixon et al., arXiv 1904.01685), which no empty bin and no
  choice of borders distorts. With few utterances both are biased upwards: a bin of one utterance is never calibrated.
* Brier score (Brier 1950), the sum over labels of squared error, from 0 (right and sure) to 2 (wrong and sure).
* Negative log-likelihood of the reference label, nats; a likely label of probability zero counts as 1e-12.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unislu_llm.errors import UserError
from unislu_llm.scoring.rows import Row, annotated_rows
from unislu_llm.tasks import LabelTask, Task, TaskRegistry

N_BINS = 15
_LEAST = 1e-12
_SLACK = 1e-3  # by which a row of probabilities may miss the sum of one: they are stored rounded

FIELD = "probabilities"
"""Field of a prediction row: probability of every label, by label."""


@dataclass(frozen=True)
class Bin:
    """Utterances of similar confidence.

    Args:
        low, high: borders of the confidence; with equal mass, the smallest and largest one there is.
        n: utterances. confidence: their mean confidence. accuracy: share of them that is right; both None in an empty bin.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None

    @property
    def gap(self) -> float:
        """|accuracy - confidence|; 0 in an empty bin."""
        return 0.0 if self.accuracy is None or self.confidence is None else abs(self.accuracy - self.confidence)


@dataclass(frozen=True)
class Calibration:
    """Calibration of one task; see the head of this module.

    Args:
        n: utterances scored. skipped: those left out, their reference being outside the label set.
        accuracy: of the likeliest label. confidence: its mean probability; above `accuracy` is overconfident.
        agreement: share of utterances whose decoded label is the likeliest one; None where no decoded labels are given.
        bins: of equal width. adaptive_bins: of equal mass.
    """

    n: int
    skipped: int
    accuracy: float
    confidence: float
    ece: float
    ece_adaptive: float
    brier: float
    nll: float
    agreement: float | None
    bins: list[Bin]
    adaptive_bins: list[Bin]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def calibration(probabilities: ArrayLike, references: Sequence[int], *, n_bins: int = N_BINS) -> Calibration:
    """Calibration of probabilities of labels.

    Args:
        probabilities: `(utterances, labels)`, rows sum to one.
        references: index of the right label of each utterance.
        n_bins: of either kind.

    Raises:
        UserError: no utterances, unequal numbers, an index outside the labels, or rows that are no distribution.
    """
    rows, gold = np.asarray(probabilities, dtype=np.float64), np.asarray(references, dtype=np.int64)
    _check(rows, gold, n_bins)
    confidence, hit = rows.max(axis=1), rows.argmax(axis=1) == gold
    width, mass = equal_width(confidence, hit, n_bins), equal_mass(confidence, hit, n_bins)
    likelihood = rows[np.arange(len(rows)), gold]
    return Calibration(
        n=len(rows), skipped=0, accuracy=float(hit.mean()), confidence=float(confidence.mean()),
        ece=expected_error(width), ece_adaptive=expected_error(mass),
        brier=float(((rows - np.eye(rows.shape[1])[gold]) ** 2).sum(axis=1).mean()),
        nll=float(-np.log(likelihood.clip(_LEAST, 1.0)).mean()), agreement=None, bins=width, adaptive_bins=mass)


def equal_width(confidence: NDArray[np.float64], hit: NDArray[np.bool_], n_bins: int = N_BINS) -> list[Bin]:
    """Bins `(k / n_bins, (k + 1) / n_bins]`, the first with zero; `(utterances,)` confidence and whether it is right."""
    borders = np.linspace(0.0, 1.0, n_bins + 1)
    index = np.searchsorted(borders[1:-1], confidence, side="left")
    return [_bin(low, high, confidence[index == k], hit[index == k])
            for k, (low, high) in enumerate(pairwise(borders))]


def equal_mass(confidence: NDArray[np.float64], hit: NDArray[np.bool_], n_bins: int = N_BINS) -> list[Bin]:
    """At most `n_bins` bins of as equal numbers of utterances as ties allow: one confidence is never in two bins."""
    values, inverse, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    # A value goes where the middle of its utterances goes in sorted order, so the order of rows does not matter.
    middle = np.cumsum(counts) - counts / 2
    index = np.minimum((middle * n_bins / len(confidence)).astype(np.int64), n_bins - 1)
    parts = [(values[index == k], (index == k)[inverse]) for k in range(n_bins)]
    return [_bin(inside[0], inside[-1], confidence[rows], hit[rows]) for inside, rows in parts if len(inside)]


def expected_error(bins: Iterable[Bin]) -> float:
    """Mean of the bins' gaps, weighted by utterances: the ECE."""
    bins = list(bins)
    return sum(b.n * b.gap for b in bins) / sum(b.n for b in bins)


def has_probabilities(task: Task) -> bool:
    """Whether a task has a probability of each label: one label an utterance."""
    return isinstance(task, LabelTask) and not task.multi


def calibrate_rows(rows: Iterable[Row], registry: TaskRegistry) -> dict[str, Calibration]:
    """Calibration of every single-label task whose prediction rows hold probabilities.

    Args:
        rows: prediction rows; those without :data:`FIELD`, and those not annotated, do not count.

    Raises:
        UserError: probabilities that are not those of the task's labels.
    """
    rows = [row for row in rows if row.get(FIELD) is not None]
    found: dict[str, Calibration] = {}
    for name in registry.names:
        task = registry[name]
        if not isinstance(task, LabelTask) or not has_probabilities(task):
            continue
        annotated = annotated_rows(rows, task)
        known = [row for row in annotated if row["ref"] in task.labels]
        if known:
            found[name] = _of_rows(known, task, len(annotated) - len(known))
    return found


def _of_rows(rows: Sequence[Row], task: LabelTask, skipped: int) -> Calibration:
    table = [_listed(row, task) for row in rows]
    scores = calibration(table, [task.labels.index(row["ref"]) for row in rows])
    likeliest = [task.labels[int(np.argmax(values))] for values in table]
    agreement = float(np.mean([row.get("hyp") == label for row, label in zip(rows, likeliest, strict=True)]))
    return Calibration(**{**scores.__dict__, "skipped": skipped, "agreement": agreement})


def _listed(row: Row, task: LabelTask) -> list[float]:
    values: Mapping[str, float] = row[FIELD]
    if not isinstance(values, Mapping) or set(values) != set(task.labels):
        raise UserError(f"prediction of '{row['id']}', field '{FIELD}': expected a probability of each of "
                        f"{', '.join(task.labels)}; decode anew with --probabilities --again")
    return [float(values[label]) for label in task.labels]


def _check(rows: NDArray[np.float64], gold: NDArray[np.int64], n_bins: int) -> None:
    if n_bins < 1:
        raise UserError(f"calibration needs one bin or more, found {n_bins}")
    if rows.ndim != 2 or not rows.size:
        raise UserError(f"calibration needs probabilities (utterances, labels) of one utterance or more, found {rows.shape}")
    if gold.shape != (len(rows),):
        raise UserError(f"{len(rows)} rows of probabilities need as many references, found {len(gold)}")
    if gold.min() < 0 or gold.max() >= rows.shape[1]:
        raise UserError(f"a reference is outside the {rows.shape[1]} labels")
    bad = ~np.isfinite(rows).all(axis=1) | (rows < 0).any(axis=1) | (np.abs(rows.sum(axis=1) - 1.0) > _SLACK)
    if bad.any():
        raise UserError(f"row {int(bad.argmax())} of the probabilities is no distribution: {rows[bad.argmax()].tolist()}")


def _bin(low: float, high: float, confidence: NDArray[np.float64], hit: NDArray[np.bool_]) -> Bin:
    n = len(confidence)
    return Bin(float(low), float(high), n, float(confidence.mean()) if n else None, float(hit.mean()) if n else None)
