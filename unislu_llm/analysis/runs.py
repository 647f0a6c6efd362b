"""Runs and saved models on disk: which folder holds what, and how a result names it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from unislu_llm.errors import UserError
from unislu_llm.models.base import WEIGHTS_FILE, SLUModel
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.config import Config, apply, read_yaml
from unislu_llm.training.state import BEST, LAST

MODEL = "model"
"""Checkpoint name of a folder that is a saved model and no run."""

_CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Run:
    """A trained model and where its results go.

    Args:
        name: of the run in tables and result files.
        folder: run folder (or model folder); predictions are written under it.
        checkpoint: best, last, or :data:`MODEL`. model: folder of the weights.
        config: of the run; None for a model folder.
    """

    name: str
    folder: Path
    checkpoint: str
    model: Path
    config: Config | None

    @property
    def label(self) -> str:
        """Name that tells `last` from `best`."""
        return f"{self.name}-{LAST}" if self.checkpoint == LAST else self.name

    def model_config(self) -> dict[str, Any]:
        """`config.json` of the model.

        Raises:
            UserError: not JSON.
        """
        path = self.model / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return values

    def registry(self) -> TaskRegistry:
        """The tasks that the model was trained on."""
        rows = self.model_config().get("tasks")
        return TaskRegistry() if rows is None else TaskRegistry.from_dict(rows, f"{self.model / 'config.json'}: tasks")


def find_run(path: str | Path, checkpoint: str | None = None) -> Run:
    """The model in a run folder, or in a model folder (`RUN/best` and `RUN/last` count as their run).

    Args:
        path: folder. checkpoint: best or last; default: best, or last where there is no best.

    Raises:
        UserError: no such folder, it is neither, or it lacks the checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: {'is not a folder' if path.exists() else 'there is no such folder'}; "
                        "give a run folder of a training recipe, or the folder of a saved model")
    if (path / _CONFIG_FILE).is_file():
        return _of_run(path, checkpoint)
    if not _is_model(path):
        raise UserError(f"{path} is neither a run folder ({_CONFIG_FILE}) nor a saved model (config.json, "
                        f"{WEIGHTS_FILE})")
    full = path.resolve()
    if full.name in (BEST, LAST) and (full.parent / _CONFIG_FILE).is_file():
        if checkpoint not in (None, full.name):
            raise UserError(f"{path} is the checkpoint '{full.name}', but --checkpoint says '{checkpoint}'; drop one")
        return _of_run(path.parent if path.name == full.name else full.parent, full.name)
    return Run(full.name, path, MODEL, path, None)


def _of_run(folder: Path, checkpoint: str | None) -> Run:
    config = Config()
    apply(config, read_yaml(folder / _CONFIG_FILE), str(folder / _CONFIG_FILE))
    there = [name for name in (BEST, LAST) if _is_model(folder / name)]
    if not there:
        raise UserError(f"{folder}: no checkpoint yet, neither {BEST} nor {LAST}; let the run finish, or resume it")
    chosen = checkpoint or there[0]
    if chosen not in there:
        raise UserError(f"{folder}: no checkpoint '{chosen}'; it has '{there[0]}': give --checkpoint {there[0]}")
    return Run(folder.resolve().name, folder, chosen, folder / chosen, config)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / WEIGHTS_FILE).is_file()


def training_versions(run: Run) -> dict[str, Any]:
    """`versions.json` of a run, from when it was begun; empty without one."""
    path = run.folder / "versions.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it") from error


def checkpoint_step(run: Run) -> int | None:
    """Optimizer step of the run's checkpoint, from its log; None where the log does not tell."""
    if run.config is None:
        return None
    try:
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        return None
    scored = [r for r in rows if r.get("part") == "dev" and r.get("step", 0) > 0]
    if run.checkpoint == BEST:  # the first of equals, as in training
        return max(scored, key=lambda r: r["score"])["step"] if scored else None
    every = run.config.train.save_every
    saved = [r["step"] for r in rows if r.get("part") == "train" and every and r["step"] % every == 0]
    return max([*saved, *(r["step"] for r in scored)], default=None)


def load_model(run: Run, precision: str = "fp32") -> SLUModel:
    """The model in eval mode, on the GPU where there is one; frozen weights in `precision` (fp32 or bf16)."""
    disable_progress_bar()  # of the base checkpoints' tensors
    model = SLUModel.from_pretrained(run.model, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return model.eval()


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def portable(path: str | Path) -> str:
    """A path as results store it: from the current folder, or its last two parts where it lies elsewhere.

    Results are shared, and the way to a folder says more of a machine than of a result.
    """
    full, here = Path(os.path.abspath(path)), Path.cwd()
    if full.is_relative_to(here):
        return full.relative_to(here).as_posix()
    return Path(*full.parts[-2:]).as_posix() if len(full.parts) > 2 else full.name


def shown(argument: str) -> str:
    """A word of a command line with its absolute path made portable, also behind `--flag=`."""
    flag, equals, path = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{portable(path)}" if Path(path).is_absolute() else argument
