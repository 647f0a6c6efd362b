"""The checks of decoding: they hold, they are taken up where they stopped, and they tell ties from faults."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from unislu_llm.analysis import check_batching
from unislu_llm.analysis.benchmark_options import CheckBatching, CheckMalformed
from unislu_llm.analysis.check_batching import Setting, plan
from unislu_llm.analysis.check_decoding import run


def test_random_models_are_malformed_without_the_grammar_alone(tmp_path: Path) -> None:
    out = tmp_path / "results" / "malformed.json"
    assert run(CheckMalformed(decodes=20, searches=["greedy"], out=out, threads=1), ["check", "malformed"]) == 0
    result = json.loads(out.read_text())
    assert result["holds"]
    assert result["answers"] == 20
    assert result["command"] == "check malformed"
    assert result["environment"]["packages"]["torch"]
    assert result["environment"]["git"]
    arms = result["arms"]
    assert arms["plain"]["malformed"] > 10
    assert all(arms[a]["malformed"] == 0 for a in arms if a != "plain")
    assert len(arms["grammar"]["malformed_by_cell"]) == 4


def batching(run_folder: Path, out: Path) -> CheckBatching:
    return CheckBatching(model=[run_folder], clips=4, batch_sizes=[3], beams=[1, 2], max_new_tokens=5,
                         manifest=[Path("corpus/dev.jsonl")], out=out, threads=1)


def test_batches_change_nothing_and_an_interrupted_check_goes_on(
        tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = batching(tiny_run(), tmp_path / "batching.json")
    decode, calls = check_batching.decode_encoded, []

    def counted(*args: object) -> list[list[list[int]]]:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(check_batching, "decode_encoded", counted)
    assert run(options) == 130
    assert run(options) == 0
    result = json.loads(options.out.read_text())
    assert len(calls) == 1 + 2 * (4 + 2 + 2)  # the call that was interrupted alone was made again
    settings = result["models"]["tiny"]["settings"]
    assert len(settings) == 6
    assert all(s["beyond_ties"] == 0 for s in settings.values())
    assert result["seconds_of_audio"]["shortest"] == pytest.approx(0.2, abs=1e-3)
    assert result["seconds_of_audio"]["longest"] == pytest.approx(30.0, abs=1e-3)
    assert list(options.out.parent.glob("*.partial.jsonl")) == []


def test_a_batch_that_changes_an_answer_is_found(
        tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = batching(tiny_run(), tmp_path / "batching.json")
    options.beams = [1]
    decode = check_batching.decode_encoded

    def faulty(model: object, encoded: object, durations: list[float], *rest: object) -> list[list[list[int]]]:
        found = decode(model, encoded, durations, *rest)  # type: ignore[arg-type]
        return found if len(durations) == 1 else [[[7, *ids[1:]] for ids in best] for best in found]

    monkeypatch.setattr(check_batching, "decode_encoded", faulty)
    assert run(options) == 1
    result = json.loads(options.out.read_text())
    assert not result["holds"]
    assert result["differing_clips"] > 0
    difference = result["models"]["tiny"]["settings"]["greedy, batch 3, random"]["differences"][0]
    assert difference["position"] == 0
    assert difference["batched"] == 7
    assert difference["margin"] > 0


@pytest.mark.parametrize("order", ["sorted", "random"])
def test_a_plan_has_every_clip_once(order: str) -> None:
    lengths = [random.Random(0).randrange(1000) for _ in range(20)]
    batches = plan(lengths, Setting(1, 6, order), seed=1)
    assert sorted(i for b in batches for i in b) == list(range(20))
    assert [len(b) for b in batches] == [6, 6, 6, 2]


def test_no_model_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(CheckBatching(out=tmp_path / "x.json", threads=1)) == 2
    assert "--model" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
