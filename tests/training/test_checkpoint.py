"""What a kill, a full disk or a flipped bit may do to the checkpoints of a run, and may not."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import zeros

from unislu_llm import load
from unislu_llm.config import Config
from unislu_llm.errors import UserError, disk_fault
from unislu_llm.io import append_json, check_saved, write_saved
from unislu_llm.run_folder import create_run, find_run, load_model, lock_run, read_metrics
from unislu_llm.training.checkpoint import (
    Progress,
    copy_model,
    newest,
    read_progress,
    save_checkpoint,
    update_progress,
    what_is_safe,
)
from unislu_llm.training.log import Log

Runs = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here ends the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Killed(BaseException):
    """As if the process had ended there."""


def killed(monkeypatch: pytest.MonkeyPatch, after: int, act: Callable[[], object],
           names: Sequence[str] = ("rename", "replace", "unlink", "rmdir", "mkdir")) -> bool:
    """Whether `act` was killed as it changed folders once more than `after` times."""
    left = after

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        except Killed:
            return True
    return False


def save(run: Path, step: int, keep: int = 2) -> None:
    save_checkpoint(run / "last", lambda new: write(new, step), Progress(step=step), keep)


def write(new: Path, step: int) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        (new / name).write_text(f"{name} of step {step}")


def state(run: Path) -> dict[str, int]:
    """Step of each checkpoint that is there and whole."""
    found = {}
    for folder in run.iterdir():
        check_saved(folder)
        found[folder.name] = read_progress(folder).step
        assert (folder / "config.json").read_text().endswith(f" {found[folder.name]}")
    return found


def resumed(run: Path) -> tuple[int, list[str]]:
    """Step of the newest, and what was said of others."""
    said: list[str] = []
    found = newest(run, said.append)
    assert found == run / "last"
    return read_progress(found).step, said


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep)
    names = ["last", "last-1", "last-2"][:keep]
    assert state(tmp_path) == dict(zip(names, (5, 4, 3), strict=False))
    save(tmp_path, 6, 1)  # fewer from now on
    assert state(tmp_path) == {"last": 6}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_kill_at_any_change_of_a_folder_loses_nothing(keep: int, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each rename, removal and file; and again while what it left is put in order."""
    first, second, ended = 0, 0, False
    while not ended:
        run = tmp_path / f"{first}-{second}"
        run.mkdir()
        for step in (2, 3, 4):
            save(run, step, keep)
        ended = not killed(monkeypatch, first, partial(save, run, 5, keep))
        again = killed(monkeypatch, second, partial(resumed, run))
        step, said = resumed(run)
        assert step in (4, 5)
        assert said == []
        save(run, 6, keep)
        kept = [6, *([5] if step == 5 else []), 4, 3][:keep]
        assert state(run) == dict(zip(["last", "last-1", "last-2"], kept, strict=False))
        first, second = (first, second + 1) if again else (first + 1, 0)
    assert first > 15


def damages(folder: Path, rng: random.Random, flips: int) -> list[tuple[Path, bytes]]:
    """A file and what has become of it: bits flipped, cut short, gone (empty bytes, no file)."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for _ in range(flips):
            broken, bit = bytearray(content), rng.randrange(8 * len(content))
            broken[bit // 8] ^= 1 << bit % 8
            found.append((path, bytes(broken)))
        lines = content.rfind(b"\n", 0, -1) + 1
        found += [(path, content[:n]) for n in {0, len(content) // 2, len(content) - 1, lines}]
    return found


def test_no_damage_is_loaded_in_silence(tiny_run: Runs) -> None:
    """Of `best` it is an error that says what to use; a run goes on from the checkpoint before."""
    run, rng = tiny_run(), random.Random(1)
    shutil.copytree(run / "last", run / "last-1")
    before = {path: path.read_bytes() for path in (run / "last").iterdir()}
    for path, content in damages(run / "best", rng, 20):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=path.name):
            load_model(find_run(run))
        path.write_bytes(kept)
    for path, content in damages(run / "last", rng, 12):
        path.write_bytes(content)
        step, (said,) = resumed(run)
        assert step == 2
        assert path.name in said
        assert f"{run / 'last-1'} (step 2) is whole and can be resumed" in said
        assert (run / "last.damaged" / path.name).read_bytes() == content
        shutil.rmtree(run / "last.damaged")
        assert {p: p.read_bytes() for p in (run / "last").iterdir()} == before
        shutil.copytree(run / "last", run / "last-1")
    load(str(run))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_a_missing_file_is_named_and_no_other_model_taken(name: str, tiny_run: Runs) -> None:
    run = tiny_run()
    (run / "best" / name).unlink()
    with pytest.raises(UserError, match=rf"best/{name} is missing.*"):
        load_model(find_run(run))
    for path in (run / "last").iterdir():
        path.unlink()
    said: list[str] = []
    assert newest(run, said.append) is None
    assert "trainer.json cannot be read" in said[0]
    assert "holds no whole checkpoint" in said[0]


def test_what_changes_a_model_renews_its_hashes(tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    update_progress(tmp_path / "last", Progress(step=1, validated=1))
    write_saved(tmp_path / "last" / "config.json", "config of step 1")
    copy_model(tmp_path / "last", tmp_path / "best", Progress(step=1))
    assert state(tmp_path) == {"last": 1, "best": 1}
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"],
                   cwd=tmp_path / "best", check=True)
    assert not (tmp_path / "best" / "optimizer.safetensors").exists()
    for kill in range(3):  # before any of its writes
        config = tmp_path / "last" / "config.json"
        assert killed(monkeypatch, kill, partial(
            write_saved, config, f"changed {kill} of step 1"), ["replace"])
        assert state(tmp_path)["last"] == 1
    (tmp_path / "last" / "SHA256SUMS").write_text(f"{'0' * 64}  ../../secret\n")
    with pytest.raises(UserError, match="SHA256SUMS is damaged"):
        check_saved(tmp_path / "last")


def full(new: Path) -> None:
    (new / "model.safetensors").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_error_that_says_what_is_safe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no space left on device while writing .*holds no whole"):
        save_checkpoint(tmp_path / "last", full, Progress(step=3))
    for step in (1, 2):
        save(tmp_path, step)
    for name in ("last", "best"):
        with pytest.raises(UserError) as caught:
            save_checkpoint(tmp_path / name, full, Progress(step=3), keep=2)
        assert str(caught.value) == (
            f"no space left on device while writing {tmp_path / name}; {tmp_path / 'last'} (step "
            "2) is whole and can be resumed")
    assert state(tmp_path) == {"last": 2, "last-1": 1}  # and the room that it took is free again
    assert what_is_safe(tmp_path).startswith(f"{tmp_path / 'last'} (step 2)")
    with pytest.raises(KeyError):  # a fault of ours is no fault of the disk
        save_checkpoint(tmp_path / "last", lambda new: {}["a"], Progress())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_libraries_that_write_in_rust_say_why_too() -> None:
    for write_full in (lambda: Tokenizer(models.BPE()).save("/dev/full"),
                       lambda: save_file({"a": zeros(9)}, "/dev/full/a")):
        with pytest.raises(Exception, match="os error") as caught:
            write_full()
        assert disk_fault(caught.value) in ("no space left on device", "not a directory")
    assert disk_fault(ValueError("other")) == ""


def hold(run: Path, ready: Any) -> None:
    lock = lock_run(run)
    ready.send(os.getpid())
    ready.recv()
    lock.release()


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(run, there), daemon=True)
    other.start()
    number = here.recv()
    holder = run / ".lock.json"
    holder.rename(run / "aside")  # the other has the lock, and has not written yet who it is
    with pytest.raises(UserError, match="is being trained by a process that has just begun"):
        lock_run(run)
    (run / "aside").rename(holder)
    with pytest.raises(UserError, match=rf"is being trained by process {number} on \S+ since 2"):
        lock_run(run)
    other.kill()  # which cleans nothing up
    other.join()
    lock = lock_run(run)
    create_run(Config(output=str(run)), "run")  # a lock alone is no run
    assert json.loads((run / ".lock.json").read_text())["process"] == os.getpid()
    lock.release()
    with pytest.raises(UserError, match="never overwritten"):
        create_run(Config(output=str(run)), "run")


def test_a_resumed_log_has_each_step_once_on_a_line_of_its_own(tmp_path: Path) -> None:
    class Main:
        is_main_process = True

    file = tmp_path / "metrics.jsonl"
    for part, step in (("dev", 0), ("train", 1), ("train", 2), ("dev", 2), ("train", 3)):
        append_json(file, {"part": part, "step": step})
    file.open("a").write('{"part": "train", "st')
    log = Log(tmp_path, Main(), [], Progress(step=2, validated=0))  # type: ignore[arg-type]
    for part, step in (("dev", 2), ("train", 3)):
        log.write(part, {"step": step})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == read_metrics(tmp_path)
    assert [(row["part"], row["step"]) for row in rows] == [
        ("dev", 0), ("train", 1), ("train", 2), ("dev", 2), ("train", 3)]
