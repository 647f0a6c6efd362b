"""Reliability diagrams (DeGroot & Fienberg 1983; Guo et al., arXiv 1706.04599) of label tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unislu_llm.errors import UserError
from unislu_llm.scoring.calibration import Calibration


def reliability_plot(tasks: Mapping[str, Calibration], path: Path, title: str = "") -> None:
    """Draw a panel a task: accuracy against confidence in bins of equal width, and the number of utterances in each.

    Args:
        tasks: one or more, by name. path: of the picture; its suffix is the format (`.svg`, `.png`, `.pdf`).
        title: above all panels.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError:
        raise UserError("plots need matplotlib; install the extra `plot`: pip install 'unislu_llm[plot]'") from None
    with rc_context({"svg.hashsalt": "unislu", "svg.fonttype": "none"}):  # equal data, equal file
        figure = Figure(figsize=(4.2 * len(tasks), 5.0), layout="constrained")
        panels = figure.subplots(2, len(tasks), squeeze=False, sharex=True, height_ratios=(4, 1))
        for column, (name, scores) in enumerate(tasks.items()):
            filled = [b for b in scores.bins if b.n]
            middles, width = [(b.low + b.high) / 2 for b in filled], 1 / len(scores.bins)
            top, below = panels[0, column], panels[1, column]
            top.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
            top.bar(middles, [b.accuracy for b in filled], width, color="#4477aa", edgecolor="white", label="accuracy")
            top.plot([b.confidence for b in filled], [b.accuracy for b in filled], "o", color="#ee6677", markersize=4,
                     label="at mean confidence")
            top.set(ylim=(0, 1.02), ylabel="accuracy",
                    title=f"{name}: ECE {scores.ece:.3f} (adaptive {scores.ece_adaptive:.3f}), n = {scores.n}")
            top.legend(loc="upper left", fontsize="small")
            below.bar(middles, [b.n for b in filled], width, color="0.7", edgecolor="white")
            below.set(xlim=(0, 1), xlabel="confidence in the likeliest label", ylabel="utterances")
        figure.suptitle(title)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
