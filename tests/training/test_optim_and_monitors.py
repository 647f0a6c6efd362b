"""Schedule, parameter groups, and the names of what goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.config import TrainConfig
from unislu_llm.training.monitors import validation_warnings
from unislu_llm.training.optim import build_optimizer, build_schedule, factor, group_rates


def test_warm_up_then_cosine_to_zero() -> None:
    values = [factor(s, kind="cosine", warmup=10, total=110) for s in range(111)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[110] == pytest.approx(0.0)
    assert values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize(("kind", "end"), [("linear", 0.0), ("constant", 1.0)])
def test_other_schedules(kind: str, end: float) -> None:
    assert factor(100, kind=kind, warmup=10, total=100) == pytest.approx(end)


def test_groups_have_their_rates_and_vectors_no_decay() -> None:
    net = nn.Linear(3, 2)
    config = TrainConfig(weight_decay=0.1)
    adapter = nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer({"projector": list(net.named_parameters()), "lora": [("x", adapter)]}, config)
    assert {(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        ("projector", config.lr.projector, 0.1), ("projector", config.lr.projector, 0.0), ("lora", config.lr.lora, 0.1)}
    build_schedule(optimizer, config, total_steps=100)
    assert group_rates(optimizer)["lora"] < config.lr.lora  # warming up


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing trains"):
        build_optimizer({}, TrainConfig())


def row(task: str, hyp: Any, ref: Any = None, problems: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"task": task, "hyp": hyp, "ref": ref, "problems": list(problems)}


def test_monitors_name_each_failure_once_it_occurs_and_not_before() -> None:
    registry = TaskRegistry()
    fine = [row("sa", "Positive", "Positive"), row("sa", "Negative", "Negative")] * 6 + [row("ner", [], [])] * 4
    history = [{"wer": 50.0 - i, "ner_f1": 10.0 + i} for i in range(4)]
    assert validation_warnings(history, fine, registry) == []
    one_class = [row("sa", "Neutral", r) for r in ("Positive", "Neutral", "Negative")] * 5
    assert any("one class only" in w for w in validation_warnings(history, one_class, registry))
    bare = [row("ner", None, [], ("missing_separator",))] * 10
    assert any("missing delimiter" in w for w in validation_warnings(history, bare, registry))
    stalled = [{"wer": 50.0 - 5 * i, "ner_f1": 10.0} for i in range(4)]
    assert any("stalls" in w for w in validation_warnings(stalled, fine, registry))
    endless = [row("ner", [], [], ("no_end",))] * 10
    assert any("no end" in w for w in validation_warnings(history, endless, registry))
