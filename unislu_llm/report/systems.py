"""What is compared: runs and files of their answers, with their logs, all on the same data."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from unislu_llm.config_file import config_of_run
from unislu_llm.data.manifest import iter_rows, manifest_name
from unislu_llm.errors import UserError
from unislu_llm.io import portable, read_json, read_json_lines, sha256
from unislu_llm.prediction_file import decoding_of, dev_predictions, known_decoding
from unislu_llm.run_folder import BEST, LAST, METRICS, Run, find_run, is_run, read_metrics, settings
from unislu_llm.scoring.predictions import Prediction, check_predictions
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

Predictions = list[Prediction]
Key = tuple[str, str]  # corpus and id of an utterance
Curve = list[dict[str, Any]]
"""Validations: `step` of all training, `minutes` of it (None: a log does not tell), `scores`."""


@dataclass(frozen=True)
class Member:
    """One trained model: its run, or what is left of it in a file."""

    name: str
    predictions: Path | None  # None: not there
    decoding: Mapping[str, Any] | None  # None: not known
    about: Mapping[str, Any]  # what evaluation noted; of a score file all of it
    run: Run | None = None  # None: a file was given

    @cached_property
    def curve(self) -> Curve:
        """Learning curve of its run, which ends in all of its training."""
        return read_curve(self.run.folder) if self.run and self.run.config else []

    @property
    def cost(self) -> dict[str, float | None]:
        """Parameters, minutes of training, seconds for one of audio; None: not known."""
        known = {"trained": self.about.get("trainable_parameters", {}).get("total"), **self.about}
        known |= {"train_minutes": self.curve[-1]["minutes"]} if self.curve else {}
        return {key: known.get(key) for key in
                ("parameters", "trained", "train_minutes", "rtf", "memory_gib")}

    def rows(self, part: str, registry: TaskRegistry) -> Iterator[tuple[Utterance, dict[str, Any]]]:
        """Of its `train` or `dev` manifests, as read and as written; none if one is not here."""
        files = [Path(name) for name in self.about.get("manifests", ()) if part == "dev"]
        if self.run is not None and self.run.config is not None:  # stages may have their own
            files = [Path(name) for key, value in settings(self.run.config)
                     if key.endswith(f"data.{part}") for name in value or ()]
        for path in dict.fromkeys(files) if all(file.is_file() for file in files) else ():
            language = self.run.config.model.language if self.run and self.run.config else ""
            for row in iter_rows(path, registry, corpus=manifest_name(path), language=language):
                if row.utterance is not None:
                    yield row.utterance, row.content

    def facts(self, registry: TaskRegistry) -> dict[Key, dict[str, Any]]:
        """What its dev manifests say of utterances."""
        return {(u.corpus, u.id): {"audio": u.audio, "start": u.start, "end": u.end,
                                   "speaker": u.speaker, "condition": content.get("condition")}
                for u, content in self.rows("dev", registry)}


def find_members(paths: Sequence[Path]) -> dict[str, Member]:
    """Systems by name, in the order of the paths; what has no predictions yet is decoded. Raises
    UserError: a path is no system, or is there twice."""
    found: dict[str, Member] = {}
    for i, path in enumerate(paths):
        member = _of_run(path) if path.is_dir() else _of_file(path)
        name = member.name if member.name not in found else portable(path)
        if name in found or path in paths[:i]:
            raise UserError(f"{path} is named twice; name every system once")
        found[name] = member
    return found


def _of_run(path: Path) -> Member:
    run = find_run(path)
    if (file := dev_predictions(run)) is None:
        from unislu_llm.evaluate import decoded, make_job  # loads models
        from unislu_llm.evaluate_options import Options

        file = decoded(make_job(path, Options()))[2]
    return _of_file(file, run)


def _of_file(path: Path, run: Run | None = None) -> Member:
    if path.suffix != ".json":
        meta = path.with_suffix(".meta.json")
        return Member(run.label if run else path.stem, path, known_decoding(path),
                      read_json(meta) if meta.is_file() else {}, run)
    result = read_json(path)
    if lacking := {"scores", "decode", "manifests", "precision", "limit"} - result.keys():
        raise UserError(f"{path} is no score file of `unislu evaluate`: it has no "
                        f"{', '.join(sorted(lacking))}")
    # Score files name it from the folder where they were made.
    file = Path(str(result.get("predictions", "")))
    there = file.is_file() and sha256(file) == result.get("predictions_sha256")
    return Member(path.stem, file if there else None, decoding_of(result), {
        **result.get("decoding", {}), **result, "manifests": [m["file"] for m in
                                                              result["manifests"]]})


def pool_seeds(members: Mapping[str, Member]) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the members of each system, and notes: runs `NAME-s1`, `NAME-s2`, ... whose settings
    are the same but for the seed are one system, unless there is no other."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, member in members.items():
        stem, _, seed = name.rpartition("-s")
        config = member.run.config if member.run and stem and seed.isdigit() else None
        # Seeds are also parts of names of folders, from which runs may start.
        known = config and re.sub(r"-s\d+(?=[/\"])", "", json.dumps(
            [pair for pair in settings(config) if not pair[0].endswith("train.seed")]))
        alike.setdefault((stem, known) if known else (name, ""), []).append(name)
    if len(alike) == 1:
        return {name: [name] for name in members}, []
    stems = Counter(stem for stem, _ in alike)
    systems = {stem if len(names) > 1 and stems[stem] == 1 else names[0]: names
               for (stem, _), names in alike.items()}
    return systems, [f"{name} is the mean over {', '.join(names)}"
                     for name, names in systems.items() if len(names) > 1] + [
        f"runs {stem}-s... are not all pooled: not only their seeds differ"
        for stem, n in stems.items() if n > 1]


def read_predictions(path: Path, registry: TaskRegistry) -> Predictions:
    """Predictions of a file; what it holds instead is named."""
    rows = read_json_lines(path)  # whose errors name the file themselves
    try:
        if found := check_predictions(rows, registry):
            return found
        fault = "there are none"
    except UserError as error:
        fault = str(error)
    raise UserError(f"{path} cannot be read as predictions: {fault}; give a file of a run's "
                    "`predictions` folder, written by unislu evaluate, or the run folder (and "
                    "--tasks-file FILE for other tasks than the built-in ones)")


def same_data(systems: Mapping[str, Predictions],
              common: bool = False) -> tuple[dict[str, Predictions], int]:
    """Predictions that all systems have, in one order, and how many are left out with `common`.
    Raises UserError: systems scored on other data, or that would be normalised otherwise."""
    # The order of rows in a file decides nothing, not even the draws of the bootstrap.
    keyed = {name: {p.key: p for p in some} for name, some in systems.items()}
    union = set().union(*keyed.values())
    shared = sorted(union.intersection(*keyed.values()))
    # Compared on other data, systems would differ by what the data are.
    if (len(union) != len(shared) and not common) or not shared:
        lacking = [f"'{name}' lacks {len(gone)} of {len(union)} (e.g. {min(gone)})"
                   for name, some in keyed.items() if (gone := union - set(some))]
        raise UserError(f"the systems were not scored on the same data: {', '.join(lacking)}; score"
                        " them on the same manifests, or give --common to compare what all have")
    name, first = next(iter(keyed.items()))
    for other, some in keyed.items():
        for what, of in (("references", lambda p: (p.ref_text, p.ref)),
                         ("languages, which texts are normalised by,",
                          lambda p: p.language or "en")):
            if odd := [key for key in shared if of(some[key]) != of(first[key])]:
                raise UserError(f"'{other}' and '{name}' have different {what} of {len(odd)} of "
                                f"{len(shared)}, e.g. {odd[0]}; score them on the same manifests")
    return ({other: [some[key] for key in shared] for other, some in keyed.items()},
            len(union) - len(shared))


def read_curve(run: Path) -> Curve:
    """Validations of a run, behind those of the run that it starts from, where that is there; last
    of all its end, without scores. Those of CTC text, no answer of the LLM, are called `ctc_wer`.
    """
    curve, before, seconds = Curve(), 0, 0.0

    def add(step: int, scores: dict[str, float]) -> None:
        minutes = None if math.isnan(seconds) else seconds / 60
        curve.append({"step": step, "minutes": minutes, "scores": scores})

    for own in _logs(run):
        prefix = "ctc_" * (config_of_run(own).train.objective == "ctc")
        step = counted = 0
        # A step is logged before it is validated, with the mean time since the last row.
        for row in sorted(read_metrics(own), key=lambda row: (row["step"], row["part"] == "dev")):
            step = row["step"]
            if row["part"] == "train":
                seconds += row.get("seconds", math.nan) * (step - counted)
                counted = step
            elif row["part"] == "dev":
                add(before + step, {prefix + key: value for key, value in row.items()
                                    if key not in ("part", "step", "seconds")
                                    and isinstance(value, int | float) and math.isfinite(value)})
        before += step  # a run that still trains may be further than its last row
    if before:
        add(before, {})
    return curve


def _logs(run: Path) -> Iterator[Path]:
    """Folders with a log, in the order of training."""
    config = config_of_run(run)
    # Stages name the one before as `init` too, but only the run's own config is followed.
    source = Path(config.train.init or "")
    source = source.parent if source.name in (BEST, LAST) else source
    if config.train.init and is_run(source):
        yield from _logs(source)
    stages = [run / str(stage["name"]) for stage in config.stages] or [run]
    yield from (own for own in stages if (own / METRICS).is_file())


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Validations that all runs of a system have, by step, as means over the runs."""
    runs = [{point["step"]: point for point in curve if point["scores"]} for curve in curves]
    steps = {step: [run[step] for run in runs] for step in sorted(set.intersection(
        *map(set, runs)))}
    return [{"step": step, "minutes": mean([p["minutes"] for p in points]), "scores": {
        key: fmean(p["scores"][key] for p in points) for key in points[0]["scores"]
        if all(key in p["scores"] for p in points)}} for step, points in steps.items()]


def mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known; whole where all are alike."""
    known = [value for value in values if value is not None]
    mean = known[0] if len(set(known)) == 1 else fmean(known or [0.0])
    return mean if len(known) == len(values) else None
