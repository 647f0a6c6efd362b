"""Batch plans: every sample once an epoch, the same steps for any number of processes, and the same from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from unislu_llm.data.batching import BatchPlan, TokenPlan, seconds, sorted_batches
from unislu_llm.data.mixture import Mixture
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.utterance import Utterance


def lengths_of(n: int, seed: int = 0) -> list[float]:
    """Lengths in seconds with ties."""
    return np.random.default_rng(seed).integers(1, 40, n).astype(float).tolist()


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int, BatchPlan]:
    """`(samples, world, accumulation, batch size, plan)` of any sizes that fit each other."""
    world, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    parts = world * accumulation
    n = draw(st.integers(parts, 120))
    batch_size = draw(st.integers(parts, 40))
    plan = BatchPlan(lengths_of(n), batch_size, parts, seed=draw(st.integers(0, 9)), bucket=draw(st.integers(0, 20)))
    return n, world, accumulation, batch_size, plan


@settings(deadline=None)
@given(plans(), st.integers(0, 5))
def test_every_sample_once_an_epoch(case: tuple[int, int, int, int, BatchPlan], epoch: int) -> None:
    n, _, _, batch_size, plan = case
    batches = plan.epoch(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert len(batches) == len(plan)
    assert all(plan.parts <= len(batch) < batch_size + plan.parts for batch in batches)
    assert sum(len(batch) != batch_size for batch in batches) <= 1, "one batch has the rest"
    assert all(type(i) is int for batch in batches for i in batch)


@settings(deadline=None)
@given(plans(), st.integers(0, 5))
def test_ranks_share_a_global_batch(case: tuple[int, int, int, int, BatchPlan], epoch: int) -> None:
    """Equal numbers of steps and of micro-batches on every rank, none empty: no rank waits for another for ever."""
    _, world, accumulation, _, plan = case
    ranks = [plan.micro_batches(epoch, rank, world) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {len(plan)}
    assert {len(micro) for steps in ranks for micro in steps} == {accumulation}
    assert all(part for steps in ranks for micro in steps for part in micro)
    for step, batch in enumerate(plan.epoch(epoch)):
        dealt = [i for steps in ranks for micro in steps[step] for i in micro]
        assert sorted(dealt) == sorted(batch)
        sizes = [len(micro) for steps in ranks for micro in steps[step]]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(plans())
def test_the_order_is_the_seed_and_the_epoch(case: tuple[int, int, int, int, BatchPlan]) -> None:
    n, _, _, batch_size, plan = case
    again = BatchPlan(lengths_of(n), batch_size, plan.parts, seed=plan.seed, bucket=plan.bucket)
    assert again.epoch(3) == plan.epoch(3) == plan.epoch(3), "and asking for it changes nothing"


def test_other_epochs_and_seeds_have_other_batches() -> None:
    plan, other = BatchPlan(lengths_of(64), 8, seed=1), BatchPlan(lengths_of(64), 8, seed=2)
    first = plan.epoch(0)
    assert plan.epoch(1) != first
    assert {frozenset(b) for b in plan.epoch(1)} != {frozenset(b) for b in first}, "also other members, not only order"
    assert other.epoch(0) != first


@settings(deadline=None)
@given(st.integers(12, 120), st.integers(12, 40), st.integers(0, 20), st.data())
def test_global_batches_do_not_depend_on_how_many_share_them(
        n: int, size: int, bucket: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, 12))
    one = BatchPlan(lengths_of(n), size, 1, seed=5, bucket=bucket).epoch(0)
    many = BatchPlan(lengths_of(n), size, parts, seed=5, bucket=bucket).epoch(0)
    rest = n % size
    if rest == 0 or rest >= parts or n < size:
        assert many == one
    else:  # a rest too small to give each part a sample joins another batch; all others are as they were
        same = {frozenset(batch) for batch in one} & {frozenset(batch) for batch in many}
        assert len(many) == len(one) - 1
        assert len(same) == len(many) - 1


def test_batches_hold_samples_of_like_length() -> None:
    lengths = lengths_of(400)

    def waste(batches: list[list[int]]) -> float:
        return 1 - sum(lengths) / sum(len(b) * max(lengths[i] for i in b) for b in batches)

    free = waste(BatchPlan(lengths, 8, bucket=0).epoch(0))
    assert waste(BatchPlan(lengths, 8, bucket=8).epoch(0)) < 0.4 * free
    assert waste(BatchPlan(lengths, 8, bucket=50).epoch(0)) < 0.2 * free


def test_members_of_a_batch_are_sorted_so_that_micro_batches_are_alike() -> None:
    lengths = lengths_of(60)
    for batch in BatchPlan(lengths, 12, parts=3).epoch(0):
        assert [lengths[i] for i in batch] == sorted(lengths[i] for i in batch)


def test_batches_do_not_come_in_order_of_length() -> None:
    lengths = lengths_of(200)
    longest = [max(lengths[i] for i in batch) for batch in BatchPlan(lengths, 8, bucket=50).epoch(0)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize(("n", "size", "parts", "message"), [
    (10, 3, 4, r"batch_size=3 is smaller than processes x accumulation = 4"),
    (3, 8, 4, r"3 training samples cannot feed 4 micro-batches"),
    (0, 8, 1, r"0 training samples"),
])
def test_sizes_that_do_not_fit_are_refused(n: int, size: int, parts: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BatchPlan(lengths_of(n), size, parts)


@pytest.mark.parametrize(("rank", "world"), [(0, 4), (0, 12), (3, 3), (-1, 3)])
def test_a_number_of_processes_that_drops_samples_is_refused(rank: int, world: int) -> None:
    with pytest.raises(UserError, match="6 micro-batches"):
        BatchPlan(lengths_of(20), 8, parts=6).micro_batches(0, rank, world)


# Lengths


def test_seconds_come_from_the_manifest_or_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(24_000, dtype=np.float32), 8_000)
    assert seconds(Utterance("u", path, "a")) == 3.0
    assert seconds(Utterance("u", path, "a", start=0.5)) == 2.5
    assert seconds(Utterance("u", path, "a", start=0.5, end=2.0)) == 1.5
    assert seconds(Utterance("u", path, "a", start=0.5, end=2.0, duration=1.4)) == 1.4
    assert seconds(Utterance("u", None, "text alone")) == 0.0
    with pytest.raises(UserError, match=r"m\.jsonl:3: field 'audio': cannot read .*gone\.wav"):
        seconds(Utterance("u", tmp_path / "gone.wav", "a", source="m.jsonl:3"))


def test_sorted_batches_begin_with_the_longest() -> None:
    samples = [Sample(Utterance(str(i), None, "a", duration=d), None) for i, d in enumerate((2.0, 9.0, 1.0, 9.0, 5.0))]
    assert sorted_batches(samples, 2) == [[1, 3], [4, 0], [2]]
    assert sorted_batches([], 2) == []


# Batches by tokens


def slue_sizes(n: int, seed: int = 0) -> np.ndarray:
    """Tokens as SLUE has them: clips of 10.4 s (VoxPopuli) or 8.0 s (VoxCeleb) in the mean, 2.5 words a second."""
    rng = np.random.default_rng(seed)
    seconds = np.concatenate([rng.gamma(3.2, mean / 3.2, n // 2 + n % 2 * (mean > 9)) for mean in (10.4, 8.0)]).clip(1.0, 30.0)
    words = seconds * rng.normal(2.5, 0.4, n).clip(1.2)
    return np.stack([np.ceil(seconds * 10), 8 + words * 1.5], 1).astype(int)


@st.composite
def token_plans(draw: st.DrawFn) -> tuple[int, int, TokenPlan]:
    """`(world, accumulation, plan)`; budgets from the tightest that is allowed."""
    world, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = slue_sizes(draw(st.integers(world * accumulation, 150)), draw(st.integers(0, 9)))
    least = world * accumulation * int(sizes.sum(1).max())
    mixture = Mixture(["ab"[i % 3 > 0] for i in range(len(sizes))]) if draw(st.booleans()) and len(sizes) > 9 else None
    plan = TokenPlan(sizes, draw(st.integers(least, 3 * least)), world * accumulation, draw(st.integers(0, 9)),
                     draw(st.integers(0, 4)), mixture)
    return world, accumulation, plan


@settings(deadline=None)
@given(token_plans(), st.integers(0, 3))
def test_token_batches_hold_every_sample_once_within_the_budget(case: tuple[int, int, TokenPlan], epoch: int) -> None:
    _, _, plan = case
    batches = plan.epoch(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(plan.sizes)))
    assert plan.steps(epoch + 1) - plan.steps(epoch) == len(batches)
    assert all(len(batch) >= plan.parts for batch in batches)
    over = [b for b in batches if len(b) * max(plan.sizes[i].sum() for i in b) > plan.batch_tokens]
    assert all(len(batch) < 2 * plan.parts for batch in over), "only a rest that cannot be shared out exceeds it"
    again = TokenPlan(plan.sizes, plan.batch_tokens, plan.parts, plan.seed, plan.bucket, plan.mixture)
    assert again.epoch(epoch) == batches


@settings(deadline=None)
@given(token_plans(), st.integers(0, 3))
def test_ranks_share_token_batches(case: tuple[int, int, TokenPlan], epoch: int) -> None:
    world, accumulation, plan = case
    ranks = [plan.micro_batches(epoch, rank, world) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {len(plan.epoch(epoch))}
    assert {len(micro) for steps in ranks for micro in steps} == {accumulation}
    assert all(part for steps in ranks for micro in steps for part in micro)
    for step, batch in enumerate(plan.epoch(epoch)):
        parts = [part for steps in ranks for part in steps[step]]
        assert sorted(i for part in parts for i in part) == sorted(batch)
        # No part costs more than an even share of what the whole costs, and one sample.
        assert max(map(plan.cost, parts)) <= plan.cost(batch) / plan.parts + 2 * max(plan.sizes[i].sum() for i in batch)


def test_two_processes_have_equal_steps_over_three_epochs_of_an_odd_number_of_samples() -> None:
    plan = TokenPlan(slue_sizes(1001), 4096, parts=2, seed=1)
    for epoch in range(3):
        first, second = (plan.micro_batches(epoch, rank, 2) for rank in range(2))
        assert len(first) == len(second) == len(plan.epoch(epoch))
        assert sorted(i for steps in (first, second) for step in steps for part in step for i in part) == list(range(1001))
    assert plan.steps(3) == sum(len(plan.epoch(epoch)) for epoch in range(3))
    assert plan.epoch(0) == TokenPlan(slue_sizes(1001), 4096, parts=1, seed=1).epoch(0), "as one process would see them"


def test_at_most_8_percent_of_a_budget_of_4k_tokens_is_padding_on_slue_lengths() -> None:
    """In the rows of the LLM and in the audio alike, where batches of as many samples have more."""
    sizes = slue_sizes(4000)
    plan = TokenPlan(sizes, 4096, seed=3)
    batches = plan.epoch(0)

    def audio(batches: list[list[int]]) -> float:
        return 1 - sizes[:, 0].sum() / sum(len(b) * sizes[b, 0].max() for b in batches)

    assert plan.padding_share(batches) == pytest.approx(1 - sizes.sum() / sum(map(plan.cost, batches)))
    assert plan.padding_share(batches) <= 0.08
    assert audio(batches) <= 0.08
    assert np.mean([plan.cost(b) for b in batches]) > 0.9 * 4096, "the budget is used"
    rows = sizes.sum(1)
    free = [list(range(i, i + 28)) for i in range(0, 4000 - 28, 28)]
    assert 1 - sum(rows[b].sum() for b in free) / sum(map(plan.cost, free)) > 0.3, "batches as they come"


def test_a_mixture_holds_at_every_step_of_token_batches() -> None:
    sizes = slue_sizes(600)
    mixture = Mixture(["a"] * 500 + ["b"] * 100, {"a": 0.5, "b": 0.5}, seed=1)
    drawn = np.array([[sum(i < 500 for i in batch), len(batch)] for batch in TokenPlan(sizes, 2000, mixture=mixture).epoch(1)])
    ahead = drawn[:, 0].cumsum() - drawn[:, 1].cumsum() / 2
    assert abs(ahead).max() <= 1.5 * drawn[:, 1].max()
    assert abs(ahead[-1]) <= 1


def test_a_budget_too_small_for_its_parts_is_refused() -> None:
    sizes = np.array([[100, 20], [10, 200]])
    with pytest.raises(UserError, match=r"batch_tokens=419 is too few: 2 micro-batches a step and at most 210 tokens a sample"):
        TokenPlan(sizes, 419, parts=2)
    assert sorted(TokenPlan(sizes, 420, parts=2).epoch(0)[0]) == [0, 1]
