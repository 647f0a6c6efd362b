"""Learning rates, parameter groups, and the names of what goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unislu_llm.config import TrainConfig
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.diagnostics import validation_warnings
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


def row(task: str, hyp: Any, ref: Any = None, problems: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"task": task, "hyp": hyp, "ref": ref, "problems": list(problems)}


FINE = [row("sa", "Positive", "Positive"), row("sa", "Negative", "Negative")] * 6 + [
    row("ner", [], [])] * 4
LEARNS = [{"wer": 50.0 - i, "ner_f1": 10.0 + i} for i in range(4)]
STALLS = [{"wer": 50.0 - 5 * i, "ner_f1": 10.0} for i in range(4)]


@pytest.mark.parametrize(("history", "predictions", "message"), [
    (LEARNS, FINE, None),
    (LEARNS, [row("sa", "Neutral", r) for r in ("Positive", "Neutral", "Negative")] * 5,
     "one class only"),
    (LEARNS, [row("ner", None, [], ("missing_separator",))] * 10, "missing delimiter"),
    (STALLS, FINE, "ner stalls"),
    ([{"wer": 99.0}, {"wer": 91.0}], FINE, "hardly a word is right (WER 91.0)"),
    ([{"wer": 99.0}], FINE, None),
    (LEARNS, [row("ner", [], [], ("no_end",))] * 10, "no end"),
    (LEARNS[:1], [row("ner", None, [], ("missing_separator", "no_end"))] * 10, None),
])
def test_each_failure_is_named_once_it_occurs_and_no_other(
        history: list[dict[str, float]], predictions: list[dict[str, Any]],
        message: str | None) -> None:
    found = validation_warnings(history, predictions, TaskRegistry())
    assert len(found) == (message is not None)
    assert message is None or message in found[0]
