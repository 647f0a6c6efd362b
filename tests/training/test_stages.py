"""Stages: each starts from the best of the one before, trains what it names, and a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unislu_llm.errors import UserError
from unislu_llm.models import load
from unislu_llm.training import state
from unislu_llm.training.build import build_model, build_registry
from unislu_llm.training.config import Config
from unislu_llm.training.stages import stage_configs, train_stages

ALIGN = {"name": "align", "train": {"groups": ["projector"], "max_steps": 2}}
ADAPT = {"name": "adapt", "train": {"max_steps": 1, "lr": {"lora": 1e-3}}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_a_stage_trains_its_groups_and_starts_from_the_one_before(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    config.stages = [ALIGN, ADAPT]
    run = train_stages("speech_llm", config, "run")
    fresh = build_model("speech_llm", tiny_config("other"), build_registry(config)).trained_state()
    align, adapt = weights(run / "align" / "last"), weights(run / "adapt" / "last")
    assert {n.split(".")[0] for n in changed(fresh, align)} == {"projector"}
    assert any(".lora_" in n for n in changed(align, adapt))
    # One small step away from where align ended, much nearer than from where align began.
    name = next(n for n in align if n.startswith("projector") and align[n].ndim == 2)
    assert (adapt[name] - align[name]).norm() < (adapt[name] - fresh[name]).norm()
    assert changed(weights(run / "best"), weights(run / "adapt" / "best")) == set()
    assert load(run / "best").kind == "speech_llm"


def test_a_stopped_run_keeps_finished_stages(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    config.stages = [ALIGN, ADAPT]
    run = train_stages("speech_llm", config, "run")
    before = (run / "align" / "last" / "model.safetensors").stat().st_mtime_ns
    (run / "adapt" / "finished.json").unlink()  # as if it had been stopped after its last checkpoint
    config.resume, config.output = True, str(run)
    train_stages("speech_llm", config, "run")
    assert (run / "align" / "last" / "model.safetensors").stat().st_mtime_ns == before
    assert state.read_finished(run / "adapt")["step"] == 1


def test_a_later_stage_may_add_what_an_earlier_one_lacked(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(model={"lora": {"rank": 0}})
    config.stages = [{"name": "align", "train": {"max_steps": 1}},
                     {"name": "joint", "model": {"lora": {"rank": 4}, "encoder_mode": "top", "encoder_top_layers": 1},
                      "train": {"max_steps": 1}}]
    run = train_stages("speech_llm", config, "run")
    align, joint = weights(run / "align" / "last"), weights(run / "joint" / "last")
    assert set(align) < set(joint)
    assert any(n.startswith("encoder.") for n in joint)


@pytest.mark.parametrize(("stages", "message"), [
    ([{"train": {}}], r"stages\[0\].*name"),
    ([{"name": "best"}], r"stages\[0\].name.*best"),
    ([{"name": "a"}, {"name": "a"}], "two stages 'a'"),
    ([{"name": "a", "trian": {}}], "did you mean 'train'"),
    ([{"name": "a", "train": {"epoch": 3}}], r"stages\[0\].train.*did you mean 'epochs'"),
])
def test_bad_stages_are_named(stages: list[dict[str, Any]], message: str, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    config.stages = stages
    with pytest.raises(UserError, match=message):
        train_stages("speech_llm", config, "run")
    assert not Path(config.output).exists()


def test_init_and_groups_are_checked(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    registry = build_registry(tiny_config())
    with pytest.raises(UserError, match=r"model.init.*neither"):
        build_model("speech_llm", tiny_config(model={"init": str(tmp_path)}), registry)
    with pytest.raises(UserError, match="did you mean 'projector'"):
        build_model("speech_llm", tiny_config(train={"groups": ["projektor"]}), registry)


def test_the_floor_is_logged(tiny_config: Callable[..., Config]) -> None:
    from unislu_llm.training.loop import Trainer

    config = tiny_config(train={"asr_floor": 0.6, "asr_floor_steps": 1, "max_steps": 2})
    trainer = Trainer("speech_llm", config)
    trainer.fit()
    rows = [json.loads(line) for line in (trainer.run / "metrics.jsonl").read_text().splitlines()]
    first, second = [r["w_asr"] for r in rows if r["part"] == "train"]
    assert first == 1.0
    assert second == pytest.approx(0.6)


def test_stage_configs_do_not_share_sections(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    config.stages = [ALIGN, ADAPT]
    (_, first), (_, second) = stage_configs(config, Path("r"))
    assert first.train.groups == ["projector"]
    assert second.train.groups == config.train.groups == []
    assert second.model.init == str(Path("r") / "align")
