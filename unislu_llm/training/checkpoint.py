"""Checkpoints: folders of a model and, for `last`, of all that a run needs to go on.

    last/
      config.json model.safetensors ...   the model, see `SLUModel.save_pretrained`
      simulation.json                     rates of text injection, where the model has some
      trainer.json                        where the run stood: :class:`Progress`
      optimizer.safetensors rng.json      moments by parameter name; random generators by rank

Nothing is pickled: a checkpoint that somebody else made can be resumed without running their code.
A folder is written beside its final place, put on disk, and swapped in by renames.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from unislu_llm.errors import UserError, dotted, explain
from unislu_llm.io import read_json, swap_folder, write_json
from unislu_llm.run_folder import TRAINER_FILE

OPTIMIZER_FILE, RNG_FILE = "optimizer.safetensors", "rng.json"


class Progress(BaseModel):
    """Where a run stands."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # of the next step,
    step_in_epoch: int = 0  # and its place in there
    nonfinite: int = 0  # steps in a row, up to this one, whose loss was not finite
    validated: int = -1  # step of the last validation
    best_step: int = -1
    best_score: float | None = None
    seconds: float = 0.0  # spent on steps, over all sittings; validation not counted
    history: list[dict[str, float]] = []  # headline scores of every validation
    shown: list[str] = []  # keys of the dev examples that validations print


def save_checkpoint(final: Path, write: Callable[[Path], object], progress: Progress) -> None:
    """Put a checkpoint in its place, whole or not at all; `write` fills a new folder."""
    new = final.with_name(final.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed while it wrote
    new.mkdir()
    write(new)
    write_json(new / TRAINER_FILE, progress.model_dump())
    # A rename may reach the disk before what it names.
    for path in [*new.rglob("*"), new]:
        _to_disk(path)
    swap_folder(new, final)
    _to_disk(final.parent)


def copy_model(source: Path, final: Path, progress: Progress) -> None:
    """Put a copy of a checkpoint's model in the place of another."""
    # What only a resumed run reads would triple the size of `best`.
    resumable = shutil.ignore_patterns(OPTIMIZER_FILE, RNG_FILE)
    save_checkpoint(final, lambda new: shutil.copytree(source, new, ignore=resumable,
                                                       dirs_exist_ok=True), progress)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_progress(folder: Path) -> Progress:
    """Where the run stood that wrote a checkpoint; raises UserError: it is missing or damaged."""
    path = folder / TRAINER_FILE
    try:
        return Progress.model_validate(read_json(path))
    except ValidationError as error:
        raise explain(error, Progress, lambda place: f"{path}: {dotted(place)}") from None


def save_optimizer(folder: Path, optimizer: Optimizer, model: nn.Module) -> None:
    """Write the optimizer's moments under the names of their parameters."""
    # By name: numbers, as in `state_dict`, would change with the order of the parameters.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    save_file({f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
               for parameter, state in optimizer.state.items() for key, value in state.items()},
              folder / OPTIMIZER_FILE)


def load_optimizer(folder: Path, optimizer: Optimizer, model: nn.Module) -> None:
    """Read what :func:`save_optimizer` wrote; raises UserError: damaged, or of other parameters."""
    path = folder / OPTIMIZER_FILE
    try:
        moments = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {names[id(p)]: number for number, p in enumerate(trained)}  # as `state_dict` has them
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        if name not in numbers:
            raise UserError(f"{path} is of other parameters than those that train now, {name} "
                            "among them; resume with the settings of the run")
        state.setdefault(numbers[name], {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); start a new run from {path.parent} with "
                     "--train.init")


def rng_state() -> dict[str, Any]:
    """State of torch's random generators in this process, as numbers."""
    # Training draws from no others: NumPy's are made anew for each item, see `data.augment.Key`.
    return {"cpu": torch.get_rng_state().tolist(),
            "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()]}


def save_rng(folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
    """Write the :func:`rng_state` of every rank."""
    write_json(folder / RNG_FILE, {"ranks": list(states)}, indent=None)


def load_rng(folder: Path, rank: int, world: int) -> None:
    """Set this rank's generators as they stood; raises UserError: the file is damaged."""
    path = folder / RNG_FILE
    try:
        states = read_json(path)["ranks"]
        # The states of other processes are no use: each goes on with those that it was given.
        if len(states) != world:
            return
        cpu, *cuda = (torch.tensor(state, dtype=torch.uint8)
                      for state in (states[rank]["cpu"], *states[rank]["cuda"]))
        torch.set_rng_state(cpu)
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error
