"""Resuming: a run goes on as it was; what may change is named, what may not is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from unislu_llm.config import Config
from unislu_llm.config_file import config_of_run
from unislu_llm.errors import UserError
from unislu_llm.io import kind_of_run
from unislu_llm.run_folder import is_run, read_finished
from unislu_llm.training.recipe import run_recipe
from unislu_llm.training.resume import check_resume
from unislu_llm.training.stages import train

Make = Callable[..., Config]


def asked(run: Path, **sections: Any) -> Config:
    """The run's own settings and others over them, as a command line gives them."""
    values = config_of_run(run).model_dump()
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(section, dict) else section
    return Config.model_validate(values)


@pytest.fixture
def run(tiny_config: Make) -> Path:
    """A run that is over, after one step."""
    return train("speech_llm", tiny_config(train={"max_steps": 1}))


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_a_run_goes_on_as_it_was_from_anywhere(kind: str, tiny_config: Make, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(train={"max_steps": 1, "loss": "uniform", "batch_size": 4, "seed": 7})
    monkeypatch.chdir(tmp_path)
    config.data.train = config.data.dev = ["corpus/train.jsonl"]
    run = train(kind, config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = config_of_run(run)
    assert before.data.train == [str(tmp_path / "corpus" / "train.jsonl")]
    assert kind_of_run(run) == kind
    # Without a script's or a flag's word the kind is the run's; `--config` is laid over it.
    Path("over.yaml").write_text("train: {loss: uniform, keep: 5}\n")
    run_recipe(["--resume", "--output", str(run), "--train.max-steps", "2", "--config",
                "over.yaml"], "")
    assert read_finished(run)["step"] == 2
    log = (run / "log.txt").read_text()
    assert ("over the run's own settings: train.max_steps 1 -> 2, train.keep 2 -> 5; learning "
            "rates follow the new schedule") in log
    # What has changed is the run's own from then on.
    before.train.max_steps, before.train.keep = 2, 5
    assert config_of_run(run) == before
    assert yaml.safe_load((run / "config.yaml").read_text())["resume"] is False


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train": {"seed": 2}}, r"another run with train\.seed 1 -> 2\. .*--train\.init"),
    ({"train": {"loss": "fixed", "batch_size": 4}},
     r"train\.loss dynamic -> fixed, train\.batch_size 8 -> 4"),
    ({"train": {"accumulation": 2}}, r"train\.accumulation 1 -> 2"),
    ({"model": {"hypothesis": "manifest"}}, r"model\.hypothesis none -> manifest"),
    ({"data": {"dev": []}}, r"data\.dev .*train\.jsonl -> "),
    ({"data": {"frame_cache": "c"}}, r"data\.frame_cache +-> "),
    ({"augment": {"gain_db": 3.0}}, r"augment\.gain_db 0\.0 -> 3\.0"),
    ({"decode": {"grammar": True}}, r"decode\.grammar False -> True"),
    ({"stages": [{"name": "a"}]}, r"stages\[0\]\.name None -> a"),
]


def test_another_run_is_refused(run: Path) -> None:
    for sections, message in REFUSED:
        with pytest.raises(UserError, match=message):
            check_resume("speech_llm", asked(run, **sections), 1)


def test_what_only_prolongs_or_reports_is_named(run: Path, tmp_path: Path) -> None:
    assert check_resume("speech_llm", asked(run), 1) == ""
    some = {"eval_every": 5, "save_minutes": 1.0, "keep": 3, "threads": 2, "on_oom": "split"}
    line = check_resume("speech_llm", asked(run, train=some), 1)
    assert all(f"train.{key} " in line for key in some)
    assert "rates" not in line
    told = check_resume("speech_llm", asked(run), 2)
    assert "processes 1 -> 2; no longer bit for bit: dropout draws anew" in told
    with pytest.raises(UserError, match="holds no run"):
        check_resume("speech_llm", asked(run, output=str(tmp_path)), 1)
    with pytest.raises(UserError, match=r"is a run of train_llm\.py, and this is train_whisper"):
        check_resume("whisper_slu", asked(run), 1)


def test_files_are_those_with_which_the_run_began(run: Path, tmp_path: Path) -> None:
    corpus, moved = tmp_path / "corpus", tmp_path / "moved" / "corpus"
    shutil.copytree(corpus, moved)
    shutil.move(corpus, tmp_path / "away")
    with pytest.raises(UserError, match=r"data\.train: .*\.jsonl is gone .*--data\.train FILE"):
        check_resume("speech_llm", asked(run), 1)
    new = [str(moved / "train.jsonl")]
    there = asked(run, data={"train": new, "dev": new})
    assert check_resume("speech_llm", there, 1) == ""
    Path(new[0]).write_text(Path(new[0]).read_text() + "\n")
    with pytest.raises(UserError, match=r"another run with data\.train .* -> .*moved"):
        check_resume("speech_llm", there, 1)
    shutil.copytree(moved, corpus)
    with pytest.raises(UserError, match=r"data\.train: .*train\.jsonl has changed since .*run"):
        check_resume("speech_llm", asked(run), 1)


def test_settings_of_stages_are_the_runs_as_well(tiny_config: Make) -> None:
    stages = [{"name": "a", "train": {"max_steps": 1, "lr": {"lora": 1e-3}}}]
    run = train("speech_llm", tiny_config(stages=stages))
    assert is_run(run / "a")
    longer = [{"name": "a", "train": {"max_steps": 2, "lr": {"lora": 1e-3}}}]
    line = check_resume("speech_llm", asked(run, stages=longer), 1)
    assert "stages[0].train.max_steps 1 -> 2; learning rates" in line
    longer[0]["train"] = {"max_steps": 1, "lr": {"lora": 1e-3}, "loss": "fixed"}
    with pytest.raises(UserError, match=r"stages\[0\]\.train\.loss None -> fixed"):
        check_resume("speech_llm", asked(run, stages=longer), 1)


def test_a_checkpoint_without_moments_is_no_traceback(run: Path) -> None:
    """Of a version that pickled them, and wrote no hashes."""
    for file in (run / "last").glob("*"):
        if file.name in ("SHA256SUMS", "optimizer.safetensors"):
            file.unlink()
    progress = json.loads((run / "last" / "trainer.json").read_text())
    del progress["sha256"]
    (run / "last" / "trainer.json").write_text(json.dumps(progress))
    with pytest.raises(UserError, match=r"start a new run from its weights: --train.init .*last"):
        train("speech_llm", asked(run, resume=True))
