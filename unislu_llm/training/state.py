"""Run folders and resumable state."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from unislu_llm.errors import UserError
from unislu_llm.training.config import Config

LAST, BEST = "last", "best"
CTC_LAST, FRAMES = "ctc_last.pt", "frames"
_STATE = "trainer_state.pt"
_FINISHED = "finished.json"


def processes() -> PartialState:
    """The processes of this run, which are set up where they are not yet; on CPUs only if told as Accelerator is told."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@dataclass
class Progress:
    """Where a run stands. `step` counts optimizer steps; `epoch` and `step_in_epoch` name the next one."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_score: float = float("-inf")
    best_step: int = -1
    seconds: float = 0.0
    """Spent on steps, over all sittings; validation not counted."""


def can_resume(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint to go on from."""
    return (folder / LAST / _STATE).is_file() or (folder / CTC_LAST).is_file() or (folder / FRAMES).is_dir()


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end."""
    return (folder / _FINISHED).is_file()


def write_finished(folder: Path, values: Mapping[str, Any]) -> None:
    """Note that a run came to its end, and its last figures."""
    write_text(folder / _FINISHED, json.dumps(dict(values), indent=2) + "\n")


def read_finished(folder: Path) -> dict[str, Any]:
    """What :func:`write_finished` wrote; nothing for a run that has not ended."""
    path = folder / _FINISHED
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def create_run(config: Config, name: str) -> Path:
    """Make the run folder and write its resolved config, versions and git revision.

    Raises:
        UserError: the folder exists; runs are never overwritten.
    """
    folder = Path(config.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume:
        if not can_resume(folder):
            raise UserError(f"--resume: {folder / LAST} holds no checkpoint; give the run's folder as --output")
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"run folder {folder} exists and is never overwritten; choose another --output, or --resume it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    write_text(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
    return folder


def versions() -> dict[str, Any]:
    """Versions, git revision and command, to tell later what made a result."""
    packages = {}
    for name in ("unislu_llm", "torch", "transformers", "accelerate", "peft", "soundfile", "jiwer"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "python": platform.python_version(),
            "packages": packages, "git": git_revision(), "cpu_cores": os.cpu_count(), "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def git_revision() -> str:
    """Commit of the source tree, `+dirty` when it has changes; `unknown` outside one."""
    root = Path(__file__).resolve().parents[2]
    try:
        def git(*args: str) -> str:
            return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()

        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def swap_folder(new: Path, final: Path) -> None:
    """Put a freshly written folder in the place of another; a kill in between loses neither."""
    old = final.with_name(final.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    new.rename(final)
    if old.exists():
        shutil.rmtree(old)


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_state(folder: Path, progress: Progress, optimizer: Mapping[str, Any], schedule: Mapping[str, Any],
               rng: list[dict[str, Any]]) -> None:
    """Write everything beside the weights that a run needs to go on; `rng` has one entry a rank."""
    torch.save({"progress": asdict(progress), "optimizer": dict(optimizer), "schedule": dict(schedule), "rng": rng},
               folder / _STATE)


def load_state(folder: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU."""
    return torch.load(folder / _STATE, map_location="cpu", weights_only=False)
