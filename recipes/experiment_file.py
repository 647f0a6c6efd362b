"""Experiment files: what is in them, how they are read, and the runs that they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dry_run
from experiment_table import Published
from pydantic import BaseModel, FilePath, ValidationError

from unislu_llm.config import Stage
from unislu_llm.config_file import YamlFile, check, config_from_dict
from unislu_llm.errors import UserError, dotted, explain, hint

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
    tests: dict[str, list[str]] | None = None
    """In place of the file's."""
    launch: FilePath | None = None
    """A config of Accelerate with which its training is launched, e.g. on several GPUs."""
    parts: dict[Literal["wer", "ner", "sa"], str] = {}
    """No run but a row: earlier systems, without rows of their own, that have its scores."""


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
    prepare: dict[str, str | list[str]] = {}
    """`unislu` commands by name; each is run once, before the first system that names it."""
    may_fail: list[str] = []
    """Names in `prepare` whose failure is said, and no more; tests that lack their manifests then
    are not scored."""
    published: list[Published] = []
    """Numbers of others, beside ours in the table, whose rows then say on which set they are."""
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

    @property
    def tests(self) -> dict[str, list[str]]:
        """Manifests by test set; without a name: the dev sets, which the run knows."""
        own = self.system.tests
        return {"": []} | (self.experiment.tests if own is None else own)

    def scores(self, test: str = "") -> Path:
        """Score file of the dev sets, or of a further test set, as eval/evaluate.py names it."""
        stems = "+".join(Path(p).stem for p in self.tests[test])
        name = "-".join(filter(None, [self.name, stems, test]))
        return self.experiment.results / f"{name}.json"


def read_experiment(path: Path, data: str = "", dry: Path | None = None) -> Experiment:
    """Read an experiment file; `base: FILE` in it names one that it is laid over; `dry`: the folder
    of a dry run.

    Raises:
        UserError: no such file, an unknown key or name, no `data` (`${data}`) where it is needed.
    """
    values = _with_base(path)
    if dry:
        values, data = dry_run.shrunk(values, dry), str(dry / "data")
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
        for part in system.parts.values():
            _known(part, systems, f"{where}.parts")
    for name in experiment.may_fail:
        _known(name, experiment.prepare, f"{path}: may_fail")
    for some in experiment.published:
        _known(some.set, {"dev": [], **experiment.tests}, f"{path}: published, {some.source}: set")
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
            "tests": other.tests if system.tests is None else system.tests,
            "launch": system.launch or other.launch,
            "config": merge(other.config, system.config)})
    if not system.recipe and not system.parts:
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
    wanted = {name for system in experiment.systems if not only or system.name in only
              for name in [system.name, *system.parts.values()]}
    found = [Job(system, seed, experiment) for system in experiment.systems
             if system.name in wanted and not system.parts for seed in system.seeds]
    for job in found:
        job.config()
    return found
