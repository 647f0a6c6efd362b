"""The subset CTC loss is CTC over the whole vocabulary, value and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.models.ctc_loss import ctc_loss, sample_classes

V, T = 11, 14
TARGETS = [[3, 3, 7, 1], [5], [2, 9, 2, 2]]
LENGTHS = [14, 3, 9]


def pick(states: Tensor, classes: Tensor) -> Tensor:
    """Stands for `CTCProjector.logits`: states are the logits themselves."""
    return states[..., torch.cat([torch.zeros(1, dtype=torch.long), classes])]


def full(scores: Tensor, targets: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    return F.ctc_loss(scores.log_softmax(-1).transpose(0, 1),
                      torch.tensor([c for row in targets for c in row]), torch.tensor(lengths),
                      torch.tensor([len(row) for row in targets]), reduction="none",
                      zero_infinity=True)


def random_scores(dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(3, T, V + 1, generator=draw, dtype=dtype).mul(2).requires_grad_()


def test_with_the_whole_vocabulary_it_is_the_full_loss() -> None:
    scores, same = random_scores(), random_scores()
    losses = ctc_loss(scores, LENGTHS, TARGETS, pick, V, samples=V)
    expected = full(same, TARGETS, LENGTHS)
    weights = torch.tensor([1.0, 0.3, 2.0])
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.grad, same.grad, rtol=1e-6, atol=1e-6)
    assert scores.grad is not None
    assert scores.grad[:, :, [4, 6, 8, 10]].any(), "tokens of no target are pushed down as well"


def test_with_a_sample_the_gradient_is_that_of_what_is_computed() -> None:
    """torch's backward is right for a log-softmax over just the classes that it is given."""
    scores = random_scores()

    def loss(values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ctc_loss(values, LENGTHS, TARGETS, pick, V, samples=2)

    assert torch.autograd.gradcheck(loss, (scores,), eps=1e-6, atol=1e-6)


def test_targets_that_do_not_fit_cost_nothing() -> None:
    """[4, 4] needs three frames."""
    scores = random_scores(torch.float32)
    losses = ctc_loss(scores, [2, 3, 2], [[4, 4], [4, 4], []], pick, V, samples=3)
    assert losses[0] == 0
    assert (losses[1:] > 0).all()
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[0].any()
    assert not scores.grad[1, 3:].any()


def test_a_sample_follows_its_seed_and_estimates_the_normalizer_without_bias() -> None:
    torch.manual_seed(0)
    scores = random_scores().detach()[0, 0]
    totals = []
    for _ in range(3000):
        classes, logs = sample_classes([3, 7], V, 4)
        assert classes[:2].tolist() == [3, 7]
        assert len(set(classes.tolist())) == 6
        assert not logs[:3].any(), "blank and the targets' own stand for themselves"
        totals.append((scores[classes] + logs[1:]).exp().sum())
    mean = float(torch.stack(totals).mean())
    assert mean == pytest.approx(float(scores[1:].exp().sum()), rel=0.03)

    def seeded() -> list[int]:
        torch.manual_seed(5)  # torch's own generator, which a resumed run restores
        return sample_classes([3], V, 4)[0].tolist()

    assert seeded() == seeded()
