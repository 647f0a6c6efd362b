"""The run as a whole: what it writes, that it resumes exactly, that it refuses what cannot go well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import CTC, SECONDS, fitted, logged, stop_after, weights
from unislu_llm import models
from unislu_llm.config import Config
from unislu_llm.data.manifest import write_manifest
from unislu_llm.errors import Stopped, UserError
from unislu_llm.run_folder import BEST, LAST, find_run, read_finished
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.training.checkpoint import read_progress
from unislu_llm.training.data import deal
from unislu_llm.training.stages import train
from unislu_llm.training.trainer import Trainer
from unislu_llm.utterance import Utterance

Make = Callable[..., Config]
DROPOUT: dict[str, Any] = {"batch_size": 4, "accumulation": 2, "hypothesis_word_dropout": 0.3}


def same(a: Path, b: Path) -> None:
    """The weights in two folders are the same to the bit."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_a_run_learns_and_leaves_a_loadable_model(kind: str, tiny_config: Make,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(kind, tiny_config(train={"epochs": 8, "lr": {"decoder": 1e-2}}))
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters()
              if not p.requires_grad}
    trainer.fit()
    rows = logged(trainer.run)
    assert len(rows) == trainer.total_steps == 16
    for row in rows:  # from the first step on
        assert 0 < row["w_asr"] < 1
        assert row["w_asr"] + row["w_task"] == pytest.approx(1)
    for part in ("loss_asr", "loss_ner", "loss_sa"):
        seen = [r[part] for r in rows if part in r]
        assert seen[-1] < seen[0], part
    for name, before in frozen.items():
        assert torch.equal(dict(trainer.model.named_parameters())[name], before), name
    assert [r["step"] for r in logged(trainer.run, "dev")] == [0, 16]
    assert len(list((trainer.run / "predictions").glob("*.jsonl"))) == 2
    assert {"config.yaml", "versions.json", "best", "last", "metrics.jsonl"} <= {
        p.name for p in trainer.run.iterdir()}
    found = read_finished(trainer.run)
    assert (found["step"], found["best_step"]) == (16, 16)
    assert (find_run(trainer.run).step(), find_run(trainer.run).checkpoint) == (16, BEST)
    loaded = models.load(trainer.run / LAST)
    state, own = loaded.trained_state(), trainer.model.trained_state()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[n], own[n]) for n in own)
    # Nothing in a checkpoint could run code.
    assert {path.suffix for path in (trainer.run / LAST).rglob("*")
            if path.name != "SHA256SUMS"} <= {".json", ".safetensors", ".jinja"}
    assert not (trainer.run / BEST / "optimizer.safetensors").exists()
    printed = capsys.readouterr()
    assert "nan" not in printed.out
    assert len(printed.out.splitlines()) < 60, "a run fits a screen"


CASES: dict[str, dict[str, Any]] = {
    "unified": {"model": {"hypothesis": "reference"}, "train": DROPOUT},
    "ctc": {"model": CTC, "train": {"objective": "ctc", "batch_size": 4, "accumulation": 2}},
    "mixture": {"data": {"temperature": 3.0, "epoch_samples": 20}, "train": {"batch_size": 4},
                "augment": {"freq_masks": 1, "time_masks": 1, "speeds": [0.9, 1.0, 1.1],
                            "gain_db": 3.0, "silence_share": 0.1}},
    "tokens": {"train": {"batch_tokens": 240, "accumulation": 2, "epochs": 3}},
    "workers": {"data": {"num_workers": 1}, "train": {"batch_size": 4}},
}


@pytest.mark.parametrize(("case", "stops"), [
    ("unified", (1, 3, 4, 5)), ("ctc", (1, 3, 4, 5)), ("mixture", (5,)), ("tokens", (5,)),
    ("workers", (5,))])
def test_a_stopped_and_resumed_run_equals_one_that_was_not(case: str, stops: tuple[int, ...],
                                                           tiny_config: Make) -> None:
    """Stopped again and again, with dropout at work: bit for bit, and its log and scores too."""
    sections = CASES[case] | {"train": CASES[case]["train"] | {"save_every": 1, "eval_every": 2}}
    whole = fitted("speech_llm", tiny_config("whole", **sections))
    resumed = Trainer("speech_llm", tiny_config("part", **sections))
    for stop in stops:
        stop_after(resumed, stop)
        resumed = Trainer("speech_llm", tiny_config("part", **sections, resume=True))
        assert resumed.progress.step == stop
    resumed.fit()
    for name in (BEST, LAST):
        same(whole.run / name, resumed.run / name)
    drop = ("seconds", "tokens_per_s", "data_wait", "memory_gib")
    for part in ("train", "dev"):
        one, two = ([{k: v for k, v in row.items() if k not in drop} for row in logged(run, part)]
                    for run in (whole.run, resumed.run))
        assert one == two
    ends = [read_progress(run / LAST) for run in (whole.run, resumed.run)]
    assert ends[0].history == ends[1].history
    assert len(ends[0].history) >= 4


def test_a_validation_that_fails_loses_no_weights(tiny_config: Make,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The run then goes on with that validation, and ends as if it had not failed."""
    train = {"eval_every": 2, "batch_size": 4}
    whole = fitted("speech_llm", tiny_config("whole", train=train))
    part = Trainer("speech_llm", tiny_config("part", train=train))
    decode = part.objective.decode

    def fail(*arguments: Any) -> Any:
        if part.progress.step:
            raise RuntimeError("out of memory")
        return decode(*arguments)

    monkeypatch.setattr(part.objective, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        part.fit()
    assert read_progress(part.run / LAST).step == 2
    resumed = Trainer("speech_llm", tiny_config("part", train=train, resume=True))
    resumed.fit()
    assert [r["step"] for r in logged(resumed.run, "dev")] == [0, 2, 4, 6]
    same(whole.run / BEST, resumed.run / BEST)


def test_a_kill_while_a_checkpoint_is_swapped_in_is_repaired(tiny_config: Make) -> None:
    whole = fitted("speech_llm", tiny_config("whole"))
    part = Trainer("speech_llm", tiny_config("part", train={"save_every": 1}))
    stop_after(part, 2)
    (part.run / LAST).rename(part.run / "last.old")  # killed between the two renames
    (part.run / "last.new").mkdir()
    (part.run / "last.new" / "model.safetensors").write_bytes(b"half")
    resumed = fitted("speech_llm", tiny_config("part", resume=True))
    same(whole.run / LAST, resumed.run / LAST)
    assert not list(part.run.glob("*.old"))
    assert not list(part.run.glob("*.new"))


def test_resuming_with_other_parts_or_a_damaged_file_is_named(tiny_config: Make) -> None:
    train = {"max_steps": 2, "save_every": 1}
    trainer = Trainer("speech_llm", tiny_config(train=train))
    stop_after(trainer, 1)
    other = tiny_config(train=train | {"groups": ["projector"]}, resume=True)
    with pytest.raises(UserError, match=r"optimizer\.safetensors is of other parameters"):
        Trainer("speech_llm", other)
    for name, text in (("rng.json", "{}"), ("trainer.json", '{"step": "x"}'),
                       ("optimizer.safetensors", "x")):
        kept = (trainer.run / LAST / name).read_bytes()
        (trainer.run / LAST / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is damaged.*holds no whole checkpoint"):
            Trainer("speech_llm", tiny_config(train=train, resume=True))
        (trainer.run / LAST / name).write_bytes(kept)


def test_a_run_folder_is_never_overwritten(tiny_config: Make) -> None:
    first = Trainer("speech_llm", tiny_config("same"))
    before = (first.run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        Trainer("speech_llm", tiny_config("same", train={"epochs": 9}))
    assert (first.run / "config.yaml").read_bytes() == before
    with pytest.raises(UserError, match="holds no run"):
        Trainer("speech_llm", tiny_config("nothing", resume=True))


def test_a_loss_that_is_not_finite_stops_the_run_before_weights_change(tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", tiny_config(train={"save_every": 1}))
    micro = next(iter(trainer.batches(0)))
    trainer.step(micro)
    trainer.save()
    before = trainer.model.trained_state()
    moments = [(value, value.clone()) for state in trainer.optimizer.state.values()
               for value in state.values()]
    loss = trainer.objective.loss

    def broken(*arguments: Any) -> Any:
        found, sums = loss(*arguments)
        return found * math.nan, sums

    trainer.objective.loss = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"loss is nan or infinite at step 1.*can be resumed"):
        trainer.step(micro)
    after = trainer.model.trained_state()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(value, kept) for value, kept in moments)


def test_bf16_trains_with_fp32_trainables(tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", tiny_config(train={"precision": "bf16", "max_steps": 2}))
    trained = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert trained == {True: torch.float32, False: torch.bfloat16}
    trainer.fit()
    assert all(math.isfinite(row["loss"]) for row in logged(trainer.run))


def test_gradient_checkpointing_changes_no_gradient(tiny_config: Make) -> None:
    gradients = []
    for name, on in (("plain", False), ("checkpointed", True)):
        trainer = Trainer("speech_llm", tiny_config(name, train={"gradient_checkpointing": on}))
        micro = next(iter(trainer.batches(0)))
        trainer.backward(micro, trainer.totals(micro))
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters()
                          if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7,
                                   msg=lambda m, n=name: f"{n}: {m}")


def test_a_corpus_without_tasks_trains(tiny_config: Make, make_utterances: Any,
                                       tmp_path: Path) -> None:
    bare = [Utterance(u.id, u.audio, u.text, {}, duration=u.duration)
            for u in make_utterances(seconds=[0.6, 0.8, 1.0, 0.7])]
    write_manifest(tmp_path / "asr.jsonl", bare)
    data = {"train": [str(tmp_path / "asr.jsonl")], "dev": []}
    run = fitted("speech_llm", tiny_config(data=data, train={"batch_size": 4, "max_steps": 3})).run
    assert all("loss_task" not in row and row["loss"] == pytest.approx(row["loss_asr"])
               for row in logged(run))
    assert not (run / BEST).exists()
    assert find_run(run).checkpoint == LAST


@pytest.mark.parametrize(("said", "asked", "stored"), [
    ("", "auto", "verbatim"), ("no " * 30, "auto", "rewrite"), ("", "rewrite", "rewrite")])
def test_validation_chooses_what_becomes_of_hypotheses(
        tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        make_utterances: Any, said: str, asked: str, stored: str) -> None:
    """Word for word where the model does not mend them; a model that has not learnt does not."""
    rows = [replace(u, hypothesis=said or u.text) for u in make_utterances(seconds=[0.6, 0.8, 1.0])]
    write_manifest(tmp_path / "heard.jsonl", rows)
    data = {key: [str(tmp_path / "heard.jsonl")] for key in ("train", "dev")}
    run = fitted("speech_llm", tiny_config(data=data, train={"max_steps": 1}, model={
        "hypothesis": "manifest", "transcript": asked})).run
    assert {models.load(run / name).config.transcript for name in (BEST, LAST)} == {stored}
    assert ("WER on dev of the hypotheses" in capsys.readouterr().out) == (asked == "auto")


def test_trackers_are_written(tiny_config: Make) -> None:
    run = fitted("speech_llm", tiny_config(train={"trackers": ["tensorboard"], "max_steps": 1})).run
    assert [path.parent.name for path in run.rglob("events.out.*")] == ["unislu_llm"]


def test_dev_examples_of_one_utterance_go_to_one_process(tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", tiny_config())
    doubled = [example for example in trainer.dev for _ in range(2)]
    shares = [deal(doubled, rank, 3) for rank in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(len(doubled)))
    assert all(place + 1 in share for share in shares for place in share if place % 2 == 0)


@pytest.mark.parametrize("objective", ["unified", "ctc"])
def test_the_guard_set_is_scored_beside_dev_and_changes_nothing(
        objective: str, tiny_config: Make, make_utterances: Any,
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"model": CTC if objective == "ctc" else {},
                            "train": {"objective": objective, "eval_every": 2}}
    plain = fitted("speech_llm", tiny_config("plain", **more)).run
    guard, dev = tmp_path / "read.jsonl", tiny_config().data.dev
    write_manifest(guard, [replace(u, corpus="read") for u in make_utterances(seconds=SECONDS[:4])])
    run = fitted("speech_llm", tiny_config("run", **more, data={"guard": [str(guard), *dev]})).run
    for row, before in zip(logged(run, "dev"), logged(plain, "dev"), strict=True):
        stem = Path("predictions", f"step-{row['step']:06d}.jsonl")
        assert (run / stem).read_text() == (plain / stem).read_text()
        made = list(map(json.loads, (run / stem.with_suffix(".guard.jsonl")).open()))
        assert [p["task"] for p in made] == ["asr"] * (4 + 12)  # whatever is annotated
        wers = {f"guard_wer{name}": corpus_wer([p["ref_text"] for p in some], [
            p["hyp_text"] for p in some], "whisper").wer for name, some in {
                "": made, "_read": made[:4], "_corpus": made[4:]}.items()}
        assert row | {"seconds": 0} == before | wers | {"seconds": 0}
    told = capsys.readouterr()
    assert "\nguard: 16 samples (16 asr)\n" in told.out
    assert sum({"score", "guard_wer"} <= set(line.split()) for line in told.out.splitlines()) == 3
    for other in ("train", "dev"):
        assert f"data.guard: 12 of 12 clips are in data.{other} too, the first {dev[0]}" in told.err


def test_forgetting_stops_a_run_that_goes_on_with_a_higher_limit(
        tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Trainer.decode_scored

    def forgets(self: Trainer) -> Any:
        dev, made = decode(self)
        wrong = "ah " * (self.progress.step > 2)
        return dev, [p | {"hyp_text": wrong + p["ref_text"]} for p in made]

    monkeypatch.setattr(Trainer, "decode_scored", forgets)

    def start(limit: float, resume: bool = False) -> None:
        train("speech_llm", tiny_config(
            data={"guard": tiny_config().data.dev}, resume=resume,
            train={"batch_size": 4, "eval_every": 2, "guard_limit": limit}))

    told = (r"^stopped \(train.guard_limit 5; best is of step 2\) after step 4 of 6, saved in "
            ".*/run/last; go on with: unislu train --resume --output .*/run$")
    for resume in (False, True):  # whoever starts it again by a script does not train on
        with pytest.raises(Stopped, match=told):
            start(5.0, resume)
    run = Path(tiny_config().output)
    assert "forgetting: the guard set's WER went from 0.0 to 1" in (run / "log.txt").read_text()
    start(50.0, resume=True)
    assert [row["step"] for row in logged(run, "dev")] == [0, 2, 4, 6]
