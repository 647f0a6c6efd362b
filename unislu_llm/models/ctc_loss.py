"""CTC over a large vocabulary at the cost of a small one.

A path through a target's lattice only visits the target's own tokens and blank, so the dynamic programme needs no other classes.
The rest of the vocabulary matters in each frame's normalizer alone, which tokens of the batch and a sample of others estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.models.ctc import BLANK
from unislu_llm.models.encoder import valid_mask


@dataclass(frozen=True)
class CtcLoss:
    """Result of :func:`ctc_loss`.

    Attributes:
        losses: `(batch,)` in nats, zero where infeasible. infeasible: targets with more tokens than their frames hold.
    """

    losses: Tensor
    infeasible: int


def sample_classes(targets: Sequence[Sequence[int]], size: int, samples: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Classes of a batch's normalizer: those of its targets, and a uniform sample of the others.

    Args:
        targets: classes 1 .. size of each clip. size: of the vocabulary, without blank. samples: of the other classes, at most.
        generator: on the CPU.

    Returns:
        the classes, the targets' own first, and the logarithm of how many others each sampled one stands for: added to
        their logits it makes the estimate of the normalizer unbiased.
    """
    own = torch.tensor(sorted({int(c) for row in targets for c in row}), dtype=torch.long)
    rest = torch.ones(size + 1, dtype=torch.bool)
    rest[BLANK] = False
    rest[own] = False
    others = rest.nonzero()[:, 0]
    if len(others) > samples:
        picked = others[torch.randperm(len(others), generator=generator)[:samples]]
        return torch.cat([own, picked]), math.log(len(others) / max(samples, 1))
    return torch.cat([own, others]), 0.0


def ctc_loss(states: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]], logits: Callable[[Tensor, Tensor], Tensor],
             size: int, samples: int = 700, generator: torch.Generator | None = None) -> CtcLoss:
    """CTC of each clip in fp32 with a sampled softmax; exact where the sample is the whole vocabulary.

    Args:
        states: `(batch, T, hidden)`. lengths: `(batch,)`.
        targets: classes 1 .. size of each clip.
        logits: `((n, hidden), classes (m,)) -> (n, 1 + m)`, blank first, as :meth:`CTCProjector.logits`.
        size: of the vocabulary. samples: classes beside the batch's own that enter the normalizer.
        generator: of the sample; default: seeded with 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    classes, shift = sample_classes(targets, size, samples, generator)
    own = len({int(c) for row in targets for c in row})
    inside = valid_mask(lengths, states.shape[1])
    scores = logits(states[inside], classes.to(states.device))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    offset = scores.new_zeros(scores.shape[-1])
    offset[1 + own:] = shift
    normalizer = (scores + offset).logsumexp(-1, keepdim=True)
    place = {int(c): i + 1 for i, c in enumerate(classes[:own].tolist())}
    columns, labels = zip(*(_local(row, place) for row in targets), strict=True)
    chosen = pad_sequence(list(columns), batch_first=True).to(states.device)  # 0, blank, fills up: no label points there
    clip = torch.arange(len(targets), device=states.device)[:, None].expand_as(inside)[inside]
    picked = scores.gather(1, chosen[clip]) - normalizer
    log_probs = picked.new_zeros(*inside.shape, chosen.shape[-1]).masked_scatter(inside[:, :, None], picked)
    feasible = torch.tensor([_frames_needed(row) for row in targets], device=states.device) <= lengths
    target = pad_sequence(list(labels), batch_first=True, padding_value=1).to(states.device)
    n_target = torch.tensor([len(row) for row in targets], device=states.device)
    losses = subset_ctc(log_probs, target, lengths, n_target)
    return CtcLoss(losses.where(feasible, losses.new_zeros(())), int((~feasible).sum()))


def subset_ctc(log_probs: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC over some of the classes of a distribution, with the gradient of what it computes.

    torch's backward gives `p - occupancy` for the gradient by `log p`, which is right only under a log-softmax over the very
    classes that it is given: there the surplus `p` sums to one and falls out. Over a subset it does not. Here a term of value
    zero and gradient `-p` takes the surplus away, whatever normalised the probabilities.

    Args:
        log_probs: `(batch, T, classes)`, blank first. targets: `(batch, L)`. lengths, target_lengths: `(batch,)`.

    Returns:
        `(batch,)` in nats; zero, with zero gradient, where no path exists.
    """
    losses = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, blank=BLANK, reduction="none",
                        zero_infinity=True)
    mass = log_probs.exp().masked_fill(~valid_mask(lengths, log_probs.shape[1])[:, :, None], 0.0).sum((1, 2))
    surplus = mass - mass.detach()
    return losses - surplus.where(losses.detach() > 0, torch.zeros_like(surplus))


def _local(row: Sequence[int], place: dict[int, int]) -> tuple[Tensor, Tensor]:
    """Columns that one clip needs, blank first, and its target in their numbers."""
    own = sorted(set(row))
    number = {c: i + 1 for i, c in enumerate(own)}
    return torch.tensor([BLANK, *(place[c] for c in own)]), torch.tensor([number[c] for c in row], dtype=torch.long)


def _frames_needed(row: Sequence[int]) -> int:
    """Frames of the shortest path: one a token, and a blank between equal ones."""
    return len(row) + sum(a == b for a, b in pairwise(row))
