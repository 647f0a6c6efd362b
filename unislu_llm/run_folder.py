"""Run folders: what a training run leaves on disk, how it is made, and how it is found again.

    runs/mine/
      config.yaml versions.json     what was asked for, and by which versions
      began.json                    kind of model, processes, and hashes of the manifests
      metrics.jsonl predictions/    the log, and what validations decoded
      log.txt                       what was printed
      best/ last/ last-1/ ...       models; `last` can be resumed, and those before it
      finished.json                 there once the run has come to its end
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers.utils.logging import disable_progress_bar

from unislu_llm import models
from unislu_llm.config import Config
from unislu_llm.config_file import absolute, config_of_run, to_yaml
from unislu_llm.data.manifest import manifest_name
from unislu_llm.errors import UserError, disk_fault
from unislu_llm.io import (
    BEST,
    LAST,
    RUN_BEGAN,
    RUN_CONFIG,
    TRAINER_FILE,
    checkpoint_folder,
    git_revision,
    is_hub_name,
    is_saved_model,
    near_models,
    read_json,
    read_signed,
    sha256,
    write_json,
    write_text,
)
from unislu_llm.models.base import SLUModel
from unislu_llm.models.saved import Description
from unislu_llm.setting_types import Precision
from unislu_llm.tasks import TaskRegistry
from unislu_llm.weights import fetch_model

MODEL = "model"  # in place of `best` or `last`, of a folder that is a saved model and no run
METRICS = "metrics.jsonl"
_VERSIONS, _FINISHED, _LOCK, _HOLDER = "versions.json", "finished.json", ".lock", ".lock.json"

log = logging.getLogger(__name__)


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
        return read_signed(path).get("step") if path.is_file() else None

    def versions(self) -> dict[str, Any]:
        """:func:`versions` when the run was begun; nothing for a model folder."""
        path = self.folder / _VERSIONS
        return read_json(path) if path.is_file() else {}


def find_run(path: str | Path, checkpoint: str | None = None) -> Run:
    """The model in a run folder, or in a model folder (`RUN/best`, `RUN/last` count as their run),
    or of a name on the Hugging Face hub (`user/model`, `user/model@revision`; no `Path` is one).

    `checkpoint` is `best` or `last`; default: best, or last where there is no best. Raises
    UserError: no such folder, it is neither, it lacks the checkpoint, or the hub's model cannot be
    had.
    """
    given, path = path, Path(path).expanduser()
    if not path.is_dir():
        if isinstance(given, str) and is_hub_name(given):
            # Results are kept here: the hub's cache is no place for them.
            name = given.replace("/", "--")
            return Run(name, Path("runs", name), MODEL, fetch_model(given, again=True), None)
        raise UserError(f"{path}: there is no such folder; give a run folder of a training recipe, "
                        "the folder of a saved model, or a name on the Hugging Face hub "
                        f"(user/model){near_models(path)}")
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
    config = config_of_run(path)
    there = [name for name in (BEST, LAST) if is_saved_model(checkpoint_folder(path, name))]
    if not there:
        raise UserError(f"{path}: no checkpoint yet, neither {BEST} nor {LAST}; let the run "
                        "finish, or resume it")
    chosen = checkpoint or there[0]
    if chosen not in there:
        raise UserError(f"{path}: no checkpoint '{chosen}'; it has '{there[0]}'")
    return Run(path.resolve().name, path, chosen, checkpoint_folder(path, chosen), config)


def load(model: str | os.PathLike[str], dtype: torch.dtype | Precision = "fp32",
         device: torch.device | str | None = None, base: SLUModel | None = None) -> SLUModel:
    """A trained model of either kind, in eval mode.

    Args:
        model: run folder (its best checkpoint), folder of a saved model, or name on the Hugging
            Face hub: `user/model`, or `user/model@revision`.
        dtype: of frozen weights, fp32 or bf16; :func:`understand` computes in it.
        device: default: the GPU where there is one, else the CPU.
        base: a model that is loaded; frozen weights that equal its own are held once, for both.

    Raises:
        UserError: no such model, a base checkpoint that cannot be had, or another dtype or device.
    """
    dtypes: dict[Any, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16",
                                    "fp32": "fp32", "bf16": "bf16"}
    if dtype not in dtypes:
        raise UserError(f"dtype {dtype}: models compute in fp32 or bf16; activations of some LLMs "
                        "do not fit fp16")
    found = load_model(find_run(model if isinstance(model, str) else Path(model)), dtypes[dtype],
                       device)
    frozen = {name: p for name, p in found.named_parameters() if not p.requires_grad}
    for name, twin in base.named_parameters() if base else ():
        own = frozen.get(name, twin)
        if (not twin.requires_grad and (own.dtype, own.device) == (twin.dtype, twin.device)
                and torch.equal(own, twin)):
            own.data = twin.data  # equal bit for bit, and never written to
    return found


def load_model(run: Run, precision: Precision = "fp32",
               device: torch.device | str | None = None) -> SLUModel:
    """The model of a run; see :func:`load`."""
    disable_progress_bar()  # of the base checkpoints' tensors
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)  # before minutes of loading
    except (RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
        why = str(error).splitlines()[0]
        raise UserError(f"device '{device}' cannot be used here ({why}); leave it out, or give "
                        "cpu or cuda") from error
    model = models.load(run.model, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return model.to(device)


def create_run(config: Config, name: str, kind: str = "") -> Path:
    """Make the run folder (by default `runs/<name>-<date-time>`), unless the run is resumed; then
    its settings are renewed, which may have changed in part. `kind` is that of the model.

    Raises UserError: it exists (runs are never overwritten), holds no run to resume, or cannot be
    written.
    """
    folder = Path(config.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume and is_run(folder):
        write_config(folder, config)
        return folder
    if config.resume:
        raise UserError(f"--resume: {folder} holds no run; give the run's folder as --output")
    lock = lock_run(folder)  # of two runs that begin at once one is refused
    try:
        # What there may be of a run that was killed before it began, or a folder to be mounted.
        mine = {_LOCK, _HOLDER, RUN_BEGAN, _VERSIONS}
        if is_run(folder) or any(p.name not in mine and p.suffix != ".partial"
                                 for p in folder.iterdir()):
            raise UserError(f"run folder {folder} exists and is never overwritten; choose another "
                            "--output, or --resume it")
        write_json(folder / RUN_BEGAN, {"kind": kind, "files": fingerprints(config),
                                        "processes": int(os.environ.get("WORLD_SIZE", "1"))})
        write_json(folder / _VERSIONS, versions())
        write_config(folder, config)  # last: with it, it is a run
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {disk_fault(error)}; choose "
                        "another --output") from error
    finally:
        lock.release()
    return folder


def lock_run(folder: Path) -> FileLock:
    """Keep other processes from training in a run folder, while what is returned is kept, or until
    its `release()`.

    Raises UserError: one does, which is named; or the folder cannot be written.
    """
    # The kernel frees it when its process ends, however. One object for a folder: in a notebook a
    # run that was interrupted may go on.
    lock, holder = FileLock(folder / _LOCK, is_singleton=True), folder / _HOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        write_json(holder, {"process": os.getpid(), "host": platform.node(),
                            "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    except Timeout:
        who = ("process {process} on {host} since {since}".format_map(read_json(holder))
               if holder.is_file() else "a process that has just begun")
        raise UserError(f"{folder} is being trained by {who}; wait for it, end it, or give another "
                        "--output") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {disk_fault(error)}") from error
    return lock


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's log, each step of each part once: of one that was taken twice the later.

    A line that a full disk or a power cut has torn is left out, with a warning. Raises UserError:
    there is no log.
    """
    kept, last = dict[tuple[int, str], dict[str, Any]](), 0
    try:
        text = (run / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{run / METRICS} cannot be read: {disk_fault(error)}") from error
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line or "{}")
            step, part = index(row["step"]), str(row["part"])
        except (ValueError, TypeError, KeyError, RecursionError):
            if line:
                log.warning("%s:%d is damaged, and left out", run / METRICS, number)
            continue
        if step < last:  # resumed from a checkpoint before
            kept = {key: row for key, row in kept.items() if key[0] <= step}
        kept[step, part], last = row, step
    return list(kept.values())


def write_config(folder: Path, config: Config) -> None:
    """Write the settings of a run, which work from anywhere."""
    own = absolute(config).model_copy(update={"resume": False})
    write_text(folder / RUN_CONFIG, to_yaml(own))


def settings(config: Config) -> Iterator[tuple[str, Any]]:
    """Settings of a run by name, those of stages as `stages[0].train.epochs`."""
    def flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            name = f"{prefix}.{key}".removeprefix(".")
            yield from flat(value, name) if isinstance(value, Mapping) else [(name, value)]

    yield from flat(config.model_dump(mode="json", exclude={"output", "resume", "stages"}), "")
    for i, stage in enumerate(config.stages):
        yield from flat(stage, f"stages[{i}]")


def fingerprints(config: Config) -> dict[str, list[tuple[str, int, str]]]:
    """Name, bytes and SHA-256 of manifests and task files, by setting; no hash of what is gone."""
    paths = {key: [Path(name) for name in ([value] if isinstance(value, str) else value or ())]
             for key, value in settings(config)
             if key.endswith(("data.train", "data.dev", "data.guard", "data.tasks"))}
    return {key: [(manifest_name(path), path.stat().st_size, sha256(path)) if path.is_file()
                  else (manifest_name(path), 0, "") for path in some]
            for key, some in paths.items()}


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / RUN_CONFIG).is_file()


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
    for name in ("unislu_llm", "torch", "transformers", "accelerate", "peft", "bitsandbytes",
                 "deepspeed", "soundfile", "jiwer", "whisper-normalizer"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # of an extra, or run from its tree
            packages[name] = "not installed"
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "python": platform.python_version(), "packages": packages,
            "git": git_revision() or "unknown", "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
