"""The experiment runner: it runs what is missing and no more, goes on, and writes a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from unislu_llm.config_file import config_from_dict
from unislu_llm.errors import UserError
from unislu_llm.training.stages import stage_configs

EXPERIMENTS = Path(__file__).parents[2] / "recipes" / "experiments"
SYSTEMS = [{"name": "w", "title": "Whisper", "recipe": "train_whisper", "seeds": [1, 2, 3]},
           {"name": "l", "recipe": "train_llm", "prepare": ["made"],
            "config": {"train": {"lr": {"projector": 1e-2}}}},
           {"name": "x", "like": "l", "config": {"train": {"init": "${output}/l-s1"}}}]


@pytest.fixture
def runner(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("run_experiments")


@pytest.fixture
def experiment(runner: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Factory of an experiment of three systems, five runs; keys of the file can be overridden."""

    def make(data: str = "corpora", **over: Any) -> Any:
        values: dict[str, Any] = {
            "title": "synthetic speech", "output": str(tmp_path / "runs"),
            "results": str(tmp_path / "results"), "evaluate": "--decode.grammar",
            "prepare": {"made": "transcribe base '${data}/a b.jsonl' --out ${output}/made"},
            "common": {"data": {"train": ["${data}/train.jsonl"]},
                       "train": {"epochs": 2, "lr": {"lora": 1e-3}}},
            "tests": {"read": ["${data}/read/dev.jsonl"]}, "systems": SYSTEMS} | over
        (tmp_path / "exp.yaml").write_text(yaml.safe_dump(values))
        return runner.read_experiment(tmp_path / "exp.yaml", data)

    return make


class Fake:
    """Stands for the commands: writes what they would; fails where it is told to."""

    def __init__(self, experiment: Any, fail: str = "") -> None:
        self.experiment, self.fail, self.commands = experiment, fail, list[list[str]]()

    def __call__(self, command: Sequence[str], log: Path) -> int:
        self.commands.append(list(command))
        if "unislu_llm.cli" in command:
            return 0
        if "eval/evaluate.py" in command:
            name, test = Path(command[2]).name, "--manifest" in command
            block = {"wer": {"overall": {"wer": 7.0}, "by_corpus": {"vp": {"wer": 10.0}}},
                     "tasks": {"ner": {"entity": {"f1": 50.0}}}}
            if name.startswith("l"):
                block |= {"ctc_wer": 40.0, "ctc_wer_by_corpus": {"vp": 41.0}}
            scores = {"scores": {"protocols": dict.fromkeys(("whisper", "slue"), block)},
                      "intervals": {p: {"ner/f1": {"low": 41.0, "high": 59.0}}
                                    for p in ("whisper", "slue")}, "decoding": {"rtf": 0.05}}
            self.experiment.results.mkdir(parents=True, exist_ok=True)
            path = self.experiment.results / f"{name}{'-dev-read' if test else ''}.json"
            path.write_text(json.dumps(scores))
            return 0
        folder = Path(command[command.index("--output") + 1])
        if folder.name == self.fail:
            with log.open("a") as file:
                file.write("error: train.lr: none\nTraceback of the launcher\nCalledProcessError\n")
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finished.json").write_text(json.dumps({"step": 4, "train_seconds": 120.0}))
        config = Path(command[command.index("--config") + 1]).read_text()
        (folder / "config.yaml").write_text(config)
        return 0

    def trained(self) -> dict[str, bool]:
        """Names of runs that were trained, and whether they were resumed."""
        return {Path(c[c.index("--output") + 1]).name: "--resume" in c for c in self.commands
                if "--output" in c}


@pytest.fixture
def run(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """Run an experiment with fake commands."""

    def start(experiment: Any, *only: str, fail: str = "") -> Fake:
        fake = Fake(experiment, fail)
        monkeypatch.setattr(runner, "run_command", fake)
        assert runner.run_experiment(experiment, only) == bool(fail)
        return fake

    return start


def test_what_is_missing_is_run_once(experiment: Callable[..., Any], run: Callable[..., Fake],
                                     capsys: pytest.CaptureFixture[str]) -> None:
    asked = experiment()
    fake = run(asked, fail="x-s1")
    said = capsys.readouterr().err
    assert "x-s1: training ended with status 1" in said
    assert said.endswith("\nerror: train.lr: none\n")
    made = next(i for i, c in enumerate(fake.commands) if "transcribe" in c)
    data = Path("corpora").resolve()
    assert fake.commands[made][3:] == ["transcribe", "base", f"{data}/a b.jsonl", "--out",
                                       f"{asked.output}/made"]
    assert "--output" in fake.commands[made + 1]
    assert all("--decode.grammar" in c for c in fake.commands if "eval/evaluate.py" in c)
    again = run(asked)
    assert set(again.trained()) == {"x-s1"}
    assert len(again.commands) == 3  # training, its dev sets, its further test set
    assert run(asked).commands == []


def test_a_stopped_run_is_resumed_or_begun_anew(experiment: Callable[..., Any],
                                                run: Callable[..., Fake],
                                                tiny_run: Callable[..., Path]) -> None:
    asked = experiment()
    asked.output.mkdir()
    tiny_run().rename(asked.output / "w-s1")
    (asked.output / "w-s1" / "finished.json").unlink()
    (asked.output / "l-s1").mkdir()
    assert run(asked, "w", "l").trained() == {"w-s1": True, "w-s2": False, "w-s3": False,
                                              "l-s1": False}
    assert len(list(asked.output.glob("l-s1.stopped-*"))) == 1


def test_the_table_has_a_row_a_system(experiment: Callable[..., Any],
                                      run: Callable[..., Fake]) -> None:
    asked = experiment()
    run(asked, "w", "l")
    text = (asked.results / "table.md").read_text()
    assert text.startswith("# synthetic speech")
    lines = [line for line in text.split("Protocol `slue`")[1].splitlines() if line.startswith("|")]
    head, *body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    assert rows["Whisper"]["WER vp"] == "10.0 ± 0.0"  # over seeds
    assert rows["l"]["NER F1"] == "50.0 [41.0, 59.0]"  # of one: the interval over utterances
    assert (rows["l"]["CTC WER vp"], rows["l"]["CTC WER read"]) == ("41.0", "40.0")
    assert rows["Whisper"]["CTC WER vp"] == "-"
    assert rows["l"]["minutes"] == "2.0"
    assert set(rows["x (not run)"].values()) == {"x (not run)", "-"}
    run(asked)
    assert "| 4.0 " in (asked.results / "table.md").read_text()  # with the run it starts from


def test_configs_are_laid_over_each_other_and_checked(runner: ModuleType, tmp_path: Path,
                                                      experiment: Callable[..., Any]) -> None:
    configs = {job.name: job.config()["train"] for job in runner.jobs(experiment())}
    lr = {"lora": 1e-3, "projector": 1e-2}
    assert configs["l-s1"] == {"epochs": 2, "lr": lr, "seed": 1}
    assert configs["x-s1"] == configs["l-s1"] | {"init": f"{tmp_path}/runs/l-s1"}
    full = {"base": "exp.yaml", "title": "full", "output": "runs/full",
            "common": {"train": {"epochs": 9}},
            "systems": [{"name": "x", "seeds": [1, 2], "config": {"train": {"init": None}}},
                        {"name": "y", "recipe": "train_llm", "config": {"train": {"lr": None}}}]}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(full))
    found = runner.jobs(runner.read_experiment(tmp_path / "full.yaml", "corpora"))
    assert [job.name for job in found] == [*configs, "x-s2", "y-s1"]
    assert found[-2].config()["train"] == {"epochs": 9, "seed": 2, "lr": lr}
    assert found[-1].config()["train"] == {"epochs": 9, "seed": 1}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_shipped_experiment_can_be_configured(path: Path, runner: ModuleType,
                                                             tmp_path: Path) -> None:
    found = runner.jobs(runner.read_experiment(path, str(tmp_path)))
    assert len(found) >= 3
    for i, job in enumerate(found):
        config = config_from_dict(job.config())
        for _, stage in stage_configs(config, job.folder):
            assert stage.train.seed == job.seed
        init = Path(config.train.init).resolve()
        if config.train.init and init.is_relative_to(job.folder.parent.resolve()):  # an earlier run
            stages = {f"{other.name}/{stage['name']}" for other in found[:i]
                      for stage in other.config().get("stages", [])}
            assert "/".join(init.parts[-2:]) in stages


@pytest.mark.parametrize(("over", "message"), [
    ({"system": []}, "did you mean 'systems'"),
    ({"systems": []}, "lists no systems"),
    ({"systems": [{"name": "a", "recipe": "train"}]}, r"systems\[0\].recipe"),
    ({"systems": [{"name": "a"}]}, "system 'a'.recipe: is missing"),
    ({"systems": [{"name": "a", "recipe": "train_llm"}] * 2}, "system 'a' is there twice"),
    ({"systems": [{"name": "a", "like": "b"}]}, "like: there is no 'b'"),
    ({"systems": [{"name": "a", "recipe": "train_llm", "prepare": ["mad"]}]}, "mean 'made'"),
    ({"common": {"train": {"epoch": 1}}}, r"system 'w'.*did you mean 'epochs'"),
    ({"data": ""}, "--data FOLDER"),
])
def test_bad_files_are_named(over: dict[str, Any], message: str, runner: ModuleType,
                             experiment: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=message):
        runner.jobs(experiment(**over))
    with pytest.raises(UserError, match="--only: there is no 'y'"):
        runner.jobs(experiment(), ["y"])
