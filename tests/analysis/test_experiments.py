"""The experiment runner: it runs what is missing and no more, goes on, and writes a table from score files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from unislu_llm.analysis.experiments import Experiment, jobs, merge, read_experiment
from unislu_llm.analysis.runner import run_experiment, status
from unislu_llm.errors import UserError
from unislu_llm.training.config import Config, apply
from unislu_llm.training.stages import stage_configs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Experiment]:
    """Factory of an experiment of three systems, five runs; keys of the file can be overridden."""

    def make(*, size: str = "", **over: Any) -> Experiment:
        values: dict[str, Any] = {
            "title": "synthetic speech", "output": str(tmp_path / "runs"), "results": str(tmp_path / "results"),
            "common": {"data": {"train": ["${data}/train.jsonl"]}, "train": {"epochs": 2, "lr": {"lora": 1e-3}}},
            "tests": {"read": ["${data}/read/dev.jsonl"]},
            "systems": [{"name": "w", "title": "Whisper", "recipe": "train_whisper", "seeds": [1, 2, 3]},
                        {"name": "l", "recipe": "train_llm", "config": {"train": {"lr": {"projector": 1e-2}}}},
                        {"name": "x", "recipe": "train_llm"}]} | over
        path = tmp_path / "exp.yaml"
        path.write_text(yaml.safe_dump(values))
        return read_experiment(path, "corpora", size)

    return make


class Fake:
    """Stands for the commands: writes what they would; fails where it is told to."""

    def __init__(self, experiment: Experiment, fail: str = "") -> None:
        self.experiment, self.fail, self.commands = experiment, fail, list[list[str]]()

    def __call__(self, command: Sequence[str], log: Path) -> int:
        self.commands.append(list(command))
        self.say(log, "last words")
        if "unislu_llm.cli" in command:
            return 0
        if "eval/evaluate.py" in command:
            name, test = Path(command[2]).name, "--manifest" in command
            wer = {"overall": {"wer": 7.0}, "by_corpus": {"vp": {"wer": 10.0 + len(name)}}}
            tasks = {"ner": {"entity": {"f1": 50.0}}}
            ctc = {"ctc_wer": 40.0, "ctc_wer_by_corpus": {"vp": 41.0}} if name.startswith("l") else {}
            scores = {"scores": {"protocols": {p: {"wer": wer, "tasks": tasks} | ctc for p in ("whisper", "slue")}},
                      "intervals": {p: {"ner/f1": {"low": 41.0, "high": 59.0}} for p in ("whisper", "slue")},
                      "trainable_parameters": {"total": 2_000_000}, "decoding": {"rtf": 0.05}}
            self.experiment.results.mkdir(parents=True, exist_ok=True)
            (self.experiment.results / f"{name}{'-dev-read' if test else ''}.json").write_text(json.dumps(scores))
            return 0
        folder = Path(command[command.index("--output") + 1])
        if folder.name == self.fail:
            self.say(log, "error: train.lr: none\nTraceback of the launcher\nlaunch.py\nCalledProcessError")
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finished.json").write_text(json.dumps({"step": 4, "train_seconds": 120.0}))
        (folder / "config.yaml").write_text(Path(command[command.index("--config") + 1]).read_text())
        return 0

    @staticmethod
    def say(log: Path, text: str) -> None:
        with log.open("a") as file:
            file.write(text + "\n")


def test_what_is_missing_is_run_once(experiment: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]) -> None:
    asked = experiment()
    first = Fake(asked, fail="x-s1")
    assert run_experiment(asked, runner=first) == 2
    said = capsys.readouterr().err
    assert "x-s1: training ended with status 1" in said
    assert said.endswith("it said:\nerror: train.lr: none\n")
    assert [s for _, s in status(asked)] == ["scored"] * 4 + ["missing"]
    again = Fake(asked)
    assert run_experiment(asked, runner=again) == 0
    assert {Path(c[c.index("--output") + 1]).name for c in again.commands if "--output" in c} == {"x-s1"}
    assert len(again.commands) == 3  # its training, its dev sets, its further test set
    nothing = Fake(asked)
    run_experiment(asked, runner=nothing)
    assert nothing.commands == []


def test_a_stopped_run_is_resumed_or_begun_anew(experiment: Callable[..., Experiment]) -> None:
    asked = experiment()
    (asked.output / "w-s1" / "last").mkdir(parents=True)
    (asked.output / "w-s1" / "last" / "trainer_state.pt").write_text("")
    (asked.output / "l-s1").mkdir()
    fake = Fake(asked)
    run_experiment(asked, ["w", "l"], fake)
    resumed = {Path(c[c.index("--output") + 1]).name: "--resume" in c for c in fake.commands if "--output" in c}
    assert resumed == {"w-s1": True, "w-s2": False, "w-s3": False, "l-s1": False}
    assert len(list(asked.output.glob("l-s1.stopped-*"))) == 1


def test_the_table_has_a_row_a_system_and_says_what_was_not_run(experiment: Callable[..., Experiment]) -> None:
    asked = experiment()
    run_experiment(asked, ["w", "l"], Fake(asked))
    text = (asked.results / "table.md").read_text()
    assert text.startswith("# synthetic speech")
    rows = {line.split("|")[1].strip(): line for line in text.split("Protocol `slue`")[1].splitlines() if line.startswith("|")}
    assert "14.0 ± 0.0" in rows["Whisper"]  # three seeds
    assert "2.0" in rows["l"]
    assert "50.0 [41.0, 59.0]" in rows["l"]  # one seed: the interval over utterances
    assert "50.0 ± 0.0" in rows["Whisper"]
    assert rows["x"].count("not run") == rows["x"].count("|") - 2
    data = json.loads((asked.results / "table.json").read_text())
    assert data["protocols"]["whisper"]["w"]["training (min)"] == {"n": 3, "mean": 2.0, "sd": 0.0}
    assert data["protocols"]["whisper"]["w"]["WER read"]["mean"] == 7.0
    texts = {f"WER of CTC text {of}": data["protocols"]["whisper"]["l"][f"WER of CTC text {of}"]["mean"] for of in ("vp", "read")}
    assert texts == {"WER of CTC text vp": 41.0, "WER of CTC text read": 40.0}
    assert not texts.keys() & data["protocols"]["whisper"]["w"].keys()


def test_configs_are_merged_and_checked(experiment: Callable[..., Experiment]) -> None:
    config = next(j for j in jobs(experiment()) if j.name == "l-s1").config()
    assert config["train"] == {"epochs": 2, "lr": {"lora": 1e-3, "projector": 1e-2}, "seed": 1}
    assert Path(config["data"]["train"][0]).is_absolute()
    assert merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": None}}) == {"a": {"c": 2}}
    with pytest.raises(UserError, match=r"system 'w'.train.*did you mean 'epochs'"):
        jobs(experiment(common={"train": {"epoch": 1}}))


def test_what_a_system_needs_is_made_before_it_trains(experiment: Callable[..., Experiment]) -> None:
    asked = experiment(evaluate="--decode.grammar", systems=[
        {"name": "w", "recipe": "train_whisper"},
        {"name": "d", "recipe": "train_llm", "prepare": ["draft ${output}/w-s1 '${data}/a b.jsonl' --out ${output}/drafts"],
         "config": {"model": {"init": "${output}/w-s1"}}},
        {"name": "e", "recipe": "train_llm", "config": {"model": {"init": "${output}/d-s1"}}}])
    fake = Fake(asked)
    run_experiment(asked, runner=fake)
    made = next(i for i, c in enumerate(fake.commands) if "draft" in c)
    assert fake.commands[made][3:] == ["draft", f"{asked.output}/w-s1", f"{Path('corpora').resolve()}/a b.jsonl", "--out",
                                       f"{asked.output}/drafts"]
    assert "--output" in fake.commands[made + 1]
    assert all("--decode.grammar" in c for c in fake.commands if "eval/evaluate.py" in c)
    data = json.loads((asked.results / "table.json").read_text())
    minutes = {name: data["protocols"]["slue"][name]["training (min)"]["mean"] for name in "wde"}
    assert minutes == {"w": 2.0, "d": 4.0, "e": 6.0}  # its own, and those of the runs it starts from
    again = Fake(asked)
    run_experiment(asked, runner=again)
    assert again.commands == []


def test_a_size_changes_what_it_names_and_nothing_else(experiment: Callable[..., Experiment]) -> None:
    sizes = {"full": {"title": "at full size", "common": {"train": {"epochs": 9}},
                      "systems": [{"name": "l", "seeds": [1, 2], "config": {"train": {"lr": {"lora": 3e-4}}}},
                                  {"name": "y", "recipe": "train_whisper", "config": {"model": {"init": "${output}/w-s1"}}}]}}
    small, full = experiment(sizes=sizes), experiment(size="full", sizes=sizes)
    assert [s.name for s in small.systems] == ["w", "l", "x"]
    assert [j.name for j in jobs(full)] == ["w-s1", "w-s2", "w-s3", "l-s1", "l-s2", "x-s1", "y-s1"]
    configs = {j.name: j.config() for j in jobs(full)}
    assert configs["l-s2"]["train"] == {"epochs": 9, "lr": {"lora": 3e-4, "projector": 1e-2}, "seed": 2}
    assert configs["y-s1"]["model"]["init"] == f"{full.output}/w-s1"
    assert (full.title, small.title) == ("at full size", "synthetic speech")
    assert full.output != small.output  # a finished run of one is none of the other
    assert full.results != small.results


@pytest.mark.parametrize("size", ["", "full"])
def test_every_run_of_the_shipped_experiment_can_be_configured(size: str, tmp_path: Path) -> None:
    found = jobs(read_experiment(ROOT / "recipes" / "experiments" / "slue_voiced.yaml", str(tmp_path), size))
    assert len(found) >= 10
    for job in found:
        config = Config()
        apply(config, job.config(), job.name)
        for _, stage in stage_configs(config, job.folder):
            assert stage.train.seed == job.seed
        init = config.model.init
        if init:  # the stage of an earlier run
            run, stage = Path(init).parent.name, Path(init).name
            earlier = next(j for j in found[:found.index(job)] if j.name == run)
            assert stage in [entry["name"] for entry in earlier.config()["stages"]]


@pytest.mark.parametrize(("over", "message"), [
    ({"size": "ful", "sizes": {"full": {}}}, "did you mean 'full'"),
    ({"size": "full"}, "has no sizes"),
    ({"size": "full", "sizes": {"full": {"system": []}}}, r"sizes.full: unknown key 'system'"),
    ({"evaluate": ["--decode.grammar"]}, "flags in one string"),
    ({"systems": [{"name": "a", "recipe": "train_llm", "prepare": "draft"}]}, r"systems\[0\].prepare"),
    ({"systems": []}, "lists no systems"),
    ({"system": []}, "did you mean 'systems'"),
    ({"systems": [{"name": "a", "recipe": "train"}]}, r"systems\[0\].recipe"),
    ({"systems": [{"name": "a", "recipe": "train_llm"}] * 2}, "two systems 'a'"),
])
def test_bad_files_are_named(over: dict[str, Any], message: str, experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(UserError, match=message):
        experiment(**over)


def test_an_unknown_system_and_a_missing_folder_are_named(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only y: no such system"):
        run_experiment(experiment(), ["y"], Fake(experiment()))
    with pytest.raises(UserError, match="--data FOLDER"):
        read_experiment(tmp_path / "exp.yaml")
