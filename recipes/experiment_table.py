"""The table of an experiment: a row a system, its predictions scored as `unislu compare` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import matplotlib.style
from matplotlib.figure import Figure
from pydantic import BaseModel, model_validator

from unislu_llm.errors import UserError
from unislu_llm.io import find_model, read_json, read_json_lines, write_json, write_text
from unislu_llm.prediction_file import differences
from unislu_llm.report import systems as read
from unislu_llm.report.compare import compare, count_scores, score_rows
from unislu_llm.report.plots import COLOURS
from unislu_llm.report.text import drawn, shown
from unislu_llm.run_folder import find_run, is_run
from unislu_llm.scoring.predictions import spoken_once
from unislu_llm.scoring.score import flat_scores
from unislu_llm.tasks import ASR, TaskRegistry

Cells = dict[str, Any]  # of a row, by column

RESAMPLES = 1000
TITLES = {"ner_f1": "NER F1", "ner_label_f1": "NER label F1", "ner_position_f1": "NER position F1",
          "sa_f1": "SA macro-F1", "hypothesis_wer": "", "ctc_wer": "", "wer": "", "cer": ""}
"""Columns that reports call otherwise; without a title: not there but by corpus."""
OF_CORPORA = {"hypothesis_wer_by_corpus": "hypothesis WER", "ctc_wer_by_corpus": "CTC WER"}
COSTS = {"trained": "trainable", "train_minutes": "minutes", "rtf": "RTF"}


class Published(BaseModel, extra="forbid"):
    """Rows of numbers that others have published."""

    source: str  # where; it stands in front of every row
    protocol: Literal["whisper", "slue"]
    set: str  # what they are scored on: dev, or a name in the experiment's `tests`
    columns: list[str]  # titles of columns of the table
    rows: dict[str, list[float]]  # numbers of these columns, by system

    @model_validator(mode="after")
    def _whole(self) -> Published:
        for name, numbers in self.rows.items():
            if len(numbers) != len(self.columns):
                raise ValueError(f"{len(self.columns)} columns, and {len(numbers)} numbers in the "
                                 f"row '{name}'")
        return self


class Scored:
    """What there is of all systems on one set: models of each seed, and their predictions."""

    def __init__(self, experiment: Any, jobs: Sequence[Any], test: str) -> None:
        there = {job.name: _member(job, test) for job in jobs
                 if test in job.tests and job.scores(test).is_file()}
        known = [find_run(job.folder).registry() for job in jobs if find_model(job.folder)]
        self.registry = max(known or [TaskRegistry()], key=lambda registry: len(registry.names))
        self.members, self.predictions = dict[str, Any](), dict[str, list[read.Predictions]]()
        for system in experiment.systems:
            own = [there[name] for seed in system.seeds
                   if (name := f"{system.name}-s{seed}") in there]
            # In one order, whatever is annotated: differences are of the same utterances.
            every = [sorted(read.read_predictions(m.predictions, self.registry), key=lambda p: (
                p.utterance, p.task)) for m in own if m.predictions]
            every = every if len(every) == len(own) else []  # not a mean over some of its seeds
            if system.parts:
                every = [self._joined(*some) for some in zip(*(
                    self.predictions[part] for _, part in system.parts), strict=False)]
            self.members[system.name], self.predictions[system.name] = own, every

    def _joined(self, *parts: read.Predictions) -> read.Predictions:
        """Predictions of models of one task each as those of one system."""
        said = [p.model_copy(update={"task": ASR, "ref": None, "hyp": None, "problems": ()})
                for p in spoken_once(parts[0], self.registry)]
        return said + [p for task, some in zip(("ner", "sa"), parts[1:], strict=True)
                       for p in some if p.task == task]

    def scores(self, names: Sequence[str], protocol: Any) -> list[dict[str, Any]]:
        """Rows of `score_rows`; of systems whose predictions are gone, without intervals."""
        flat, tables = count_scores({name: some for name in names if (
            some := self.predictions[name])}, self.registry, protocol)
        return score_rows({name: flat.get(name) or [
            flat_scores(m.about["scores"], protocol) for m in self.members[name]]
            for name in names if self.predictions[name] or self.members[name]}, tables, RESAMPLES)

    def beside(self, name: str, protocol: str) -> Cells:
        """What score files say beside scores: error rates of what was read, and costs."""
        some = self.members[name]
        rates = [{f"{title} {corpus}": rate for key, title in OF_CORPORA.items() for corpus, rate in
                  m.about["scores"]["protocols"][protocol].get(key, {}).items()} for m in some]
        costs = [{title: m.cost[key] for key, title in COSTS.items()} for m in some]
        return {title: read.mean([cells.get(title) for cells in every])
                for every in (rates, costs) for title in (every[0] if every else ())}


def _member(job: Any, test: str) -> read.Member:
    """A scored run, its minutes of training noted in the score file, which outlives the run."""
    result = read_json(job.scores(test))
    if "train_minutes" not in result and is_run(job.folder) and (
            curve := read.read_curve(job.folder)):
        write_json(job.scores(test), result | {"train_minutes": curve[-1]["minutes"]})
    return next(iter(read.find_members([job.scores(test)]).values()))


def write_table(experiment: Any, jobs: Sequence[Any]) -> None:
    """Write `table.md`, and `table.svg` of its main columns, into the results folder, from what is
    scored of an experiment's runs."""
    sets = {test: Scored(experiment, jobs, test) for test in ("", *experiment.tests)}
    text = (f"# {experiment.title}\n\n[]: 95 % interval, from {RESAMPLES} resamples of utterances "
            "and, where a system has several, of seeds.\n")
    for protocol in ("whisper", "slue"):
        rows = [row for test in ([*reversed(sets)] if experiment.published else [""])
                for row in _rows(experiment, sets, test, protocol)]
        seen = [(f"{row['system']} {row.get('set', '')}".strip(), {
            column: cell for column, cell in row.items() if isinstance(cell, Mapping)
            and (column[:3] == "WER" or column in ("NER F1", "SA macro-F1"))}) for row, _ in rows]
        if protocol == "whisper" and any(cells for _, cells in seen):
            draw_forest(experiment.results / "table.svg", [some for some in seen if some[1]])
        for said, some in zip(("", "\nDifferences to the first system of a set\n\n"),
                              zip(*rows, strict=True), strict=True):
            if columns := list(dict.fromkeys(c for row in some for c in row if row[c] is not None)):
                text += (said or f"\nProtocol `{protocol}`\n\n") + drawn(
                    [columns, *([row.get(c) for c in columns] for row in some if row)]) + "\n"
    known = {name: some[0].decoding for name, some in sets[""].members.items() if some}
    text = "\n".join([text, *(f"{line}\n" for line in differences(known))])
    write_text(experiment.results / "table.md", text.rstrip("\n") + "\n")


def draw_forest(path: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Write an SVG of a table of numbers with intervals: a line a system, a panel a column."""
    # Two systems may have one title: "the same, ...".
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    style = str(files("unislu_llm.report") / "plots.mplstyle")
    with matplotlib.style.context(["default", style, {"svg.hashsalt": path.stem}]):
        figure = Figure(figsize=(3 + 1.5 * len(columns), 0.5 + 0.4 * len(rows)),
                        layout="constrained")
        for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False).flat,
                                columns, strict=True):
            axes.set(title=column, yticks=range(len(rows)),
                     yticklabels=[fill(name, 44) for name, _ in rows])
            for y, (_, row) in enumerate(rows):
                cell = row.get(column, {"value": float("nan")})
                x, *across = (cell["value"] if cell.get(key) is None else cell[key]
                              for key in ("value", "low", "high"))
                axes.plot(across, [y, y], color=COLOURS[0])
                axes.plot(x, y, "o", color=COLOURS[0])
            axes.yaxis.set_inverted(True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def _rows(experiment: Any, sets: Mapping[str, Scored], test: str,
          protocol: Any) -> Iterator[tuple[Cells, Cells]]:
    """What is published for a set (dev without a name), and a row for each system of ours, with
    what it is over the first."""
    where = {"set": test or "dev"} if experiment.published else {}
    for some in experiment.published:
        for name, numbers in some.rows.items() if some.protocol == protocol else ():
            if some.set == where["set"]:
                yield {"system": f"published ({some.source}): {name}"} | where | {
                    c: f"{n:g}" for c, n in zip(some.columns, numbers, strict=True)}, {}
    parts = {part for system in experiment.systems for _, part in system.parts or ()}
    ours = {s.name: s for s in experiment.systems if s.name not in parts}
    titled = [(title, s) for s in sets[test].scores(list(ours), protocol)
              if (title := TITLES.get(s["key"], s["title"]))]
    others = [(f"{s['title']} {t}", s) for t in experiment.tests if not experiment.published
              for s in sets[t].scores(list(ours), protocol) if s["key"] in ("wer", "ctc_wer")]
    for name, system in ours.items():
        n, known = (len(own.members[name] or own.predictions[name])
                    for own in (sets[test], sets[""]))
        title = (system.title or name) + (f" ({n} of {len(system.seeds)} seeds)" if n else
                                          f" (not {'scored' if known else 'run'})")
        head = {"system": title.removesuffix(f" ({n} of {n} seeds)")} | where
        changes = {c: shown(cell, 1, "+") for c, s in titled
                   if (cell := s["differences"].get(name)) and cell["p"] is not None}
        yield head | {c: s["values"].get(name) for c, s in titled + others} | sets[
            test].beside(name, protocol), changes and head | changes


def write_report(experiment: Any, jobs: Sequence[Any]) -> str:
    """Write the whole comparison of the runs that were scored on the dev examples of the first into
    the output folder (`report/report.html`, `.md`); returns a line on it."""
    parts = {part for system in experiment.systems for _, part in system.parts or ()}
    keys = {job.folder: {(row["corpus"], row["id"], row["task"]) for row in read_json_lines(file)}
            for job in jobs if job.system.name not in parts
            and (file := job.folder / "predictions" / "best-dev.jsonl").is_file()}
    alike = [folder for folder, own in keys.items() if own == next(iter(keys.values()))]
    try:
        compare(alike, out=experiment.output / "report")
    except UserError as error:
        return f"no report: {error}"
    return f"report of {len(alike)} runs: {experiment.output / 'report' / 'report.html'}"
