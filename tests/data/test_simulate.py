"""Simulated posteriors: exact without errors, at the asked rates with them, and as fitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unislu_llm.data.simulate import Edit, SimulationOptions, align, fit_simulation, simulate
from unislu_llm.errors import UserError

V = 20


def texts(count: int = 150, length: int = 20) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(1, V + 1, (length,), generator=draw).tolist() for _ in range(count)]


def heard(log_posterior: Tensor) -> list[int]:
    return [c for c in torch.unique_consecutive(log_posterior.argmax(-1)).tolist() if c]


@pytest.mark.parametrize("text", [[], [3], [3, 3, 3], [1, 2, 2, 20]])
@pytest.mark.parametrize("blanks", [0.0, 3.0])
def test_without_errors_greedy_ctc_gives_the_text(text: list[int], blanks: float) -> None:
    options = SimulationOptions(0.0, 0.0, 0.0, repeat=0.5, blanks=blanks, peak=0.0, peak_spread=3.0)
    for seed in range(20):
        log_posterior = simulate(text, V, options, torch.Generator().manual_seed(seed))
        assert log_posterior.shape[1] == V + 1
        assert len(log_posterior) >= 1
        torch.testing.assert_close(log_posterior.exp().sum(-1), torch.ones(len(log_posterior)))
        assert heard(log_posterior) == text
    again = simulate(text, V, options, torch.Generator().manual_seed(19))
    assert torch.equal(log_posterior, again)


def test_alignment() -> None:
    assert align([1, 2, 3], [1, 3]) == [Edit(1, 1), Edit(2, 0), Edit(3, 3)]
    assert align([1, 3], [1, 4, 3]) == [Edit(1, 1), Edit(0, 4), Edit(3, 3)]
    assert align([1, 2], [1, 5]) == [Edit(1, 1), Edit(2, 5)]
    assert align([], [7]) == [Edit(0, 7)]


def test_fit_finds_the_options_that_simulated() -> None:
    """Errors by kind, confusions, frames, peaks. A token lost beside one invented is seen as two replaced, hence the slack."""
    options = SimulationOptions(0.15, 0.08, 0.02, burst=0.6, repeat=0.3, blanks=2.0, peak=3.0, peak_spread=0.5,
                                confusions={c: {c % V + 1: 1} for c in range(1, V + 1)})
    refs, draw = texts(300), torch.Generator().manual_seed(2)
    found = fit_simulation(refs, [simulate(ref, V, options, draw) for ref in refs])
    for name, slack in (("substitutions", 0.03), ("deletions", 0.03), ("insertions", 0.02), ("burst", 0.08),
                        ("repeat", 0.05), ("blanks", 0.2),
                        ("peak", 0.1), ("peak_spread", 0.1)):
        assert getattr(found, name) == pytest.approx(getattr(options, name), abs=slack), name
    for c in range(1, V + 1):
        table = found.confusions[c]
        assert max(table, key=lambda other: table[other]) == c % V + 1
    half = found.at_error_rate(0.1)
    assert half.substitutions + half.deletions + half.insertions == pytest.approx(0.1)
    assert half.substitutions / half.deletions == pytest.approx(found.substitutions / found.deletions)


def test_bad_rates_are_named() -> None:
    for options in ({"substitutions": 1.5}, {"repeat": 1.0}, {"blanks": -1.0}, {"substitutions": 0.7, "deletions": 0.6}):
        with pytest.raises(UserError, match="simulation"):
            SimulationOptions(**options)
    with pytest.raises(UserError, match="no reference"):
        fit_simulation([], [])
