"""Learning rates and parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unislu_llm.config import TrainConfig
from unislu_llm.errors import UserError
from unislu_llm.training.optim import build_optimizer, factor, group_rates, set_rates


def test_warm_up_then_cosine_to_zero() -> None:
    values = [factor(step, warmup=10, total=110) for step in range(111)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[110] == pytest.approx(0.0)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_groups_have_their_rates() -> None:
    net, adapter = nn.Linear(3, 2), nn.Parameter(torch.ones(2, 2))
    config = TrainConfig(warmup_steps=10)
    groups = {"projector": list(net.named_parameters()), "lora": [("x", adapter)]}
    optimizer = build_optimizer(groups, config)
    assert [(g["name"], g["peak"]) for g in optimizer.param_groups] == [
        ("projector", config.lr.projector), ("lora", config.lr.lora)]
    set_rates(optimizer, config, 0, total=100)
    assert group_rates(optimizer)["lr_lora"] == pytest.approx(config.lr.lora / 10)
    set_rates(optimizer, config, 1, total=8)  # of a short run a quarter warms up
    assert group_rates(optimizer)["lr_lora"] == config.lr.lora


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing trains"):
        build_optimizer({}, TrainConfig())
