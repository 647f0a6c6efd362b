"""Handmade logs: steps of stages add up, CTC's apart, repeated steps count once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.report.systems import mean_curve, read_curve


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


def seen(run: Path) -> list[tuple[int, float | None, str, float]]:
    """Steps, minutes, and the WER of each validation, by its name."""
    return [(point["step"], point["minutes"], key, point["scores"][key])
            for point in read_curve(run) for key in ("wer", "ctc_wer") if key in point["scores"]]


def test_steps_and_seconds_of_stages_and_of_the_first_run_add_up(two: list[Path]) -> None:
    stages = [(20, 0.5, "ctc_wer", 45.0), (30, 1.0, "ctc_wer", 50.0), (40, 2.0, "wer", 60.0),
              (80, 6.0, "wer", 30.0)]
    assert seen(two[1]) == stages
    # A row has the mean seconds of the steps since the one before.
    assert [row[1] for row in seen(two[0])] == [0.0, 2.0, 4.0]
    more = [train(4), dev(4, 20.0)]
    assert seen(make(Path("a"), more, init=str(two[1] / "ctc")))[-1] == (34, 1.4, "wer", 20.0)
    ahead = make(Path("b"), more, init=str(two[1] / "adapt" / "best"))
    assert read_curve(ahead)[-1] == {"step": 84, "minutes": pytest.approx(6.4), "scores": {}}
    assert seen(make(Path("c"), more, init="models/gone")) == [(4, 0.4, "wer", 20.0)]
    assert read_curve(make(Path("d"), [])) == []


def test_curves_of_seeds_are_means_of_what_all_have(two: list[Path]) -> None:
    other = make(Path("s2"), [dev(0, 150.0), train(20, None), dev(20, 80.0)])
    assert mean_curve([read_curve(two[0]), read_curve(other)]) == [
        {"step": 0, "minutes": 0.0, "scores": {"wer": 200.0, "score": -100.0}},
        {"step": 20, "minutes": None, "scores": {"wer": 85.0, "score": 15.0}}]


def test_steps_taken_twice_count_once(tmp_path: Path) -> None:
    once = [train(1, 1.0), train(2, 2.0), dev(2, 50.0), train(3, 3.0), train(4, 4.0), dev(4, 45.0)]
    first = [*once[:4], train(4, 9.0), train(5, 9.0), dev(5, 1.0)]  # it goes on from step 2
    again = read_curve(make(tmp_path / "resumed", [*first, *once[3:]]))
    assert again == read_curve(make(tmp_path / "plain", once))
    assert [60 * point["minutes"] for point in again] == [3.0, 10.0, 10.0]


def test_torn_lines_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make(tmp_path / "run", [train(1), dev(1, 50.0)])
    whole = seen(run)
    torn = ('{"part": "train", "st', "\0\0\0", "[1]", '{"part": "dev"}', '{"step": Infinity}')
    (run / "metrics.jsonl").open("a").write("\n".join(torn))
    assert seen(run) == whole
    assert [message.split(":")[1].split()[0] for message in caplog.messages] == list("34567")
