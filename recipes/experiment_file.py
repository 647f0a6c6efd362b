"""Experiment files: what is in them, how they are read, and the runs that they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import dry_run
from experiment_table import Published
from pydantic import BaseModel, FilePath, ValidationError, model_validator

from unislu_llm.config import Config, Stage
from unislu_llm.config_file import YamlFile, check
from unislu_llm.errors import Place, UserError, dotted, explain, hint

Values = dict[str, Any]


class Lines:
    """Where a value stands in an experiment file, or in the one that it is laid over."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [YamlFile.read(path)]
        while base := self.files[-1].values.get("base"):
            self.files.append(YamlFile.read(self.files[-1].path.parent / str(base)))

    def __call__(self, *places: Place, said: str = "") -> str:
        """`file:line: said` of the first of some places that a file has, the topmost file first.

        In a place a system has its name, where the file has a number. Without `said`: the place.
        """
        for place in places:
            for file in self.files:
                own, value = [*place], cast(Any, file.values)
                try:
                    if own[0] == "systems" and isinstance(own[1], str):
                        own[1] = [s.get("name") for s in value["systems"]].index(own[1])
                    for part in own:
                        value = value[part]
                except (KeyError, IndexError, ValueError, TypeError, AttributeError):
                    continue
                found = tuple(own)
                return file.where(found).removesuffix(dotted(found)) + (said or dotted(found))
        if len(places[0]) > 1:  # what is missing has the line of what should hold it
            return self(*(place[:-1] for place in places), said=said or dotted(places[0]))
        return f"{self.path}: {said or dotted(places[0])}"


class Parts(BaseModel, extra="forbid"):
    """Systems whose transcripts, entities and sentiment are scored as those of one."""

    wer: str
    ner: str
    sa: str


class System(BaseModel, extra="forbid"):
    """A row of the table."""

    name: str
    """Of its run folders and score files, with `-s<seed>` behind it."""
    title: str = ""
    recipe: Literal["train_llm", "train_whisper", ""] = ""
    like: str = ""
    """An earlier system, whose recipe, config and the like hold where this one says nothing."""
    prepare: list[str] | None = None
    """Names in the file's `prepare`: what to run before training."""
    config: Values = {}
    """Sections over the common ones; null takes a setting away."""
    of: str = ""
    """No runs of its own: those of an earlier system are scored in another way."""
    seeds: list[int] = [1]
    """One run for each."""
    evaluate: str = ""
    """Flags of eval/evaluate.py, behind the file's."""
    dev: list[str] = []
    """Manifests that are scored in place of the runs' dev sets."""
    tests: dict[str, list[str]] | None = None
    """In place of the file's."""
    launch: FilePath | None = None
    """A config of Accelerate with which its training is launched, e.g. on several GPUs."""
    parts: Parts | None = None
    """No run but a row of scores of earlier systems, which have no rows of their own."""

    @model_validator(mode="after")
    def _own(self) -> System:
        for key in ("config", "like", "recipe", "launch", "parts", "seeds"):
            if self.of and key in self.model_fields_set:
                raise ValueError(f"'of' scores the runs of '{self.of}'; take '{key}' away, or give "
                                 "`like` in place of `of`")
        return self


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
    """`unislu` commands, or scripts (`recipes/make_voices.py ...`), by name; each is run
    once, before the first system that names it."""
    may_fail: list[str] = []
    """Names in `prepare` whose failure is said, and no more; tests that lack their manifests then
    are not scored."""
    published: list[Published] = []
    """Numbers of others, beside ours in the table, whose rows then say on which set they are."""
    systems: list[System]
    _lines: Lines


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
        return self.experiment.output / f"{self.system.of or self.system.name}-s{self.seed}"

    def config(self) -> Values:
        """Config of the run as its recipe reads it, checked."""
        values = merge(merge(self.experiment.common, self.system.config),
                       {"train": {"seed": self.seed}})
        values, names = without_nulls(values), [self.system.name]
        for system in reversed(self.experiment.systems):  # a fault may be in what it is like
            names += [system.like] if system.like and system.name == names[-1] else []

        def where(place: Place) -> str:
            own = [("systems", name, "config", *place) for name in names]
            return self.experiment._lines(
                *own, ("common", *place), said=f"system '{names[0]}': {dotted(place)}")

        def inside(stage: int, place: Place) -> str:
            return where(("stages", stage, *place))

        check(Config, values, where)
        for i, stage in enumerate(values.get("stages", [])):
            check(Stage, stage, partial(inside, i))
        return values

    @property
    def tests(self) -> dict[str, list[str]]:
        """Manifests by test set; without a name: the dev sets, which the run knows if there are
        none."""
        own = self.system.tests
        return {"": self.system.dev} | (self.experiment.tests if own is None else own)

    def label(self, test: str = "") -> str:
        """What eval/evaluate.py calls the scores of a test set beside the run's own dev sets."""
        return "-".join(filter(None, [self.system.name if self.system.of else "", test]))

    def scores(self, test: str = "") -> Path:
        """Score file of the dev sets, or of a further test set, as eval/evaluate.py names it."""
        stems = "+".join(Path(p).stem for p in self.tests[test])[:100]
        name = "-".join(filter(None, [self.folder.name, stems, self.label(test)]))
        return self.experiment.results / f"{name}.json"


def read_experiment(path: Path, data: str = "", dry: Path | None = None) -> Experiment:
    """Read an experiment file; `base: FILE` in it names one that it is laid over; `dry`: the folder
    of a dry run.

    Raises:
        UserError: no such file, an unknown key or name, no `data` (`${data}`) where it is needed.
    """
    lines = Lines(path)
    values = _laid_over(lines.files)
    if dry:
        values, data = dry_run.shrunk(values, dry), str(dry / "data")
    words = {"data": str(Path(data).resolve()) if data else "", "here": str(path.parent.resolve()),
             "output": str(Path(str(values.get("output", ""))).resolve())}
    try:
        experiment = Experiment.model_validate(_filled(values, words))
    except ValidationError as error:
        names = [s.get("name", i) for i, s in enumerate(values.get("systems", []))]
        raise explain(error, Experiment, lambda place: lines(
            ("systems", names[int(place[1])], *place[2:]) if place[0] == "systems" and place[1:]
            else place)) from None
    experiment._lines = lines
    systems: dict[str, System] = {}
    for system in experiment.systems:
        where = lines(("systems", system.name), said=f"system '{system.name}'")
        if system.name in systems:
            raise UserError(f"{where} is there twice; rename one")
        system = _inherit(system, systems, where)
        for name in system.prepare or []:
            _known(name, experiment.prepare, f"{where}.prepare")
        for part in dict(system.parts or {}).values():
            _known(part, systems, f"{where}.parts")
        systems[system.name] = system
    for name in experiment.may_fail:
        _known(name, experiment.prepare, lines(("may_fail",)))
    for i, some in enumerate(experiment.published):
        _known(some.set, {"dev": [], **experiment.tests}, lines(("published", i, "set")))
    if not systems:
        raise UserError(f"{path}: lists no systems")
    return experiment.model_copy(update={"systems": list(systems.values())})


def _laid_over(files: Sequence[YamlFile]) -> Values:
    values = {key: value for key, value in files[0].values.items() if key != "base"}
    if len(files) == 1:
        return values
    base = _laid_over(files[1:])
    systems = {entry.get("name"): entry for entry in base.get("systems") or []}
    for entry in values.pop("systems", None) or []:
        name = entry.get("name")
        systems[name] = merge(systems.get(name, {}), entry)
    return merge(base, values) | {"systems": list(systems.values())}


def _inherit(system: System, earlier: Mapping[str, System], where: str) -> System:
    if name := system.like or system.of:
        _known(name, earlier, f"{where}.{'like' if system.like else 'of'}")
        other = earlier[name]
        if system.of and other.parts:
            raise UserError(f"{where}.of: '{name}' has no runs, but parts; name one of those")
        system = system.model_copy(update={
            "recipe": system.recipe or other.recipe,
            "prepare": other.prepare if system.prepare is None else system.prepare,
            "tests": other.tests if system.tests is None else system.tests,
            "of": system.of and (other.of or other.name),
            "seeds": other.seeds if system.of else system.seeds,
            "dev": system.dev if "dev" in system.model_fields_set else other.dev,
            "evaluate": system.evaluate or other.evaluate,
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
              for name in [system.name, system.of, *dict(system.parts or {}).values()]}
    found = [Job(system, seed, experiment) for system in experiment.systems
             if system.name in wanted and not system.parts for seed in system.seeds]
    files: dict[Path, str] = {}
    for job in found:
        job.config()
        for file in map(job.scores, job.tests):
            if files.setdefault(file, job.name) != job.name:
                raise UserError(f"{files[file]} and {job.name} would share the scores {file}; "
                                "rename a system or a set of tests")
    return found
