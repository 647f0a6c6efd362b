"""Train and score what is missing of an experiment, and write its table anew.

Every system is trained by its recipe in a process of its own and scored by `eval/evaluate.py`, exactly as a user would from the
command line, so that a row of the table can be repeated alone. Whatever is finished is kept; a stopped run goes on.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from unislu_llm.analysis.experiments import Experiment, Job, jobs
from unislu_llm.analysis.table import write_table
from unislu_llm.errors import UserError
from unislu_llm.training import state

Runner = Callable[[Sequence[str], Path], int]
"""Runs a command, its output appended to a log file; returns the exit status."""


def run_command(command: Sequence[str], log: Path) -> int:
    """Run a command with its output appended to a log file."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def run_job(job: Job, runner: Runner = run_command) -> None:
    """Train and score what is missing of one run.

    Raises:
        UserError: a command failed; the message names its log.
    """
    folder, log = job.folder, job.experiment.output / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if not state.is_finished(folder):
        for line in job.system.prepare:
            command = [sys.executable, "-m", "unislu_llm.cli", *shlex.split(line)]
            _run(runner, command, log, f"{job.name}: {line.partition(' ')[0]}")
        config = log.with_suffix(".yaml")
        state.write_text(config, yaml.safe_dump(job.config(), sort_keys=False))
        command = [sys.executable, "-m", "accelerate.commands.launch", f"recipes/{job.system.recipe}.py", "--config", str(config),
                   "--output", str(folder)]
        resumable = state.can_resume(folder) or ((folder / "config.yaml").is_file() and "stages" in job.config())
        if folder.exists() and not resumable:  # stopped before its first checkpoint
            folder.rename(folder.with_name(f"{folder.name}.stopped-{time.strftime('%Y%m%d-%H%M%S')}"))
        _run(runner, [*command, "--resume"] if resumable else command, log, f"{job.name}: training")
    for test, manifests in [("", []), *job.experiment.tests.items()]:
        command = [sys.executable, "eval/evaluate.py", str(folder), "--out", str(job.experiment.results)]
        command += shlex.split(job.experiment.evaluate)
        command += ["--manifest", *manifests, "--label", test] if manifests else []
        if not job.scores(test).is_file():
            _run(runner, command, log, f"{job.name}: scoring{f' of {test}' if test else ''}")


def _run(runner: Runner, command: Sequence[str], log: Path, what: str) -> None:
    print(f"{what} ... (log: {log})", flush=True)
    before = log.stat().st_size if log.is_file() else 0
    status = runner(command, log)
    if status:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("error: ")]  # `accelerate launch` puts its own traceback behind it
        why = "\n".join(said[-1:] or lines[-3:])
        raise UserError(f"{what} ended with status {status}, see {log}; {'it said' if said else 'its last lines'}:\n{why}")


def run_experiment(experiment: Experiment, only: Sequence[str] = (), runner: Runner = run_command) -> int:
    """Run what is missing, the table rewritten after every run; a run that fails is named and the others go on.

    Returns:
        Exit status: 0, or 2 when a run failed.
    """
    failed = 0
    for job in jobs(experiment, only):
        try:
            run_job(job, runner)
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        write_table(experiment)
    print((experiment.results / "table.md").read_text(encoding="utf-8"))
    return 2 if failed else 0


def status(experiment: Experiment) -> list[tuple[str, str]]:
    """`(run, state)` of every run: finished, scored, stopped at a step, or missing."""
    rows = []
    for job in jobs(experiment):
        done = state.read_finished(job.folder)
        text = f"trained, {done.get('step', '?')} steps" if done else "stopped" if job.folder.exists() else "missing"
        if job.scores().is_file():
            text = "scored" if done else "scored (its run is not here)"
        rows.append((job.name, text))
    return rows
