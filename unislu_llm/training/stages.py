"""Training in stages: a list in one config; each stage starts from the best of the one before.

    stages:
      - {name: ctc, train: {objective: ctc, epochs: 10}}             # the projector alone, see docs/ctc.md
      - {name: align, train: {groups: [projector, markers], epochs: 2}}
      - {name: adapt, train: {epochs: 4, lr: {lora: 1e-4}}, data: {train: [more.jsonl]}}
      - {name: joint, model: {encoder_mode: lora}, train: {epochs: 1}}

A stage's sections are laid over the rest of the config. Its run folder is `<run>/<name>`, and `<run>/best` is the best
model of the last finished stage, so that a staged run is scored and loaded like any other.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unislu_llm.errors import UserError, hint
from unislu_llm.training import state
from unislu_llm.training.config import Config, apply
from unislu_llm.training.ctc_run import run_ctc
from unislu_llm.training.loop import Trainer

_SECTIONS = ("model", "data", "augment", "train", "decode")


def stage_configs(config: Config, run: Path) -> list[tuple[str, Config]]:
    """Name and full configuration of every stage; each begins with the model of the one before.

    Raises:
        UserError: a stage without a name, two of one name, an unknown key or a value of the wrong type.
    """
    stages: list[tuple[str, Config]] = []
    for i, stage in enumerate(config.stages):
        where = f"stages[{i}]"
        name = _name(stage, where, [n for n, _ in stages])
        own = copy.deepcopy(config)
        own.stages, own.output, own.resume = [], str(run / name), False
        if stages:
            own.model.init, own.model.init_llm = stages[-1][1].output, ""
        apply(own, {key: value for key, value in stage.items() if key != "name"}, where)
        stages.append((name, own))
    return stages


def _name(stage: Any, where: str, before: Sequence[str]) -> str:
    if not isinstance(stage, Mapping) or not isinstance(stage.get("name"), str):
        raise UserError(f"{where}: a stage is a mapping with a `name`, found {stage!r}")
    name: str = stage["name"]
    if not name or Path(name).name != name or name in (state.BEST, state.LAST, "predictions"):
        raise UserError(f"{where}.name: '{name}' cannot be the name of a folder in the run; choose another")
    if name in before:
        raise UserError(f"{where}.name: there are two stages '{name}'; rename one")
    for key in stage:
        if key != "name" and key not in _SECTIONS:
            raise UserError(f"{where}: unknown key '{key}'; known: name, {', '.join(_SECTIONS)}{hint(key, _SECTIONS)}")
    return name


def train_stages(kind: str, config: Config, name: str) -> Path:
    """Train every stage in order; with `resume`, finished ones are kept and a stopped one goes on.

    Args:
        kind: speech_llm or whisper_slu. name: start of the default run folder's name.

    Returns:
        The run folder.

    Raises:
        UserError: as :func:`stage_configs` (before anything is written) and as training.
    """
    stage_configs(config, Path("."))
    if config.resume:
        run = Path(config.output)
        if not (run / "config.yaml").is_file():
            raise UserError(f"--resume: {run or 'no --output'} holds no run; give the run's folder as --output")
    else:
        run = _claim(config, name)
    for stage, own in stage_configs(config, run):
        folder = Path(own.output)
        if state.is_finished(folder):
            print(f"stage {stage}: finished before", flush=True)
            continue
        own.resume = state.can_resume(folder)
        process = state.processes()
        if process.is_main_process and folder.exists() and not own.resume:  # stopped before anything of it could be used
            folder.rename(folder.with_name(f"{folder.name}.stopped-{len(list(run.glob('*.stopped-*')))}"))
        process.wait_for_everyone()
        print(f"stage {stage}", flush=True)
        last = stage == config.stages[-1]["name"]
        main = process.is_main_process
        train_run(kind, own, stage, final=last)
        if main:
            publish(folder, run)
            if last:
                done = [state.read_finished(run / str(s["name"])) for s in config.stages]
                state.write_finished(run, {key: sum(d[key] for d in done) for key in ("step", "train_seconds")})
    return run


def train_run(kind: str, config: Config, name: str, *, final: bool = True) -> Path:
    """Train one model by the objective of its config; returns the run folder.

    Args:
        kind: speech_llm or whisper_slu. name: start of the default run folder's name.
        final: nothing is trained in these processes afterwards.

    Raises:
        UserError: as training.
    """
    if config.train.objective == "ctc":
        run = run_ctc(kind, config, name)
        if final:
            state.processes().destroy_process_group()
        return run
    trainer = Trainer(kind, config, name)
    trainer.fit(final=final)
    if final and trainer.accelerator.is_main_process:
        p = trainer.progress
        best = f"best (step {p.best_step}): {trainer.run / 'best'}; " if p.best_step >= 0 else ""
        print(f"{best}last: {trainer.run / 'last'}")
    return trainer.run


def _claim(config: Config, name: str) -> Path:
    """The run folder, made by the main process; the others take its name from it."""
    from accelerate.utils import broadcast_object_list

    process = state.processes()
    made: list[Any] = [None]
    if process.is_main_process:
        try:
            made = [str(state.create_run(config, name))]
        except UserError as error:
            made = [error]
    if process.num_processes > 1:
        broadcast_object_list(made)
    if isinstance(made[0], UserError):
        raise made[0]
    return Path(made[0])


def publish(stage: Path, run: Path) -> None:
    """Copy the best model of a stage (its last, where nothing was scored) to the run, and note which stage it is."""
    source = next(p for p in (stage / state.BEST, stage / state.LAST) if p.is_dir())
    new = run / f"{state.BEST}.new"
    shutil.copytree(source, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("trainer_state.pt"))
    state.swap_folder(new, run / state.BEST)
    state.write_text(run / "stage.yaml", yaml.safe_dump({"best": f"{stage.name}/{source.name}"}))


__all__ = ["publish", "stage_configs", "train_run", "train_stages"]
