"""The report of `eval/curves.py`: logs in; a plot, its points as JSON and tables out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from unislu_llm.analysis.curve_options import CurveOptions
from unislu_llm.analysis.curves import History, Point, lower_is_better, reach, read_history
from unislu_llm.analysis.runs import portable, shown
from unislu_llm.errors import UserError
from unislu_llm.training.state import versions, write_text

_FORMATS = (".svg", ".png", ".pdf")
_WER_SHOWN = 110.0  # above it a model has not learnt to listen, and the rest of the curve would be a flat line


def report(options: CurveOptions, command: Sequence[str] = ()) -> int:
    """Draw the curves of `options.runs`, write their points, and print the tables.

    Returns:
        Exit status: 0, or 2 for bad input (one message on stderr).
    """
    try:
        if options.out.suffix not in _FORMATS:
            raise UserError(f"--out {options.out}: names the picture; give it one of the endings {', '.join(_FORMATS)}")
        histories = load(options)
        result = measure(histories, options)
        print(tables(result))
        result |= {"command": " ".join(map(shown, command)), "versions": {k: v for k, v in versions().items() if k != "command"}}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"\npoints: {options.out.with_suffix('.json')}")
        if draw(options):
            plot({h.name: h.points(options.score) for h in histories}, options.out, options.score, options.x)
            print(f"plot: {options.out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {options.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def draw(options: CurveOptions) -> bool:
    """Whether a plot can be drawn; says so where it cannot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"{options.out} not drawn: plots need matplotlib; install the extra `plot`: pip install 'unislu_llm[plot]'",
              file=sys.stderr)
        return False
    return True


def load(options: CurveOptions) -> list[History]:
    """The runs' histories, each by a name of its own.

    Raises:
        UserError: no run, names that do not fit, or as :func:`read_history`.
    """
    if not options.runs:
        raise UserError("no run is named; give run folders, e.g. eval/curves.py runs/a runs/b")
    if options.names and len(options.names) != len(options.runs):
        raise UserError(f"--names: {len(options.names)} names for {len(options.runs)} runs; give one a run")
    names = options.names or [folder.resolve().name for folder in options.runs]
    if not options.names:
        names = [n if names.count(n) == 1 else portable(p) for n, p in zip(names, options.runs, strict=True)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"two runs are named '{twice}'; name every run once" + (" (--names)" if options.names else ""))
    return [read_history(folder, name) for folder, name in zip(options.runs, names, strict=True)]


def measure(histories: Sequence[History], options: CurveOptions) -> dict[str, Any]:
    """Everything that is plotted and printed, as plain data.

    Raises:
        UserError: a run has no such score or, for `--x minutes`, no times; and as :func:`reach`.
    """
    runs: dict[str, Any] = {}
    for history in histories:
        points = history.points(options.score)
        if options.x == "minutes" and any(p.minutes is None for p in points):
            raise UserError(f"{history.folder}: --x minutes: its log does not have the seconds of its steps; use --x step")
        last = history.parts[-1]
        runs[history.name] = {
            "folder": portable(history.folder), "seed": last.seed, "git": last.git, "llm_steps": history.llm_steps,
            "ctc_steps": history.ctc_steps, "parts": [p.to_dict() for p in history.parts],
            "starts_from_unknown": list(history.unknown), "points": [asdict(p) for p in points]}
    found = {"score": options.score, "lower_is_better": lower_is_better(options.score), "x": options.x, "notes": notes(histories)}
    return found | {"runs": runs} | ({"reach": reach(histories, options.score, options.reach)} if options.reach else {})


def notes(histories: Sequence[History]) -> list[str]:
    """What stands against a comparison of these runs."""
    found = [f"{h.name} starts from {', '.join(h.unknown)}, whose training is not here: its steps are not counted"
             for h in histories if h.unknown]
    found += [f"{h.name} is not marked as finished: {h.llm_steps} LLM steps so far" for h in histories if not h.finished]
    if len({p.dev for h in histories for p in h.parts if p.scores and not p.ctc}) > 1:
        found.append("the dev data (manifests or dev_limit) are not the same everywhere: values of different data do not compare")
    return found


def tables(result: Mapping[str, Any]) -> str:
    """The runs, and with `--reach` when each reaches the best of one, as Markdown."""
    score, sign = result["score"], -1 if result["lower_is_better"] else 1
    rows = []
    for name, run in result["runs"].items():
        points = [Point(**p) for p in run["points"]]
        of_llm = [p for p in points if not p.ctc]
        top = max(of_llm or points, key=lambda p: sign * p.value)
        best = f"{top.value:.2f}" + ("" if of_llm else " (CTC text)")
        rows.append([name, best, top.llm_step, run["llm_steps"], run["ctc_steps"], _minutes(points[-1].minutes), run["seed"],
                     str(run["git"] or "unknown")[:8]])
    head = ["run", f"best {score}", "at LLM step", "LLM steps", "CTC steps", "minutes", "seed", "revision"]
    blocks = [_table(rows, head)]
    if "reach" in result:
        blocks += _reach_table(result["reach"], score)
    if any(run["ctc_steps"] for run in result["runs"].values()):
        blocks.append("CTC steps: of a `ctc` stage, which does not run the LLM; not among the LLM steps.")
    return "\n\n".join([*blocks, *(f"note: {note}" for note in result["notes"])])


def _reach_table(found: Mapping[str, Any], score: str) -> list[str]:
    target, rows = found["target"], []
    for name, run in found["runs"].items():
        if run["llm_step"] is None:
            best = "no validation of the LLM" if run["best"] is None else f"not reached (best {run['best']:.2f})"
            rows.append([name, best, "-", "-", "-", "-"])
        else:
            rows.append([name, run["llm_step"], _percent(run["of_steps"]), _percent(run["of_best_step"]), run["ctc_steps"],
                         _minutes(run["minutes"])])
    title = (f"First validation with {score} {found['value']:.2f} or better: the best of {target}, at LLM step "
             f"{found['best_step']} of {found['llm_steps']}{'' if found['finished'] else ' so far'}")
    head = ["run", "LLM steps", f"of all of {target}'s", "of those to its best", "CTC steps before", "minutes"]
    return [title, _table(rows, head)]


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    return tabulate(rows, headers=head, tablefmt="github", disable_numparse=True)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _minutes(minutes: float | None) -> str:
    return "-" if minutes is None else f"{minutes:.1f}"


def plot(curves: Mapping[str, Sequence[Point]], path: Path, score: str, x: str) -> None:
    """Draw a line a run. Over minutes, `ctc` stages are dashed; over LLM steps, of which they have none, their best is a diamond.

    Args:
        curves: points by name. path: of the picture; its suffix is the format. score: name of the values. x: step or minutes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with rc_context({"svg.hashsalt": "unislu", "svg.fonttype": "none"}):  # equal data, equal file
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        axes = figure.subplots()
        for i, (name, points) in enumerate(curves.items()):
            of_llm, of_ctc = [p for p in points if not p.ctc], [p for p in points if p.ctc]
            if of_ctc and x == "step":
                of_ctc = [min(of_ctc, key=lambda p: p.value)]
            for own, style, fill, label in ((of_ctc, "D--", "none", f"{name}: CTC text"), (of_llm, "o-", "full", name)):
                if own:
                    at = [float(p.llm_step) if x == "step" else p.minutes or 0.0 for p in own]
                    axes.plot(at, [p.value for p in own], style, color=f"C{i % 10}", markersize=4, fillstyle=fill, label=label)
        values = [p.value for points in curves.values() for p in points]
        ylabel = f"dev {score} (%)"
        if score.startswith("wer") and max(values) > _WER_SHOWN > min(values):
            axes.set_ylim(bottom=0, top=_WER_SHOWN)
            ylabel += f", cut at {_WER_SHOWN:.0f}"
        apart = any(p.ctc_step for points in curves.values() for p in points)
        steps = "LLM training steps (CTC steps not counted)" if apart else "training steps"
        axes.set(xlabel=steps if x == "step" else "minutes of training", ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
