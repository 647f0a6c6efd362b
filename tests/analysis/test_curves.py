"""Handmade logs: steps of stages add up, CTC's apart, repeated steps count once, and the first to be as good is found."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from unislu_llm.analysis.curve_options import CurveOptions
from unislu_llm.analysis.curve_report import report
from unislu_llm.analysis.curves import Point, reach, read_history
from unislu_llm.errors import UserError

Rows = Sequence[Mapping[str, Any]]


def train(step: int, seconds: float | None = 6.0) -> dict[str, Any]:
    return {"part": "train", "step": step, "loss": 1.0} | ({} if seconds is None else {"seconds": seconds})


def dev(step: int, wer: float, **more: float) -> dict[str, Any]:
    return {"part": "dev", "step": step, "wer": wer, "score": 100 - wer, "seconds": 9.0, **more}


def epoch(number: int, steps: int, wer: float | None = None, seconds: float = 30.0) -> dict[str, Any]:
    return {"epoch": number, "steps": steps, "loss": 2.0, "seconds": seconds} | ({} if wer is None else {"wer": wer, "kept": 0.2})


def make(folder: Path, rows: Rows, *, ctc: bool = False, finished: Mapping[str, Any] | None = None, init: str = "",
         devs: Sequence[str] = ("dev.jsonl",)) -> Path:
    """A folder as training leaves it, of a run or of a stage."""
    folder.mkdir(parents=True)
    config = {"model": {"init": init}, "data": {"dev": list(devs), "dev_limit": 0}, "stages": [],
              "train": {"objective": "ctc" if ctc else "unified", "seed": 7}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "versions.json").write_text(json.dumps({"git": "abc123def456", "command": "train_llm.py"}))
    (folder / ("ctc_log.jsonl" if ctc else "metrics.jsonl")).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished is not None:
        (folder / "finished.json").write_text(json.dumps(finished))
    return folder


def staged(folder: Path, llm: Rows) -> Path:
    """Two stages: 30 CTC steps in a minute, best WER 45; then `llm`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"seed": 7}, "stages": [{"name": "ctc"}, {"name": "adapt"}]}))
    make(folder / "ctc", [epoch(1, 20, 45.0), epoch(2, 10, 50.0)], ctc=True, finished={"step": 30})
    make(folder / "adapt", llm, init=str(folder / "ctc"))
    return folder


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """`mlp`: 100 steps, best WER 40 at step 80. `ctc`: in two stages, there at LLM step 20 of 50."""
    monkeypatch.chdir(tmp_path)
    wers = {20: 90.0, 40: 70.0, 60: 50.0, 80: 40.0, 100: 41.0}
    mlp = [dev(0, 250.0), *(row for step, wer in wers.items() for row in (train(step), dev(step, wer)))]
    ctc = [train(10), dev(10, 60.0), train(20), dev(20, 38.0), train(50), dev(50, 30.0)]
    return [make(Path("runs/mlp"), mlp, finished={"step": 100, "train_seconds": 1200.0}), staged(Path("runs/ctc"), ctc)]


def test_steps_and_minutes_of_stages_add_up_and_ctc_is_apart(two: list[Path]) -> None:
    history = read_history(two[1])
    assert (history.llm_steps, history.ctc_steps) == (50, 30)
    assert history.points("wer") == [
        Point(0, 20, 0.5, 45.0, True), Point(0, 30, 1.0, 50.0, True),
        Point(10, 30, 2.0, 60.0, False), Point(20, 30, 3.0, 38.0, False), Point(50, 30, 6.0, 30.0, False)]
    assert [p.value for p in history.points("score")] == [40.0, 62.0, 70.0]
    # Every 20th step is logged at 6 s, 10 minutes in all; measured were 20.
    assert [p.minutes for p in read_history(two[0]).points("wer")] == pytest.approx([0, 4, 8, 12, 16, 20])


@pytest.mark.parametrize("score", ["wer", "score"])  # fewer errors, and more of what is good
def test_first_to_reach_the_best_of_another(two: list[Path], score: str) -> None:
    found = reach([read_history(run) for run in two], score, "mlp")
    assert (found["value"], found["best_step"], found["llm_steps"]) == (40.0 if score == "wer" else 60.0, 80, 100)
    assert found["finished"] is True
    hit = found["runs"]["ctc"]
    assert (hit["llm_step"], hit["ctc_steps"], hit["of_steps"], hit["of_best_step"]) == (20, 30, 0.2, 0.25)
    assert found["runs"]["mlp"]["llm_step"] == 80
    back = reach([read_history(run) for run in two], score, "ctc")["runs"]["mlp"]
    assert (back["llm_step"], back["of_steps"]) == (None, None)


def test_text_of_the_ctc_stage_reaches_nothing(two: list[Path], tmp_path: Path) -> None:
    run = staged(tmp_path / "good-ctc", [train(5), dev(5, 47.0)])  # its CTC text had 45
    mlp = make(tmp_path / "bad-mlp", [train(5), dev(5, 46.0)])
    found = reach([read_history(mlp), read_history(run)], "wer", "bad-mlp")
    nowhere = dict.fromkeys(("llm_step", "ctc_steps", "minutes", "of_steps", "of_best_step"))
    assert found["runs"]["good-ctc"] == nowhere | {"best": 47.0}
    alone = read_history(two[1] / "ctc")
    with pytest.raises(UserError, match="only of the ctc stage"):
        reach([alone], "wer", "ctc")


def test_training_of_the_run_that_a_run_starts_from_counts(two: list[Path], tmp_path: Path) -> None:
    more = [train(4), dev(4, 20.0)]
    ahead = read_history(make(tmp_path / "a", more, init=str(two[1] / "ctc")))
    assert [(p.llm_step, p.ctc_step) for p in ahead.points("score")] == [(4, 30)]
    behind = read_history(make(tmp_path / "b", more, init=str(two[1] / "adapt" / "best")))
    assert (behind.llm_steps, behind.ctc_steps, behind.points("wer")[-1].llm_step) == (54, 30, 54)
    assert read_history(make(tmp_path / "c", more, init="models/gone")).unknown == ("models/gone",)


def test_steps_taken_twice_count_once_and_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    once = [train(1, 1.0), train(2, 2.0), dev(2, 50.0), train(3, 3.0), train(4, 4.0), dev(4, 45.0)]
    first = [*once[:4], train(4, 9.0), train(5, 9.0), dev(5, 1.0)]  # stopped; it goes on from step 2
    run = make(tmp_path / "resumed", [*first, *once[3:]])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"part": "train", "st')
    plain = read_history(make(tmp_path / "plain", once))
    again = read_history(run)
    assert again.points("wer") == plain.points("wer")
    assert [p.minutes for p in again.points("wer")] == [3 / 60, 10 / 60]
    assert again.llm_steps == 4
    assert again.parts[0].exact


def test_report_writes_plot_and_points(two: list[Path], capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    options = CurveOptions([p.resolve() for p in two], Path("out/c.svg"), names=["plain", "two stages"], reach="plain")
    command = ["eval/curves.py", *(str(p) for p in options.runs)]
    assert report(options, command) == 0
    picture, text = Path("out/c.svg").read_bytes(), Path("out/c.json").read_text()
    assert b"two stages: CTC text" in picture
    assert b"CTC steps not counted" in picture
    result = json.loads(text)
    assert str(Path.cwd()) not in text
    assert result["command"] == "eval/curves.py runs/mlp runs/ctc"
    mlp, ctc = result["runs"]["plain"], result["runs"]["two stages"]
    assert (mlp["seed"], mlp["git"]) == (7, "abc123def456")
    assert mlp["parts"][0]["log_sha256"] == hashlib.sha256((two[0] / "metrics.jsonl").read_bytes()).hexdigest()
    assert [p["objective"] for p in ctc["parts"]] == ["ctc", "unified"]
    assert result["reach"] == reach([read_history(two[0], "plain"), read_history(two[1], "two stages")], "wer", "plain")
    out = capsys.readouterr().out
    assert "20.0 %" in out
    assert "not among the LLM steps" in out
    assert "two stages is not marked as finished" in out
    assert "dev data" not in out
    assert report(options, command) == 0
    assert (Path("out/c.svg").read_bytes(), Path("out/c.json").read_text()) == (picture, text)
    Path("out/c.svg").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert report(options, command) == 0
    assert "unislu_llm[plot]" in capsys.readouterr().err
    assert not Path("out/c.svg").exists()


def test_unlike_dev_data_are_noted(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    other = make(Path("runs/other"), [train(1), dev(1, 50.0)], devs=["other.jsonl"])
    assert report(CurveOptions([two[0], other], Path("c.png"), x="minutes")) == 0
    assert "the dev data (manifests or dev_limit) are not the same" in capsys.readouterr().out


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no run": ({"runs": []}, "no run is named"),
    "no folder": ({"runs": [Path("runs/nosuch")]}, "there is no such folder"),
    "no log": ({"runs": [Path("runs/empty")]}, "no log yet"),
    "no validation": ({"runs": [Path("runs/nodev")]}, "no validation in its log"),
    "damaged": ({"runs": [Path("runs/damaged")]}, "metrics.jsonl:2: not a JSON object"),
    "lost epoch": ({"runs": [Path("runs/lost")]}, "ctc_log.jsonl:2: expected epoch 2"),
    "unknown score": ({"score": "wr"}, "no score 'wr' (--score); it has score, wer; did you mean 'wer'?"),
    "no times": ({"runs": [Path("runs/notimes")], "x": "minutes"}, "--x step"),
    "names": ({"names": ["one"]}, "1 names for 2 runs"),
    "one name twice": ({"names": ["one", "one"]}, "two runs are named 'one'"),
    "unknown run": ({"reach": "mpl"}, "no run is named 'mpl'; there are mlp, ctc; did you mean 'mlp'?"),
    "format": ({"out": Path("curves.json")}, ".svg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(two: list[Path], case: str, capsys: pytest.CaptureFixture[str]) -> None:
    (make(Path("runs/empty"), []) / "metrics.jsonl").unlink()
    make(Path("runs/nodev"), [train(1)])
    (make(Path("runs/damaged"), [train(1)]) / "metrics.jsonl").open("a").write("{]\n")
    make(Path("runs/lost"), [epoch(1, 5), epoch(3, 5)], ctc=True)
    make(Path("runs/notimes"), [train(1, None), dev(1, 50.0)])
    changed, message = BAD[case]
    values: dict[str, Any] = {"runs": two, "out": Path("c.svg")} | changed
    assert report(CurveOptions(**values)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("c.json").exists()
