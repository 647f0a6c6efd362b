"""Runs of tiny random models in forked processes, which can be torn at any moment.

Everything is loaded once, by this process; a run of a few steps then takes a second. For
`survive.py`, and for tests.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the tests' tiny models

from tests import tiny  # noqa: E402
from unislu_llm.config import Config  # noqa: E402
from unislu_llm.config_file import merge  # noqa: E402
from unislu_llm.data.manifest import write_manifest  # noqa: E402
from unislu_llm.errors import reported  # noqa: E402
from unislu_llm.training.stages import train  # noqa: E402
from unislu_llm.training.steps import Steps  # noqa: E402

SAVE_EVERY = 2
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.link"}


@dataclass
class Fault:
    """What happens to one process of a run at its moment number `at`."""

    at: int = 0  # 0: nothing, moments are counted alone
    act: Callable[[], object] = lambda: None
    rank: int = 0
    count: int = field(default=0, init=False)
    armed: bool = field(default=False, init=False)

    def arm(self, run: Path) -> None:
        """Count the moments of this process from now on."""
        self.armed, self.folder, step = True, str(run), Steps.step

        def counted(steps: Steps, micro: Any) -> None:
            self.moment()
            step(steps, micro)

        Steps.step = counted  # type: ignore[method-assign, assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event in _CHANGES or (event == "open" and isinstance(args[1], str)
                                       and bool(set(args[1]) & set("wax")))
        if writes and str(args[0]).startswith(self.folder):
            self.moment()

    def moment(self) -> None:
        """One more; the fault, if it is its moment."""
        self.count += 1
        if self.count == self.at:
            self.act()


class Bench:
    """A folder with a corpus and tiny checkpoints, and the runs in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        tokenizer = tiny.make_tokenizer()
        for name, (model, own) in {"whisper": tiny.make_whisper(), "llm": (
                tiny.make_llm("llama", tokenizer), tokenizer)}.items():
            model.save_pretrained(home / name)
            own.save_pretrained(home / name)
        spoken = tiny.write_utterances(home / "audio", seconds=(0.6, 1.9, 0.7, 1.0, 0.8, 1.5))
        mute = [replace(u, id=f"text-{u.id}", audio=None, duration=None) for u in spoken[:3]]
        write_manifest(home / "dev.jsonl", spoken)
        write_manifest(home / "train.jsonl", [*spoken, *mute])

    def config(self, run: Path, objective: str, **sections: Any) -> Config:
        """Nine steps, a checkpoint every two and a validation every three."""
        base = {"output": str(run), "model": {
            "encoder": str(self.home / "whisper"), "llm": str(self.home / "llm"),
            "projector": "ctc", "projector_options": {"stack": 2, "layers": 1, "heads": 2,
                                                      "hidden": 16, "blank_bias": 1.0},
            "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}},
            "data": {"train": [str(self.home / "train.jsonl")],
                     "dev": [str(self.home / "dev.jsonl")],
                     "frame_cache": str(self.home / "frames")},
            "augment": {"freq_masks": 1, "time_masks": 1},
            "train": {"objective": objective, "epochs": 3, "batch_size": 4, "max_steps": 9,
                      "trackers": [], "threads": 1, "save_every": SAVE_EVERY, "eval_every": 3,
                      "timeout": 0.15, "lr": {"projector": 1e-2, "lora": 1e-2, "markers": 1e-2}},
            "decode": {"max_new_tokens": 8}}
        return Config.model_validate(merge(Config, base, sections))

    def run(self, config: Config, world: int = 1, *faults: Fault,
            before: Callable[[], object] = lambda: None) -> tuple[list[int], str, list[int]]:
        """Train in so many forked processes; their exit codes, what they printed, and how many
        moments those had for which there is a fault."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = Path(tempfile.mkdtemp(dir=self.home)) / "told.txt"
        pids = []
        for rank in range(world):
            pid = os.fork()
            if not pid:
                os.environ |= {} if world == 1 else {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port)}
                _child(config, next((f for f in faults if f.rank == rank), None), told, before)
            pids.append(pid)
        codes, left, deadline = [0] * world, set(pids), time.monotonic() + 120
        while left:
            for pid in list(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pids.index(pid)] = os.waitstatus_to_exitcode(status)
                    left.remove(pid)
            if any(codes):  # the others find out by themselves, or are ended as by a launcher
                deadline = min(deadline, time.monotonic() + 30)
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        text = told.read_text() if told.exists() else ""
        counted = sorted(told.parent.glob("moments-*"))
        return codes, text, [int(file.read_text()) for file in counted]


def _child(config: Config, fault: Fault | None, told: Path, before: Callable[[], object]) -> None:
    """A forked process of a run; does not return."""
    code = 1
    with told.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):  # of a file, they would hold lines back
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        if fault:
            fault.arm(Path(config.output))
        before()
        with reported():
            train("speech_llm", config)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    if fault:  # in a file of its own: what two processes print may share a line
        (told.parent / f"moments-{fault.rank}").write_text(str(fault.count))
    sys.stdout.flush()
    os._exit(code)
