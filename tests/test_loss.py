"""The losses against hand-computed values and against the paper's formula."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unislu_llm.loss import (
    ASR_PART,
    NO_PART,
    TASK_PART,
    LossMode,
    TokenCounts,
    asr_share,
    token_weights,
    weighted_loss,
)

A, T, N = ASR_PART, TASK_PART, NO_PART
MODES: tuple[LossMode, ...] = get_args(LossMode)


def parts_of(sizes: list[tuple[int, int]]) -> Tensor:
    """`(batch, length)` parts of samples with so many transcript and task tokens, padded."""
    width = max(a + t for a, t in sizes)
    return torch.tensor([[A] * a + [T] * t + [N] * (width - a - t) for a, t in sizes])


SIZES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)).filter(any), min_size=1,
                 max_size=6)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Cross-entropies in double precision and parts, both `(batch, length)`."""
    parts = parts_of(draw(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(parts.shape, generator=generator, dtype=torch.float64) * 10, parts


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paper(losses: Tensor, parts: Tensor) -> float:
    """`sum_i (n_asr_i meanCE_task_i + n_task_i meanCE_asr_i) / sum_i T_i`.

    A sample of one part alone has plain cross-entropy.
    """
    total = 0.0
    for row, of in zip(losses, parts, strict=True):
        asr, task = row[of == A].tolist(), row[of == T].tolist()
        both = asr and task
        total += len(asr) * mean(task) + len(task) * mean(asr) if both else sum(asr) + sum(task)
    return total / int((parts != N).sum())


def test_dynamic_by_hand() -> None:
    # 4 transcript and 2 task tokens: a transcript token weighs 2/4, a task token 4/2, over the
    # 6 + 3 of the batch.
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 9.0, 0.0, 0.0, 0.0]])
    parts = torch.tensor([[A, A, A, A, T, T], [A, A, T, N, N, N]])
    expected = (0.5 * (1 + 2 + 3 + 4) + 2 * (5 + 6) + 0.5 * (1 + 1) + 2 * 9) / 9
    assert float(weighted_loss(losses, parts, "dynamic")) == pytest.approx(expected)
    weights = token_weights(parts, "dynamic", TokenCounts.of(parts), torch.float32)
    assert (weights * 9).flatten().tolist() == pytest.approx(
        [0.5, 0.5, 0.5, 0.5, 2, 2, 0.5, 0.5, 2, 0, 0, 0])


def test_the_share_of_a_short_task_part() -> None:
    """The paper's consequence: empty NER leaves the transcript 0.02, four task tokens 0.09."""
    assert [asr_share(40, n) for n in (1, 4, 0)] == pytest.approx([1 / 41, 4 / 44, 1.0])
    weights = token_weights(parts_of([(40, 4)]), "dynamic", TokenCounts(40, 4), torch.float32)
    assert float(weights[0, :40].sum()) == pytest.approx(4 / 44)


@settings(deadline=None)
@given(batches())
def test_every_loss_is_its_formula(batch: tuple[Tensor, Tensor]) -> None:
    losses, parts = batch
    asr, task = losses[parts == A].tolist(), losses[parts == T].tolist()
    fixed = 0.5 * mean(asr) + 0.5 * mean(task) if asr and task else mean(asr + task)
    expected = {"dynamic": paper(losses, parts), "fixed": fixed, "uniform": mean(asr + task)}
    assert {mode: float(weighted_loss(losses, parts, mode)) for mode in MODES} == pytest.approx(
        expected, rel=1e-9)


@settings(deadline=None)
@given(batches(), st.sampled_from(MODES), st.data())
def test_micro_batches_add_up_to_the_whole(batch: tuple[Tensor, Tensor], mode: LossMode,
                                           data: st.DataObject) -> None:
    losses, parts = batch
    cuts = sorted(data.draw(st.sets(st.integers(1, len(parts)), max_size=3)) | {0, len(parts)})
    bounds = list(pairwise(cuts))
    total = TokenCounts.of(parts)
    assert total == (int((parts == A).sum()), int((parts == T).sum()))
    whole = losses.clone().requires_grad_()
    value = weighted_loss(whole, parts, mode)
    value.backward()
    micro = losses.clone().requires_grad_()
    summed = 0.0
    for a, b in bounds:
        width = int((parts[a:b] != N).sum(-1).max())  # a micro-batch is padded to its own longest
        part = weighted_loss(micro[a:b, :width], parts[a:b, :width], mode, total)
        part.backward()
        summed += float(part.detach())
    assert summed == pytest.approx(float(value.detach()), rel=1e-9)
    assert whole.grad is not None
    assert micro.grad is not None
    torch.testing.assert_close(micro.grad, whole.grad, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(batches(), st.sampled_from(MODES), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_garbage_at_padding_does_not_enter(batch: tuple[Tensor, Tensor], mode: LossMode,
                                           garbage: float) -> None:
    losses, parts = batch
    clean = losses.clone().requires_grad_()
    weighted_loss(clean, parts, mode).backward()
    dirty = losses.masked_fill(parts == N, garbage).requires_grad_()
    loss = weighted_loss(dirty, parts, mode)
    loss.backward()
    assert float(loss.detach()) == float(weighted_loss(losses, parts, mode))
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(dirty.grad, clean.grad)
    assert not dirty.grad[parts == N].any()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_micro_batch_is_zero(mode: LossMode) -> None:
    """A rank whose micro-batch holds nothing but padding adds nothing, and no NaN."""
    parts = torch.full((2, 3), N)
    assert float(weighted_loss(torch.rand(2, 3), parts, mode)) == 0.0
    assert float(weighted_loss(torch.rand(2, 3), parts, mode, TokenCounts(7, 3))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_has_the_type_of_the_cross_entropies(dtype: torch.dtype) -> None:
    losses = torch.ones(1, 3, dtype=dtype)
    assert weighted_loss(losses, parts_of([(2, 1)]), "dynamic").dtype == dtype
