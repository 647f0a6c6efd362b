"""Figures of a training step: sums that add up over micro-batches and processes, and what the log makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unislu_llm.data.audio import MEL_RATE
from unislu_llm.data.collate import Batch
from unislu_llm.loss import ASR_PART, TASK_PART, sample_shares
from unislu_llm.tasks import TaskRegistry


def sum_names(registry: TaskRegistry) -> list[str]:
    """Names of the sums of :func:`micro_sums`, in its order."""
    return ["loss", "asr", "task", "n_asr", "n_task", "w_asr", "tasked", "n_mel", "filled",
            *(f"{kind}_{t.name}" for t in registry for kind in ("sum", "n"))]


def micro_sums(losses: Tensor, loss: Tensor, batch: Batch, registry: TaskRegistry, floor: float) -> Tensor:
    """Sums over one micro-batch, `(sums,)` in double precision on the CPU, in the order of :func:`sum_names`.

    Args:
        losses: cross-entropy of each target token, `(batch, L)` in nats. loss: the micro-batch's term of the global loss.
        batch: on the CPU. floor: least share of the transcript, see :func:`unislu_llm.loss.sample_shares`.
    """
    parts, cpu = batch.target_parts, losses.double().cpu()
    is_task, is_asr = parts == TASK_PART, parts == ASR_PART
    shares, tasked = sample_shares(parts, floor)[0], is_task.any(-1)
    sums: list[Any] = [float(loss), cpu[is_asr].sum(), cpu[is_task].sum(), is_asr.sum(), is_task.sum(), shares[tasked].sum(),
            tasked.sum(), batch.mel_lengths.sum(), 1.0 - batch.padding_share]
    for task in registry:
        mine = is_task & torch.tensor([s.task == task.name for s in batch.samples])[:, None]
        sums += [cpu[mine].sum(), mine.sum()]
    return torch.tensor([float(v) for v in sums], dtype=torch.float64)


def read_sums(sums: Tensor, registry: TaskRegistry, micro_batches: int) -> dict[str, float]:
    """What the log says of a step.

    Args:
        sums: `(sums,)` of :func:`micro_sums`, added up over all micro-batches of all processes. micro_batches: how many.

    Returns:
        Losses in nats a token (`loss` is the weighted one), `w_asr` and `w_task`, target tokens, seconds of audio, and the
        share of padding.
    """
    values = dict(zip(sum_names(registry), sums.tolist(), strict=True))
    figures = {"loss": values["loss"], "loss_asr": values["asr"] / max(values["n_asr"], 1),
               "tokens": values["n_asr"] + values["n_task"], "audio_seconds": values["n_mel"] / MEL_RATE,
               "padding": 1.0 - values["filled"] / micro_batches}
    if values["n_task"]:
        w_asr = values["w_asr"] / values["tasked"]
        figures |= {"loss_task": values["task"] / values["n_task"], "w_asr": w_asr, "w_task": 1.0 - w_asr}
    return figures | {f"loss_{t.name}": values[f"sum_{t.name}"] / values[f"n_{t.name}"] for t in registry
                      if values[f"n_{t.name}"]}
