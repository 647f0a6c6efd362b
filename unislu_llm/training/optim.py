"""Optimizer and learning rates: Adam, a linear warm-up, a cosine to zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from unislu_llm.config import TrainConfig
from unislu_llm.errors import UserError

Groups = dict[str, list[tuple[str, nn.Parameter]]]


def build_optimizer(groups: Groups, config: TrainConfig) -> Adam:
    """Adam with a rate for each group of `trainable_groups`; raises UserError: nothing trains."""
    if not any(groups.values()):
        raise UserError("nothing trains: every part is frozen; check model.encoder_mode, "
                        "model.decoder_mode, model.lora.rank and train.groups")
    # Without weight decay, which adapters of a frozen model do not need, AdamW is Adam.
    params: Any = [{"params": [p for _, p in named], "name": name, "peak": getattr(config.lr, name)}
                   for name, named in groups.items()]
    return Adam(params, betas=(0.9, 0.98), fused=torch.cuda.is_available())


def factor(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate for the step after `step` steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_rates(optimizer: Optimizer, config: TrainConfig, step: int, total: int) -> None:
    """Learning rates of all groups for the step after `step` of `total` steps."""
    # From these numbers alone: there is no schedule whose state could be lost. The warm-up takes
    # at most a quarter of a short run.
    share = factor(step, min(config.warmup_steps, total // 4), total)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def group_rates(optimizer: Optimizer) -> dict[str, float]:
    """Current learning rates, `lr_<group>`."""
    return {f"lr_{group['name']}": float(group["lr"]) for group in optimizer.param_groups}
