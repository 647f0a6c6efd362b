"""Losses that balance a long transcript against short task outputs (UniSLU, arXiv 2507.12951).

Every mode comes down to one weight a token: `loss = sum(weight * CE) / normalizer`. The normalizer
is taken over the *global* batch, that is, over all micro-batches and all processes. Partial sums
over the same normalizer add up to the loss of the whole, so the loss is exact under gradient
accumulation and distribution.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

ASR_PART, TASK_PART, NO_PART = 0, 1, -1
"""Part of a target token: transcript (with `[T/L]` and the control token), task output (with the
end of text), or padding."""

LossMode = Literal["dynamic", "fixed", "uniform"]


class TokenCounts(NamedTuple):
    """Supervised tokens of a (global) batch. Those of micro-batches add up."""

    asr: float
    task: float

    @classmethod
    def of(cls, parts: Tensor) -> TokenCounts:
        """Count the parts `(batch, length)` of one micro-batch."""
        return cls(float((parts == ASR_PART).sum()), float((parts == TASK_PART).sum()))


def asr_share(n_asr: float, n_task: float) -> float:
    """`W_asr = n_task / (n_asr + n_task)` of one sample; 1 for a sample without a task part."""
    return n_task / (n_asr + n_task) if n_task else 1.0


def token_weights(parts: Tensor, mode: LossMode, total: TokenCounts, dtype: torch.dtype) -> Tensor:
    """Weight of every target token with the normalizer in it, `(batch, length)`; 0 at padding.

    * `dynamic`: per sample, `L_i = W_asr * mean CE_asr + W_task * mean CE_task`, and samples are
      weighted by their length `T_i`. So an asr token weighs `n_task / n_asr` and a task token
      `n_asr / n_task`, over `sum T`. A sample without a task part has plain cross-entropy.
    * `fixed`: `0.5 * mean CE_asr + 0.5 * mean CE_task` over the batch; the plain mean where one
      part is absent.
    * `uniform`: the plain mean over all tokens.

    `parts` are those of the tokens, `(batch, length)`; `total` counts the global batch that they
    are a part of.
    """
    # Counts of tokens are small integers, which fp32 holds exactly; Apple GPUs have no float64.
    asr, task = (parts == ASR_PART).to(dtype), (parts == TASK_PART).to(dtype)
    tokens = max(total.asr + total.task, 1.0)
    if mode == "uniform":
        return (asr + task) / tokens
    if mode == "fixed":
        share = 0.5 if total.asr and total.task else 1.0
        return asr * (share / max(total.asr, 1.0)) + task * (share / max(total.task, 1.0))
    n_asr, n_task = asr.sum(-1, keepdim=True), task.sum(-1, keepdim=True)
    # With one part alone its share would be 0 or its count 0: it has plain cross-entropy instead.
    alone = (n_task == 0) | (n_asr == 0)
    w_asr = torch.where(alone, 1.0, n_task / n_asr.clamp(min=1))
    w_task = torch.where(alone, 1.0, n_asr / n_task.clamp(min=1))
    return (asr * w_asr + task * w_task) / tokens


def weighted_loss(token_losses: Tensor, parts: Tensor, mode: LossMode,
                  total: TokenCounts | None = None) -> Tensor:
    """This batch's term of the global loss, a scalar.

    Args:
        token_losses: cross-entropy of each target token, nats, `(batch, length)`.
        parts: part of each token, `(batch, length)`: `ASR_PART`, `TASK_PART` or `NO_PART`.
        mode: which loss.
        total: counts of the global batch; default: this batch is the whole.
    """
    exact = torch.promote_types(token_losses.dtype, torch.float32)
    weights = token_weights(parts, mode, total or TokenCounts.of(parts), exact)
    weights = weights.to(token_losses.dtype)
    # What stands at padding is filled first: a weight of 0 times a NaN is a NaN, in the gradient
    # as well.
    return (weights * token_losses.masked_fill(parts == NO_PART, 0.0)).sum()
