"""Experiment files: systems and seeds that are compared in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unislu_llm.analysis.runs import portable
from unislu_llm.errors import UserError, hint
from unislu_llm.training.config import Config, apply, read_yaml

RECIPES = ("train_llm", "train_whisper")
_KEYS = ("title", "output", "results", "common", "tests", "evaluate", "systems", "sizes")
_SYSTEM_KEYS = ("name", "title", "recipe", "prepare", "config", "seeds")

@dataclass(frozen=True)
class System:
    """A row of the table.

    Args:
        name: of its folders. title: in the table. recipe: one of :data:`RECIPES`.
        config: sections over the common ones. seeds: one run each.
        prepare: `unislu` commands before its training, each a command line without the program's name; they must be such that
            running them again is cheap, as `draft` and `prepare` are.
    """

    name: str
    title: str
    recipe: str
    config: dict[str, Any]
    seeds: tuple[int, ...]
    prepare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """An experiment file.

    Args:
        title: head of the table, which says what is common to all rows.
        output: folder of runs. results: folder of score files and the table.
        common: config sections of every system.
        tests: further manifests by name, scored on their own beside the dev sets.
        systems: rows, in order.
        evaluate: flags of `eval/evaluate.py` for every system, in one string.
    """

    title: str
    output: Path
    results: Path
    common: dict[str, Any]
    tests: dict[str, list[str]]
    systems: list[System]
    evaluate: str = ""


@dataclass(frozen=True)
class Job:
    """One run of a system.

    Args:
        system: whose. seed: of training.
    """

    system: System
    seed: int
    experiment: Experiment = field(repr=False)

    @property
    def name(self) -> str:
        """Of the run folder and the score files."""
        return f"{self.system.name}-s{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.experiment.output / self.name

    def config(self) -> dict[str, Any]:
        """Config of the run, as its recipe reads it.

        Raises:
            UserError: an unknown key or a value of the wrong type.
        """
        values = merge(merge(self.experiment.common, self.system.config), {"train": {"seed": self.seed}})
        apply(Config(), values, f"system '{self.system.name}'")
        return values

    def scores(self, test: str = "") -> Path:
        """Score file of the dev sets, or of a further test set; named as `eval/evaluate.py` names it."""
        stems = "+".join(Path(p).stem for p in self.experiment.tests[test]) if test else ""
        return self.experiment.results / ("-".join(filter(None, [self.name, stems, test])) + ".json")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mappings key by key; null takes a key of `base` away."""
    out = dict(base)
    for key, value in over.items():
        if value is None:
            out.pop(key, None)
            continue
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def read_experiment(path: Path, data: str = "", size: str = "") -> Experiment:
    """Read an experiment file.

    Args:
        size: one of the file's `sizes`, a mapping of what is different at each: sections of the file laid over its own, systems
            by name (an unknown name is a further system). Runs and results of a size have folders of their own.
        data: what `${data}` in it stands for: the folder of the corpora. `${output}` stands for the file's own `output`, so that
            a system can start from another's run.

    Raises:
        UserError: no such file, not YAML, an unknown key or size, a system without a name, two of one name, an unknown recipe,
            commands or flags that are no text.
    """
    values = {"output": f"runs/{path.stem}", "results": f"eval/results/{path.stem}", "title": path.stem} | read_yaml(path)
    _known(values, _KEYS, str(path))
    values = _sized(values, size, str(path))
    output = str(values["output"])
    words = {"data": str(Path(data).resolve()) if data else "", "output": str(Path(output).resolve())}
    values = _filled(values, words, str(path))
    systems: list[System] = []
    for i, entry in enumerate(values.get("systems") or []):
        where = f"{path}: systems[{i}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise UserError(f"{where}: a system is a mapping with a `name`")
        _known(entry, _SYSTEM_KEYS, where)
        if entry["name"] in [s.name for s in systems]:
            raise UserError(f"{where}: there are two systems '{entry['name']}'; rename one")
        if entry.get("recipe") not in RECIPES:
            raise UserError(f"{where}.recipe: {entry.get('recipe')!r} is not one of {', '.join(RECIPES)}")
        prepare = entry.get("prepare") or []
        if not isinstance(prepare, list) or not all(isinstance(line, str) for line in prepare):
            raise UserError(f"{where}.prepare: must be a list of command lines, e.g. 'draft openai/whisper-base a.jsonl --out F'")
        systems.append(System(entry["name"], entry.get("title", entry["name"]), entry["recipe"], entry.get("config") or {},
                              tuple(entry.get("seeds") or (1,)), tuple(prepare)))
    if not isinstance(values.get("evaluate", ""), str):
        raise UserError(f"{path}: evaluate: must be flags in one string, e.g. '--decode.grammar'")
    if not systems:
        raise UserError(f"{path}: lists no systems")
    return Experiment(values["title"], Path(output), Path(values["results"]), values.get("common") or {},
                      values.get("tests") or {}, systems, values.get("evaluate", ""))


def _sized(values: Mapping[str, Any], size: str, where: str) -> dict[str, Any]:
    """The file as it is at a size."""
    base = {key: value for key, value in values.items() if key != "sizes"}
    if not size:
        return base
    sizes = values.get("sizes") or {}
    if size not in sizes:
        raise UserError(f"--size {size}: {where} has {', '.join(sizes) or 'no sizes'}{hint(size, list(sizes))}")
    over = dict(sizes[size] or {})
    _known(over, [key for key in _KEYS if key != "sizes"], f"{where}: sizes.{size}")
    apart = {key: f"{base[key]}_{size}" for key in ("output", "results")}
    systems = list(base.get("systems") or [])
    names = [entry.get("name") if isinstance(entry, Mapping) else None for entry in systems]
    for entry in over.pop("systems", None) or []:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if name in names and name is not None:
            systems[names.index(name)] = merge(systems[names.index(name)], entry)
        else:
            systems.append(entry)
    return merge(base, apart | over) | {"systems": systems}


def _known(values: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in values:
        if key not in keys:
            raise UserError(f"{where}: unknown key '{key}'; known: {', '.join(keys)}{hint(key, keys)}")


def _filled(value: Any, words: Mapping[str, str], where: str) -> Any:
    """`${data}` and `${output}` replaced in every string."""
    if isinstance(value, Mapping):
        return {k: _filled(v, words, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, words, where) for v in value]
    if isinstance(value, str):
        for name, word in words.items():
            if "${" + name + "}" in value and not word:
                raise UserError(f"{where}: needs the folder of the corpora; give --data FOLDER")
            value = value.replace("${" + name + "}", word)
    return value


def jobs(experiment: Experiment, only: Sequence[str] = ()) -> list[Job]:
    """Runs of the systems that are named (all, without names), in order.

    Raises:
        UserError: an unknown name, or a system whose config is wrong.
    """
    names = [s.name for s in experiment.systems]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: no such system; known: {', '.join(names)}{hint(name, names)}")
    found = [Job(s, seed, experiment) for s in experiment.systems if not only or s.name in only for seed in s.seeds]
    for job in found:
        job.config()
    return found


def load_scores(path: Path) -> dict[str, Any]:
    """A score file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{portable(path)} is not a score file ({error}); delete it and run again") from error
