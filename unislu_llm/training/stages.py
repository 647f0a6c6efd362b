"""Training, in one run or in stages: each stage starts from the best of the one before.

A stage's sections are laid over the rest of the config. Its run folder is `<run>/<name>`, and
`<run>/best` is the best model of the last finished stage, so that a staged run is scored and loaded
like any other.
"""

from __future__ import annotations

import logging
import re
import shlex
import time
from functools import partial
from pathlib import Path

from filelock import FileLock

from unislu_llm.config import Config, Stage, check_together
from unislu_llm.config_file import absolute, check, config_from_dict, inside, merge
from unislu_llm.data.manifest import iter_rows
from unislu_llm.data.text_injection import SimulationRates
from unislu_llm.errors import Stopped, UserError
from unislu_llm.io import find_model
from unislu_llm.models.projectors import check_projector
from unislu_llm.models.saved import Description
from unislu_llm.run_folder import (
    BEST,
    create_run,
    lock_run,
    read_finished,
    write_config,
    write_finished,
)
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.checkpoint import copy_model, newest, read_progress
from unislu_llm.training.log import say
from unislu_llm.training.process import from_main, lost_process, processes
from unislu_llm.training.resume import check_resume
from unislu_llm.training.sharding import sharding_of
from unislu_llm.training.trainer import Trainer
from unislu_llm.training.zero import zero_of

log = logging.getLogger(__name__)


def train(kind: str, config: Config, name: str = "run") -> Path:
    """Train one model, in one run or in the stages of its config; returns the run folder.

    Args:
        kind: `speech_llm` or `whisper_slu`.
        config: of the run; with `resume`, finished stages are kept and a stopped one goes on.
        name: start of the default run folder's name.

    Raises UserError: bad configuration (before anything is written) or data, or a loss that is not
    finite; Stopped: a signal or the time limit.
    """
    started, config = time.monotonic(), absolute(config)
    state = processes(config.train.timeout)  # the first call sets it
    world, main = state.num_processes, state.is_main_process
    # Before data and checkpoints are loaded, and the first of several stages has trained for hours.
    for own in [own for _, own in stage_configs(config, Path("."))] or [config]:
        check_together(own, world)
        sharding_of(own), zero_of(own)
        if own.augment.noise and not Path(own.augment.noise).is_dir():
            raise UserError(f"augment.noise: {own.augment.noise} is no folder with audio files")
        if kind == "speech_llm":
            check_projector(own.model.projector, own.model.projector_options)
            SimulationRates().override(own.data.text_injection)
    if config.resume and (line := from_main(partial(check_resume, kind, config, world))) and main:
        say(Path(config.output), line)
    try:
        run = (_train_stages(kind, config, name, started) if config.stages
               else Trainer(kind, config, name, started).fit())
    except Stopped:
        processes().destroy_process_group()
        raise
    except RuntimeError as error:
        if lost := lost_process(error, config.train.timeout):
            raise UserError(f"{lost}; the run can be resumed from its last checkpoint") from error
        raise
    if main:
        best = find_model(run) or run
        tasks = Description.read(best).registry(best)
        more = "" if config.data.dev else " --manifest FILE"
        say(run, f"{best.name}: {best}\nscore it: unislu evaluate {run}{more}\n"
                 f"use it: unislu predict {run} {_clip(config, tasks)}")
    processes().destroy_process_group()
    return run


def _train_stages(kind: str, config: Config, name: str, started: float) -> Path:
    run = from_main(lambda: _claim(config, name, kind))
    held = list[FileLock]()
    from_main(lambda: held.append(lock_run(run)))
    stages = stage_configs(config, run)
    main, said = processes().is_main_process, set[str]()
    finished = [bool(read_finished(Path(own.output))) for _, own in stages]
    for i, (stage, own) in enumerate(stages):
        folder = Path(own.output)
        if main:
            say(run, f"stage {stage}" + " is finished, and stays as it is" * finished[i])
        if not finished[i]:
            own.resume = from_main(partial(_resumable, folder))
            Trainer(kind, own, stage, started, said, run).fit()
        if main and not any(finished[i + 1:]):
            # After each stage: a run that stops in a later one has a model. After a finished one,
            # too: it may have been stopped just before this.
            source = find_model(folder)
            assert source is not None  # a finished run has saved one
            copy_model(source, run / BEST, read_progress(source))
        processes().wait_for_everyone()
    if main:
        done = [read_finished(run / stage) for stage, _ in stages]
        write_finished(run, {key: sum(d[key] for d in done) for key in ("step", "train_seconds")})
        held[0].release(force=True)
    return run


def _clip(config: Config, registry: TaskRegistry) -> str:
    """A dev clip for the first try."""
    rows = (row.utterance for path in config.data.dev for row in iter_rows(path, registry))
    whole = (u for u in rows if u and u.audio and not u.start and u.end is None and not u.segments)
    clip = next(whole, None)
    if clip is None or clip.audio is None:
        return "clip.wav"
    here = clip.audio.is_relative_to(Path.cwd())
    return shlex.quote(str(clip.audio.relative_to(Path.cwd()) if here else clip.audio))


def _claim(config: Config, name: str, kind: str) -> Path:
    if not config.resume:
        return create_run(config, name, kind)
    write_config(Path(config.output), config)
    return Path(config.output)


def _resumable(folder: Path) -> bool:
    if newest(folder, log.warning):
        return True
    # A stage that stopped before its first checkpoint begins anew; its log is kept, aside.
    if folder.exists():
        tried = len(list(folder.parent.glob(f"{folder.name}.stopped-*")))
        folder.rename(folder.with_name(f"{folder.name}.stopped-{tried}"))
    return False


def stage_configs(config: Config, run: Path) -> list[tuple[str, Config]]:
    """Name and full configuration of every stage; each begins with the model of the one before.

    Raises UserError: a stage without a name, two of one name, an unknown key or a bad value.
    """
    stages: list[tuple[str, Config]] = []
    for i, values in enumerate(config.stages):
        where = f"stages[{i}]"
        name = check(Stage, values, inside(where)).name
        if not re.fullmatch(r"(?!(best|last.*|predictions|trackers)$)\w[\w-]{0,63}", name):
            raise UserError(f"{where}.name: '{name[:64]}' cannot be the name of a folder in the "
                            "run; choose another, of letters, digits, _ and -")
        if name in dict(stages):
            raise UserError(f"{where}.name: there are two stages '{name}'; rename one")
        common = config.model_dump() | {"stages": [], "output": str(run / name), "resume": False}
        if stages:
            common["train"]["init"] = stages[-1][1].output
        sections = {key: value for key, value in values.items() if key != "name"}
        stages.append((name, config_from_dict(merge(Config, common, sections), where)))
    return stages
