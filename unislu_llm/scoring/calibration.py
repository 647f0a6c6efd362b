"""Calibration of label tasks: does a label that is given 70 % hold in 70 % of cases?

Scores are fractions, see docs/scoring.md: ECE of the likeliest label (Guo et al., arXiv
1706.04599), in bins of equal mass as well (Nixon et al., arXiv 1904.01685), the Brier score (1950),
and negative log-likelihood, nats, in which a probability of zero counts as 1e-12.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unislu_llm.errors import UserError
from unislu_llm.scoring.predictions import Prediction, annotated
from unislu_llm.tasks import LabelTask, TaskRegistry


def calibrate(predictions: Iterable[Prediction],
              registry: TaskRegistry) -> dict[str, dict[str, Any]]:
    """By single-label task whose annotated predictions have probabilities, :func:`calibration`;
    `skipped`: utterances whose reference is no label; `agreement`: share whose decoded label is
    the likeliest. Raises UserError: probabilities that are no distribution over the labels."""
    rated = [p for p in predictions if p.probabilities is not None]
    found = {}
    for task in (t for t in registry if isinstance(t, LabelTask) and not t.multi):
        known = annotated(rated, task)
        # As in label scores, a reference such as `<mixed>` is nobody's fault.
        if scored := [p for p in known if p.ref in task.labels]:
            table = np.array([_distribution(p, task) for p in scored])
            agree = [p.hyp == task.labels[i] for p, i in zip(scored, table.argmax(1), strict=True)]
            found[task.name] = calibration(table, [task.labels.index(p.ref) for p in scored]) | {
                "skipped": len(known) - len(scored), "agreement": float(np.mean(agree))}
    return found


def calibration(probabilities: NDArray[np.float64], references: Sequence[int],
                n_bins: int = 15) -> dict[str, Any]:
    """Calibration of probabilities `(utterances, labels)`, with the index of each right label;
    `accuracy` and `confidence` are of the likeliest one, `bins` those that are not empty."""
    # Both errors are of the likeliest label alone; Brier score and likelihood see all of them.
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == references
    right = np.eye(probabilities.shape[1])[references]
    # Borders belong to the bin below, so that a confidence of one is in the last bin.
    width = np.searchsorted(np.linspace(0.0, 1.0, n_bins + 1)[1:-1], confidence, side="left")

    def expected_error(bins: NDArray[np.int64]) -> float:
        # The sum of a bin's differences is its size times that of its means.
        return float(np.abs(np.bincount(bins, hit - confidence)).sum() / len(hit))

    return {
        "n": len(probabilities),
        "accuracy": float(hit.mean()),
        "confidence": float(confidence.mean()),
        "ece": expected_error(width),
        "ece_adaptive": expected_error(equal_mass(confidence, n_bins)),
        "brier": float(((probabilities - right) ** 2).sum(axis=1).mean()),
        "nll": float(-np.log((probabilities * right).sum(axis=1).clip(1e-12, 1.0)).mean()),
        "bins": [{"low": k / n_bins, "high": (k + 1) / n_bins, "n": int((width == k).sum()),
                  "confidence": float(confidence[width == k].mean()),
                  "accuracy": float(hit[width == k].mean())} for k in np.unique(width).tolist()],
    }


def equal_mass(confidence: NDArray[np.float64], n_bins: int) -> NDArray[np.int64]:
    """`(utterances,)`: bins of as equal numbers as ties allow; equal confidences stay together."""
    _, inverse, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    # A value goes where the middle of its utterances goes in sorted order, however rows stand.
    middle = np.cumsum(counts) - counts / 2
    index = (middle * n_bins / len(confidence)).astype(np.int64)
    return np.minimum(index, n_bins - 1)[inverse]


def _distribution(prediction: Prediction, task: LabelTask) -> list[float]:
    """Probabilities in the order of the task's labels."""
    values = prediction.probabilities or {}
    # Probabilities are stored rounded, so that they may miss the sum of one a little.
    if (set(values) != set(task.labels) or not abs(sum(values.values()) - 1.0) <= 1e-3
            or min(values.values()) < 0.0):
        raise UserError(f"prediction of '{prediction.id}', field 'probabilities': expected a "
                        f"distribution over {', '.join(task.labels)}, found {values}")
    return [values[label] for label in task.labels]
