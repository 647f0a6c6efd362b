"""Systems side by side: scores, and differences with intervals where predictions are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from unislu_llm.errors import UserError
from unislu_llm.io import portable, read_json, read_json_lines, sha256
from unislu_llm.prediction_file import decoding_of, dev_predictions, differences, known_decoding
from unislu_llm.run_folder import find_run
from unislu_llm.scoring import score as scoring
from unislu_llm.scoring.bootstrap import Counts, bootstrap
from unislu_llm.scoring.predictions import Prediction, check_predictions
from unislu_llm.scoring.score import flat_scores, interval_of, score_predictions, utterance_counts
from unislu_llm.scoring.text import Protocol
from unislu_llm.tasks import TaskRegistry

Systems = dict[str, list[Prediction]]
"""Predictions by name of the system."""


@dataclass(frozen=True)
class System:
    """What is known of one system."""

    scores: Mapping[str, Any] | None  # of its score file
    decoding: Mapping[str, Any] | None  # None: not known
    predictions: Path | None  # None: not there


def compare(paths: Sequence[Path], protocol: Protocol = "whisper", resamples: int = 1000,
            tasks_file: Path | None = None) -> str:
    """Table of the scores of systems, the first beside each other one, and what to mind.

    Args:
        paths: run folders, score files, or prediction files; two or more.
        protocol: how transcripts and phrases are normalised.
        resamples: of the paired bootstrap.
        tasks_file: YAML list of tasks; default: those of the first run folder, else the built-in.

    Raises UserError: fewer than two systems, what is none, or systems scored on other data.
    """
    if len(paths) < 2 or resamples < 1:
        raise UserError("--resamples must be 1 or more" if len(paths) > 1 else
                        "name two systems or more: run folders or score files")
    registry = TaskRegistry.from_yaml(tasks_file) if tasks_file else next(
        (find_run(path).registry() for path in paths if path.is_dir()), TaskRegistry())
    systems: dict[str, System] = {}
    for i, path in enumerate(paths):
        name, system = _read(path)
        name = name if name not in systems else portable(path)
        if name in systems or path in paths[:i]:
            raise UserError(f"{path} is named twice; name every system once")
        systems[name] = system
    notes = differences({name: s.decoding for name, s in systems.items()})
    read = {name: read_predictions(s.predictions, registry)
            for name, s in systems.items() if s.predictions}
    lacking = [name for name in systems if name not in read]
    counts: dict[str, dict[str, Counts]] = {}
    if lacking:
        scores = {name: s.scores or score_predictions(read[name], registry)
                  for name, s in systems.items()}
        for fault in scoring.same_data(scores):
            raise UserError(fault.removeprefix("warning: ") + "; score them on the same manifests")
        notes.append("no intervals of the differences: the predictions of "
                     f"{', '.join(lacking)} are not there, or have changed since")
    else:
        found, _ = same_data(read)
        scores = {name: score_predictions(some, registry) for name, some in found.items()}
        counts = {name: utterance_counts(some, registry, protocol) for name, some in found.items()}
    rows = _rows({name: flat_scores(s, protocol) for name, s in scores.items()}, counts, resamples)
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True,
                     colalign=["left", *["right"] * (len(rows[0]) - 1)])
    head = f"Protocol: {protocol}, in percent. Differences are to '{next(iter(systems))}'"
    how = "." if lacking else ", with 95 % intervals and p-values of a paired bootstrap."
    return "\n".join([head + how, "", table, *notes])


def _read(path: Path) -> tuple[str, System]:
    """Name of a system, and what its run folder, score file or prediction file says."""
    if path.is_dir():
        run = find_run(path)
        file = dev_predictions(run)
        return run.label, System(None, known_decoding(file), file)
    if path.suffix != ".json":
        return path.stem, System(None, known_decoding(path), path)
    result = read_json(path)
    if lacking := {"scores", "decode", "manifests", "precision", "limit"} - result.keys():
        raise UserError(f"{path} is no score file of `unislu evaluate`: it has no "
                        f"{', '.join(sorted(lacking))}")
    # Score files name it from the folder where they were made.
    file = Path(str(result.get("predictions", "")))
    there = file.is_file() and sha256(file) == result.get("predictions_sha256")
    return path.stem, System(result["scores"], decoding_of(result), file if there else None)


def _rows(scores: Mapping[str, Mapping[str, float]], counts: Mapping[str, Mapping[str, Counts]],
          resamples: int) -> list[dict[str, str]]:
    """Rows of the table, a score each; a score that a system lacks is `-`."""
    (first, own), *others = scores.items()
    rows = []
    for key in dict.fromkeys(key for some in scores.values() for key in some if key != "score"):
        cells = {name: f"{some[key]:.2f}" if key in some else "-" for name, some in scores.items()}
        for name, some in others:
            cell = f"{some[key] - own[key]:+.2f}" if key in some and key in own else "-"
            if counts and cell != "-" and (known := interval_of(key, counts[name])):
                span = bootstrap(difference(counts[name][known], counts[first][known]),
                                 resamples=resamples)
                cell += f" [{span['low']:+.2f}, {span['high']:+.2f}] p {span['p_value']:.3f}"
            cells[f"{name} - {first}"] = cell
        rows.append({"score": key, **cells})
    return rows


# ---- predictions of several systems


def read_predictions(path: Path, registry: TaskRegistry) -> list[Prediction]:
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


def same_data(systems: Systems, common: bool | None = None) -> tuple[Systems, int]:
    """Predictions that all systems have, in one order, and how many are left out with `common`; by
    default nothing may be left out, and nobody is told of a flag for it.

    Raises UserError: systems that were scored on other data.
    """
    # The order of rows in a file decides nothing, not even the draws of the bootstrap.
    keyed = {name: {p.key: p for p in sorted(some, key=lambda p: p.key)}
             for name, some in systems.items()}
    # Compared on other data, systems would differ by what the data are.
    union = set().union(*keyed.values())
    shared = union.intersection(*keyed.values())
    if (union != shared and not common) or not shared:
        lacking = [f"'{name}' lacks {len(gone)} of {len(union)} (e.g. {min(gone)})"
                   for name, some in keyed.items() if (gone := union - set(some))]
        raise UserError(f"the systems were not scored on the same data: {', '.join(lacking)}; "
                        "score them on the same manifests" + (
                            "" if common is None else
                            ", or give --common to compare what all have"))
    name, first = next(iter(keyed.items()))
    for other, some in keyed.items():
        for key in sorted(shared):
            if (some[key].ref_text, some[key].ref) != (first[key].ref_text, first[key].ref):
                raise UserError(f"'{other}' and '{name}' have different references of {key}; score "
                                "them on the same manifests")
    return ({other: [some[key] for key in sorted(shared)] for other, some in keyed.items()},
            len(union) - len(shared))


def difference(one: Counts, two: Counts) -> Counts:
    """The score of a system less that of another one, as a score of their common utterances."""
    def statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        first, second = np.split(sums, 2, axis=1)
        return one.statistic(first) - two.statistic(second)

    # Side by side in one matrix, the rows of both systems are drawn together.
    assert one.utterances == two.utterances
    return Counts(one.utterances, np.concatenate([one.matrix, two.matrix], axis=1), statistic)
