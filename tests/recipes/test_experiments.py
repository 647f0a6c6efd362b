"""The experiment runner: it runs what is missing and no more, goes on, and writes a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from filelock import FileLock

from tests.scoring.rows import ner, row
from unislu_llm.config_file import config_from_dict
from unislu_llm.errors import UserError
from unislu_llm.io import sha256, write_json, write_text
from unislu_llm.scoring.score import score_predictions
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.stages import stage_configs

TEXT = "a b c d e f g h i j"
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
            log.touch()
            return int(self.fail in command)
        if "eval/evaluate.py" in command:
            name, test = Path(command[2]).name, "-dev" * ("--manifest" in command)
            test += f"-{command[-1]}" * ("--label" in command)
            # One word in ten is wrong, of a second seed two; of the model of another task all are.
            wrong = 10 if name.startswith("only-") else 2 if name.endswith("s2") else 1
            said = "no " * wrong + TEXT[2 * wrong:]
            more = {"ctc_hypothesis": "no " * 4 + TEXT[8:]} if name.startswith("l") else {}
            rows = [ner(TEXT, [("LAW", "i")], said, [("LAW", "i")], 0, **more),
                    ner(TEXT, [("LAW", "j")], said, [("ORG", "j")], 1, **more),
                    row(0, "sa", TEXT, said, "Neutral", "Neutral", **more)]
            file = Path(command[2]) / "predictions" / f"best{test or '-dev'}.jsonl"
            write_text(file, "".join(json.dumps(p) + "\n" for p in rows))
            write_json(self.experiment.results / f"{name}{test}.json", {
                "scores": score_predictions(rows, TaskRegistry()), "decode": {}, "manifests": [],
                "precision": "fp32", "limit": 0, "decoding": {"rtf": 0.05},
                "predictions": str(file), "predictions_sha256": sha256(file)})
            return 0
        folder = Path(command[command.index("--output") + 1])
        if folder.name == self.fail:
            with log.open("a") as file:
                file.write("error: train.lr: none\nTraceback of the launcher\nCalledProcessError\n")
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finished.json").touch()
        (folder / "metrics.jsonl").write_text('{"part": "train", "step": 4, "seconds": 30.0}')
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
        assert bool(runner.run_experiment(experiment, only)) == bool(fail)
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


def rows_of(results: Path, protocol: str) -> dict[str, dict[str, str]]:
    """Rows by system (and set, where there are several), and column; `slue differences`: those."""
    name, _, kind = protocol.partition(" ")
    text = (results / "table.md").read_text().split(f"Protocol `{name}`")[1].split("Protocol")[0]
    text = text.split("Differences")[bool(kind)]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = [dict(zip(head, row, strict=True)) for row in body]
    return {" ".join([row["system"], row.get("set", "")]).strip(): row for row in rows}


def test_the_table_has_a_row_a_system(experiment: Callable[..., Any],
                                      run: Callable[..., Fake]) -> None:
    asked = experiment()
    run(asked, "w", "l")
    assert (asked.results / "table.md").read_text().startswith("# synthetic speech")
    rows = rows_of(asked.results, "slue")
    drawn = [*ElementTree.parse(asked.results / "table.svg").getroot().itertext()]
    assert {"WER vp", "WER read", "NER F1", "Whisper"} < set(drawn)
    # Each utterance has as many errors as the other, so that seeds alone make the interval.
    assert rows["Whisper"]["WER vp"] == rows["Whisper"]["WER read"] == "13.3 [10.0, 20.0]"
    assert rows["l"]["NER F1"] == "50.0 [0.0, 100.0]"
    assert (rows["l"]["CTC WER vp"], rows["l"]["CTC WER read"]) == ("40.0", "40.0")
    assert rows["Whisper"]["CTC WER vp"] == "-"
    assert {name: cells["WER vp"][:20] for name, cells in rows_of(
        asked.results, "slue differences").items()} == {"l": "-3.3 [-10.0, +0.0] p"}
    assert rows["l"]["minutes"] == "2.0"
    assert set(rows["x (not run)"].values()) == {"x (not run)", "-"}
    run(asked)
    assert rows_of(asked.results, "slue")["x"]["minutes"] == "4.0"  # with the run it starts from
    asked.systems[-1].title = "Whisper"  # a title may come twice
    run(asked)
    assert (asked.results / "table.svg").read_text().count(">Whisper<") == 2


def test_published_numbers_and_parts_have_rows(experiment: Callable[..., Any],
                                               run: Callable[..., Fake]) -> None:
    parts = [{"name": "asr", "recipe": "train_llm"}, {"name": "only-ner", "like": "asr"},
             {"name": "only-sa", "like": "asr", "tests": {}},
             {"name": "all", "parts": {"wer": "asr", "ner": "only-ner", "sa": "only-sa"}}]
    theirs = {"source": "them", "protocol": "slue", "set": "read", "columns": ["WER vp", "NER F1"],
              "rows": {"theirs": [8.5, 70]}}
    asked = experiment(systems=[*parts, {"name": "none", "like": "asr"}], published=[theirs])
    assert run(asked, "asr").trained().keys() == {"asr-s1"}
    assert "all (not run) dev" in rows_of(asked.results, "slue")
    assert run(asked, "all").trained().keys() == {"only-ner-s1", "only-sa-s1"}
    rows = rows_of(asked.results, "slue")
    assert list(rows) == ["published (them): theirs read", "all (not scored) read",
                          "none (not run) read", "all dev", "none (not run) dev"]
    assert [rows["all dev"][column] for column in ("WER vp", "NER F1", "SA macro-F1", "SLUE")] == [
        "10.0 [10.0, 10.0]", "50.0 [0.0, 100.0]", "100.0 [100.0, 100.0]", "80.0 [30.0, 96.7]"]
    assert rows["published (them): theirs read"]["WER vp"] == "8.5"
    assert len(rows_of(asked.results, "whisper")) == 4


def test_runs_of_a_system_are_scored_in_another_way(runner: ModuleType,
                                                    experiment: Callable[..., Any],
                                                    run: Callable[..., Fake],
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    other = {"name": "beams", "of": "w", "evaluate": "--precision bf16",
             "dev": ["${data}/made/dev.jsonl"], "tests": {}}
    asked = experiment(systems=[*SYSTEMS[:1], other, {"name": "again", "of": "beams", "dev": []}])
    fakes = [run(asked, "beams", fail="w-s2"), run(asked, "beams")]
    assert [[*fake.trained()] for fake in fakes] == [["w-s1", "w-s2", "w-s3"], ["w-s2"]]
    assert "beams-s2: not scored: the run" in capsys.readouterr().err
    scored = sorted(c[2:] for fake in fakes for c in fake.commands if "beams" in c)
    dev = str(Path("corpora/made/dev.jsonl").resolve())
    assert scored == [[str(asked.output / f"w-s{seed}"), "--out", str(asked.results),
                       "--decode.grammar", "--precision", "bf16", "--manifest", dev, "--label",
                       "beams"] for seed in (1, 2, 3)]
    assert [job.scores().name for job in runner.jobs(asked) if job.system.name == "again"] == [
        f"w-s{seed}-again.json" for seed in (1, 2, 3)]
    rows = rows_of(asked.results, "slue")
    assert rows["beams"]["WER vp"] == rows["Whisper"]["WER vp"]
    assert list(rows_of(asked.results, "slue differences")) == ["beams"]
    assert run(asked, "beams").commands == []


def test_another_runners_run_is_left_to_it(experiment: Callable[..., Any], run: Callable[..., Fake],
                                           capsys: pytest.CaptureFixture[str]) -> None:
    asked = experiment()
    asked.output.mkdir()
    with FileLock(asked.output / "w-s2.lock"):
        assert "w-s2" not in run(asked).trained()
    assert "w-s2: another runner is at it" in capsys.readouterr().out
    assert run(asked).trained().keys() == {"w-s2"}


def test_what_may_fail_is_done_without(experiment: Callable[..., Any], runner: ModuleType,
                                       monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two_gpus.yaml").touch()
    systems = [*SYSTEMS[:1], SYSTEMS[1] | {"launch": str(tmp_path / "two_gpus.yaml")}, SYSTEMS[2]]
    asked = experiment(systems=systems, may_fail=["made"])
    fake = Fake(asked, fail="transcribe")
    monkeypatch.setattr(runner, "run_command", fake)
    assert runner.run_experiment(asked, ["l", "x"]) == 0
    assert [*fake.trained()] == ["l-s1", "x-s1"]
    assert sum("transcribe" in command for command in fake.commands) == 1
    launched = [c[c.index("--config_file") + 1] for c in fake.commands if "--config_file" in c]
    assert launched == [str(tmp_path / "two_gpus.yaml")] * 2
    assert "x-s1: not scored on read: there is no" in capsys.readouterr().out
    assert not list(asked.results.glob("*-read.json"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_the_papers_table_plays_on_generated_files(runner: ModuleType, tmp_path: Path) -> None:
    """In a process of its own, in which torch has no threads yet that its forks would miss."""
    root = EXPERIMENTS.parents[1]
    before = sorted((root / "eval" / "results").rglob("*"))
    done = subprocess.run([
        sys.executable, "recipes/run_experiments.py", str(EXPERIMENTS / "slue.yaml"), "--dry-run",
        str(tmp_path), "--only", "unified-dynamic", "ours-reads"], cwd=root, text=True,
        capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted((root / "eval" / "results").rglob("*")) == before
    assert (tmp_path / "results" / "table.md").read_text().startswith("# DRY RUN")
    rows = rows_of(tmp_path / "results", "whisper")
    assert rows["published (the authors' repository): unified Whisper-medium, 3 seeds test"][
        "NER F1"] == "69.95"
    assert "Whisper-medium, unified, fixed loss (not run) test" in rows
    for name in ("Whisper-medium, unified, dynamic loss dev", "Ours: the LLM reads the hypothesis "
                 "and may rewrite it test"):
        assert "-" not in [*rows[name].values()][2:7]  # WER of both, F1 of both, SLUE
    (tmp_path / "dry-run.txt").unlink()
    with pytest.raises(UserError, match="holds something else"):
        runner.dry_run.begin(tmp_path)


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
    assert len(found) >= 2
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
    ({"systems": [{"name": "a", "recipe": "train"}]}, r"exp.yaml:\d+: systems\[0\].recipe"),
    ({"systems": [{"name": "a"}]}, "system 'a'.recipe: is missing"),
    ({"systems": [{"title": "a"}]}, r"exp.yaml:\d+: systems\[0\].name: is missing"),
    ({"systems": [{"name": "a", "recipe": "train_llm"}] * 2}, "system 'a' is there twice"),
    ({"systems": [{"name": "a", "like": "b"}]}, "like: there is no 'b'"),
    ({"systems": [{"name": "a", "recipe": "train_llm", "prepare": ["mad"]}]}, "mean 'made'"),
    ({"common": {"train": {"epoch": 1}}}, r"yaml:3: system 'w': .*did you mean 'epochs'"),
    ({"systems": [*SYSTEMS[:1], {"name": "a", "of": "w", "config": {}}]}, "take 'config' away"),
    ({"systems": [{"name": "a", "of": "v"}]}, "of: there is no 'v'"),
    ({"systems": [*SYSTEMS, {"name": "read", "of": "l", "dev": ["x/dev.jsonl"]}]},
     "l-s1 and read-s1 would share the scores"),
    ({"may_fail": ["mad"]}, "may_fail: there is no 'mad'"),
    ({"systems": [{"name": "a", "recipe": "train_llm", "launch": "x.yaml"}]}, "launch: .*'x.yaml'"),
    ({"published": [{"source": "", "protocol": "slue", "set": "read", "columns": ["SLUE"],
                     "rows": {"a": [1, 2]}}]}, "1 columns, and 2 numbers in the row 'a'"),
    ({"data": ""}, "--data FOLDER"),
])
def test_bad_files_are_named(over: dict[str, Any], message: str, runner: ModuleType,
                             experiment: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=message):
        runner.jobs(experiment(**over))
    with pytest.raises(UserError, match="--only: there is no 'y'"):
        runner.jobs(experiment(), ["y"])
