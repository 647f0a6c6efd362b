"""The subset CTC loss is CTC over the whole vocabulary, value and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.models.ctc_loss import ctc_loss, sample_classes, subset_ctc

V, T = 11, 14
TARGETS = [[3, 3, 7, 1], [5], [2, 9, 2, 2]]
LENGTHS = torch.tensor([14, 3, 9])


def table(scores: Tensor, lengths: Tensor) -> object:
    """Stands for `CTCProjector.logits`: states are the logits themselves."""
    return lambda states, classes: states[:, torch.cat([torch.zeros(1, dtype=torch.long), classes])]


def full(scores: Tensor, targets: Sequence[Sequence[int]], lengths: Tensor) -> Tensor:
    return F.ctc_loss(scores.log_softmax(-1).transpose(0, 1), torch.tensor([c for row in targets for c in row]), lengths,
                      torch.tensor([len(row) for row in targets]), reduction="none", zero_infinity=True)


def random_scores(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, T, V + 1, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(2).requires_grad_()


def test_with_the_whole_vocabulary_it_is_the_full_loss() -> None:
    scores, same = random_scores(), random_scores()
    result = ctc_loss(scores, LENGTHS, TARGETS, table(scores, LENGTHS), V, samples=V)
    expected = full(same, TARGETS, LENGTHS)
    weights = torch.tensor([1.0, 0.3, 2.0])
    (result.losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(result.losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.grad, same.grad, rtol=1e-6, atol=1e-6)
    assert scores.grad is not None
    assert scores.grad[:, :, [4, 6, 8, 10]].any(), "tokens of no target are pushed down as well"


def brute_force(log_probs: Tensor, target: list[int]) -> Tensor:
    """-log of the sum over every path, by autograd alone."""
    steps, classes = log_probs.shape
    paths = torch.cartesian_prod(*[torch.arange(classes)] * steps)
    keep = [i for i, path in enumerate(paths) if [c for c in torch.unique_consecutive(path).tolist() if c] == target]
    return -log_probs[torch.arange(steps), paths[keep]].sum(-1).logsumexp(0)


def test_gradient_is_exact_where_mass_lies_outside_of_the_subset() -> None:
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    subset = scores.log_softmax(-1)[:, :3]
    loss = subset_ctc(subset[None], torch.tensor([[1, 2, 2]]), torch.tensor([5]), torch.tensor([3]))[0]
    expected = brute_force(subset, [1, 2, 2])
    torch.testing.assert_close(loss, expected)
    mine, = torch.autograd.grad(loss, scores, retain_graph=True)
    right, = torch.autograd.grad(expected, scores, retain_graph=True)
    torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-8)
    plain = F.ctc_loss(subset[:, None], torch.tensor([[1, 2, 2]]), torch.tensor([5]), torch.tensor([3]), reduction="sum")
    torchs, = torch.autograd.grad(plain, scores)
    assert float((torchs - right).abs().max()) > 1e-3, "torch's own would do: the correction can go"


def test_targets_that_do_not_fit_cost_nothing_and_are_counted() -> None:
    """[4, 4] needs three frames."""
    scores = random_scores(torch.float32)
    lengths = torch.tensor([2, 3, 2])
    result = ctc_loss(scores, lengths, [[4, 4], [4, 4], []], table(scores, lengths), V, samples=3)
    assert result.infeasible == 1
    assert result.losses[0] == 0
    assert (result.losses[1:] > 0).all()
    result.losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[0].any()
    assert not scores.grad[1, 3:].any()


def test_the_loss_of_a_clip_does_not_depend_on_its_batch() -> None:
    scores = random_scores()
    together = ctc_loss(scores, LENGTHS, TARGETS, table(scores, LENGTHS), V, samples=V).losses
    for i, n in enumerate(LENGTHS.tolist()):
        alone = ctc_loss(scores[i:i + 1, :n], LENGTHS[i:i + 1], TARGETS[i:i + 1], table(scores, LENGTHS), V, samples=V).losses
        torch.testing.assert_close(alone[0], together[i])


def test_a_sample_is_seeded_and_estimates_the_normalizer_without_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = random_scores().detach()[0, 0]
    totals = []
    for _ in range(3000):
        classes, shift = sample_classes([[3, 7]], V, 4, draw)
        assert classes[:2].tolist() == [3, 7]
        assert len(set(classes.tolist())) == 6
        totals.append(scores[classes[:2]].exp().sum() + (scores[classes[2:]] + shift).exp().sum())
    assert float(torch.stack(totals).mean()) == pytest.approx(float(scores[1:].exp().sum()), rel=0.03)
    again = [sample_classes([[3]], V, 4, torch.Generator().manual_seed(5))[0].tolist() for _ in range(2)]
    assert again[0] == again[1]
