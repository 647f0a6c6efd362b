"""Mixtures: asked shares at every step, walks without repetition, all from seed and epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unislu_llm.config import DataConfig
from unislu_llm.data.mixture import Mixture, build_mixture
from unislu_llm.data.sampler import BatchPlan
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance


def example(corpus: str, manifest: str = "m", task: str | None = None) -> Example:
    """An example of a corpus, read from `<manifest>.jsonl`."""
    source = f"data/{manifest}.jsonl:1"
    return Example(Utterance("u", None, "a", {}, corpus=corpus, source=source), task)


def groups_of(**sizes: int) -> list[str]:
    """Group names of corpora one after another."""
    return [name for name, n in sizes.items() for _ in range(n)]


# Shares


def mixture_of(examples: list[Example], **settings: Any) -> Mixture:
    mixture = build_mixture(DataConfig(**settings), examples, 1)
    return mixture


def shares_of(examples: list[Example], **settings: Any) -> dict[str, float]:
    mixture = mixture_of(examples, **settings)
    return dict(zip(mixture.names, mixture.shares.tolist(), strict=True))


def test_temperature_goes_from_natural_to_equal() -> None:
    examples = [example("a")] * 90 + [example("b")] * 10
    assert build_mixture(DataConfig(), examples, 1) is None
    assert shares_of(examples, epoch_samples=4) == {"a": 0.9, "b": 0.1}
    assert mixture_of(examples, epoch_samples=4).size == 4
    assert shares_of(examples, temperature=2) == pytest.approx({"a": 0.75, "b": 0.25})
    assert shares_of(examples, temperature=float("inf")) == {"a": 0.5, "b": 0.5}
    weighted = mixture_of(examples, weights={"a": 1, "b": 3}, temperature=5)
    assert weighted.shares.tolist() == [0.25, 0.75]
    assert "75.0 %  7.50 passes" in str(weighted)


def test_a_corpus_is_named_by_its_rows_or_by_its_manifest() -> None:
    examples = [example("slue", "x"), example("slue", "y"), example("default", "asr")]
    assert mixture_of(examples, temperature=2).names == ["slue", "asr"]
    assert mixture_of(examples, weights={"x": 1, "y": 1, "asr": 2}).names == ["x", "y", "asr"]
    assert mixture_of(examples, weights={"slue": 1, "asr": 2}).names == ["slue", "asr"]


@pytest.mark.parametrize(("weights", "message"), [
    ({"slu": 1, "asr": 1}, r"'slu' is no corpus .*; did you mean 'slue'\?; known: slue, x, asr"),
    ({"qqqqq": 1}, r"'qqqqq' is no corpus .*; known: slue, x, asr"),
    ({"slue": 1}, r"no weight for asr"),
    ({"slue": 1, "x": 1, "asr": 1}, r"'x' .* all of its examples have another weight; known"),
    ({"slue": 0, "asr": 0}, "all weights are 0"),
    ({"slue": -1, "asr": 1}, r"weights\.slue"),
])
def test_bad_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixture(DataConfig(weights=weights), [example("slue", "x"),
                                                    example("default", "asr")], 1)


# What is drawn


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 5),
       st.data())
def test_walks_do_not_repeat_and_shares_add_up(sizes: list[int], per_epoch: int, seed: int,
                                               data: st.DataObject) -> None:
    weights = [data.draw(st.floats(0.05, 1)) for _ in sizes]
    groups = groups_of(**{str(i): n for i, n in enumerate(sizes)})
    shares = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    mixture = Mixture(groups, shares, per_epoch, seed)
    seen: Counter[int] = Counter()
    for epoch in range(6):
        drawn = mixture.epoch(epoch)
        assert len(drawn) == per_epoch == mixture.size
        seen.update(drawn.tolist())
        for name, members in zip(mixture.names, mixture.members, strict=True):
            times = [seen[i] for i in members.tolist()]
            assert max(times) - min(times) <= 1, "none comes again before all others"
            assert abs(sum(times) - shares[name] * per_epoch * (epoch + 1)) < len(sizes) + 1
    later = Mixture(groups, shares, per_epoch, seed)
    assert np.array_equal(later.epoch(4), mixture.epoch(4)), "also when it is asked for first"
    left_out = Mixture(["a", "b", "a"], {"a": 1.0, "b": 0.0}, seed=seed)
    assert sorted(left_out.epoch(0).tolist()) == [0, 2]


def test_realised_shares_over_200_steps_are_within_one_percent() -> None:
    """The worst case: corpora so different in length that most batches hold one corpus only."""
    rng = np.random.default_rng(0)
    groups = groups_of(short=4000, medium=700, long=90)
    lengths = np.concatenate([rng.uniform(*r, n) for r, n in (((1, 3), 4000), ((5, 9), 700),
                                                              ((15, 29), 90))])
    asked = {"short": 0.5, "medium": 0.3, "long": 0.2}
    plan = BatchPlan(lengths.tolist(), 8, seed=1, mixture=Mixture(groups, asked, 2500, 1))
    steps = [batch for epoch in range(3) for batch in plan.epoch(epoch)]
    for first in (0, 57, 300, 700):
        drawn = Counter(groups[i] for batch in steps[first:first + 200] for i in batch)
        for name, share in asked.items():
            assert drawn[name] / drawn.total() == pytest.approx(share, abs=0.01), (first, name)
    spread = np.mean([np.ptp(lengths[batch]) for batch in steps])
    assert spread < 3, "batches are of like length; free shuffling gives about 10"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_same_draws(world: int) -> None:
    mixture = Mixture(groups_of(a=30, b=3), {"a": 0.5, "b": 0.5}, 48, 2)
    plan = BatchPlan(list(range(33)), 8, 4, seed=2, mixture=mixture)
    whole = [[draw for micro in step for draw in micro.members] for step in plan.micro_batches(1)]
    ranks = [plan.micro_batches(1, rank, world) for rank in range(world)]
    assert [[draw for steps in ranks for micro in steps[i] for draw in micro.members]
            for i in range(len(whole))] == whole
    draws = [draw for step in whole for draw in step]
    assert len(set(draws)) == len(draws) == 48, "an example drawn again is told from its first draw"
    assert max(times for _, times in draws) == 7, "3 examples drawn 24 times"
    assert sorted(i for i, _ in draws) == sorted(mixture.epoch(1).tolist())
