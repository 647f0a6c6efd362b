"""Run what is missing of an experiment file and rewrite its table and report.

    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA
    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA --status
    python recipes/run_experiments.py recipes/experiments/slue.yaml --dry-run

Every system is trained by its recipe and scored by eval/evaluate.py in processes of their own,
exactly as from the command line, so that a row of the table can be repeated alone. What is finished
is kept; a stopped run goes on with the same command. Several may be started, one a GPU
(CUDA_VISIBLE_DEVICES): a run that one of them works on is left to it. Call it from the project's
folder.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import dry_run
import yaml
from experiment_file import Experiment, Job, jobs, read_experiment
from experiment_table import write_report, write_table
from filelock import FileLock, Timeout

from unislu_llm.errors import UserError, reported
from unislu_llm.io import is_saved_model, write_text


def run_command(command: Sequence[str], log: Path) -> int:
    """Run a command, its output appended to a log file; returns the exit status."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        if dry_run.begun:
            return dry_run.forked(command, file)
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode


def run_job(job: Job, failed: set[str]) -> None:
    """Train and score what is missing of one run.

    Args:
        failed: names of `may_fail` that did; they are not tried again.

    Raises:
        UserError: a command failed; the message names its log.
    """
    experiment, log = job.experiment, job.experiment.output / f"{job.name}.log"
    trained = (job.folder / "finished.json").is_file()
    if trained and all(job.scores(test).is_file() for test in job.tests):
        return
    for name in job.system.prepare or []:
        try:
            if name not in failed:
                _prepare(name, job, log)
        except UserError as error:
            if name not in experiment.may_fail:
                raise
            failed.add(name)
            print(f"without it: {error}", flush=True)
    if not trained and job.system.of:
        raise UserError(f"{job.name}: not scored: the run {job.folder} is not finished")
    if not trained:
        _run(_training(job, log.with_suffix(".yaml")), log, f"{job.name}: training")
    for test, manifests in job.tests.items():
        if failed and (missing := [path for path in manifests if not Path(path).is_file()]):
            print(f"{job.name}: not scored on {test}: there is no {missing[0]}", flush=True)
        elif not job.scores(test).is_file():
            more = shlex.split(f"{experiment.evaluate} {job.system.evaluate}")
            for flag, given in (("--manifest", manifests), ("--label", [job.label(test)])):
                more += [flag, *given] if any(given) else []
            _run([sys.executable, "eval/evaluate.py", str(job.folder), "--out",
                  str(experiment.results), *more], log, f"{job.name}: scoring {test or 'dev'}")


def _prepare(name: str, job: Job, log: Path) -> None:
    """Run the commands of a name that were not run; another runner may be at it, and is awaited."""
    experiment, given = job.experiment, job.experiment.prepare[name]
    done = experiment.output / "prepared.txt"  # commands, each of which is run once
    with FileLock(experiment.output / f"prepare-{name}.lock"):
        commands = [given] if isinstance(given, str) else given
        for i, line in enumerate((" ".join(command.split()) for command in commands), 1):
            if done.is_file() and line in done.read_text(encoding="utf-8").splitlines():
                continue
            words = shlex.split(line)
            script = words[0].endswith(".py")
            _run([sys.executable, *([] if script else ["-m", "unislu_llm.cli"]), *words], log,
                 f"{job.name}: {name}" + f" {i}/{len(commands)}" * (len(commands) > 1))
            with done.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def _training(job: Job, config: Path) -> list[str]:
    """Command that trains or goes on; what was stopped before its first checkpoint moves away."""
    values = job.config()
    write_text(config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    begun = "stages" in values and (job.folder / "config.yaml").is_file()
    resume = begun or any(map(is_saved_model, job.folder.glob("last*")))
    if job.folder.exists() and not resume:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        job.folder.rename(job.folder.with_name(f"{job.folder.name}.stopped-{stamp}"))
    launch = ["--config_file", str(job.system.launch)] if job.system.launch else []
    return [sys.executable, "-m", "accelerate.commands.launch", *launch,
            f"recipes/{job.system.recipe}.py", "--config", str(config), "--output", str(job.folder),
            *["--resume"] * resume]


def _run(command: Sequence[str], log: Path, what: str) -> None:
    print(f"{what} ... (log: {log})", flush=True)
    before = log.stat().st_size if log.is_file() else 0
    if status := run_command(command, log):
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        # `accelerate launch` puts a traceback of its own behind what the recipe said.
        said = [line for line in lines if line.startswith("error: ")][-1:] or lines[-3:]
        raise UserError(f"{what} ended with status {status}, see {log}:\n" + "\n".join(said))


def run_experiment(experiment: Experiment, only: Sequence[str] = ()) -> int:
    """Run what is missing, the table rewritten after every run, the report after the last one;
    returns the number of failures."""
    failed, lacking = 0, set[str]()
    experiment.output.mkdir(parents=True, exist_ok=True)
    for job in jobs(experiment, only):
        try:
            with FileLock(f"{job.folder}.lock", timeout=0):
                run_job(job, lacking)
        except Timeout:
            print(f"{job.name}: another runner is at it", flush=True)
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        write_table(experiment, jobs(experiment))
    print((experiment.results / "table.md").read_text(encoding="utf-8"))
    print(write_report(experiment, jobs(experiment)))
    return failed


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="experiment file")
    parser.add_argument("--data", default="", help="folder of the corpora, ${data} in the file")
    parser.add_argument("--only", nargs="+", default=[], help="names of systems; default: all")
    parser.add_argument("--status", action="store_true", help="say what is finished, run nothing")
    parser.add_argument("--dry-run", nargs="?", type=Path, const=Path("runs/dry-run"),
                        metavar="FOLDER", help="play it with tiny random models on generated data "
                        "in a folder of its own, which is emptied first; default: runs/dry-run")
    args = parser.parse_args()
    with reported():
        if args.dry_run and not args.status:
            dry_run.begin(args.dry_run)
        experiment = read_experiment(args.experiment, args.data, args.dry_run)
        if not args.status:
            return 2 if run_experiment(experiment, args.only) else 0
        for job in jobs(experiment, args.only):
            done = (job.folder / "finished.json").is_file()
            trained = "trained" if done else "begun" if job.folder.exists() else "no run"
            print(f"{job.name:<40} {trained}{', scored' if job.scores().is_file() else ''}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
