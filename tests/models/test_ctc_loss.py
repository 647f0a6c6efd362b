"""The subset CTC loss is CTC over the whole vocabulary, value and gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.models.ctc_loss import ctc_loss, sample_classes, subset_ctc

V, T = 11, 14
TARGETS = [[3, 3, 7, 1], [5], [2, 9, 2, 2]]
LENGTHS = [14, 3, 9]


def pick(states: Tensor, classes: Tensor) -> Tensor:
    """Stands for `CTCProjector.logits`: states are the logits themselves."""
    return states[:, torch.cat([torch.zeros(1, dtype=torch.long), classes])]


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


def brute_force(log_probs: Tensor, target: list[int]) -> Tensor:
    """-log of the sum over every path, by autograd alone."""
    steps, classes = log_probs.shape
    paths = torch.cartesian_prod(*[torch.arange(classes)] * steps)
    keep = [i for i, path in enumerate(paths)
            if [c for c in torch.unique_consecutive(path).tolist() if c] == target]
    return -log_probs[torch.arange(steps), paths[keep]].sum(-1).logsumexp(0)


def test_gradient_is_exact_where_mass_lies_outside_of_the_subset() -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 9, generator=draw, dtype=torch.float64).requires_grad_()
    subset, target = scores.log_softmax(-1)[:, :3], torch.tensor([1, 2, 2])
    loss = subset_ctc(subset[None], [target], [5])[0]
    expected = brute_force(subset, [1, 2, 2])
    torch.testing.assert_close(loss, expected)
    mine, = torch.autograd.grad(loss, scores, retain_graph=True)
    right, = torch.autograd.grad(expected, scores, retain_graph=True)
    torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-8)
    plain = F.ctc_loss(subset[:, None], target[None], torch.tensor([5]), torch.tensor([3]),
                       reduction="sum")
    torchs, = torch.autograd.grad(plain, scores)
    assert float((torchs - right).abs().max()) > 1e-3, "torch's own would do: drop the correction"


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
    draw = torch.Generator().manual_seed(0)
    scores = random_scores().detach()[0, 0]
    totals = []
    for _ in range(3000):
        classes, shift = sample_classes([3, 7], V, 4, draw)
        assert classes[:2].tolist() == [3, 7]
        assert len(set(classes.tolist())) == 6
        totals.append(scores[classes[:2]].exp().sum() + (scores[classes[2:]] + shift).exp().sum())
    mean = float(torch.stack(totals).mean())
    assert mean == pytest.approx(float(scores[1:].exp().sum()), rel=0.03)

    def seeded(draw: Callable[[], torch.Generator | None]) -> list[list[int]]:
        return [sample_classes([3], V, 4, draw())[0].tolist() for _ in range(2)]

    same = seeded(lambda: torch.Generator().manual_seed(5))
    assert same[0] == same[1]
    own = seeded(lambda: torch.manual_seed(5) and None)  # torch's own, which a run restores
    assert own[0] == own[1]
