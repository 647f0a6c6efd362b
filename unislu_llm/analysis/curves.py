"""Learning curves of runs from their logs: `metrics.jsonl` of the unified training, `ctc_log.jsonl` of `ctc` stages.

A run's history is a list of parts: its stages, behind those of the runs that it starts from (`model.init`, `model.init_llm`).
Steps of `ctc` stages do not run the LLM; they are counted apart everywhere.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from unislu_llm.analysis.runs import file_hash, portable
from unislu_llm.errors import UserError, hint
from unislu_llm.training.config import read_yaml
from unislu_llm.training.ctc_stage import LOG as CTC_LOG
from unislu_llm.training.state import BEST, LAST, is_finished, read_finished

METRICS = "metrics.jsonl"
_NO_SCORE = ("part", "step", "seconds")
_CTC_SCORE = "wer"
"""What a `ctc` stage measures; its other figures have no like in the unified training."""

Validation = tuple[int, float | None, Mapping[str, float]]
"""Step, seconds of training up to it, scores."""


@dataclass(frozen=True)
class Part:
    """One training in the history of a run: a stage, or the whole run.

    Args:
        folder: of the log. log: its name. seed, git: of the training; None where its folder does not tell.
        dev: dev manifests and the limit on their rows. ctc: trained by CTC alone, without the LLM.
        steps: optimizer steps so far. finished: it came to its end.
        seconds: of training; None where the log does not tell. exact: every step's time is logged, so no point's is estimated.
        scores: of every validation, in order.
    """

    folder: Path
    log: str
    seed: int | None
    git: str | None
    dev: tuple[str, ...]
    ctc: bool
    steps: int
    finished: bool
    seconds: float | None
    exact: bool
    scores: tuple[Validation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a result file, with the hash of the log and no scores."""
        return {"folder": portable(self.folder), "objective": "ctc" if self.ctc else "unified", "steps": self.steps,
                "finished": self.finished, "seconds": self.seconds, "seconds_exact": self.exact, "seed": self.seed,
                "git": self.git, "dev": list(self.dev), "log": self.log, "log_sha256": file_hash(self.folder / self.log)}


@dataclass(frozen=True)
class Point:
    """A validation: steps and minutes of training before it, over all parts so far.

    Args:
        ctc: the value is of the greedy CTC transcript of a `ctc` stage and not of the LLM's answer.
    """

    llm_step: int
    ctc_step: int
    minutes: float | None
    value: float
    ctc: bool


@dataclass(frozen=True)
class History:
    """A run's name and parts, oldest first.

    Args:
        unknown: models that it starts from and whose training is not here.
    """

    name: str
    folder: Path
    parts: tuple[Part, ...]
    unknown: tuple[str, ...] = ()

    @property
    def llm_steps(self) -> int:
        """Steps of all parts that run the LLM."""
        return sum(p.steps for p in self.parts if not p.ctc)

    @property
    def finished(self) -> bool:
        """Whether the run, with all its stages, is marked as finished."""
        return is_finished(self.folder)

    @property
    def ctc_steps(self) -> int:
        """Steps of all `ctc` stages."""
        return sum(p.steps for p in self.parts if p.ctc)

    def points(self, score: str) -> list[Point]:
        """Values of a score; of a `ctc` stage its WER.

        Raises:
            UserError: the run has no validation, or none with this score.
        """
        points, llm, ctc = [], 0, 0
        before: float | None = 0.0
        for part in self.parts:
            for step, took, scores in part.scores:
                if score in scores:
                    minutes = None if before is None or took is None else (before + took) / 60
                    at = (llm, ctc + step) if part.ctc else (llm + step, ctc)
                    points.append(Point(*at, minutes, scores[score], part.ctc))
            llm, ctc = llm + (0 if part.ctc else part.steps), ctc + (part.steps if part.ctc else 0)
            before = None if before is None or part.seconds is None else before + part.seconds
        if not points:
            known = sorted({key for part in self.parts for _, _, scores in part.scores for key in scores})
            if not known:
                raise UserError(f"{self.folder}: no validation in its log; it has no data.dev, or has not come to the first one")
            raise UserError(f"{self.folder}: no score '{score}' (--score); it has {', '.join(known)}{hint(score, known)}")
        return points


def lower_is_better(score: str) -> bool:
    """Whether a dev score counts errors."""
    return score in ("wer", "malformed") or score.startswith("wer_")


# ---- reading ---------------------------------------------------------------------------------------------------------------


def read_history(folder: Path, name: str = "") -> History:
    """History of a run from its folder (`RUN/best` and `RUN/last` count as their run).

    Raises:
        UserError: no run, none of its logs is there, or one is damaged.
    """
    if folder.name in (BEST, LAST) and (folder.parent / "config.yaml").is_file():
        folder = folder.parent
    if not (folder / "config.yaml").is_file():
        problem = "is no run folder (it has no config.yaml)" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {problem}; give a run folder of a training recipe")
    parts, unknown = _parts(folder)
    if not parts:
        raise UserError(f"{folder}: no log yet, neither {METRICS} nor {CTC_LOG}; let it train, up to its first validation")
    return History(name or folder.resolve().name, folder, tuple(parts), tuple(unknown))


def _parts(folder: Path) -> tuple[list[Part], list[str]]:
    config = read_yaml(folder / "config.yaml")
    model = config.get("model") or {}
    parts: list[Part] = []
    unknown: list[str] = []
    for init in filter(None, (model.get("init"), model.get("init_llm"))):
        source = Path(init).parent if Path(init).name in (BEST, LAST) else Path(init)
        if (source / "config.yaml").is_file():
            before, lost = _parts(source)
            parts, unknown = [*parts, *before], [*unknown, *lost]
        else:
            unknown.append(portable(init))
    names = [str(stage["name"]) for stage in config.get("stages") or []]
    for own in [folder / name for name in names] if names else [folder]:
        if (own / METRICS).is_file() or (own / CTC_LOG).is_file():
            parts.append(_read_part(own))
    return parts, unknown


def _read_part(folder: Path) -> Part:
    config = read_yaml(folder / "config.yaml")
    train, data = config.get("train") or {}, config.get("data") or {}
    dev = tuple(portable(p) for p in data.get("dev") or []) + ((f"limit {data['dev_limit']}",) if data.get("dev_limit") else ())
    try:
        git = json.loads((folder / "versions.json").read_text(encoding="utf-8")).get("git")
    except (OSError, ValueError):
        git = None
    ctc = train.get("objective") == "ctc"
    log = CTC_LOG if ctc else METRICS
    steps, seconds, exact, scores = (ctc_figures if ctc else unified_figures)(folder / log)
    end = read_finished(folder)
    if seconds and not exact and end.get("train_seconds"):  # what was estimated adds up to what was measured
        scale = end["train_seconds"] / seconds
        seconds = float(end["train_seconds"])
        scores = [(step, None if took is None else took * scale, values) for step, took, values in scores]
    return Part(folder, log, train.get("seed"), git, dev, ctc, steps, bool(end), seconds, exact, tuple(scores))


def read_log(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """`(line number, row)` of a log of JSON lines; a last line that is being written is left out.

    Raises:
        UserError: it cannot be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # behind the last end of line there is nothing, or a line half written
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if row is None:
            continue
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; the log is damaged, take the line out")
        rows.append((number, row))
    return rows


Figures = tuple[int, float | None, bool, list[Validation]]
"""Steps, seconds, whether these are exact, and the validations."""


def unified_figures(path: Path) -> Figures:
    """What `metrics.jsonl` says. Of steps that a resumed run took twice, the later ones count.

    The time of every `train.log_every`-th step is logged; it stands for those since the one logged before.

    Raises:
        UserError: as :func:`read_log`, and a row without a step.
    """
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    last = 0
    for number, row in read_log(path):
        part, step = row.get("part"), row.get("step")
        if not isinstance(part, str) or not isinstance(step, int):
            raise UserError(f"{path}:{number}: no 'part' or no 'step'; the log is damaged, take the line out")
        if step < last:  # resumed from a checkpoint before
            kept = {key: value for key, value in kept.items() if key[1] <= step}
        kept[part, step], last = row, step
    logged = [(step, row.get("seconds")) for (part, step), row in sorted(kept.items()) if part == "train"]
    seconds_at = _clock(logged)
    validated = [(step, row) for (part, step), row in sorted(kept.items()) if part == "dev"]
    scores: list[Validation] = [(step, seconds_at(step), _scores(row)) for step, row in validated]
    steps = max((step for _, step in kept), default=0)
    return steps, seconds_at(steps), len(logged) == steps, scores


def _clock(logged: Sequence[tuple[int, Any]]) -> Callable[[int], float | None]:
    """A function from a step to the seconds up to its end; None where no or not every logged step has its time."""
    known = bool(logged) and all(isinstance(seconds, int | float) for _, seconds in logged)
    steps = [0, *(step for step, _ in logged)]
    spans = zip(steps, logged, strict=False)
    totals = list(accumulate(((step - before) * seconds for before, (step, seconds) in spans), initial=0.0)) if known else []

    def at(step: int) -> float | None:
        if step == 0:
            return 0.0
        if not known:
            return None
        i = min(bisect_left(steps, step), len(logged))  # the logged step that stands for this one
        return float(totals[i] + (step - steps[i]) * logged[i - 1][1])

    return at


def ctc_figures(path: Path) -> Figures:
    """What `ctc_log.jsonl` says; steps and seconds are the sums over epochs.

    Raises:
        UserError: as :func:`read_log`, a row without its figures, or an epoch that is missing.
    """
    steps, seconds = 0, 0.0
    scores: list[Validation] = []
    for count, (number, row) in enumerate(read_log(path), start=1):
        if not all(isinstance(row.get(key), int | float) for key in ("epoch", "steps", "seconds")) or row["epoch"] != count:
            raise UserError(f"{path}:{number}: expected epoch {count} with its 'steps' and 'seconds'; the log is damaged")
        steps, seconds = steps + int(row["steps"]), seconds + row["seconds"]
        if _CTC_SCORE in row:
            scores.append((steps, seconds, _scores({_CTC_SCORE: row[_CTC_SCORE]})))
    return steps, seconds, True, scores


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key not in _NO_SCORE and isinstance(value, int | float)
            and math.isfinite(value)}


# ---- when one reaches another ------------------------------------------------------------------------------------------------


def reach(histories: Sequence[History], score: str, target: str) -> dict[str, Any]:
    """When each run first is as good, at a validation of the LLM, as the run `target` at its best.

    The greedy transcripts of `ctc` stages do not count, and their steps are given apart.

    Args:
        score: dev score. target: name of a run.

    Returns:
        `value`, `best_step`, `llm_steps`, `finished` of the target; and `runs`: by name `llm_step`, `ctc_steps`, `minutes`
        (null where not reached), `of_steps` and `of_best_step`: LLM steps as shares of the target's, all of them and those to its
        best; `best`, the run's own best value.

    Raises:
        UserError: no such run, or as :meth:`History.points`.
    """
    by_name = {h.name: h for h in histories}
    if target not in by_name:
        raise UserError(f"--reach: no run is named '{target}'; there are {', '.join(by_name)}{hint(target, by_name)}")
    sign = -1.0 if lower_is_better(score) else 1.0
    answers = {h.name: [p for p in h.points(score) if not p.ctc] for h in histories}
    if not answers[target]:
        raise UserError(f"--reach {target}: it has no validation of the LLM, only of the ctc stage; name another run")
    goal = max(answers[target], key=lambda p: sign * p.value)  # the first of equals
    total = by_name[target].llm_steps
    runs: dict[str, dict[str, Any]] = {}
    for name, points in answers.items():
        hit = next((p for p in points if sign * p.value >= sign * goal.value), None)
        runs[name] = {"llm_step": None, "ctc_steps": None, "minutes": None, "of_steps": None, "of_best_step": None,
                      "best": max((p.value for p in points), key=lambda v: sign * v, default=None)}
        if hit is not None:
            runs[name] |= {"llm_step": hit.llm_step, "ctc_steps": hit.ctc_step, "minutes": hit.minutes,
                           "of_steps": hit.llm_step / total if total else None,
                           "of_best_step": hit.llm_step / goal.llm_step if goal.llm_step else None}
    return {"target": target, "value": goal.value, "best_step": goal.llm_step, "llm_steps": total,
            "finished": by_name[target].finished, "runs": runs}
