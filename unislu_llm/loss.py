"""Losses that balance a long transcript against short task outputs (UniSLU, arXiv 2507.12951).

Every mode comes down to one weight a token: `loss = sum(weight * CE) / normalizer`, with the normalizer taken over the
*global* batch (all micro-batches and all processes). That makes the loss exact under gradient accumulation and
distribution: partial sums over the same normalizer add up to the loss of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unislu_llm.errors import UserError

ASR_PART, TASK_PART, NO_PART = 0, 1, -1
"""Part of a target token: transcript (with `[T/L]` and the control token), task output (with EOS), or padding."""

LossMode = Literal["dynamic", "fixed", "uniform"]


@dataclass(frozen=True)
class Counts:
    """Supervised tokens of a (global) batch. Counts of micro-batches add up."""

    asr: float
    task: float

    @classmethod
    def of(cls, parts: Tensor) -> Counts:
        """Count the parts `(batch, length)` of one micro-batch."""
        return cls(float((parts == ASR_PART).sum()), float((parts == TASK_PART).sum()))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.asr + other.asr, self.task + other.task)


def floor_at(step: int, floor: float, steps: int) -> float:
    """Floor under the transcript's share at an optimizer step.

    Args:
        floor: where it ends, 0 to 1. steps: over so many steps it falls linearly from 1, the transcript alone; 0 is no
            schedule.
    """
    return floor if step >= steps else 1.0 + (floor - 1.0) * step / steps


def sample_shares(parts: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """`(W_asr, W_task)` of every sample in the dynamic loss, each `(batch,)`; a sample without task part has (1, 0).

    `W_asr = n_task / (n_asr + n_task)`, `W_task = 1 - W_asr`: the shorter part weighs more.

    Args:
        floor: least `W_asr`. The paper has none: a short task part leaves a long transcript next to nothing.
    """
    n_asr = (parts == ASR_PART).sum(-1).double()
    n_task = (parts == TASK_PART).sum(-1).double()
    w_asr = torch.where(n_task > 0, (n_task / (n_asr + n_task).clamp(min=1)).clamp(min=floor), torch.ones_like(n_asr))
    return w_asr, 1.0 - w_asr


def token_weights(parts: Tensor, mode: LossMode, total: Counts, floor: float = 0.0) -> Tensor:
    """Weight of every target token, normalizer included, `(batch, length)` in double precision; 0 at padding.

    * `dynamic`: per sample, `L_i = W_asr mean CE_asr + W_task mean CE_task`, samples weighted by their length `T_i`:
      an asr token weighs `n_task/n_asr`, a task token `n_asr/n_task`, over `sum T`. A sample without a task part has
      plain cross-entropy (weight 1 a token).
    * `fixed`: `0.5 * mean CE_asr + 0.5 * mean CE_task` over the batch; plain mean where one part is absent.
    * `uniform`: plain mean over all tokens.

    Args:
        parts: part of each token, `(batch, length)`, values :data:`ASR_PART`, :data:`TASK_PART`, :data:`NO_PART`.
        total: counts of the global batch that this one is a part of.
        floor: least share of the transcript, of every sample (`dynamic`) or of the batch (`fixed`); `uniform` has none.

    Raises:
        UserError: unknown mode.
    """
    asr, task = parts == ASR_PART, parts == TASK_PART
    if mode == "uniform":
        return (asr | task).double() / max(total.asr + total.task, 1.0)
    if mode == "fixed":
        most = max(0.5, floor)
        share_asr, share_task = (most, 1.0 - most) if total.asr and total.task else (1.0, 1.0)
        return asr.double() * (share_asr / max(total.asr, 1.0)) + task.double() * (share_task / max(total.task, 1.0))
    if mode != "dynamic":
        raise UserError(f"unknown loss '{mode}'; known: {', '.join(get_args(LossMode))}")
    n_asr, n_task = asr.sum(-1, keepdim=True).double(), task.sum(-1, keepdim=True).double()
    alone = (n_task == 0) | (n_asr == 0)
    ones, length = torch.ones_like(n_asr), n_asr + n_task
    share = (n_task / length.clamp(min=1)).clamp(min=floor)
    w_asr = torch.where(alone, ones, share * length / n_asr.clamp(min=1))
    w_task = torch.where(alone, ones, (1.0 - share) * length / n_task.clamp(min=1))
    return (asr * w_asr + task * w_task) / max(total.asr + total.task, 1.0)


def weighted_loss(token_losses: Tensor, parts: Tensor, mode: LossMode, total: Counts | None = None,
                  floor: float = 0.0) -> Tensor:
    """This batch's term of the global loss, a scalar.

    Args:
        token_losses: cross-entropy of each target token, `(batch, length)`; values at padding do not count.
        parts: part of each token, `(batch, length)`.
        total: counts of the global batch; default: this batch is the whole.
        floor: least share of the transcript, see :func:`token_weights`.
    """
    weights = token_weights(parts, mode, total or Counts.of(parts), floor).to(token_losses.dtype)
    return (weights * token_losses.masked_fill(parts == NO_PART, 0.0)).sum()
