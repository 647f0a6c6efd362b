"""Calibration scores against hand-computed values, the library's, and what must hold of any of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, log_loss

from unislu_llm.errors import UserError
from unislu_llm.scoring.calibration import Calibration, calibrate_rows, calibration, equal_mass, expected_error
from unislu_llm.tasks import SA, TaskRegistry


def sharp(confidence: list[float]) -> NDArray[np.float64]:
    """Three labels, the first with the confidence, the others with half of the rest."""
    top = np.asarray(confidence)
    return np.stack([top, (1 - top) / 2, (1 - top) / 2], axis=1)


def test_hand_computed_values() -> None:
    """Two bins of width 1/2: (0.6, 0.8 | right, wrong) and, as 0.5 is no more than 1/2, (0.5 | right)."""
    found = calibration(sharp([0.6, 0.8, 0.5]), [0, 1, 0], n_bins=2)
    assert [b.n for b in found.bins] == [1, 2]
    assert (found.bins[1].confidence, found.bins[1].accuracy) == (pytest.approx(0.7), 0.5)
    assert found.ece == pytest.approx((1 * 0.5 + 2 * 0.2) / 3)
    assert (found.accuracy, found.confidence) == (pytest.approx(2 / 3), pytest.approx(1.9 / 3))
    errors = [0.4**2 + 2 * 0.2**2, 0.8**2 + 0.9**2 + 0.1**2, 0.5**2 + 2 * 0.25**2]
    assert found.brier == pytest.approx(sum(errors) / 3)
    assert found.nll == pytest.approx(-np.log([0.6, 0.1, 0.5]).mean())
    # Equal mass: 0.6, the second of three, has its middle on the border and goes up.
    assert [(b.low, b.high, b.n) for b in found.adaptive_bins] == [(0.5, 0.5, 1), (0.6, 0.8, 2)]


@pytest.mark.parametrize("labels", [2, 3, 6])
def test_calibrated_data_has_no_error(labels: int) -> None:
    rng = np.random.default_rng(labels)
    rows = rng.dirichlet(np.ones(labels), size=40_000)
    drawn = (rows.cumsum(axis=1) > rng.random((len(rows), 1))).argmax(axis=1)
    found = calibration(rows, drawn)
    assert found.ece < 0.015
    assert found.ece_adaptive < 0.015
    assert found.accuracy == pytest.approx(found.confidence, abs=0.01)
    assert found.nll == pytest.approx(log_loss(drawn, rows, labels=list(range(labels))))
    assert found.brier == pytest.approx(brier_score_loss(
        drawn, rows if labels > 2 else rows[:, 1], labels=list(range(labels)), scale_by_half=False))
    # What is sharpened without being righter is overconfident.
    sharper = rows**3 / (rows**3).sum(axis=1, keepdims=True)
    assert calibration(sharper, drawn).ece > 0.05


def test_ends_of_the_scale() -> None:
    right, wrong = calibration(np.eye(3), [0, 1, 2]), calibration(np.eye(3), [1, 2, 0])
    assert (right.ece, right.ece_adaptive, right.brier, right.nll) == (0.0, 0.0, 0.0, 0.0)
    assert (wrong.ece, wrong.ece_adaptive, wrong.brier) == (1.0, 1.0, 2.0)
    assert wrong.nll == pytest.approx(-np.log(1e-12))
    unsure = calibration(np.full((30, 3), 1 / 3), [0, 1, 2] * 10)
    assert unsure.ece == unsure.ece_adaptive == pytest.approx(0.0)
    assert unsure.nll == pytest.approx(np.log(3))


@given(st.lists(st.tuples(st.sampled_from([0.34, 0.4, 0.5, 0.66, 0.9, 1.0]), st.integers(0, 2)), min_size=1, max_size=60),
       st.randoms(use_true_random=False), st.integers(1, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_order_is_nothing_and_bins_hold_every_utterance_once(pairs: list[tuple[float, int]], random: Any, n_bins: int) -> None:
    def scores(items: list[tuple[float, int]]) -> Calibration:
        return calibration(sharp([c for c, _ in items]), [label for _, label in items], n_bins=n_bins)

    found, mixed = scores(pairs), list(pairs)
    random.shuffle(mixed)
    other = scores(mixed)
    for key in ("ece", "ece_adaptive", "brier", "nll", "accuracy", "confidence"):
        assert getattr(other, key) == pytest.approx(getattr(found, key))
    for bins in (found.bins, found.adaptive_bins):
        assert sum(b.n for b in bins) == len(pairs)
        assert sum(b.n * (b.accuracy or 0.0) for b in bins) == pytest.approx(found.accuracy * len(pairs))
        assert sum(b.n * (b.confidence or 0.0) for b in bins) == pytest.approx(found.confidence * len(pairs))
        assert all(b.low - 1e-9 <= b.confidence <= b.high + 1e-9 for b in bins if b.confidence is not None)
        # A coarser look hides error, it never adds any.
        assert expected_error(bins) >= abs(found.accuracy - found.confidence) - 1e-9
    assert len(found.adaptive_bins) <= n_bins == len(found.bins)


def test_equal_mass_is_equal_where_nothing_ties() -> None:
    confidence = np.random.default_rng(0).permutation(np.linspace(0.2, 0.99, 90))
    assert [b.n for b in equal_mass(confidence, confidence > 0.5, 15)] == [6] * 15
    assert [b.n for b in equal_mass(np.full(90, 0.7), confidence > 0.5, 15)] == [90]


def row(i: int, ref: str | None, values: list[float] | None, hyp: str | None = "Positive", task: str = "sa") -> dict[str, Any]:
    more = {} if values is None else {"probabilities": dict(zip(SA.labels, values, strict=True))}
    return {"id": str(i), "corpus": "c", "task": task, "ref": ref, "hyp": hyp, "ref_text": "", **more}


def test_rows_are_those_of_annotated_single_label_tasks() -> None:
    first, second, *_ = SA.labels
    rows = [row(0, first, [0.7, 0.2, 0.1], first), row(1, second, [0.7, 0.2, 0.1], None), row(2, "<mixed>", [0.7, 0.2, 0.1]),
            row(3, None, [0.7, 0.2, 0.1]), row(4, first, None), row(5, None, None, task="ner")]
    found = calibrate_rows(rows, TaskRegistry())
    assert found.keys() == {"sa"}
    scores = found["sa"]
    assert (scores.n, scores.skipped, scores.accuracy, scores.agreement) == (2, 1, 0.5, 0.5)
    assert scores.ece == pytest.approx(0.2)
    assert scores.to_dict()["bins"][10] == {"low": pytest.approx(10 / 15), "high": pytest.approx(11 / 15), "n": 2,
                                            "confidence": pytest.approx(0.7), "accuracy": 0.5}
    assert calibrate_rows(rows[3:], TaskRegistry()) == {}
    with pytest.raises(UserError, match="'9', field 'probabilities'"):
        calibrate_rows([row(9, first, None) | {"probabilities": {"Happy": 1.0}}], TaskRegistry())


@pytest.mark.parametrize(("rows", "references", "expected"), [
    ([], [], "one utterance or more"),
    ([[0.5, 0.5]], [0, 1], "as many references"),
    ([[0.5, 0.5]], [2], "outside the 2 labels"),
    ([[0.5, 0.5], [0.5, 0.6]], [0, 0], "row 1 of the probabilities"),
    ([[float("nan"), 0.5]], [0], "no distribution"),
])
def test_what_is_no_distribution_is_refused(rows: Any, references: list[int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        calibration(rows, references)
