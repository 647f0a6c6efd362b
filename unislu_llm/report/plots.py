"""The six plots of a comparison as SVG with text; nothing else in the package loads matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Report = Mapping[str, Any]
Rows = list[dict[str, Any]]
"""A table: text, numbers, None and intervals `{"value", "low", "high"}`, by column."""


class _Plot(NamedTuple):
    x: str  # a column; likewise y
    y: str
    height: float  # of a panel, in inches
    of_row: float = 0.0  # what each row adds to it
    line: str = ""  # between the points of a system


_PLOTS = {"trade": _Plot("error rate", "gain", 2.6), "causes": _Plot("", "", 0.6, 0.28),
          "labels": _Plot("F1", "label", 0.5, 0.13), "lengths": _Plot("length", "value", 1.7, 0, "-"),
          "calibration": _Plot("confidence", "share right", 2.4, 0, "-"),
          "curves": _Plot("step", "value", 1.7, 0, "-")}
_MOST = 20  # labels of a panel; its table has them all
_MARKERS, _HATCHES = "osD^vPX", ("", "//", "..", "\\\\", "xx", "++")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
# What is drawn in these follows the page, light or dark: its style sheet says what they are.
_VARIABLES = {"#000000": "ink", "#ffffff": "paper", "#b0b0b0": "line",
              **{colour: f"c{i}" for i, colour in enumerate(_COLOURS)}}


def draw_plots(report: Report) -> dict[str, tuple[Rows, str]]:
    """Each plot's numbers, and the SVG that is drawn from them: empty where there are none."""
    names = [system["name"] for system in report["systems"]]
    # Labels that begin with `_` are left out of legends.
    looks = {name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)],
                    "label": f" {_short(name)}"} for i, name in enumerate(names)}
    # A user's own style would bring colours that the page does not know.
    with warnings.catch_warnings(), matplotlib.style.context(
            ["default", Path(__file__).with_name("plots.mplstyle")]):
        # Sizes are measured in a font that lacks many scripts; the reader's browser has them.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return {name: (rows, _draw(name, rows, looks))
                for name, rows in _numbers(report, names).items()}


def main_scores(report: Report) -> list[Mapping[str, Any]]:
    """The error rate of words (or of characters), then the first score of each task."""
    found = [[s for s in report["scores"] if s["key"] in ("wer", "cer")]]
    found += [[s for s in report["scores"] if s["key"].startswith(f"{task}_")]
              for task in report["data"]["tasks"]]
    return [scores[0] for scores in found if scores]


def _numbers(report: Report, names: Sequence[str]) -> dict[str, Rows]:
    """Rows of each plot; the first column is the panel that a row is drawn in."""
    scores, entities = main_scores(report), report["entities"]
    rates = [score for score in scores if score["key"] in ("wer", "cer")]
    return {
        "trade": [{"score": gain["title"], "system": name, "error rate": cost, "gain": won}
                  for rate in rates for gain in scores if gain is not rate for name in names[1:]
                  if (cost := rate["differences"].get(name))
                  and (won := gain["differences"].get(name))],
        "causes": [{"task": task, "system": name,
                    **{cause.replace("_", " "): n for cause, n in causes.items()}}
                   for task, block in entities.items()
                   for name, causes in block["causes"].items() if causes],
        "labels": [{"task": task, "label": label["name"], "n": label["n"], "system": name,
                    "F1": cell, "gain": first and name != names[0] and (
                        cell["value"] - first["value"]) or None}
                   for task, block in entities.items()
                   for label in sorted(block["by_label"], key=lambda label: -label["n"])
                   for first in [label["f1"].get(names[0])]
                   for name, cell in label["f1"].items() if cell],
        "lengths": [{"score": f"{score['title']} by {block['by']}", "system": name,
                     "length": row["name"], "n": row["n"], "value": cell}
                    for score in scores for block in report["lengths"] for row in block["rows"]
                    for name, cell in row["values"].get(score["key"], {}).items() if cell],
        "calibration": [{"task": task, "system": name, "confidence": part["confidence"],
                         "share right": part["accuracy"], "n": part["n"], "ECE": block["ece"]}
                        for task, systems in report["calibration"].items()
                        for name, block in systems.items() if block for part in block["bins"]],
        "curves": [{"score": score["title"], "system": name, "step": point["step"],
                    "minutes": point.get("minutes"), "value": value}
                   for score in scores for name in names for point in report["curves"].get(name, ())
                   if (value := point["scores"].get(score["key"])) is not None]}


def _draw(name: str, rows: Rows, looks: Mapping[str, Mapping[str, Any]]) -> str:
    """A panel for each first cell of the rows, one below the other, and a legend."""
    panels: dict[str, Rows] = {}
    for row in rows:
        panels.setdefault(next(iter(row.values())), []).append(row)
    if not panels:
        return ""
    plot = _PLOTS[name]
    heights = [plot.height + plot.of_row * min(len(some), _MOST * len(looks))
               for some in panels.values()]
    # As wide as a phone: there text has its own size, and on a desktop it is larger.
    figure = Figure(figsize=(4.6, 0.5 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for axes, (title, some) in zip(grid.flat, panels.items(), strict=True):
        axes.set(title=title, xlabel=plot.x, ylabel=plot.y.replace("value", ""))
        if name == "causes":
            _draw_bars(axes, some)
        else:
            _draw_points(axes, some[:_MOST * len(looks)], looks, plot)
        for line in (axes.axhline, axes.axvline) if name == "trade" else ():
            line(0, color="k", linewidth=0.8)
        if name == "calibration":
            axes.plot([0, 1], [0, 1], color="k", linestyle="--", linewidth=0.8)
    shown = {label: handle for axes in grid.flat
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center",
                  ncols=2 if len(shown) < 5 else 3)
    return _svg(figure, name)


def _draw_bars(axes: Axes, rows: Rows) -> None:
    left, most = [0] * len(rows), max(sum(list(row.values())[2:]) for row in rows)
    for cause, colour, hatch in zip(list(rows[0])[2:], _COLOURS, _HATCHES, strict=True):
        values = [row[cause] for row in rows]
        bars = axes.barh([_short(row["system"]) for row in rows], values, left=left, label=cause,
                         color=colour, edgecolor="w", hatch=hatch, height=0.7)
        # On a hatched bar a number has to be kept apart from the lines.
        axes.bar_label(bars, [str(v) if v > 0.06 * most else "" for v in values], fontsize=8,
                       label_type="center", bbox={"fc": "w", "ec": "none", "pad": 0.8})
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="entities")


def _draw_points(axes: Axes, rows: Rows, looks: Mapping[str, Mapping[str, Any]],
                 plot: _Plot) -> None:
    """Points of each system, with their intervals; words have places in their order."""
    places = list(dict.fromkeys(row[key] for row in rows for key in (plot.x, plot.y)
                                if isinstance(row[key], str)))
    for i, (name, look) in enumerate(looks.items()):
        shift = 0.5 * ((i + 0.5) / len(looks) - 0.5)  # side by side: intervals hide one another
        spans = [[_span(row[key], places, shift) for key in (plot.x, plot.y)]
                 for row in rows if row["system"] == name]
        for (x, *across), (y, *up) in spans:
            axes.plot(across, [y, y], color=look["color"])
            axes.plot([x, x], up, color=look["color"])
        if spans:
            axes.plot([x for (x, *_), _ in spans], [y for _, (y, *_) in spans], linestyle=plot.line,
                      **look)
    if places:
        (axes.set_yticks if plot.y == "label" else axes.set_xticks)(
            range(len(places)), [_short(place) for place in places])
    if plot.y == "label":
        axes.invert_yaxis()


def _span(cell: Any, places: Sequence[str], shift: float) -> list[float]:
    """Value, low and high of a cell."""
    if isinstance(cell, Mapping):
        return [cell["value"] if cell.get(key) is None else cell[key]
                for key in ("value", "low", "high")]
    return [places.index(cell) + shift if isinstance(cell, str) else cell] * 3


def _short(name: str) -> str:
    """Head and tail of a long name: runs of one experiment differ at either."""
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def _svg(figure: Figure, name: str) -> str:
    """SVG to stand in HTML, in colours of the page and without style attributes, which its
    security policy forbids."""
    matplotlib.rcParams["svg.hashsalt"] = name  # ids follow from it, and plots share a document
    figure.savefig(file := io.StringIO(), format="svg", transparent=True,
                   metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", file.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        rules = [rule.split(": ") for rule in element.attrib.pop("style", "").split("; ") if rule]
        element.attrib |= {key: f"var(--{_VARIABLES[value]})" if value in _VARIABLES else value
                           for key, value in rules if key != "font-family"}
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()
                          if (element.tag, key) != ("g", "id")}  # `axes_1` is in every plot
        for style in element.findall("{*}style"):
            element.remove(style)
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")
