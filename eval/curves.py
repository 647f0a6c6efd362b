"""Plot a dev score of runs over their training, from their logs (`metrics.jsonl`).

    python eval/curves.py runs/a runs/b --out eval/results/curves.svg  # WER by step
    python eval/curves.py runs/a runs/b --score ner_f1 --x minutes

A run's history is that of its stages, behind those of the run that it starts from (`train.init`).
Steps of the objective `ctc` do not run the LLM: they are counted apart, and their WER is of the
greedy CTC text and no answer of the LLM.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tabulate import tabulate

from unislu_llm.config_file import config_of_run
from unislu_llm.errors import UserError, hint, reported
from unislu_llm.io import portable, sha256, write_json
from unislu_llm.run_folder import BEST, LAST, METRICS, is_run, read_finished, read_metrics

WER_SHOWN = 110.0  # above it a model has not learnt to listen, and the rest would be a flat line


@dataclass
class Options:
    """Which runs' learning curves are drawn, and how."""

    runs: Annotated[tyro.conf.Positional[list[Path]],
                    tyro.conf.arg(metavar="RUN [RUN ...]")] = field(default_factory=list)
    """Run folders of the recipes; finished or not."""
    out: Path = Path("eval/results/curves.svg")
    """Picture (.svg, .png or .pdf), with its points as FILE.json beside it."""
    score: str = "wer"
    """Dev score by its name in metrics.jsonl: wer, wer_<corpus>, ner_f1, sa_f1, slue, score..."""
    x: Literal["step", "minutes"] = "step"
    """Optimizer steps of the whole model, or minutes of training (validation not counted)."""
    names: list[str] = field(default_factory=list)
    """Names for the legend, one a run; default: the folders' names."""


@dataclass(frozen=True)
class Point:
    """A validation, and the training before it."""

    llm_step: int  # steps with the LLM
    ctc_step: int  # steps without it
    seconds: float | None  # None where a log does not tell
    scores: dict[str, float]
    ctc: bool  # the scores are of the CTC text


Curve = Sequence[tuple[Point, float]]


@dataclass(frozen=True)
class History:
    """All of a run's training."""

    name: str
    folder: Path
    points: tuple[Point, ...] = ()
    end: Point = Point(0, 0, 0.0, {}, False)  # stands where a validation after the last step would
    logs: dict[str, str] = field(default_factory=dict)  # SHA-256 by file
    unknown: tuple[str, ...] = ()  # models that it starts from and whose training is not here

    def values(self, score: str) -> Curve:
        """Values of a score.

        Raises:
            UserError: the run has no validation, or none with this score.
        """
        found = [(p, p.scores[score]) for p in self.points if score in p.scores]
        if not found:
            known = sorted({key for p in self.points for key in p.scores})
            raise UserError(
                f"{self.folder}: no score '{score}' (--score); it has {', '.join(known)}"
                f"{hint(score, known)}" if known else
                f"{self.folder}: no validation in its log; it has no data.dev, or has not come to "
                "the first one")
        return found


def report(options: Options) -> None:
    """Draw the curves of the runs, write their points, and print each one's best.

    Raises:
        UserError: bad options, or a run without a log or the score.
    """
    names = options.names or [folder.resolve().name for folder in options.runs]
    if not options.runs:
        raise UserError("no run is named; give run folders, e.g. eval/curves.py runs/a runs/b")
    if options.out.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--out {options.out}: names the picture; give it one of the endings .svg, "
                        ".png, .pdf")
    if len(names) != len(options.runs) or len(set(names)) < len(names):
        raise UserError(f"--names: give each of the {len(options.runs)} runs a name of its own, "
                        f"not {', '.join(names)}")
    histories = [read_history(run, name) for run, name in zip(options.runs, names, strict=True)]
    curves = {h.name: h.values(options.score) for h in histories}
    for h in histories:
        if options.x == "minutes" and any(p.seconds is None for p in h.points):
            raise UserError(f"{h.folder}: --x minutes: its log does not have the seconds of its "
                            "steps; use --x step")
    rows = []
    for h in histories:
        # A run that has only trained its projector is shown by its CTC text, which is said.
        answers = [a for a in curves[h.name] if not a[0].ctc]
        point, value = best(answers or curves[h.name], options.score)
        rows.append({"run": h.name, f"best {options.score}": f"{value:.2f}"
                     f"{' (CTC text)' * point.ctc}", "at LLM step": point.llm_step,
                     "LLM steps": h.end.llm_step, "CTC steps": h.end.ctc_step})
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    write_json(options.out.with_suffix(".json"), {"score": options.score, "runs": {h.name: {
        "folder": portable(h.folder), "finished": bool(read_finished(h.folder)), "logs": h.logs,
        "starts_from_unknown": h.unknown, "llm_steps": h.end.llm_step, "ctc_steps": h.end.ctc_step,
        "points": [asdict(p) | {"scores": {options.score: value}} for p, value in curves[h.name]]}
        for h in histories}})
    try:
        plot(curves, options)
    except ImportError:  # tables and points are there all the same
        print(f"{options.out} not drawn: plots need matplotlib; install the extra `plot`: "
              "pip install 'unislu_llm[plot]'", file=sys.stderr)


def read_history(folder: Path, name: str = "") -> History:
    """History of a run from its folder (`RUN/best` and `RUN/last` count as their run).

    Raises:
        UserError: no run, or none of its logs is there.
    """
    folder = run_of(folder)
    if not is_run(folder):
        fault = "is no run folder" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {fault}; give a run folder of a recipe")
    found = with_training(History(name or folder.resolve().name, folder), folder)
    if not found.logs:
        raise UserError(f"{folder}: no log yet ({METRICS}); let it train up to its first "
                        "validation")
    return found


def run_of(folder: Path) -> Path:
    return folder.parent if folder.name in (BEST, LAST) and is_run(folder.parent) else folder


def with_training(history: History, folder: Path) -> History:
    """A history and the training of one more run, behind what that one starts from."""
    config = config_of_run(folder)
    # Stages name the one before as `init` too, but only the run's own config is followed.
    if config.train.init:
        source = run_of(Path(config.train.init))
        history = (with_training(history, source) if is_run(source) else
                   replace(history, unknown=(*history.unknown, portable(source))))
    for own in [folder / str(stage["name"]) for stage in config.stages] or [folder]:
        if (own / METRICS).is_file():
            history = with_log(history, own)
    return history


def with_log(history: History, folder: Path) -> History:
    """A history and what one more log says."""
    before, rows = history.end, read_metrics(folder)
    ctc = config_of_run(folder).train.objective == "ctc"
    seconds, counted, points = before.seconds, 0, list(history.points)

    def at(step: int, scores: dict[str, float]) -> Point:
        return Point(before.llm_step + step * (not ctc), before.ctc_step + step * ctc, seconds,
                     scores, ctc)

    # A step is logged before it is validated, with the mean time of the steps since the last row.
    for row in sorted(rows, key=lambda row: (row["step"], row["part"] == "dev")):
        step, part = row["step"], row["part"]
        if part == "train":
            took = row.get("seconds")
            seconds = None if seconds is None or took is None else seconds + took * (step - counted)
            counted = step
        elif part == "dev":
            points.append(at(step, {
                key: float(value) for key, value in row.items() if key not in ("step", "seconds")
                and isinstance(value, int | float) and math.isfinite(value)}))
    # A run that still trains may be further than its last row; what is not logged does not count.
    end = at(max((row["step"] for row in rows), default=0), {})
    logs = history.logs | {portable(folder): sha256(folder / METRICS)}
    return replace(history, points=tuple(points), end=end, logs=logs)


def best(curve: Curve, score: str) -> tuple[Point, float]:
    """The first of the best values."""
    # Some scores count errors.
    errors = {"wer", "cer", "malformed"} & {score, *score.split("_")}
    sign = -1.0 if errors else 1.0
    return max(curve, key=lambda a: sign * a[1])


def plot(curves: Mapping[str, Curve], options: Options) -> None:
    """A line a run; CTC text is dashed over minutes, and over LLM steps a diamond at its best."""
    import matplotlib  # an extra
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    # Equal data, equal file: else every run would change pictures that are under version control.
    matplotlib.rcParams.update({"svg.hashsalt": "unislu", "svg.fonttype": "none"})
    picture = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = picture.subplots()
    for i, (name, points) in enumerate(curves.items()):
        of_llm, of_ctc = ([a for a in points if a[0].ctc == ctc] for ctc in (False, True))
        if of_ctc and options.x == "step":  # all of them are at one step
            of_ctc = [best(of_ctc, options.score)]
        for own, style, label in ((of_ctc, "D--", f"{name}: CTC text"), (of_llm, "o-", name)):
            at = [p.llm_step if options.x == "step" else (p.seconds or 0.0) / 60 for p, _ in own]
            if own:
                axes.plot(at, [value for _, value in own], style, color=f"C{i % 10}", markersize=4,
                          label=label)
    values = [value for points in curves.values() for _, value in points]
    if cut := options.score.startswith("wer") and max(values) > WER_SHOWN > min(values):
        axes.set_ylim(bottom=0, top=WER_SHOWN)
    axes.set(xlabel="LLM training steps" if options.x == "step" else "minutes of training",
             ylabel=f"dev {options.score} (%)" + f", cut at {WER_SHOWN:.0f}" * cut)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(options.out, dpi=150,
                    metadata={"Date": None} if options.out.suffix == ".svg" else None)


if __name__ == "__main__":
    with reported():
        report(tyro.cli(Options, description=str(__doc__), config=(tyro.conf.FlagCreatePairsOff,)))
