"""What ends a run early, and what it may not lose: signals, the time limit, bad losses, memory."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import CTC, fitted, logged, weights
from unislu_llm import io
from unislu_llm.config import Config
from unislu_llm.errors import Stopped, UserError, reported
from unislu_llm.run_folder import LAST
from unislu_llm.training.checkpoint import read_progress
from unislu_llm.training.interrupt import Clock, Interrupts
from unislu_llm.training.trainer import Trainer

Make = Callable[..., Config]
SMALL: dict[str, Any] = {"batch_size": 4, "eval_every": 3}


def same(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def interrupted(trainer: Trainer, place: str, times: int, number: int) -> None:
    """Send this process a signal when a method of a trainer is called for so many a time."""
    method, calls = getattr(trainer, place), []

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == times:
            os.kill(os.getpid(), number)
        return method(*arguments)

    setattr(trainer, place, signalled)


@pytest.mark.parametrize(("place", "times", "number", "saved"), [
    ("backward", 2, signal.SIGTERM, 3), ("save", 1, signal.SIGINT, 3),
    ("_validate", 2, signal.SIGTERM, 3), ("_log_step", 1, signal.SIGINT, 2)])
def test_a_signal_loses_no_step(place: str, times: int, number: int, saved: int,
                                tiny_config: Make) -> None:
    """The step that is under way is finished, at most one more is taken; then bit for bit."""
    whole = fitted("speech_llm", tiny_config("whole", train=SMALL))
    part = Trainer("speech_llm", tiny_config("part", train=SMALL))
    interrupted(part, place, times, number)
    before = signal.getsignal(number)
    told = f"{signal.Signals(number).name}.*go on with: unislu train --resume --output "
    with pytest.raises(Stopped, match=told):
        part.fit()
    assert signal.getsignal(number) is before
    assert read_progress(part.run / LAST).step == saved
    resumed = fitted("speech_llm", tiny_config("part", train=SMALL, resume=True))
    for name in ("best", "last"):
        same(whole.run / name, resumed.run / name)
    assert [r["step"] for r in logged(resumed.run)] == [r["step"] for r in logged(whole.run)]


def test_a_signal_where_an_epoch_ends_loses_no_step(tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", tiny_config(train={"batch_size": 4}))  # saves at the end alone
    interrupted(trainer, "batches", 2, signal.SIGTERM)
    with pytest.raises(Stopped, match="after step 4 of 6, saved"):
        trainer.fit()
    assert read_progress(trainer.run / LAST).step == 4


@pytest.mark.parametrize(("place", "told"), [
    ("build_model", r"^stopped \(SIGTERM\) before anything was written; start it again$"),
    ("build_frames", r"first step of .*/run; go on with: unislu train --resume --output .*/run$")])
def test_a_signal_while_a_run_is_prepared_says_what_to_do(
        place: str, told: str, tiny_config: Make, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"unislu_llm.training.trainer.{place}",
                        lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    config = tiny_config(data={"frame_cache": str(tmp_path / "cache")})
    with pytest.raises(Stopped, match=told):
        Trainer("speech_llm", config)
    monkeypatch.undo()
    config.resume = Path(config.output).is_dir()
    assert fitted("speech_llm", config).progress.step == 4


def test_a_full_disk_names_the_file_and_what_is_safe(tiny_config: Make,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer("speech_llm", tiny_config(train=SMALL))
    append, log = io.append_text, trainer.log.file

    def full(path: Path, text: str) -> None:
        with io.named(path):
            if '"step": 5' in text:
                raise OSError(errno.ENOSPC, "full")  # as `write` of an open file raises it
        append(path, text)

    monkeypatch.setattr(io, "append_text", full)
    with pytest.raises(UserError, match=rf"^{log}: No space left.*last \(step 3\) is whole"):
        trainer.fit()


def test_a_signal_before_the_first_step_says_so(tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", tiny_config())
    interrupted(trainer, "_validate", 1, signal.SIGTERM)
    with pytest.raises(Stopped, match="before the first step"):
        trainer.fit()


def test_entry_points_have_exit_codes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    for error, status in ((Stopped("stopped"), 75), (KeyboardInterrupt(), 130),
                          (UserError("bad"), 2), (RuntimeError("I/O error (os error 28)"), 2),
                          (OSError(28, "full", "runs/x"), 2)):
        with pytest.raises(SystemExit) as found, reported():
            raise error
        assert found.value.code == status
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: runs/x: No space left on device; make room")


def test_a_second_signal_ends_at_once_and_an_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Interrupts() as interrupts, interrupts.held():
        for _ in range(2):  # the terminal's, and the launcher's
            os.kill(os.getpid(), signal.SIGINT)
        assert (interrupts.reason, ended) == ("SIGINT", [])
        interrupts.since -= 60
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]


def test_checkpoints_by_time_and_the_time_limit(tiny_config: Make) -> None:
    """The limit saves in time and is resumed; a checkpoint is due by minutes."""
    part = Trainer("speech_llm", tiny_config("part", train=SMALL | {"time_limit": 60.0}))
    step = part.step

    def late(micro: Any) -> None:
        if part.progress.step == 1:
            part.clock.started -= 3600 - 1e-3
        step(micro)

    part.step = late  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="time_limit of 60 minutes"):
        part.fit()
    assert read_progress(part.run / LAST).step == 2
    clock = Clock(save_minutes=10, time_limit=0, started=time.monotonic())
    assert not clock.save_is_due()
    clock.last_save -= 601
    assert clock.save_is_due()
    with clock.measure("save"):
        pass
    assert not clock.save_is_due()
    assert not clock.time_is_up()


def test_a_checkpoint_that_is_due_is_saved_without_a_validation(tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", tiny_config(train={"save_minutes": 1e-9, "batch_size": 4}))
    interrupted(trainer, "backward", 4, signal.SIGUSR1)
    seen = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: seen.append(
        read_progress(trainer.run / LAST).step))
    try:
        trainer.fit()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert seen == [3]


def broken(trainer: Trainer, steps: set[int]) -> None:
    """Make the loss of some steps not a number."""
    loss = trainer.objective.loss

    def bad(*arguments: Any) -> Any:
        found, sums = loss(*arguments)
        return found * (math.nan if trainer.progress.step in steps else 1.0), sums

    trainer.objective.loss = bad  # type: ignore[method-assign]


def test_steps_that_are_not_finite_are_left_out_and_logged(tiny_config: Make) -> None:
    skip = SMALL | {"on_nonfinite": "skip"}
    trainer = Trainer("speech_llm", tiny_config(train=skip))
    broken(trainer, {1, 2})
    trainer.fit()
    assert [row["step"] for row in logged(trainer.run)] == [1, 4, 5, 6]
    left_out = logged(trainer.run, "nonfinite")
    assert [row["step"] for row in left_out] == [2, 3]
    assert all("train.jsonl:" in place for row in left_out for place in row["samples"])
    assert all(math.isfinite(float(value.abs().max())) for value in
               weights(trainer.run / LAST).values())


def test_a_loss_that_stays_bad_ends_the_run(tiny_config: Make) -> None:
    skip = {"batch_size": 2, "on_nonfinite": "skip"}
    trainer = Trainer("speech_llm", tiny_config(train=skip))
    broken(trainer, set(range(2, 99)))
    with pytest.raises(UserError, match=r"step 7, and in 5 steps in a row; its samples") as found:
        trainer.fit()
    assert "set train.on_nonfinite" not in str(found.value)  # it is set


@pytest.mark.parametrize(("kind", "sections"), [
    ("speech_llm", {}), ("whisper_slu", {}), ("speech_llm", {
        "model": {**CTC, "projector_options": CTC["projector_options"] | {"dropout": 0.0}},
        "train": {"objective": "ctc"}})])
def test_a_batch_that_does_not_fit_is_split_and_changes_no_gradient(
        kind: str, sections: dict[str, Any], tiny_config: Make) -> None:
    def gradients(name: str, limit: int) -> dict[str, torch.Tensor]:
        trainer = Trainer(kind, tiny_config(name, model=sections.get("model", {}), train={
            "on_oom": "split", **sections.get("train", {})}))
        forward = trainer.model.forward

        def bounded(batch: Any, **more: Any) -> Any:
            if len(batch) > limit:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return forward(batch, **more)

        trainer.model.forward = bounded  # type: ignore[method-assign]
        micro = next(iter(trainer.batches(0)))
        total = trainer.totals(micro)
        trainer.backward(micro, total)
        return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}

    whole, split = gradients("whole", 99), gradients("split", 3)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "limit", "words"), [
    ("stop", 1, r"out of memory at step 1: a micro-batch of \d sample.*raise train.accumulation"),
    ("split", 0, "one sample alone does not fit")])
def test_out_of_memory_names_the_batch_and_the_setting(mode: str, limit: int, words: str,
                                                       tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", tiny_config(data={"dev": []}, train={"on_oom": mode}))

    def full(batch: Any) -> Any:
        assert len(batch) > limit
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.forward = full  # type: ignore[method-assign]
    with pytest.raises(UserError, match=words):
        trainer.fit()


@pytest.mark.slow
def test_processes_split_what_does_not_fit_and_stay_together(tiny_config: Make,
                                                             launch: Callable[..., str]) -> None:
    """`split` averages gradients itself: the same steps as DDP takes."""
    for name, mode in (("stop", "stop"), ("split", "split")):
        launch(2, ("speech_llm", tiny_config(name, train=SMALL | {"on_oom": mode})))
    folders = [Path(tiny_config(name).output) for name in ("stop", "split")]
    assert [r["loss"] for r in logged(folders[0])] == [r["loss"] for r in logged(folders[1])]
    assert json.dumps(read_progress(folders[0] / LAST).history) == json.dumps(
        read_progress(folders[1] / LAST).history)


def test_a_full_disk_outside_a_save_says_what_is_safe(tiny_config: Make,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer("speech_llm", tiny_config(train=SMALL | {"save_every": 1}))
    write = trainer.log.write

    def full(part: str, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        write(part, row)

    monkeypatch.setattr(trainer.log, "write", full)
    with pytest.raises(UserError, match=r"No space left.*last \(step 1\) is whole and can be resu"):
        trainer.fit()


def test_damaged_weights_of_earlier_versions_are_named(tiny_config: Make) -> None:
    """They have no hashes."""
    trainer = fitted("speech_llm", tiny_config(train={"max_steps": 1}))
    (trainer.run / LAST / "SHA256SUMS").unlink()
    progress = json.loads((trainer.run / LAST / "trainer.json").read_text())
    progress.pop("sha256")
    (trainer.run / LAST / "trainer.json").write_text(json.dumps(progress))
    (trainer.run / LAST / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="last is damaged"):
        Trainer("speech_llm", tiny_config(train={"max_steps": 1}, resume=True))


def test_a_stop_for_a_bad_loss_keeps_the_steps_before_it(tiny_config: Make) -> None:
    """And goes on from there, bit for bit, once the loss is good again."""
    train = {"batch_size": 4, "hypothesis_word_dropout": 0.3}
    sections: dict[str, Any] = {"model": {"hypothesis": "reference"}, "train": train}
    whole = fitted("speech_llm", tiny_config("whole", **sections))
    part = Trainer("speech_llm", tiny_config("part", **sections))
    broken(part, {2})
    with pytest.raises(UserError, match=r"at step 3; .* can be resumed"):
        part.fit()
    assert read_progress(part.run / LAST).step == 2
    resumed = fitted("speech_llm", tiny_config("part", **sections, resume=True))
    same(whole.run / LAST, resumed.run / LAST)


def test_fewer_steps_than_were_taken_are_refused(tiny_config: Make) -> None:
    run = fitted("speech_llm", tiny_config(train={"batch_size": 4})).run
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="has taken 6 steps, and would end after 2"):
        Trainer("speech_llm", tiny_config(train={"batch_size": 4, "max_steps": 2}, resume=True))
    assert (run / "config.yaml").read_bytes() == before
