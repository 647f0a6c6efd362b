"""Checkpoints: folders of a model and, for `last`, of all that a run needs to go on.

    last/                                 last-1/ ...: those before, `train.keep` in all
      config.json model.safetensors ...   the model, see `SLUModel.save_pretrained`
      simulation.json                     rates of text injection, where the model has some
      optimizer.safetensors rng.json      moments by parameter name; random generators by rank
      SHA256SUMS                          the hash of each of them
      trainer.json                        where the run stood, :class:`Progress`; written last

Nothing is pickled: a checkpoint that somebody else made can be resumed without running their code.
A folder is written as `last.new`, put on disk, and swapped in by renames; what they push out is
`last.old` for a moment. A kill at any moment leaves whole ones, which :func:`newest` finds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from unislu_llm.errors import UserError, disk_fault, dotted, explain
from unislu_llm.io import (
    LAST,
    SUMS_FILE,
    TRAINER_FILE,
    check_saved,
    read_json,
    read_signed,
    write_json,
    write_signed,
    write_sums,
)
from unislu_llm.models.base import gathered, like

OPTIMIZER_FILE, RNG_FILE = "optimizer.safetensors", "rng.json"

_WINDOWS = os.name == "nt"  # flushes what is open for writing alone, and no folders


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


def save_checkpoint(final: Path, write: Callable[[Path], object], progress: Progress,
                    keep: int = 1) -> None:
    """Put a checkpoint in its place, whole or not at all; `write` fills a new folder.

    The `keep` newest stay, this one among them: `last`, `last-1`, ... Raises UserError: the disk
    is full, or cannot be written; it says what can be resumed.
    """
    new = _beside(final, ".new")
    with _saving(final):
        if (new / TRAINER_FILE).is_file():  # of a run that was killed before its renames
            _settle(final, keep)
        shutil.rmtree(new, ignore_errors=True)  # of one that was killed while it wrote
        new.mkdir(parents=True)
        write(new)
        write_sums(new)
        # A rename may reach the disk before what it names.
        for path in [*new.rglob("*"), new]:
            _to_disk(path)
        # From here on it is a checkpoint, wherever it lies.
        write_signed(new / TRAINER_FILE, progress.model_dump())
        _to_disk(new)
        _settle(final, keep)
        _to_disk(final.parent)


def update_progress(folder: Path, progress: Progress) -> None:
    """Write anew where the run of a checkpoint stands; raises as :func:`save_checkpoint`."""
    with _saving(folder):
        write_signed(folder / TRAINER_FILE, progress.model_dump())
        _to_disk(folder)


def copy_model(source: Path, final: Path, progress: Progress) -> None:
    """Put a copy of a checkpoint's model in the place of another; raises as
    :func:`save_checkpoint`, and for a source that is damaged."""
    check_saved(source)  # else the copy would be hashed as it is
    # What only a resumed run reads would triple the size of `best`.
    left = shutil.ignore_patterns(OPTIMIZER_FILE, RNG_FILE, TRAINER_FILE, SUMS_FILE)
    save_checkpoint(final, lambda new: shutil.copytree(source, new, ignore=left,
                                                       dirs_exist_ok=True), progress)


def newest(run: Path, say: Callable[[str], object]) -> Path | None:
    """The newest whole checkpoint of a run, which lies in `RUN/last` then; None: there is none.

    Newer ones that are damaged are told, a line each, and lie in `RUN/last.damaged` then. The main
    process alone calls this, with the run's lock. Raises as :func:`save_checkpoint`.
    """
    found, passed = _first_whole(run)
    with _saving(run / LAST):
        for folder, fault in passed:
            say(f"{fault}; {what_is_safe(run)}")
            if found:
                shutil.rmtree(_beside(folder, ".damaged"), ignore_errors=True)
                folder.rename(_beside(folder, ".damaged"))
        if found:
            _settle(run / LAST)
    return run / LAST if found else None


def what_is_safe(run: Path) -> str:
    """The end of a message: what of a run can be resumed."""
    found, _ = _first_whole(run)
    return (f"{found} (step {read_progress(found).step}) is whole and can be resumed" if found else
            f"{run} holds no whole checkpoint")


def _first_whole(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and the damaged ones that are newer, each with its fault."""
    passed = list[tuple[Path, str]]()
    for folder in _checkpoints(run / LAST):
        try:
            check_saved(folder)
            read_progress(folder)
            return folder, passed
        except UserError as error:
            passed.append((folder, str(error)))
    return None, passed


def _beside(final: Path, end: str) -> Path:
    return final.with_name(final.name + end)


def _checkpoints(final: Path) -> list[Path]:
    """What lies at and beside a checkpoint's place, the newest first."""
    earlier = sorted((path for path in final.parent.glob(f"{final.name}-*")
                      if path.name.rpartition("-")[2].isdecimal()), key=lambda p: (len(p.name), p))
    # Beside it, what lacks the file that is written last and removed first is none.
    return [path for path in (_beside(final, ".new"), final, *earlier, _beside(final, ".old"))
            if path.is_dir() and (not path.suffix or (path / TRAINER_FILE).is_file())]


def _settle(final: Path, keep: int | None = None) -> None:
    """Give checkpoints their places by age, by renames, and remove those beyond `keep`."""
    # No system exchanges two folders at once. `_checkpoints` reads the age from the names, and no
    # rename changes the order: a kill between two of them leaves the same list.
    there, old = _checkpoints(final), _beside(final, ".old")
    for extra in reversed(there[keep:] if keep else []):
        if extra != old:
            _remove(old)
            extra.rename(old)
    moves = [(folder, _beside(final, f"-{age}") if age else final)
             for age, folder in enumerate(there[:keep])]
    # From the oldest on, to make room for a new one; then from the newest, where there is a gap.
    for folder, place in [*reversed(moves), *moves]:
        if folder.exists() and not place.exists():
            folder.rename(place)
    _remove(old)


def _remove(folder: Path) -> None:
    (folder / TRAINER_FILE).unlink(missing_ok=True)  # first: half a folder is no checkpoint
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _saving(final: Path) -> Iterator[None]:
    """Errors of the disk as one message that says what is safe."""
    try:
        yield
    except Exception as error:  # tokenizers raise nothing narrower
        if not (why := disk_fault(error)):
            raise
        new = _beside(final, ".new")
        if not (new / TRAINER_FILE).is_file():
            shutil.rmtree(new, ignore_errors=True)  # which may have filled the disk
        raise UserError(f"{why} while writing {final}; {what_is_safe(final.parent)}") from error


def _to_disk(path: Path) -> None:
    if _WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_progress(folder: Path) -> Progress:
    """Where the run stood that wrote a checkpoint; raises UserError: it is missing or damaged."""
    path = folder / TRAINER_FILE
    try:
        return Progress.model_validate(read_signed(path))
    except ValidationError as error:
        raise explain(error, Progress, lambda place: f"{path}: {dotted(place)}") from None


def moments(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's moments under the names of their parameters, on the CPU; of a sharded model
    all processes call this."""
    # By name: numbers, as in `state_dict`, would change with the order of the parameters.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {f"{names[id(parameter)]}/{key}": gathered(value.detach()).cpu().contiguous()
            for parameter, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer(folder: Path, optimizer: Optimizer, model: nn.Module) -> None:
    """Read :func:`moments` of a checkpoint; raises UserError: they are missing, or of other
    parameters."""
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: this checkpoint, perhaps of an earlier version, "
                        "cannot be resumed; start a new run from its weights: --train.init "
                        f"{folder}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {names[id(p)]: number for number, p in enumerate(trained)}  # as `state_dict` has them
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        name, _, moment = key.rpartition("/")
        if name not in numbers:
            raise UserError(f"{path} is of other parameters than those that train now, {name} "
                            "among them; resume with the settings of the run")
        own = trained[numbers[name]]
        value = like(own, value) if value.shape == own.shape else value
        state.setdefault(numbers[name], {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def rng_state() -> dict[str, Any]:
    """State of torch's random generators in this process, as numbers."""
    # Training draws from no others: NumPy's are made anew for each item, see `data.augment.Key`.
    return {"cpu": torch.get_rng_state().tolist(),
            "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()]}


def save_rng(folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
    """Write the :func:`rng_state` of every rank."""
    write_json(folder / RNG_FILE, {"ranks": list(states)}, indent=None)


def load_rng(folder: Path, rank: int, world: int) -> None:
    """Set this rank's generators as they stood."""
    states = read_json(folder / RNG_FILE)["ranks"]
    # The states of other processes are no use: each goes on with those that it was given.
    if len(states) == world:
        set_rng_state(states[rank])


def set_rng_state(found: Mapping[str, Any]) -> None:
    """Set the generators of this process to a :func:`rng_state`."""
    cpu, *cuda = (torch.tensor(state, dtype=torch.uint8)
                  for state in (found["cpu"], *found["cuda"]))
    torch.set_rng_state(cpu)
    if len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
