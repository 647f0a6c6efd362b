"""A report as text: what it says in sentences, and its tables in Markdown and LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

Report = Mapping[str, Any]
Rows = list[list[Any]]  # of a table, its head first: text, numbers and intervals
CHANCE = 0.05  # from this p on, a difference may be chance
_WAYS = {"wer": ("transcribes {} points better", "transcribes {} points worse"),
         "span": ("finds {} more {}", "finds {} less {}"),
         "label": ("labels {} points of {} better", "labels {} points of {} worse"),
         "slue": ("has {} more {}", "has {} less {}")}
_COSTS = {"parameters": ("M parameters", 1e6), "trained": ("M trained parameters", 1e6),
          "train_minutes": ("minutes of training", 1), "rtf": ("s for a second of audio", 1),
          "memory_gib": ("GiB of memory", 1)}
_GROUPS = {"by_label": "label", "by_length": "words", "by_rarity": "times in training"}


def score_table(report: Report) -> str:
    """Scores side by side under the names of logs, with differences to the first system."""
    return drawn(_scores(report, "key", 2))


def markdown(report: Report) -> str:
    """The whole report but its examples and curves."""
    parts = [f"# {report['title']}", caption(report), *report["verdict"],
             "\n".join(f"- {note}" for note in report["notes"]),
             *(f"## {title}\n\n{drawn(rows)}" for title, rows in _tables(report))]
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(report: Report) -> str:
    """All tables; they need the package booktabs."""
    def table(title: str, rows: Rows) -> str:
        # The library escapes cells, and so the caption.
        cell = tabulate([[f"{title}. {caption(report)}"]], tablefmt="latex").split("\n")[2]
        return (f"\\begin{{table}}\n\\centering\n\\caption{{{cell.strip(chr(92) + ' ')}}}\n"
                f"{drawn(rows, 'latex_booktabs')}\n\\end{{table}}\n")

    return "\n".join(["% Needs \\usepackage{booktabs}.", *(table(*one) for one in _tables(report))])


def caption(report: Report) -> str:
    """What numbers need beside them."""
    first, *others = report["systems"]
    seeds = any(len(system["seeds"]) > 1 for system in report["systems"])
    how = (f", n = {report['data']['utterances']} utterances, 95 % intervals and p-values of a "
           f"paired bootstrap ({report['resamples']} resamples of {'seeds and ' * seeds}utterances)"
           ) * bool(report["words"])
    return f"Protocol: {report['protocol']}, in percent{how}." + (
        f" Differences are to '{first['name']}'." * bool(others))


def _tables(report: Report) -> Iterator[tuple[str, Rows]]:
    """Title and rows of every table that has something in it."""
    names = [system["name"] for system in report["systems"]]

    def by_system(rows: Mapping[str, Mapping[str, Any]]) -> Rows:
        head = [key.replace("_", " ") for key in next(iter(rows.values()))]
        return [["system", *head], *([name, *row.values()] for name, row in rows.items())]

    yield "Scores", _scores(report, "title", 1)
    yield "Cost", by_system({system["name"]: system["cost"] for system in report["systems"]})
    for group in ("all", "inside", "outside") if report["words"] else ():
        yield f"Word errors: {group.replace('side', 'side entities')}", by_system({
            name: {**own[group], "WER": 100.0 * own[group]["errors"] / max(own[group]["words"], 1)}
            for name, own in report["words"].items()})
    for task, entities in report["entities"].items():
        yield f"{task}: entities by cause", by_system(entities["causes"])
        for by, what in _GROUPS.items():
            if entities[by]:
                yield f"{task}: F1 by {what}", [[what, "n", *names], *(
                    [row["name"], row["n"], *map(row["f1"].get, names)] for row in entities[by])]
    for task, systems in report["confusion"].items():
        for name, found in systems.items():
            yield f"{task}: answers (columns) to references, {name}", [["", *found["labels"]], *(
                [label, *row] for label, row in zip(found["labels"], found["rows"], strict=False))]
    for task, systems in report["calibration"].items():
        yield f"{task}: expected calibration error", by_system(
            {name: {"ECE": found["ece"]} for name, found in systems.items()})
    for part in (*report["conditions"], *report["lengths"]):
        yield f"Scores by {part['by']}", [["score", part["by"], "n", *names], *(
            [score["title"], row["name"], row["n"], *map(row["values"][score["key"]].get, names)]
            for score in report["scores"] for row in part["rows"]
            if score["key"] in row["values"])]


def _scores(report: Report, named: str, digits: int) -> Rows:
    first, *others = names = [system["name"] for system in report["systems"]]
    return [["score", *names, *(f"{name} - {first}" for name in others)], *(
        [score[named], *(f"{score['values'][name]['value']:.{digits}f}"
                         if name in score["values"] else None for name in names),
         *(shown(score["differences"].get(name), digits, "+") for name in others)]
        for score in report["scores"])]


def shown(cell: Any, digits: int = 1, sign: str = "") -> str:
    """A cell as text; of a value that is not known a dash."""
    if isinstance(cell, Mapping):
        value, low, high = (None if cell[key] is None else f"{cell[key] + 0.0:{sign}.{digits}f}"
                            for key in ("value", "low", "high"))
        return f"{value} [{low}, {high}]" * bool(low) + (
            f" p {cell['p']:.3f}" if low and "p" in cell else "") or str(value)
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1 else f"{cell:.1f}"
    return "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell


def drawn(rows: Rows, form: str = "github") -> str:
    """Rows, the head first, as a table in a format of tabulate."""
    head, *body = ([shown(cell).replace("|", "\\|") if form == "github" else shown(cell)
                    for cell in row] for row in rows)
    return tabulate(body, headers=head, tablefmt=form, disable_numparse=True,
                    colalign=["left", *["right"] * (len(head) - 1)])


def verdict(report: Report) -> list[str]:
    """Sentences on each system beside the baseline: what it hears, finds, mistakes and costs."""
    first, *others = (system["name"] for system in report["systems"])
    return [text for name in others for text in (
        _quality(name, first, report), *_causes(name, first, report), _cost(name, first, report))
        if text]


def _quality(name: str, first: str, report: Report) -> str:
    scores = {score["key"]: (score["title"], score["differences"][name])
              for score in report["scores"] if name in score["differences"]}
    if not any(found["value"] for _, found in scores.values()):
        return f"{name} beside {first}: no score differs."
    ways = {"wer": "wer"} if "wer" in scores else {"cer": "wer"}
    ways |= {f"{task}_f1": about["kind"] for task, about in report["data"]["tasks"].items()}
    said = []
    for key, way in {**ways, "slue": "slue"}.items():
        title, found = scores.get(key, ("", None))
        if found is None:
            continue
        sign = 1 if found["value"] > 0 else -1
        text = f"has the same {title}" if not found["value"] else _WAYS[way][
            (sign > 0) == (way == "wer")].format(f"{abs(found['value']):.1f}", title)
        if found["p"] is not None:  # an interval has the direction of the words before it
            low, high = sorted(sign * found[end] + 0.0 for end in ("low", "high"))
            text += f" [{low:.1f}, {high:.1f}]"
            text += " (which may be chance)" * bool(found["value"] and found["p"] >= CHANCE)
        said.append(text)
    return f"{name} beside {first}: {', '.join(said)}."


def _causes(name: str, first: str, report: Report) -> Iterator[str]:
    """For each span task how many entities more or fewer are right, and what became of them."""
    seeds = {system["name"]: len(system["seeds"]) for system in report["systems"]}
    for task, entities in report["entities"].items():
        # Counts of several seeds are sums, and compared as means.
        before, after = ({cause: n / seeds[system] for cause, n in
                          entities["causes"][system].items()} for system in (first, name))
        total = sum(before.values()) - before["hallucinated"]
        changes = {cause.replace("_", " "): round(after[cause] - before[cause], 1)
                   for cause in before if after[cause] != before[cause]}
        if total and changes:
            right = changes.pop("right", 0.0)
            yield (f"Of {total:.0f} entities ({task}) {abs(right):g} "
                   f"{'fewer' if right < 0 else 'more'} are right ({100 * abs(right) / total:.1f} "
                   f"%): {', '.join(f'{n:+g} {cause}' for cause, n in changes.items())}.")


def _cost(name: str, first: str, report: Report) -> str:
    costs = {system["name"]: system["cost"] for system in report["systems"]}
    said = [f"{shown(own / scale)} {unit} against {shown(other / scale)}"
            for key, (unit, scale) in _COSTS.items()
            if None not in (own := costs[name][key], other := costs[first][key])]
    return f"It takes {', '.join(said)}." * bool(said)
