"""The guard set: scored beside dev, it chooses nothing, shows what is forgotten, stops a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_utterances
from tests.training.conftest import CTC, fitted, logged
from unislu_llm.config import Config
from unislu_llm.data.manifest import write_manifest
from unislu_llm.errors import Stopped, UserError
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.training.checkpoint import read_progress
from unislu_llm.training.stages import train as start
from unislu_llm.training.trainer import Trainer

Make = Callable[..., Config]


@pytest.fixture
def guard(tmp_path: Path) -> list[str]:
    """Two manifests, of four clips that are annotated and of three."""
    files = [tmp_path / "guard" / f"{name}.jsonl" for name in ("read", "calls")]
    for file, n in zip(files, (4, 3), strict=True):
        write_manifest(file, [replace(u, corpus=file.stem) for u in write_utterances(
            tmp_path / file.stem, seconds=[0.6] * n, seed=n)])
    return [str(file) for file in files]


@pytest.mark.parametrize("train", [{}, {"objective": "ctc"}], ids=["unified", "ctc"])
def test_the_guard_set_is_scored_beside_dev_and_changes_nothing(
        train: dict[str, Any], tiny_config: Make, guard: list[str],
        capsys: pytest.CaptureFixture[str]) -> None:
    model, train = CTC if train else {}, train | {"eval_every": 2, "trackers": ["tensorboard"]}
    dev = tiny_config().data.dev
    plain = fitted("speech_llm", tiny_config("plain", model=model, train=train)).run
    capsys.readouterr()
    run = fitted("speech_llm", tiny_config("guarded", model=model, train=train, data={
        "guard": [*guard, *dev]})).run
    for row, before in zip(logged(run, "dev"), logged(plain, "dev"), strict=True):
        made = [json.loads(line) for line in (
            run / "predictions" / f"step-{row['step']:06d}.guard.jsonl").read_text().splitlines()]
        assert [p["task"] for p in made] == ["asr"] * (4 + 3 + 12)
        wer = {name: corpus_wer([p["ref_text"] for p in some], [p["hyp_text"] for p in some],
                                "whisper").wer for name, some in {
            "guard_wer": made, "guard_wer_read": made[:4], "guard_wer_calls": made[4:7],
            "guard_wer_corpus": made[7:]}.items()}
        assert {key: value for key, value in row.items() if "guard" in key} == wer
        assert {**row, "seconds": 0} == {**before, **wer, "seconds": 0}
        one, two = ((folder / "predictions" / f"step-{row['step']:06d}.jsonl").read_text()
                    for folder in (run, plain))
        assert one == two
    assert read_progress(run / "last").best_step == read_progress(plain / "last").best_step
    told = capsys.readouterr()
    assert "\nguard: 19 samples (19 asr)\n" in told.out
    lines = [line.split() for line in told.out.splitlines()]
    assert sum({"score", "guard_wer"} <= set(line) for line in lines) == len(logged(run, "dev"))
    assert sum(line[:1] == ["guard_wer"] for line in lines) == 1  # of before and after
    for other in ("train", "dev"):
        said = f"data.guard: 12 of 19 clips are in data.{other} too, the first {dev[0]}:1"
        assert said in told.err
    assert not list((plain / "predictions").glob("*.guard.*"))


def test_forgetting_stops_a_run_that_goes_on_with_a_higher_limit(
        tiny_config: Make, guard: list[str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """The guard's transcripts are right up to the second step and then wrong."""
    decode = Trainer.decode_scored

    def forgets(self: Trainer) -> Any:
        dev, made = decode(self)
        wrong = "ah " * (self.progress.step > 2)
        return dev, [p | {"hyp_text": wrong + p["ref_text"]} for p in made]

    monkeypatch.setattr(Trainer, "decode_scored", forgets)

    def config(limit: float, **more: Any) -> Config:
        return tiny_config(data={"guard": guard[:1]}, **more, train={
            "batch_size": 4, "eval_every": 2, "guard_limit": limit})

    told = (r"^stopped \(train.guard_limit 5; best is of step 2\) after step 4 of 6, "
            r"saved in .*/run/last; go on with: unislu train --resume --output .*/run$")
    with pytest.raises(Stopped, match=told):
        start("speech_llm", config(5.0))
    run = Path(config(5.0).output)
    scores = read_progress(run / "last").history
    assert [row["guard_wer"] > 0 for row in scores] == [False, False, True]
    said = f"forgetting: the guard set's WER went from 0.0 to {scores[-1]['guard_wer']:.1f}"
    assert said in (run / "log.txt").read_text()
    # Whoever starts it again and again by a script does not train on.
    with pytest.raises(Stopped, match="after step 4 of 6"):
        start("speech_llm", config(5.0, resume=True))
    start("speech_llm", config(50.0, resume=True))
    assert "train.guard_limit 5.0 -> 50.0" in capsys.readouterr().out
    assert [row["step"] for row in logged(run, "dev")] == [0, 2, 4, 6]
    assert logged(run, "dev")[-1]["guard_wer"] > 0


@pytest.mark.parametrize(("data", "train", "says"), [
    ({"dev": []}, {}, "data.guard: is scored beside data.dev"),
    ({"guard": []}, {"guard_limit": 1.0, "eval_every": 2}, "train.guard_limit: .*data.guard"),
    ({}, {"guard_limit": 1.0}, "train.guard_limit: .*train.eval_every")])
def test_what_could_not_guard_is_refused(data: dict[str, Any], train: dict[str, Any], says: str,
                                         tiny_config: Make, guard: list[str]) -> None:
    from unislu_llm.training.stages import train as start

    with pytest.raises(UserError, match=says):
        start("speech_llm", tiny_config(data={"guard": guard} | data, train=train))
