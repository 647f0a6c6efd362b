"""Simulated posteriors: exact without errors, at the asked rates with them, and as fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from unislu_llm.data.augment import Key
from unislu_llm.data.text_injection import SimulationRates, TextInjector, densify, simulate
from unislu_llm.errors import UserError
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

V = 20


def log_posterior(text: list[int], rates: SimulationRates, generator: Generator) -> Tensor:
    return densify(*simulate(text, V, rates, generator), V)


def greedy(posterior: Tensor) -> list[int]:
    return [c for c in torch.unique_consecutive(posterior.argmax(-1)).tolist() if c]


@pytest.mark.parametrize("text", [[], [3], [3, 3, 3], [1, 2, 2, 20]])
@pytest.mark.parametrize("blanks", [0.0, 3.0])
def test_without_errors_greedy_ctc_gives_the_text(text: list[int], blanks: float) -> None:
    rates = SimulationRates(substitutions=0.0, deletions=0.0, insertions=0.0, repeat=0.5,
                            blanks=blanks, peak=0.0, peak_spread=3.0)
    for seed in range(20):
        found = log_posterior(text, rates, Generator().manual_seed(seed))
        assert found.shape[1] == V + 1
        assert len(found) >= 1
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))
        assert greedy(found) == text
    again = log_posterior(text, rates, Generator().manual_seed(19))
    assert torch.equal(found, again)


def test_fit_finds_the_rates_that_simulated(tmp_path: Path) -> None:
    """A token lost beside one invented is seen as two replaced, hence the slack."""
    rates = SimulationRates(substitutions=0.15, deletions=0.08, insertions=0.02, burst=0.6,
                            repeat=0.3, blanks=2.0, peak=3.0, peak_spread=0.5,
                            confusions={c: {c % V + 1: 1} for c in range(1, V + 1)})
    draw = Generator().manual_seed(1)
    refs = [torch.randint(1, V + 1, (20,), generator=draw).tolist() for _ in range(300)]
    found = SimulationRates.fit(refs, [log_posterior(ref, rates, draw) for ref in refs])
    for name, slack in (("substitutions", 0.03), ("deletions", 0.03), ("insertions", 0.02),
                        ("burst", 0.08), ("repeat", 0.05), ("blanks", 0.2), ("peak", 0.1),
                        ("peak_spread", 0.1)):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), abs=slack), name
    for c in range(1, V + 1):
        table = found.confusions[c]
        assert max(table, key=lambda other: table[other]) == c % V + 1
    half = found.override({"error_rate": 0.1, "blanks": 1})
    assert half.substitutions + half.deletions + half.insertions == pytest.approx(0.1)
    assert half.substitutions / half.deletions == pytest.approx(
        found.substitutions / found.deletions)
    assert (half.blanks, half.confusions) == (1.0, found.confusions)
    found.save(tmp_path)
    assert SimulationRates.load(tmp_path / "simulation.json") == found


@pytest.mark.parametrize(("options", "message"), [
    ({"deletion": 0.1}, "did you mean 'deletions'"),
    ({"substitutions": 1.5}, r"data\.text_injection\.substitutions"),
    ({"peak": float("nan")}, r"data\.text_injection\.peak"),
    ({"blanks": "many"}, r"data\.text_injection\.blanks: must be a number"),
    ({"error_rate": 1.0}, r"data\.text_injection\.error_rate"),
])
def test_bad_rates_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SimulationRates().override(options)


def test_what_cannot_be_fitted_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "simulation.json").write_text('{"repeat": 0.1, "no": 1}')
    with pytest.raises(UserError, match=r"simulation\.json: cannot be read"):
        SimulationRates.load(tmp_path / "simulation.json")
    with pytest.raises(UserError, match="no reference"):
        SimulationRates.fit([], [])


def test_what_is_injected_follows_from_the_key_alone() -> None:
    example = Example(Utterance("u", None, "a b c d e f g h"), None)
    injector = TextInjector(SimulationRates(), lambda text: [ord(c) - 96 for c in text.split()],
                            V, 0.06)
    first = injector(example, Key(1, 0, 3))
    assert all(map(torch.equal, first, injector(example, Key(1, 0, 3))))
    for key in (Key(2, 0, 3), Key(1, 1, 3), Key(1, 0, 4), Key(1, 0, 3, 1)):
        other = injector(example, key)
        assert len(other.shares) != len(first.shares) or not torch.equal(*(
            posteriors.shares for posteriors in (other, first)))
    frames = [len(injector(example, Key(0, 0, i)).shares) for i in range(400)]
    assert injector.seconds(example) == pytest.approx(0.06 * sum(frames) / 400, rel=0.05)
    # What runs drew before.
    assert (len(first.shares), int(first.classes.sum())) == (29, 335)
