"""Run what is missing of an experiment file and rewrite its table.

    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA
    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA --status

Every system is trained by its recipe and scored by eval/evaluate.py in processes of their own,
exactly as from the command line, so that a row of the table can be repeated alone. What is finished
is kept; a stopped run goes on with the same command. Call it from the project's folder.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from experiment_table import write_table
from pydantic import BaseModel, ValidationError

from unislu_llm.config import Stage
from unislu_llm.config_file import YamlFile, check, config_from_dict
from unislu_llm.errors import UserError, dotted, explain, hint, reported
from unislu_llm.io import is_saved_model, write_text

Values = dict[str, Any]


class System(BaseModel, extra="forbid"):
    """A row of the table."""

    name: str
    """Of its run folders and score files, with `-s<seed>` behind it."""
    title: str = ""
    recipe: Literal["train_llm", "train_whisper", ""] = ""
    like: str = ""
    """An earlier system, whose recipe, `prepare` and config hold where this one says nothing."""
    prepare: list[str] | None = None
    """Names in the file's `prepare`: what to run before training."""
    config: Values = {}
    """Sections over the common ones; null takes a setting away."""
    seeds: list[int] = [1]
    """One run for each."""


class Experiment(BaseModel, extra="forbid"):
    """An experiment file. `${data}`, `${output}` and `${here}` (its folder) stand for paths."""

    title: str
    output: Path
    """Folder of the runs."""
    results: Path
    """Folder of the score files and the table."""
    common: Values = {}
    """Config sections of every system."""
    evaluate: str = ""
    """Flags of eval/evaluate.py for every system."""
    tests: dict[str, list[str]] = {}
    """Further manifests by name, scored on their own beside the dev sets."""
    prepare: dict[str, str] = {}
    """`unislu` commands by name; each is run once, before the first system that names it."""
    systems: list[System]


@dataclass(frozen=True)
class Job:
    """One run of a system."""

    system: System
    seed: int
    experiment: Experiment = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.system.name}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return self.experiment.output / self.name

    def config(self) -> Values:
        """Config of the run as its recipe reads it, checked."""
        values = merge(merge(self.experiment.common, self.system.config),
                       {"train": {"seed": self.seed}})
        values, where = without_nulls(values), f"system '{self.system.name}'"
        config_from_dict(values, where)
        for stage in values.get("stages", []):
            check(Stage, stage, lambda place: f"{where}, a stage: {dotted(place)}")
        return values

    def scores(self, test: str = "") -> Path:
        """Score file of the dev sets, or of a further test set, as eval/evaluate.py names it."""
        stems = "+".join(Path(p).stem for p in self.experiment.tests[test]) if test else ""
        name = "-".join(filter(None, [self.name, stems, test]))
        return self.experiment.results / f"{name}.json"


# ---- reading


def read_experiment(path: Path, data: str = "") -> Experiment:
    """Read an experiment file; `base: FILE` in it names one that it is laid over.

    Raises:
        UserError: no such file, an unknown key or name, no `data` (`${data}`) where it is needed.
    """
    values = _with_base(path)
    words = {"data": str(Path(data).resolve()) if data else "", "here": str(path.parent.resolve()),
             "output": str(Path(str(values.get("output", ""))).resolve())}
    try:
        experiment = Experiment.model_validate(_filled(values, words))
    except ValidationError as error:
        raise explain(error, Experiment, lambda place: f"{path}: {dotted(place)}") from None
    systems: dict[str, System] = {}
    for system in experiment.systems:
        where = f"{path}: system '{system.name}'"
        if system.name in systems:
            raise UserError(f"{where} is there twice; rename one")
        systems[system.name] = system = _inherit(system, systems, where)
        for name in system.prepare or []:
            _known(name, experiment.prepare, f"{where}.prepare")
    if not systems:
        raise UserError(f"{path}: lists no systems")
    return experiment.model_copy(update={"systems": list(systems.values())})


def _with_base(path: Path) -> Values:
    values = YamlFile.read(path).values
    if "base" not in values:
        return values
    base = _with_base(path.parent / str(values.pop("base")))
    systems = {entry["name"]: entry for entry in base["systems"]}
    for entry in values.pop("systems", []):
        systems[entry["name"]] = merge(systems.get(entry["name"], {}), entry)
    return merge(base, values) | {"systems": list(systems.values())}


def _inherit(system: System, earlier: Mapping[str, System], where: str) -> System:
    if system.like:
        _known(system.like, earlier, f"{where}.like")
        other = earlier[system.like]
        system = system.model_copy(update={
            "recipe": system.recipe or other.recipe,
            "prepare": other.prepare if system.prepare is None else system.prepare,
            "config": merge(other.config, system.config)})
    if not system.recipe:
        raise UserError(f"{where}.recipe: is missing; give train_llm or train_whisper, or `like`")
    return system


def _known(name: str, known: Mapping[str, Any], where: str) -> None:
    if name not in known:
        raise UserError(f"{where}: there is no '{name}'; known: {', '.join(known)}"
                        f"{hint(name, known)}")


def _filled(value: Any, words: Mapping[str, str]) -> Any:
    """`${word}` replaced in every string."""
    if isinstance(value, Mapping):
        return {k: _filled(v, words) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, words) for v in value]
    for name, word in words.items():
        if isinstance(value, str) and "${" + name + "}" in value:
            if not word:
                raise UserError(f"the experiment needs the folder of the corpora; give --{name} "
                                "FOLDER")
            value = value.replace("${" + name + "}", word)
    return value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Values:
    """`above` laid over `below`, mappings key by key."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def without_nulls(values: Mapping[str, Any]) -> Values:
    """Null takes away what was laid below."""
    return {key: without_nulls(value) if isinstance(value, Mapping) else value
            for key, value in values.items() if value is not None}


def jobs(experiment: Experiment, only: Sequence[str] = ()) -> list[Job]:
    """Runs of the systems that are named (all, without names), in order, their configs checked."""
    for name in only:
        _known(name, {system.name: None for system in experiment.systems}, "--only")
    found = [Job(system, seed, experiment) for system in experiment.systems
             if not only or system.name in only for seed in system.seeds]
    for job in found:
        job.config()
    return found


# ---- running


def run_command(command: Sequence[str], log: Path) -> int:
    """Run a command, its output appended to a log file; returns the exit status."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode


def run_job(job: Job) -> None:
    """Train and score what is missing of one run.

    Raises:
        UserError: a command failed; the message names its log.
    """
    experiment, log = job.experiment, job.experiment.output / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if not (job.folder / "finished.json").is_file():
        done = experiment.output / "prepared.txt"  # commands, each of which is run once
        for name in job.system.prepare or []:
            line = " ".join(experiment.prepare[name].split())
            if done.is_file() and line in done.read_text(encoding="utf-8").splitlines():
                continue
            _run([sys.executable, "-m", "unislu_llm.cli", *shlex.split(line)], log,
                 f"{job.name}: {name}")
            with done.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        _run(_training(job, log.with_suffix(".yaml")), log, f"{job.name}: training")
    for test, manifests in [("", []), *experiment.tests.items()]:
        more = ["--manifest", *manifests, "--label", test] if test else []
        if not job.scores(test).is_file():
            _run([sys.executable, "eval/evaluate.py", str(job.folder), "--out",
                  str(experiment.results), *shlex.split(experiment.evaluate), *more], log,
                 f"{job.name}: scoring {test}")


def _training(job: Job, config: Path) -> list[str]:
    """Command that trains or goes on; what was stopped before its first checkpoint moves away."""
    values = job.config()
    write_text(config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    begun = "stages" in values and (job.folder / "config.yaml").is_file()
    resume = begun or any(map(is_saved_model, job.folder.glob("last*")))
    if job.folder.exists() and not resume:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        job.folder.rename(job.folder.with_name(f"{job.folder.name}.stopped-{stamp}"))
    return [sys.executable, "-m", "accelerate.commands.launch", f"recipes/{job.system.recipe}.py",
            "--config", str(config), "--output", str(job.folder), *["--resume"] * resume]


def _run(command: Sequence[str], log: Path, what: str) -> None:
    print(f"{what} ... (log: {log})", flush=True)
    before = log.stat().st_size if log.is_file() else 0
    if status := run_command(command, log):
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        # `accelerate launch` puts a traceback of its own behind what the recipe said.
        said = [line for line in lines if line.startswith("error: ")][-1:] or lines[-3:]
        raise UserError(f"{what} ended with status {status}, see {log}:\n" + "\n".join(said))


def run_experiment(experiment: Experiment, only: Sequence[str] = ()) -> int:
    """Run what is missing, the table rewritten after every run; returns the number of failures."""
    failed = 0
    for job in jobs(experiment, only):
        try:
            run_job(job)
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        write_table(experiment, jobs(experiment))
    print((experiment.results / "table.md").read_text(encoding="utf-8"))
    return failed


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="experiment file")
    parser.add_argument("--data", default="", help="folder of the corpora, ${data} in the file")
    parser.add_argument("--only", nargs="+", default=[], help="names of systems; default: all")
    parser.add_argument("--status", action="store_true", help="say what is finished, run nothing")
    args = parser.parse_args()
    with reported():
        experiment = read_experiment(args.experiment, args.data)
        if not args.status:
            return 2 if run_experiment(experiment, args.only) else 0
        for job in jobs(experiment, args.only):
            done = (job.folder / "finished.json").is_file()
            trained = "trained" if done else "begun" if job.folder.exists() else "no run"
            print(f"{job.name:<40} {trained}{', scored' if job.scores().is_file() else ''}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
