"""Batch plans: every example once an epoch, or in the shares of a mixture; the same steps for any
number of processes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unislu_llm.config import DataConfig
from unislu_llm.data.mixture import Mixture, build_mixture
from unislu_llm.data.sampler import BatchPlan, MicroBatch, TokenPlan
from unislu_llm.errors import UserError
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

KINDS: Any = ("audio", "posteriors")
Plans = tuple[int, int, BatchPlan]


def lengths_of(n: int, seed: int = 0) -> list[float]:
    """Lengths in seconds with ties."""
    return np.random.default_rng(seed).integers(1, 40, n).astype(float).tolist()


def members(micro: MicroBatch) -> list[int]:
    return [i for i, _ in micro.members]


def counted(steps: list[MicroBatch]) -> list[int]:
    """Indices that weigh in a step's loss."""
    return sorted(i for micro in steps if micro.counted for i in members(micro))


@st.composite
def plans(draw: st.DrawFn) -> Plans:
    """`(world, accumulation, plan)` of any sizes that fit each other."""
    world, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    parts = world * accumulation
    n, size = draw(st.integers(parts, 120)), draw(st.integers(parts, 40))
    return world, accumulation, BatchPlan(lengths_of(n), size, parts, draw(st.integers(0, 9)))


@settings(deadline=None)
@given(plans(), st.integers(0, 5))
def test_every_example_once_an_epoch(case: Plans, epoch: int) -> None:
    _, _, plan = case
    batches = plan.epoch(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(plan.lengths)))
    assert len(batches) == plan.steps(epoch + 1) - plan.steps(epoch)
    assert all(plan.parts <= len(batch) < plan.batch_size + plan.parts for batch in batches)
    assert sum(len(batch) != plan.batch_size for batch in batches) <= 1, "one batch has the rest"


@settings(deadline=None)
@given(plans(), st.integers(0, 5), st.integers(0, 9))
def test_ranks_share_a_global_batch_and_run_micro_batches_of_the_same_kinds(
        case: Plans, epoch: int, seed: int) -> None:
    """As many micro-batches of one kind each, none empty: no rank waits for another for ever."""
    world, accumulation, plain = case
    for shares in zip(*(plain.micro_batches(epoch, r, world) for r in range(world)), strict=True):
        sizes = [len(m.members) for micro in shares for m in micro]
        assert len(sizes) == plain.parts
        assert max(sizes) - min(sizes) <= 1
    drawn = np.random.default_rng(seed).integers(0, 2, len(plain.lengths))
    kinds = [KINDS[k] for k in drawn]
    plan = BatchPlan(plain.lengths.tolist(), plain.batch_size, plain.parts, plain.seed, kinds=kinds)
    assert plan.epoch(epoch) == plain.epoch(epoch), "what is in a global batch stays as it is"
    ranks = [plan.micro_batches(epoch, rank, world) for rank in range(world)]
    for step, batch in enumerate(plan.epoch(epoch)):
        for steps in ranks:
            assert [m.kind for m in steps[step]] == [m.kind for m in ranks[0][step]]
            assert len(steps[step]) <= len(KINDS) * accumulation
        micro = [m for steps in ranks for m in steps[step]]
        assert all({kinds[i] for i in members(m)} == {m.kind} for m in micro)
        assert counted(micro) == sorted(batch), "each weighs once over all ranks"
        assert all(len(m.members) == 1 for m in micro if not m.counted)
        assert all(i in batch for m in micro for i in members(m))


def test_a_seed_keeps_its_plan() -> None:
    """What runs drew before: a change here makes every published seed another run."""
    first = BatchPlan(lengths_of(64), 8, seed=1).epoch(0)
    assert BatchPlan(lengths_of(64), 8, seed=1).epoch(1) != first
    assert BatchPlan(lengths_of(64), 8, seed=2).epoch(0) != first
    groups = ["a" if i % 3 else "b" for i in range(50)]
    sizes = np.stack([np.array(lengths_of(50)) * 10, np.array(lengths_of(50)) + 8], 1)
    plans: list[BatchPlan] = []
    for mixture in (None, Mixture(groups, {"a": 0.3, "b": 0.7}, 44, seed=3)):
        plans += [BatchPlan(lengths_of(50), 6, 3, 5, mixture=mixture),
                  TokenPlan(sizes, 3000, 3, 5, mixture=mixture)]
    drawn = json.dumps([plan.epoch(epoch) for plan in plans for epoch in (0, 1)])
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "fab3cde82441d1ba"


@settings(deadline=None)
@given(st.integers(12, 120), st.integers(12, 40), st.integers(1, 12))
def test_global_batches_do_not_depend_on_how_many_share_them(n: int, size: int, parts: int) -> None:
    one = BatchPlan(lengths_of(n), size, 1, seed=5).epoch(0)
    many = BatchPlan(lengths_of(n), size, parts, seed=5).epoch(0)
    if n < size or n % size == 0 or n % size >= parts:
        assert many == one
    else:  # a rest too small to give each part an example joins another; all others stay
        same = {frozenset(batch) for batch in one} & {frozenset(batch) for batch in many}
        assert len(same) == len(many) - 1 == len(one) - 2


def test_batches_hold_examples_of_like_length_in_random_order() -> None:
    lengths = lengths_of(400)

    def waste(batches: list[list[int]]) -> float:
        return 1 - sum(lengths) / sum(len(b) * max(lengths[i] for i in b) for b in batches)

    batches = BatchPlan(lengths, 8).epoch(0)
    free = np.random.default_rng(0).permutation(400).reshape(-1, 8).tolist()
    assert waste(batches) < 0.4 * waste(free)
    inside = [[lengths[i] for i in batch] for batch in batches]
    assert inside == [sorted(batch) for batch in inside], "so that micro-batches are alike"
    assert abs(np.corrcoef([b[-1] for b in inside], np.arange(len(inside)))[0, 1]) < 0.4


@pytest.mark.parametrize(("n", "size", "parts", "message"), [
    (10, 3, 4, r"train\.batch_size: 3 is smaller than processes x accumulation = 4"),
    (3, 8, 4, r"3 training examples cannot feed 4 micro-batches"),
    (0, 8, 1, r"0 training examples"),
])
def test_sizes_that_do_not_fit_are_refused(n: int, size: int, parts: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BatchPlan(lengths_of(n), size, parts)
    sizes = np.array([[100, 20], [10, 200]])
    with pytest.raises(UserError, match=r"batch_tokens: 419 is too few: 2 micro-batches a step"):
        TokenPlan(sizes, 419, parts=2)
    assert sorted(TokenPlan(sizes, 420, parts=2).epoch(0)[0]) == [0, 1]


# Batches by tokens


def slue_sizes(n: int, seed: int = 0) -> np.ndarray:
    """Tokens as SLUE has them: clips of 10.4 s or 8.0 s in the mean, 2.5 words a second."""
    rng = np.random.default_rng(seed)
    seconds = np.concatenate([rng.gamma(3.2, mean / 3.2, n // 2 + n % 2 * (mean > 9))
                              for mean in (10.4, 8.0)]).clip(1.0, 30.0)
    words = seconds * rng.normal(2.5, 0.4, n).clip(1.2)
    return np.stack([np.ceil(seconds * 10), 8 + words * 1.5], 1).astype(int)


@st.composite
def token_plans(draw: st.DrawFn) -> tuple[int, int, TokenPlan]:
    """`(world, accumulation, plan)`; budgets from the tightest that is allowed."""
    world, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = slue_sizes(draw(st.integers(world * accumulation, 150)), draw(st.integers(0, 9)))
    least = world * accumulation * int(sizes.sum(1).max())
    mixture = None
    if draw(st.booleans()) and len(sizes) > 9:
        groups = ["ab"[i % 3 > 0] for i in range(len(sizes))]
        mixture = Mixture(groups, {name: groups.count(name) / len(groups) for name in "ab"})
    plan = TokenPlan(sizes, draw(st.integers(least, 3 * least)), world * accumulation,
                     draw(st.integers(0, 9)), mixture=mixture)
    return world, accumulation, plan


@settings(deadline=None)
@given(token_plans(), st.integers(0, 3))
def test_token_batches_hold_every_example_once_within_the_budget(
        case: tuple[int, int, TokenPlan], epoch: int) -> None:
    world, accumulation, plan = case
    batches = plan.epoch(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(plan.sizes)))
    assert plan.steps(epoch + 1) - plan.steps(epoch) == len(batches)
    over = [b for b in batches if plan.cost(b) > plan.batch_tokens]
    assert all(len(b) < 2 * plan.parts for b in over), "only a rest that cannot be shared out"
    alone = TokenPlan(plan.sizes, plan.batch_tokens, 1, plan.seed, mixture=plan.mixture)
    if min(map(len, alone.epoch(epoch))) >= plan.parts:
        assert sorted(map(sorted, alone.epoch(epoch))) == sorted(map(sorted, batches))
    ranks = [plan.micro_batches(epoch, rank, world) for rank in range(world)]
    assert {len(step) for steps in ranks for step in steps} == {accumulation}
    for step, batch in enumerate(batches):
        parts = [members(m) for steps in ranks for m in steps[step]]
        assert all(parts)
        assert sorted(i for part in parts for i in part) == sorted(batch)
        # No part costs more than an even share of what the whole costs, and one example.
        longest = max(plan.sizes[i].sum() for i in batch)
        assert max(map(plan.cost, parts)) <= plan.cost(batch) / plan.parts + 2 * longest


def test_at_most_8_percent_of_a_budget_of_4k_tokens_is_padding_on_slue_lengths() -> None:
    """In the positions of the LLM and in the audio alike."""
    sizes = slue_sizes(4000)
    plan = TokenPlan(sizes, 4096, seed=3)
    batches = plan.epoch(0)
    assert 1 - sizes.sum() / sum(map(plan.cost, batches)) <= 0.08
    assert 1 - sizes[:, 0].sum() / sum(len(b) * sizes[b, 0].max() for b in batches) <= 0.08
    assert np.mean([plan.cost(b) for b in batches]) > 0.9 * 4096, "the budget is used"


def test_a_mixture_holds_at_every_step_of_token_batches() -> None:
    mixture = Mixture(["a"] * 500 + ["b"] * 100, {"a": 0.5, "b": 0.5}, seed=1)
    plan = TokenPlan(slue_sizes(600), 2000, mixture=mixture)
    drawn = np.array([[sum(i < 500 for i in batch), len(batch)] for batch in plan.epoch(1)])
    ahead = drawn[:, 0].cumsum() - drawn[:, 1].cumsum() / 2
    assert abs(ahead).max() <= 1.5 * drawn[:, 1].max()
    assert abs(ahead[-1]) <= 1


# Mixtures


def example(corpus: str, manifest: str = "m") -> Example:
    """An example of a corpus, read from `<manifest>.jsonl`."""
    source = f"data/{manifest}.jsonl:1"
    return Example(Utterance("u", None, "a", {}, corpus=corpus, source=source), None)


def groups_of(**sizes: int) -> list[str]:
    """Group names of corpora one after another."""
    return [name for name, n in sizes.items() for _ in range(n)]


def mixture_of(examples: list[Example], **options: Any) -> Any:
    return build_mixture(DataConfig(**options), examples, 1)


def test_temperature_goes_from_natural_to_equal() -> None:
    examples = [example("a")] * 90 + [example("b")] * 10
    assert mixture_of(examples) is None
    for options, share in (({"epoch_samples": 4}, 0.9), ({"temperature": 2}, 0.75),
                           ({"temperature": 1e9}, 0.5),
                           ({"weights": {"a": 1, "b": 3}, "temperature": 5}, 0.25)):
        mixture = mixture_of(examples, **options)
        assert mixture.shares.tolist() == pytest.approx([share, 1 - share])
        assert mixture.size == options.get("epoch_samples", 100)
    assert "75.0 %  7.50 passes" in str(mixture)


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
    ({"slue": -1, "asr": 1}, r"weights\.slue"),
])
def test_bad_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_of([example("slue", "x"), example("default", "asr")], weights=weights)


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
