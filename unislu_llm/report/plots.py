"""Plots of a comparison as SVG with text; nothing else in the package loads matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
"""A table: text, numbers and intervals `{"value", "low", "high"}`, by column."""

# Columns that are drawn, inches of a panel and what each row adds, line between points.
_PLOTS = {"trade": ("error rate, difference", "score, difference", 2.4, 0.0, ""),
          "causes": ("", "", 0.5, 0.28, ""), "labels": ("F1", "label", 0.5, 0.15, ""),
          "lengths": ("length", "value", 1.5, 0.0, "-"), "curves": ("step", "value", 1.6, 0.0, "-"),
          "calibration": ("confidence", "share right", 2.4, 0.0, "-")}
_STYLE = Path(__file__).with_name("plots.mplstyle")
_MARKERS, _HATCHES = "osD^vPX", ("", "//", "..", "\\\\", "xx", "++")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
# What is drawn in these follows the page, light or dark: its style sheet says what they are.
_VARIABLES = {"#000000": "var(--ink)", "#ffffff": "var(--paper)", "#b0b0b0": "var(--line)",
              **{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}}


def draw_plot(kind: str, rows: Rows, systems: Sequence[str]) -> str:
    """SVG of a plot, its kind a key of `_PLOTS`, from the rows of its table, one or more. The first
    column names its panels; the order of all `systems` gives colours and markers."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault(next(iter(row.values())), []).append(row)
    lines = max(fill(name, 22).count("\n") for name in systems)
    of_row = _PLOTS[kind][3] + 0.16 * lines * (kind == "causes")
    heights = [_PLOTS[kind][2] + of_row * len(some) for some in panels.values()]
    # A user's own style would bring colours that the page does not know.
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # Sizes are measured in a font that lacks many scripts; the reader's browser has them.
        warnings.simplefilter("ignore", UserWarning)
        # As wide as a phone: there text has its own size, and on a desktop it is larger.
        figure = Figure(figsize=(4.4, 0.3 + 0.08 * (lines + 1) * len(systems) + sum(heights)),
                        layout="constrained")
        grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
        for axes, (title, some) in zip(grid.flat, panels.items(), strict=True):
            axes.set_title(fill(title, 60))
            if kind == "causes":
                _draw_bars(axes, some)
            else:
                _draw_points(axes, some, systems, kind)
        shown = {label: handle for axes in grid.flat
                 for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(shown.values(), shown.keys(), loc="outside upper center",
                      ncols=3 if kind == "causes" else 2)
        return _svg(figure, kind)


def _draw_bars(axes: Axes, rows: Rows) -> None:
    """Numbers of the third column and those behind it, stacked; a bar a system."""
    left, most = [0] * len(rows), max(sum(list(row.values())[2:]) for row in rows)
    for part, colour, hatch in zip(list(rows[0])[2:], COLOURS, _HATCHES, strict=True):
        values = [row[part] for row in rows]
        bars = axes.barh([fill(row["system"], 22) for row in rows], values, left=left, label=part,
                         color=colour, edgecolor="w", hatch=hatch, height=0.7)
        # On a hatched bar a number has to be kept apart from the lines.
        axes.bar_label(bars, [str(v) if v > 0.06 * most else "" for v in values], fontsize=8,
                       label_type="center", bbox={"fc": "w", "ec": "none", "pad": 0.8})
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()


def _draw_points(axes: Axes, rows: Rows, systems: Sequence[str], kind: str) -> None:
    """Points of each system with their intervals; words have places in their order."""
    columns, line = _PLOTS[kind][:2], _PLOTS[kind][4]
    places = list(dict.fromkeys(row[key] for row in rows for key in columns
                                if isinstance(row[key], str)))
    for i, name in enumerate(systems):
        shift = 0.4 * ((i + 0.5) / len(systems) - 0.5)  # side by side: intervals hide one another
        spans = [[_span(row[key], places, shift) for key in columns]
                 for row in rows if row["system"] == name]
        colour = COLOURS[i % len(COLOURS)]
        for (x, *across), (y, *up) in spans:
            axes.plot(across, [y, y], color=colour)
            axes.plot([x, x], up, color=colour)
        # Labels that begin with `_` are left out of legends.
        axes.plot([x for (x, *_), _ in spans], [y for _, (y, *_) in spans], linestyle=line,
                  color=colour, marker=_MARKERS[i % len(_MARKERS)],
                  label=f" {fill(name, 22)}" if spans else None)
    axes.set(xlabel=columns[0].replace("length", ""),
             ylabel=columns[1] if kind in ("trade", "calibration") else "")
    if places:
        axis, width = ("y", 22) if kind == "labels" else ("x", 9)
        axes.set(**{f"{axis}ticks": range(len(places)), f"{axis}lim": (-0.5, len(places) - 0.5),
                    f"{axis}ticklabels": [fill(place, width) for place in places]})
    axes.yaxis.set_inverted(kind == "labels")
    for zero in (axes.axhline, axes.axvline) if kind == "trade" else ():
        zero(0, color="k", linewidth=0.8, zorder=1)
    if kind == "calibration":
        axes.plot([0, 1], [0, 1], color="k", linestyle="--", linewidth=0.8)


def _span(cell: Any, places: Sequence[str], shift: float) -> list[float]:
    """Value, low and high of a cell."""
    if isinstance(cell, Mapping):
        return [cell["value"] if cell.get(key) is None else cell[key]
                for key in ("value", "low", "high")]
    return [places.index(cell) + shift if isinstance(cell, str) else cell] * 3


def _svg(figure: Figure, name: str) -> str:
    """SVG for HTML: in the page's colours, without style attributes, which its policy forbids."""
    matplotlib.rcParams["svg.hashsalt"] = name  # ids follow from it, and plots share a document
    figure.savefig(file := io.StringIO(), format="svg", transparent=True,
                   metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(re.sub("(?s)<style.*?</style>", "", file.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        rules = [rule.split(": ") for rule in element.attrib.pop("style", "").split("; ") if rule]
        element.attrib = {
            key.rpartition("}")[2]: _VARIABLES.get(value, value) for key, value in
            (*element.attrib.items(), *rules)
            if key != "font-family" and (element.tag, key) != ("g", "id")}  # every plot's `axes_1`
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")
