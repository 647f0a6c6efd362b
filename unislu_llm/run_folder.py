"""Run folders: what a training run leaves on disk, how it is made, and how it is found again.

    runs/mine/
      config.yaml versions.json     what was asked for, and by which versions
      metrics.jsonl predictions/    the log, and what validations decoded
      best/ last/                   models; `last` can be resumed as well
      finished.json                 there once the run has come to its end
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from unislu_llm import models
from unislu_llm.config import Config, Precision
from unislu_llm.config_file import config_from_file, to_yaml
from unislu_llm.errors import UserError
from unislu_llm.io import (
    BEST,
    LAST,
    is_saved_model,
    read_json,
    restore_folder,
    write_json,
    write_text,
)
from unislu_llm.models.base import SLUModel
from unislu_llm.models.saved import Description
from unislu_llm.tasks import TaskRegistry

MODEL = "model"  # in place of `best` or `last`, of a folder that is a saved model and no run
TRAINER_FILE = "trainer.json"  # in a checkpoint: where the run stood
_CONFIG, _VERSIONS, _FINISHED = "config.yaml", "versions.json", "finished.json"


@dataclass(frozen=True)
class Run:
    """A trained model and where its results go."""

    name: str  # in tables and result files
    folder: Path  # of the run, or of the model; predictions are written under it
    checkpoint: str  # `best`, `last`, or :data:`MODEL`
    model: Path  # folder of the weights
    config: Config | None  # None for a model folder

    @property
    def label(self) -> str:
        """Name that tells `last` from `best`."""
        return f"{self.name}-{LAST}" if self.checkpoint == LAST else self.name

    def registry(self) -> TaskRegistry:
        """The tasks that the model was trained on."""
        return Description.read(self.model).registry(self.model)

    def step(self) -> int | None:
        """Optimizer steps behind the checkpoint; None where it does not say."""
        path = self.model / TRAINER_FILE
        return read_json(path).get("step") if path.is_file() else None

    def versions(self) -> dict[str, Any]:
        """:func:`versions` when the run was begun; nothing for a model folder."""
        path = self.folder / _VERSIONS
        return read_json(path) if path.is_file() else {}


def find_run(path: str | Path, checkpoint: str | None = None) -> Run:
    """The model in a run folder, or in a model folder (`RUN/best`, `RUN/last` count as their run).

    `checkpoint` is `best` or `last`; default: best, or last where there is no best. Raises
    UserError: no such folder, it is neither, or it lacks the checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; give a run folder of a training recipe, "
                        "or the folder of a saved model")
    if not is_run(path):
        if not is_saved_model(path):
            raise UserError(f"{path} is neither a run folder (config.yaml) nor a saved model "
                            "(config.json, model.safetensors)")
        full = path.resolve()
        if full.name not in (BEST, LAST) or not is_run(full.parent):
            return Run(full.name, path, MODEL, path, None)
        if checkpoint not in (None, full.name):
            raise UserError(f"{path} is the checkpoint '{full.name}', but --checkpoint says "
                            f"'{checkpoint}'; drop one")
        # The folder as it was given, where it ends in the checkpoint: results show it.
        path = path.parent if path.name == full.name else full.parent
        checkpoint = full.name
    config = config_from_file(path / _CONFIG, resolve=False)
    there = [name for name in (BEST, LAST) if is_saved_model(path / name)]
    if not there:
        raise UserError(f"{path}: no checkpoint yet, neither {BEST} nor {LAST}; let the run "
                        "finish, or resume it")
    chosen = checkpoint or there[0]
    if chosen not in there:
        raise UserError(f"{path}: no checkpoint '{chosen}'; it has '{there[0]}'")
    return Run(path.resolve().name, path, chosen, path / chosen, config)


def load_model(run: Run, precision: Precision = "fp32") -> SLUModel:
    """The model of a run, frozen weights in `precision`; on the GPU where there is one."""
    disable_progress_bar()  # of the base checkpoints' tensors
    model = models.load(run.model, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def create_run(config: Config, name: str) -> Path:
    """Make the run folder (by default `runs/<name>-<date-time>`), unless the run is resumed.

    Raises UserError: it exists (runs are never overwritten), or holds nothing to resume.
    """
    folder = Path(config.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume:
        if not can_resume(folder):
            raise UserError(f"--resume: {folder / LAST} holds no checkpoint; give the run's "
                            "folder as --output")
        return folder
    # An empty one may have been made to be mounted.
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"run folder {folder} exists and is never overwritten; choose another "
                        "--output, or --resume it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _CONFIG, to_yaml(config))
    write_json(folder / _VERSIONS, versions())
    return folder


def can_resume(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint to go on from, which is mended where it must be."""
    # A run that was killed between two renames has its checkpoint under another name.
    for name in (BEST, LAST):
        restore_folder(folder / name)
    return (folder / LAST / TRAINER_FILE).is_file()


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / _CONFIG).is_file()


def write_finished(folder: Path, values: Mapping[str, Any]) -> None:
    """Note that a run came to its end, and how it stood then."""
    write_json(folder / _FINISHED, values)


def read_finished(folder: Path) -> dict[str, Any]:
    """What :func:`write_finished` wrote; nothing for a run that has not ended."""
    return read_json(folder / _FINISHED) if (folder / _FINISHED).is_file() else {}


def versions() -> dict[str, Any]:
    """Versions, git revision and command, to tell later what made a result."""
    packages = {}
    # Those whose version can change a number.
    for name in ("unislu_llm", "torch", "transformers", "accelerate", "peft", "soundfile", "jiwer"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from its source tree
            packages[name] = "not installed"
    # The commit, `+dirty` where files have changed; tags are excluded, for they are no commits.
    git = ["git", "-C", str(Path(__file__).resolve().parents[1]), "describe", "--always",
           "--exclude=*", "--abbrev=40", "--dirty=+dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "python": platform.python_version(), "packages": packages, "git": revision,
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
