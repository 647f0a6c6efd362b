"""What `propagate.py` has measured, in words, as Markdown, and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from propagate_attention import PARTS
from tabulate import tabulate

from unislu_llm.report.plots import COLOURS
from unislu_llm.report.text import shown

DEAF = 5.0  # percent of transcripts and answers: where fewer change, nobody listened
Result = Mapping[str, Any]


def share(n: float, of: float) -> float:
    """Percent; 0 of nothing."""
    return 100.0 * n / of if of else 0.0


def metrics(result: Result) -> dict[str, str]:
    """Names of scores, the error rate first, as they are shown."""
    keys = [key for key, cell in result["curve"][0].items() if isinstance(cell, Mapping)]
    rates = [key for key in keys if key in ("wer", "cer")]
    order = [key for key in (*rates[:1], *keys) if key not in rates[1:]]
    upper = ("wer", "cer", "ner", "sa", "f1")
    return {key: " ".join(word.upper() if word in upper else word for word in key.split("_"))
            for key in dict.fromkeys(order)}


def sentences(result: Result) -> dict[str, str]:
    """One sentence of plain words for each part."""
    return {"curve": _of_curve(result), "repairs": _of_repairs(result),
            "attention": _of_attention(result), "swaps": _of_swaps(result)}


def _of_curve(result: Result) -> str:
    named = metrics(result)
    rows = [r for r in result["curve"] if r["changed"] in ("nothing", "transcript")]
    rate, *scores = [key for key in named if not key.endswith("label_f1")]
    own, reference, last = rows[0], rows[1], rows[-1]

    def at(row: Result) -> str:
        return ", ".join(f"{named[key]} {row[key]['value']:.1f}" for key in scores)

    return (f"Behind its own transcripts ({named[rate]} {own[rate]['value']:.1f} %) the model has "
            f"{at(own)}; behind the references {at(reference)}; with "
            f"{last[rate]['value']:.0f} % of word errors {at(last)}.")


def _of_repairs(result: Result) -> str:
    rows = [r for r in result["repairs"] if r["changed"] in ("nothing", "transcript")]
    if not rows:
        return "No task marks phrases, so that nothing can be repaired."
    (own, bound), most = rows[:2], [r for r in rows if r["phrases"] == "free"][-1]
    return (f"Of {own['wrong']:g} entities whose words are wrong in the model's own transcripts, "
            f"{own['repaired']:g} are right in the answer all the same ({bound['repaired']:g} with "
            f"grounded phrases); with {most['transcript']}, {most['repaired']:g} of "
            f"{most['wrong']:g}.")


def _of_attention(result: Result) -> str:
    if not result["attention"]:
        return "The decoder shows no attention, so that nothing is said of it."
    said = []
    for task, found in result["attention"].items():
        mean = {part: 100 * sum(layer[part] for layer in found["self"]) / len(found["self"])
                for part in PARTS}
        tokens = found["tokens"]
        some = [f"{mean[part]:.0f} % to the {part} ({share(tokens[part], sum(tokens.values())):.0f}"
                " % of the tokens)" for part in PARTS[1:4] if tokens[part]]
        cross = found.get("cross_weight", [])
        more = (f"; of what its layers add, {100 * sum(cross) / len(cross):.0f} % comes from the "
                "speech" if cross else "")
        said.append(f"of {task}: {', '.join(some)}{more}")
    before = ("among the tokens before it, " if result["kind"] == "whisper_slu" else "")
    return f"Mean attention of a task's tokens, {before}{'; '.join(said)}."


def _of_swaps(result: Result) -> str:
    said = [] if result["listens"] else [
        "The model is given no speech: it goes by the hypothesis alone"]
    for row in result["swaps"]:
        n, of = sum(row["answers_changed"].values()), sum(row["answers"].values())
        kept, what = row["transcript"] == "kept", row["swapped"]
        text = "" if kept else f"{row['transcripts_changed']} of {row['clips']} transcripts and "
        said.append(f"with the {what} of another clip{' and its transcript kept' if kept else ''} "
                    f"{text}{n} of {of} answers change")
        quiet = share(n, of) < DEAF and (
            kept or share(row["transcripts_changed"], row["clips"]) < DEAF)
        if what == "speech" and quiet:
            said[-1] += " (the model does not listen)" if not kept or _verbatim(result) else (
                " (its tasks do not listen)")
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}."


def _verbatim(result: Result) -> bool:
    return bool(result["reads_hypothesis"] and result["transcripts"] == "verbatim")


def markdown(result: Result, name: str) -> str:
    """The summary: a sentence and a table a part, and the picture."""
    words, named = result["in_words"], metrics(result)
    curve = [{"transcript": r["transcript"], "changed": r["changed"],
              **{title: shown(r[key]) for key, title in named.items()}} for r in result["curve"]]
    repaired = [{key: r[key] for key in ("transcript", "changed", "phrases", "task", "wrong",
                                         "repaired")}
                | {"repaired, %": shown(r["rate"]), "right where the words are, %": r["kept"]}
                for r in result["repairs"]]
    looked = [{"task": task, "layers": where} | {
        part: f"{100 * sum(layer[part] for layer in some) / len(some):.1f}" for part in PARTS} | (
        {"speech, of what is added": f"{100 * sum(weight) / len(weight):.1f}"} if weight else {})
        for task, found in result["attention"].items()
        for where, some, weight in _thirds(found["self"], found.get("cross_weight", []))]
    looked += [{"task": task, "layers": "(tokens seen)"} | {p: found["tokens"][p] for p in PARTS}
               for task, found in result["attention"].items()]
    swaps = [{"swapped": r["swapped"], "transcript": r["transcript"],
              "transcripts changed": f"{r['transcripts_changed']} of {r['clips']}",
              **{f"{t} answers changed": f"{n} of {r['answers'][t]}"
                 for t, n in r["answers_changed"].items()},
              **{title: shown(r[key]) for key, title in named.items()}} for r in result["swaps"]]
    sources = [{"rate": f"{r['rate']:.0%}", "errors": r["errors"], **r["sources"]}
               for r in result["confusions"]["injected"]]
    clips = ", ".join(f"{n} of {task}" for task, n in result["clips"].items())
    parts = [f"# Error propagation: {name}",
             f"Clips: {clips}. Protocol `{result['protocol']}`, percent, 95 % bootstrap intervals "
             f"over clips. Draws of errors: {result['draws']}.",
             f"![curve and attention]({name}.svg)"]
    for title, key, rows in (("Scores against word errors", "curve", curve),
                             ("Repairs", "repairs", repaired),
                             ("Attention", "attention", looked), ("Swaps", "swaps", swaps)):
        parts += [f"## {title}", words[key]] + ([_table(rows)] if rows else [])
    counts = ", ".join(f"{n} {kind}s" for kind, n in
                       result["confusions"]["errors_of_the_model"].items())
    parts += ["## Errors that were put in", f"The model itself has {counts} in "
              f"{result['confusions']['words']} words. Each column is a kind of error and what it "
              "was drawn from.", _table(sources), f"```\n{result['command']}\n```"]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", missingval="", disable_numparse=True)


def _thirds(layers: Sequence[Any], weights: Sequence[float]) -> list[tuple[str, Any, Any]]:
    """Layers in three parts, lowest first, with their numbers."""
    cuts = sorted({round(len(layers) * k / 3) for k in range(4)})
    return [(f"{a + 1} to {b}", layers[a:b], weights[a:b])
            for a, b in pairwise(cuts)]


def draw(result: Result) -> str:
    """SVG with text: each task's scores against the error rate, and its attention by layer."""
    named = metrics(result)
    rate, *scores = [key for key in named if not key.endswith("label_f1")]
    wide = max(len(scores), len(result["attention"]))
    with matplotlib.style.context(["default", str(files("unislu_llm.report") / "plots.mplstyle")]):
        matplotlib.rcParams["svg.hashsalt"] = "propagate"  # the same ids each time
        figure = Figure(figsize=(3.6 * wide, 6.0), layout="constrained")
        grid = figure.subplots(2, wide, squeeze=False)
        for axes, key in zip(grid[0], scores, strict=False):
            _draw_curve(axes, result["curve"], rate, key)
            axes.set(title=named[key], xlabel=f"{named[rate]}, %")
        for axes, (task, found) in zip(grid[1], result["attention"].items(), strict=False):
            _draw_attention(axes, found)
            axes.set(title=f"attention of {task} tokens", xlabel="layer")
        for axes in (*grid[0][len(scores):], *grid[1][len(result["attention"]):]):
            axes.set_axis_off()
        legends: tuple[Any, ...] = ("outside upper center", "outside lower center")
        for row, place in zip(grid, legends, strict=True):
            if handles := row[0].get_legend_handles_labels()[0]:
                figure.legend(handles=handles, loc=place, ncols=5, fontsize=8)
        figure.savefig(file := io.StringIO(), format="svg",
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()


def _draw_curve(axes: Axes, rows: Sequence[Mapping[str, Any]], rate: str, key: str) -> None:
    for colour, marker, changed in zip(
            COLOURS, "osD", ("transcript", "transcript and hypothesis", "nothing"), strict=False):
        some = sorted((r for r in rows if r["changed"] == changed), key=lambda r: r[rate]["value"])
        for row in some:
            axes.plot([row[rate]["value"]] * 2, [row[key]["low"], row[key]["high"]], color=colour)
        if some:
            axes.plot([r[rate]["value"] for r in some], [r[key]["value"] for r in some],
                      color=colour, marker=marker, linestyle="" if changed == "nothing" else "-",
                      label="own transcript" if changed == "nothing" else f"changed: {changed}")


def _draw_attention(axes: Axes, found: Mapping[str, Any]) -> None:
    layers = range(1, len(found["self"]) + 1)
    rows = [(part, [layer[part] for layer in found["self"]], colour, hatch) for part, colour, hatch
            in zip(PARTS, COLOURS, ("", "//", "--", "\\\\", "++"), strict=False)]
    parts, values, colours, hatches = zip(*(row for row in rows if any(row[1])), strict=True)
    axes.stackplot(layers, values, labels=parts, colors=colours, hatch=hatches, edgecolor="w",
                   linewidth=0.3)
    if weights := found.get("cross_weight"):
        axes.plot(layers, weights, color="k", marker="o", label="speech, of what is added")
