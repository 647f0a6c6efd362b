"""CTC over a large vocabulary at the cost of a small one.

A path through a target's lattice only visits the target's own tokens and blank. The rest of the
vocabulary matters in each frame's normalizer alone, which the tokens of the batch and a sample of
others estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.models.ctc import BLANK

# Classes beside the batch's own that enter a normalizer. With all 8,558 of a vocabulary a CPU takes
# half as long again for a step of the projector.
SAMPLES = 700


def sample_classes(own: Sequence[int], size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Classes `(m,)` of a batch's normalizer: `own`, those of its targets, and a sample of others.

    Also `(1 + m,)`, blank first, the logarithm of how many classes each stands for: added to their
    logits it makes the estimate of the normalizer unbiased.
    """
    rest = torch.ones(size + 1, dtype=torch.bool)
    rest[[BLANK, *own]] = False
    others, share = rest.nonzero()[:, 0], 1.0
    if len(others) > samples:
        share = len(others) / max(samples, 1)
        others = others[torch.randperm(len(others))[:samples]]
    classes = torch.cat([torch.tensor(own, dtype=torch.long), others])
    logs = torch.zeros(1 + len(classes))
    logs[1 + len(own):] = math.log(share)
    return classes, logs


def ctc_loss(states: Tensor, lengths: Sequence[int], targets: Sequence[Sequence[int]],
             logits: Callable[[Tensor, Tensor], Tensor], size: int, samples: int) -> Tensor:
    """CTC `(batch,)` in nats with a sampled softmax; exact where the sample is everything.

    Zero where a target has more tokens than its frames hold.

    Args:
        states: `(batch, T, hidden)`, of which `lengths` count.
        targets: classes 1 .. `size` of each clip.
        logits: `(states, classes (m,)) -> (batch, T, 1 + m)`, as :meth:`CTCProjector.logits`.
        samples: classes beside the batch's own that enter the normalizer.
    """
    device, own = states.device, sorted({c for row in targets for c in row})
    classes, logs = sample_classes(own, size, samples)
    scores = logits(states, classes.to(device, non_blocking=True))
    scores = scores + logs.to(device, scores.dtype, non_blocking=True)
    log_probs = scores - scores.logsumexp(-1, keepdim=True)
    # Targets in numbers of the classes that are left; own ones come first.
    number = {c: i for i, c in enumerate(own, 1)}
    labels = pad_sequence([torch.tensor([number[c] for c in row], dtype=torch.long)
                           for row in targets], batch_first=True, padding_value=1)
    # Lengths stay on the CPU, where torch reads them.
    return F.ctc_loss(log_probs.transpose(0, 1), labels.to(device, non_blocking=True),
                      torch.tensor(list(lengths)), torch.tensor([len(row) for row in targets]),
                      blank=BLANK, reduction="none", zero_infinity=True)
