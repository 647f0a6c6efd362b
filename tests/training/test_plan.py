"""`--plan`: what is counted on shapes is what a run does, and no weights are needed for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unislu_llm.config import Config
from unislu_llm.data.loading import load_examples
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.build import build_model
from unislu_llm.training.plan import cost, memory, plan, shapes_alone

Make = Callable[..., Config]


def batch_of(model: SLUModel, config: Config) -> Any:
    examples = load_examples(config.data.train, TaskRegistry())[:4]
    return model.collator().from_waves(examples, [torch.zeros(16_000 + 900 * i) for i in range(4)])


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_counted_flops_and_bytes_are_those_of_the_model(kind: str, tiny_config: Make) -> None:
    config = tiny_config(model={"attention": "eager"} if kind == "speech_llm" else {})
    with shapes_alone():
        shapes = build_model(kind, config, TaskRegistry())
    assert all(p.is_meta for p in shapes.parameters())
    real = build_model(kind, config, TaskRegistry()).to(torch.bfloat16).train()
    for model in (shapes, real):  # torch does not count fused attention on a CPU
        for part in (model.lm, model.encoder.whisper):
            part.set_attn_implementation("eager")
    found = cost(shapes, batch_of(shapes, config))
    batch = batch_of(real, config)
    with FlopCounterMode(display=False) as count:
        loss = real(batch).sum()
    assert found.forward == count.get_total_flops() > 1e6
    with count:  # counts anew
        loss.backward()
    assert found.backward == count.get_total_flops() > 1e6
    assert found.kept > 4 * 50 * 32 * 2  # frames of the encoder alone


def test_checkpointing_computes_more_and_keeps_less(tiny_config: Make) -> None:
    costs = []
    for again in (False, True):
        config = tiny_config(train={"gradient_checkpointing": again})
        with shapes_alone():
            model = build_model("speech_llm", config, TaskRegistry())
        costs.append(cost(model, batch_of(model, config)))
    assert costs[1].forward == costs[0].forward
    assert costs[1].backward > costs[0].backward
    assert costs[1].kept < costs[0].kept


def test_shards_and_fewer_bits_take_less_memory(tiny_config: Make) -> None:
    config = tiny_config()
    with shapes_alone():
        model = build_model("speech_llm", config, TaskRegistry())
    found = cost(model, batch_of(model, config))
    assert memory(model, found, 1) > memory(model, found, 1, 4.13)
    assert memory(model, found, 2) > memory(model, found, 64)
    frozen = sum(2 * p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(16 * p.numel() for p in model.parameters() if p.requires_grad)
    assert memory(model, found) * 2**30 == pytest.approx(
        frozen + trained + found.kept + found.logits + 2**30, rel=1e-9)


@pytest.mark.parametrize("projector", ["mlp", "ctc", "none"])
def test_a_plan_needs_no_weights_and_writes_nothing(projector: str, tiny_config: Make,
                                                    tmp_path: Path) -> None:
    config = tiny_config(model={"projector": projector, "projector_options": {},
                                "hypothesis": "manifest", "hypothesis_prompt": "read"},
                         train={"accumulation": 2})
    for part in ("encoder", "llm"):
        folder = Path(shutil.copytree(getattr(config.model, part), tmp_path / part))
        (folder / "model.safetensors").unlink()
        setattr(config.model, part, str(folder))
    text = plan("speech_llm", config)
    assert text.startswith("12 samples")
    assert "steps of 2 micro-batch(es)" in text
    assert text.count("\n|") == 5  # a head, and three numbers of GPUs
    assert not Path(config.output).exists()


def test_stages_are_planned_one_by_one(tiny_config: Make) -> None:
    config = tiny_config(stages=[{"name": "first", "train": {"objective": "ctc"}},
                                 {"name": "then", "train": {"max_steps": 2}}])
    first, then = plan("speech_llm", config).split("\n\nstage then: ")
    assert first == "stage first: the projector alone (train.objective ctc), which is not counted"
    assert "; 2 steps of" in then


def test_weights_in_4_bits_are_not_shared_out(tiny_config: Make) -> None:
    lines = plan("speech_llm", tiny_config(model={"quantization": "4bit"})).splitlines()
    rows = [line.split("|") for line in lines if line.startswith("|")][2:]
    assert [row[3].strip() == "-" for row in rows] == [False, True, True]
