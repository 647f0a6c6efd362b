"""Draw the reliability diagrams of score files: accuracy against confidence.

    python eval/calibration.py eval/results/my-run.json    # eval/results/my-run-calibration.svg

A score file has a `calibration` where label probabilities are known (--force-task
--decode.grammar); docs/scoring.md says what its numbers are. Needs the extra `plot`. The diagrams
are those of DeGroot and Fienberg 1983 and Guo et al., arXiv 1706.04599.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unislu_llm.errors import UserError, reported
from unislu_llm.io import read_json


def draw(tasks: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw a panel a task: accuracy against confidence, and the number of utterances in each bin.

    Args:
        tasks: `calibration` of a score file.
        path: of the picture; its suffix is the format (`.svg`, `.png`, `.pdf`).
        title: above all panels.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError:
        raise UserError("plots need matplotlib; install the extra `plot`: "
                        "pip install 'unislu_llm[plot]'") from None
    # Equal data, equal file: else every run would change pictures that are under version control.
    matplotlib.rcParams.update({"svg.hashsalt": "unislu", "svg.fonttype": "none"})
    picture = Figure(figsize=(4.2 * len(tasks), 5.0), layout="constrained")
    panels = picture.subplots(2, len(tasks), squeeze=False, sharex=True, height_ratios=(4, 1))
    for top, below, (name, scores) in zip(*panels, tasks.items(), strict=True):
        # Empty bins have no accuracy, so each bar stands at its own borders.
        bins = [[b[key] for key in ("low", "high", "n", "confidence", "accuracy")]
                for b in scores["bins"] if b["n"]]
        low, high, n, confidence, accuracy = zip(*bins, strict=True)
        widths = [b - a for a, b in zip(low, high, strict=True)]
        top.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
        top.bar(low, accuracy, widths, align="edge", color="#4477aa", edgecolor="white",
                label="accuracy")
        top.plot(confidence, accuracy, "o", color="#ee6677", markersize=4,
                 label="at mean confidence")
        top.set(ylim=(0, 1.02), ylabel="accuracy",
                title=f"{name}: ECE {scores['ece']:.3f} (adaptive {scores['ece_adaptive']:.3f}), "
                      f"n = {scores['n']}")
        top.legend(loc="upper left", fontsize="small")
        below.bar(low, n, widths, align="edge", color="0.7", edgecolor="white")
        below.set(xlim=(0, 1), xlabel="confidence in the likeliest label", ylabel="utterances")
    picture.suptitle(title)
    picture.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, nargs="+", help="score files of eval/evaluate.py")
    with reported():
        for file in parser.parse_args().scores:
            if not (tasks := read_json(file).get("calibration")):
                raise UserError(f"{file}: no calibration; score the run with --force-task "
                                "--decode.grammar")
            picture = file.with_name(f"{file.stem}-calibration.svg")
            draw(tasks, picture, file.stem)
            print(picture)


if __name__ == "__main__":
    main()
