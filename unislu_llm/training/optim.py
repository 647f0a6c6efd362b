"""Optimizer and learning-rate schedule: AdamW with one learning rate a parameter group."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from unislu_llm.errors import UserError
from unislu_llm.training.config import LearningRates, TrainConfig

Groups = dict[str, list[tuple[str, nn.Parameter]]]


def build_optimizer(groups: Groups, config: TrainConfig) -> AdamW:
    """AdamW over named groups; vectors (norms, biases) are never decayed.

    Args:
        groups: parameters by group name, as a model's `trainable_groups` gives them.
        config: learning rates and weight decay.

    Raises:
        UserError: nothing trains.
    """
    if not any(groups.values()):
        raise UserError("nothing trains: every part is frozen; check model.*_mode and model.lora.rank")
    rates = dataclasses.asdict(config.lr)
    params = []
    for name, named in groups.items():
        for decay in (True, False):
            chosen = [p for _, p in named if (p.ndim > 1) == decay]
            if chosen:
                params.append({"params": chosen, "lr": rates[name], "name": name,
                               "weight_decay": config.weight_decay if decay else 0.0})
    return AdamW(params, betas=(0.9, 0.98), fused=torch.cuda.is_available())


def factor(step: int, *, kind: str, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine or linear decay to zero, or constant."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Schedule of all groups; the warm-up takes at most a quarter of a short run."""
    warmup = min(config.warmup_steps, total_steps // 4)
    return LambdaLR(optimizer, partial(factor, kind=config.schedule, warmup=warmup, total=total_steps))


def group_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Current learning rate by group name."""
    return {str(g["name"]): float(g["lr"]) for g in optimizer.param_groups}


__all__ = ["LearningRates", "build_optimizer", "build_schedule", "factor", "group_rates"]
