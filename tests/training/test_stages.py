"""Stages: each starts from the best of the one before, trains what it names, and can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.conftest import CTC, logged, weights
from unislu_llm import models
from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.run_folder import find_run, read_finished
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.build import build_model, start_from
from unislu_llm.training.stages import train

Make = Callable[..., Config]
ALIGN = {"name": "align", "train": {"groups": ["projector"], "max_steps": 2}}
ADAPT = {"name": "adapt", "train": {"max_steps": 1, "lr": {"lora": 1e-3}}}
CTC_STAGE = {"name": "ctc", "train": {"objective": "ctc", "epochs": 2}}


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def fresh(config: Config, **more: Any) -> Any:
    return build_model("speech_llm", config, TaskRegistry(), **more)


def test_a_stage_trains_its_groups_and_starts_from_the_one_before(tiny_config: Make) -> None:
    run = train("speech_llm", tiny_config(stages=[ALIGN, ADAPT]))
    before = fresh(tiny_config("other")).trained_state()
    align, adapt = weights(run / "align" / "last"), weights(run / "adapt" / "last")
    assert {n.split(".")[0] for n in changed(before, align)} == {"projector"}
    assert any(".lora_" in n for n in changed(align, adapt))
    # One small step away from where align ended, much nearer than from where align began.
    name = next(n for n in align if n.startswith("projector") and align[n].ndim == 2)
    assert (adapt[name] - align[name]).norm() < (adapt[name] - before[name]).norm()
    assert changed(weights(run / "best"), weights(run / "adapt" / "best")) == set()
    assert models.load(run / "best").kind == "speech_llm"
    assert find_run(run).step() == read_finished(run / "adapt")["step"] == 1
    assert read_finished(run)["step"] == 3


def test_a_warning_that_all_stages_have_is_given_once(
        tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ({"name": name, "train": {"max_steps": 1}} for name in "ab")
    train("speech_llm", tiny_config(stages=[first, second]))
    assert capsys.readouterr().err.count("warning: data.dev: 12 of 12 clips are in data.train") == 1


def test_a_stopped_run_keeps_finished_stages(tiny_config: Make,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    run = train("speech_llm", tiny_config(stages=[ALIGN, ADAPT]))
    saved = run / "align" / "last" / "model.safetensors"
    before = saved.stat().st_mtime_ns
    (run / "adapt" / "finished.json").unlink()  # as if stopped after its last checkpoint
    train("speech_llm", tiny_config(stages=[ALIGN, ADAPT], resume=True))
    assert saved.stat().st_mtime_ns == before
    assert read_finished(run / "adapt")["step"] == 1
    # Stopped between the end of the last stage and the copy of its best.
    shutil.rmtree(run / "best")
    shutil.copytree(run / "align" / "best", run / "best")
    train("speech_llm", tiny_config(stages=[ALIGN, ADAPT], resume=True))
    assert changed(weights(run / "best"), weights(run / "adapt" / "best")) == set()
    assert "stage align is finished, and stays as it is" in capsys.readouterr().out
    # A stage that stopped before anything of it could be used makes way.
    for name in ("finished.json", "last/trainer.json"):
        (run / "adapt" / name).unlink()
    train("speech_llm", tiny_config(stages=[ALIGN, ADAPT], resume=True))
    assert (run / "adapt.stopped-0" / "config.yaml").is_file()
    with pytest.raises(UserError, match="holds no run"):
        train("speech_llm", tiny_config("nothing", stages=[ALIGN], resume=True))


def test_a_later_stage_may_add_what_an_earlier_one_lacked(tiny_config: Make) -> None:
    joint = {"name": "joint", "train": {"max_steps": 1}, "model": {
        "lora": {"rank": 4}, "encoder_mode": "top", "encoder_top_layers": 1}}
    align = {"name": "align", "train": {"max_steps": 1, "precision": "bf16"}}
    run = train("speech_llm", tiny_config(model={"lora": {"rank": 0}}, stages=[align, joint]))
    first, second = weights(run / "align" / "last"), weights(run / "joint" / "last")
    assert set(first) < set(second)
    assert any(n.startswith("encoder.") for n in second)


@pytest.mark.parametrize(("stages", "message"), [
    ([{"name": "best"}], r"stages\[0\]\.name: 'best'"),
    ([{"name": "a"}, {"name": "a"}], "two stages 'a'"),
    ([{"name": "a", "train": {"epoch": 3}}], r"stages\[0\]\.train\.epoch.*did you mean 'epochs'"),
])
def test_bad_stages_are_named_before_anything_is_written(
        stages: list[dict[str, Any]], message: str, tiny_config: Make) -> None:
    config = tiny_config(stages=stages)
    with pytest.raises(UserError, match=message):
        train("speech_llm", config)
    assert not Path(config.output).exists()


def test_the_encoder_may_train_by_ctc(tiny_config: Make) -> None:
    model = CTC | {"encoder_mode": "lora"}
    run = train("speech_llm", tiny_config(model=model, stages=[
        CTC_STAGE, {"name": "adapt", "train": {"max_steps": 1, "groups": ["lora"]}}]))
    before = fresh(tiny_config("other", model=model), texts=["so it is"]).trained_state()
    ctc, adapt = weights(run / "ctc" / "best"), weights(run / "adapt" / "last")
    assert changed({n: ctc[n] for n in ctc if n.startswith("encoder")}, before)
    assert not changed({n: ctc[n] for n in ctc if n.startswith("llm")}, before)
    assert {n.split(".")[0] for n in changed(adapt, ctc)} == {"llm"}


def test_stages_ctc_then_adapt(tiny_config: Make) -> None:
    run = train("speech_llm", tiny_config(
        model=CTC, stages=[CTC_STAGE, {"name": "adapt", "train": {"max_steps": 1}}]))
    done = read_finished(run / "ctc")
    assert done["step"] == 4
    assert {"train_seconds", "best_step", "best_score"} <= set(done)
    words = Path(tiny_config().data.train[0]).read_text().splitlines()
    before = fresh(tiny_config("other", model=CTC),
                   texts=[json.loads(w)["text"] for w in words]).trained_state()
    best = weights(run / "ctc" / "best")
    assert {n.split(".")[0] for n in changed(best, before)} == {"projector"}
    # The next stage has the vocabulary and starts from those weights: after a step it is near.
    places = ("ctc/best", "ctc/last", "adapt/last")
    tokens = [json.loads((run / name / "config.json").read_text())["ctc_tokens"] for name in places]
    assert tokens[0]
    assert tokens[0] == tokens[1] == tokens[2]
    after = weights(run / "adapt" / "last")
    name = "projector.to_token.weight"
    assert name in changed(after, best)
    assert (after[name] - best[name]).norm() < (after[name] - before[name]).norm()
    # Rates of text injection travel with the model.
    rates = [(run / name / "simulation.json").read_text() for name in (*places, "best")]
    assert len(set(rates)) == 1
    rows = logged(run / "ctc", "dev")
    assert [row["step"] for row in rows] == [0, 4]
    assert rows[1]["score"] == pytest.approx(100 - rows[1]["wer"])


def test_ctc_learns_to_the_word(tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """A few clips by heart, without the LLM; its validation decodes what it has learnt."""
    model = CTC | {"projector_options": CTC["projector_options"] | {"hidden": 32, "dropout": 0.0}}
    config = tiny_config(model=model, train={"objective": "ctc", "epochs": 60, "batch_size": 4})
    manifest = Path(config.data.train[0])
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1::2][:4]))
    run = train("speech_llm", config)
    assert max(row["score"] for row in logged(run, "dev")) > 60
    losses = [row["loss"] for row in logged(run)]
    assert losses[-1] < 0.2 * losses[0]
    assert "greedy CTC text" in capsys.readouterr().out
    # And is spoilt by steps that are far too large, which the end says.
    config.output, config.train.init, config.train.max_steps = f"{run}-on", str(run), 2
    config.train.lr.projector = 50.0
    end = (train("speech_llm", config) / "log.txt").read_text().partition("\ndev ")[2]
    assert "warning: training made the model worse: its score was " in end
    assert f"or keep {run}\n" in end


def test_another_vocabulary_is_refused_and_a_saved_one_inherited(tiny_config: Make,
                                                                 tmp_path: Path) -> None:
    one = fresh(tiny_config(model=CTC), texts=["the council met"])
    one.save_pretrained(tmp_path / "one")
    with pytest.raises(UserError, match="learned from other transcripts"):
        start_from(fresh(tiny_config(model=CTC), texts=["quite another text"]), tmp_path / "one")
    config = tiny_config(model=CTC, train={"init": str(tmp_path / "one")})
    assert fresh(config, texts=["quite another text"]).ctc_tokens == one.ctc_tokens
