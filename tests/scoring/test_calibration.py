"""Calibration against hand-computed values, scikit-learn's, and what must hold of any."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from tests.scoring.rows import REGISTRY, records, row
from unislu_llm.errors import UserError
from unislu_llm.scoring.calibration import calibrate, calibration, equal_mass
from unislu_llm.tasks import SA


def sharp(confidence: list[float]) -> NDArray[np.float64]:
    """Three labels, the first with the confidence, the others with half of the rest."""
    top = np.asarray(confidence)
    return np.stack([top, (1 - top) / 2, (1 - top) / 2], axis=1)


def test_hand_computed_values() -> None:
    """Bins of width 1/2: (0.6, 0.8 | right, wrong) and, as 0.5 is not above 1/2, (0.5 | right)."""
    found = calibration(sharp([0.6, 0.8, 0.5]), [0, 1, 0], n_bins=2)
    assert found["bins"] == [
        {"low": 0.0, "high": 0.5, "n": 1, "confidence": 0.5, "accuracy": 1.0},
        {"low": 0.5, "high": 1.0, "n": 2, "confidence": pytest.approx(0.7), "accuracy": 0.5}]
    errors = [0.4**2 + 2 * 0.2**2, 0.8**2 + 0.9**2 + 0.1**2, 0.5**2 + 2 * 0.25**2]
    expected = {"ece": (1 * 0.5 + 2 * 0.2) / 3, "accuracy": 2 / 3, "confidence": 1.9 / 3,
                "brier": sum(errors) / 3, "nll": -np.log([0.6, 0.1, 0.5]).mean()}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    # Equal mass: 0.6, the second of three, has its middle on the border and goes up.
    assert equal_mass(np.array([0.6, 0.8, 0.5]), 2).tolist() == [1, 1, 0]
    assert np.bincount(equal_mass(np.linspace(0.2, 0.99, 90), 15)).tolist() == [6] * 15


@pytest.mark.parametrize("labels", [3, 6])
def test_calibrated_data_has_no_error(labels: int) -> None:
    rng = np.random.default_rng(labels)
    rows = rng.dirichlet(np.ones(labels), size=40_000)
    drawn = (rows.cumsum(axis=1) > rng.random((len(rows), 1))).argmax(axis=1)
    found = calibration(rows, drawn.tolist())
    assert max(found["ece"], found["ece_adaptive"]) < 0.015
    assert found["accuracy"] == pytest.approx(found["confidence"], abs=0.01)
    assert found["nll"] == pytest.approx(log_loss(drawn, rows, labels=list(range(labels))))
    assert found["brier"] == pytest.approx(brier_score_loss(
        drawn, rows, labels=list(range(labels)), scale_by_half=False))
    right, mean = calibration_curve(rows.argmax(1) == drawn, rows.max(1), n_bins=15)
    assert [b["accuracy"] for b in found["bins"]] == pytest.approx(right)
    assert [b["confidence"] for b in found["bins"]] == pytest.approx(mean)
    # What is sharpened without being righter is overconfident.
    sharper = rows**3 / (rows**3).sum(axis=1, keepdims=True)
    assert calibration(sharper, drawn.tolist())["ece"] > 0.05


def test_of_predictions_those_of_annotated_single_label_tasks_count() -> None:
    first, second, _ = SA.labels
    rated = {"probabilities": dict(zip(SA.labels, [0.7, 0.2, 0.1], strict=True))}
    some = records(row(0, "sa", ref=first, hyp=first, **rated), row(1, "sa", ref=second, **rated),
                   row(2, "sa", ref="<mixed>", **rated), row(3, "sa", ref=None, **rated),
                   row(4, "sa", ref=first), row(5), row(6, "acts", ref=["ask"], **rated))
    found = calibrate(some, REGISTRY)
    assert found.keys() == {"sa"}
    assert [found["sa"][key] for key in ("n", "skipped", "accuracy", "agreement")] == [2, 1, .5, .5]
    assert found["sa"]["ece"] == pytest.approx(0.2)
    assert calibrate(some[3:], REGISTRY) == {}
    for values in ([1.0], [0.5, 0.6, 0.0], [1.5, -0.5, 0.0], [float("nan"), 0, 0]):
        odd = {"probabilities": dict(zip(SA.labels, values, strict=False))}
        with pytest.raises(UserError, match="'9', field 'probabilities'"):
            calibrate(records(row(9, "sa", ref=first, **odd)), REGISTRY)
