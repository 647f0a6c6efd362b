"""Handmade logs: steps of stages add up, CTC's apart, repeated steps count once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.curves import History, Options, read_history, report
from unislu_llm.errors import UserError


def train(step: int, seconds: float | None = 6.0) -> dict[str, Any]:
    return {"part": "train", "step": step} | ({} if seconds is None else {"seconds": seconds})


def dev(step: int, wer: float) -> dict[str, Any]:
    return {"part": "dev", "step": step, "wer": wer, "score": 100 - wer, "seconds": 9.0}


def make(folder: Path, rows: list[dict[str, Any]], **settings: str) -> Path:
    """A folder as training leaves it, of a run or of a stage."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"train": settings}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """One stage of 40 steps, logged every 20th; and 30 CTC steps in a minute before 50 others."""
    monkeypatch.chdir(tmp_path)
    one = make(Path("runs/mlp"), [dev(0, 250.0), train(20), dev(20, 90.0), train(40), dev(40, 70.)])
    stages = Path("runs/ctc")
    make(stages / "ctc", [train(20, 1.5), dev(20, 45.0), train(30, 3.0), dev(30, 50.0)],
         objective="ctc")
    make(stages / "adapt", [train(10), dev(10, 60.0), train(50), dev(50, 30.0)],
         init=str(stages / "ctc"))
    (stages / "config.yaml").write_text("stages: [{name: ctc}, {name: adapt}]")
    return [one, stages]


def seen(history: History) -> list[tuple[int, int, float | None, float, bool]]:
    """LLM and CTC steps, seconds, value, whether it is of CTC text."""
    return [(p.llm_step, p.ctc_step, p.seconds, value, p.ctc) for p, value in history.values("wer")]


def test_steps_and_seconds_of_stages_and_of_the_first_run_add_up(two: list[Path]) -> None:
    history = read_history(two[1])
    assert (history.end.llm_step, history.end.ctc_step) == (50, 30)
    assert seen(history) == [(0, 20, 30.0, 45.0, True), (0, 30, 60.0, 50.0, True),
                             (10, 30, 120.0, 60.0, False), (50, 30, 360.0, 30.0, False)]
    # A row has the mean seconds of the steps since the one before.
    assert [row[2] for row in seen(read_history(two[0]))] == [0, 120, 240]
    more = [train(4), dev(4, 20.0)]
    assert seen(read_history(make(Path("a"), more, init=str(two[1] / "ctc"))))[-1][:2] == (4, 30)
    ahead = read_history(make(Path("b"), more, init=str(two[1] / "adapt" / "best")))
    assert ahead.end.llm_step == seen(ahead)[-1][0] == 54
    assert read_history(make(Path("c"), more, init="models/gone")).unknown == ("models/gone",)


def test_steps_taken_twice_count_once(tmp_path: Path) -> None:
    once = [train(1, 1.0), train(2, 2.0), dev(2, 50.0), train(3, 3.0), train(4, 4.0), dev(4, 45.0)]
    first = [*once[:4], train(4, 9.0), train(5, 9.0), dev(5, 1.0)]  # it goes on from step 2
    again = read_history(make(tmp_path / "resumed", [*first, *once[3:]]))
    assert seen(again) == seen(read_history(make(tmp_path / "plain", once)))
    assert [p.seconds for p in (*again.points, again.end)] == [3.0, 10.0, 10.0]


def test_torn_lines_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make(tmp_path / "run", [train(1), dev(1, 50.0)])
    whole = seen(read_history(run))
    torn = ('{"part": "train", "st', "\0\0\0", "[1]", '{"part": "dev"}', '{"step": Infinity}')
    (run / "metrics.jsonl").open("a").write("\n".join(torn))
    assert seen(read_history(run)) == whole
    assert [message.split(":")[1].split()[0] for message in caplog.messages] == list("34567")


def test_report_writes_plot_and_points(two: list[Path], capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options([p.resolve() for p in two], Path("out/c.svg"), names=["plain", "staged"])
    report(options)
    assert b"staged: CTC text" in Path("out/c.svg").read_bytes()
    text = Path("out/c.json").read_text()
    assert str(Path.cwd()) not in text
    assert json.loads(text)["runs"]["staged"]["ctc_steps"] == 30
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report(options)
    assert "unislu_llm[plot]" in capsys.readouterr().err


def test_bad_input_is_named(two: list[Path]) -> None:
    for changed, message in (
            ({"runs": []}, "no run is named"), ({"runs": [Path("runs/no")]}, "no such folder"),
            ({"runs": [make(Path("runs/nodev"), [train(1)])]}, "no validation in its log"),
            ({"runs": [make(Path("runs/old"), [train(1, None), dev(1, 50.0)])], "x": "minutes"},
             "--x step"), ({"names": ["one"]}, "give each of the 2 runs"),
            ({"score": "wr"}, "no score 'wr'.*did you mean 'wer'"),
            ({"out": Path("c.json")}, ".svg")):
        values: dict[str, Any] = {"runs": two, "out": Path("c.svg")} | changed
        with pytest.raises(UserError, match=message):
            report(Options(**values))
