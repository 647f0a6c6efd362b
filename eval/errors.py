"""Sort the errors of systems by cause, and compare them on the same utterances.

    python eval/errors.py runs/a runs/b                       # predictions of their dev manifests
    python eval/errors.py a.jsonl b.jsonl --out errors.md     # files of eval/evaluate.py

Reads predictions, no models; see eval/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tabulate import tabulate

from unislu_llm.compare import difference, read_predictions, same_data
from unislu_llm.errors import UserError, reported
from unislu_llm.io import portable, sha256, write_json, write_text
from unislu_llm.prediction_file import dev_predictions
from unislu_llm.run_folder import find_run
from unislu_llm.scoring.bootstrap import bootstrap
from unislu_llm.scoring.entities import KINDS, entity_errors, place, prf
from unislu_llm.scoring.labels import label_scores
from unislu_llm.scoring.predictions import Prediction, annotated, spoken_once
from unislu_llm.scoring.score import by_corpus, utterance_counts
from unislu_llm.scoring.text import Protocol
from unislu_llm.scoring.wer import WER, edits
from unislu_llm.tasks import LabelTask, TaskRegistry

ALL = "(all)"
"""Name of the group of all corpora."""

Block = Mapping[str, Any]


@dataclass
class Options:
    """Which systems' errors are sorted, and how."""

    systems: Annotated[tyro.conf.Positional[list[Path]],
                       tyro.conf.arg(metavar="SYSTEM [SYSTEM ...]")] = field(default_factory=list)
    """Prediction files of eval/evaluate.py, or run folders (their predictions of the dev
    manifests). The others are compared to the first."""
    protocol: Protocol = "whisper"
    """How transcripts and phrases are normalised before they are compared."""
    out: Path | None = None
    """Markdown report, with its numbers as FILE.json beside it; default: it is printed."""
    common: bool = False
    """Compare what all systems have; without it, systems scored on other data are refused."""
    tasks_file: Path | None = None
    """Task file (YAML), for predictions of other tasks that do not lie in their run's folder."""
    resamples: int = 1000
    """Of the paired bootstrap."""
    examples: int = 5
    """Utterances with the largest difference that are shown for each pair."""


def report(options: Options) -> None:
    """Sort the errors of the systems, compare them, and write or print the report.

    Raises:
        UserError: no system, a file without predictions, or systems that were not scored on the
            same data.
    """
    out = options.out
    if out is not None and out.suffix == ".json":
        raise UserError(f"--out {out}: names the Markdown report, e.g. {out.with_suffix('.md')}; "
                        "its numbers go to the .json beside it")
    files, registry = find_files(options)
    systems, left_out = same_data({name: read_predictions(path, registry)
                                   for name, path in files.items()}, options.common)
    (name, first), *others = systems.items()
    result = {
        "protocol": options.protocol, "resamples": options.resamples, "predictions": len(first),
        "left_out": left_out, "compared_to": name,
        "systems": {s: {"predictions": portable(files[s]), "sha256": sha256(files[s]),
                        "corpora": analyse(some, registry, options.protocol)}
                    for s, some in systems.items()},
        "comparisons": {other: compare(first, some, registry, options) for other, some in others}}
    text = markdown(result)
    if out is None:
        print(text)
        return
    write_text(out, text + "\n")
    write_json(out.with_suffix(".json"), result)
    print(f"written to {out} and {out.with_suffix('.json')}")


# ---- what is compared


def find_files(options: Options) -> tuple[dict[str, Path], TaskRegistry]:
    """Prediction files by name of the system; the tasks: of --tasks-file, else the first run's."""
    if not options.systems or options.resamples < 1:
        raise UserError("--resamples must be 1 or more" if options.systems else
                        "no system is named; give prediction files or run folders, e.g. "
                        "eval/errors.py runs/a runs/b")
    registry = TaskRegistry.from_yaml(options.tasks_file) if options.tasks_file else None
    found: dict[str, Path] = {}
    for path in options.systems:
        name, file = path.stem, path
        if path.is_dir():
            run = find_run(path)
            # Predictions hold task names alone; what these are is known to the model.
            registry = registry or run.registry()
            name, file = run.label, dev_predictions(run)
        if file in found.values():
            raise UserError(f"{file} is named twice; name every system once")
        found[name if name not in found else portable(file)] = file
    return found, registry or TaskRegistry()


# ---- errors of one system


def analyse(predictions: Sequence[Prediction], registry: TaskRegistry,
            protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Errors by corpus, and of :data:`ALL` where there are several: `words`, `length`, `tasks`."""
    groups = by_corpus(predictions)
    if len(groups) > 1:
        groups[ALL] = list(predictions)
    return {name: word_errors(spoken_once(group, registry), protocol) | {"tasks": {
        task.name: (label_errors(known, task, protocol) if isinstance(task, LabelTask)
                    else span_errors(known, protocol))
        for task in registry if (known := annotated(group, task))}}
        for name, group in groups.items()}


def word_errors(spoken: Sequence[Prediction], protocol: Protocol) -> dict[str, Any]:
    """WER of some utterances by kind of error, and by length of the reference (quartiles).

    `long` hypotheses have more than twice the reference's words, a `loop` was cut for repeating
    itself; `wer_without` is the rate of the others.
    """
    counts = edits(spoken, protocol)
    ref, hyp = counts[:, [0, 1, 3]].sum(axis=1), counts[:, [0, 2, 3]].sum(axis=1)
    # Models that copy or loop fail by length first.
    long, loop = hyp > 2 * ref, np.array(["loop" in p.problems for p in spoken], dtype=bool)
    quarter = np.searchsorted(np.quantile(ref, [0.25, 0.5, 0.75]), ref)  # ties stay together
    return {
        "words": {"n": len(spoken), **WER.of(counts)._asdict(), "long": int(long.sum()),
                  "loop": int(loop.sum()), "wer_without": WER.of(counts[~(long | loop)]).wer},
        "length": {f"{ref[quarter == i].min()}-{ref[quarter == i].max()} words":
                   {"n": int((quarter == i).sum()), "wer": WER.of(counts[quarter == i]).wer}
                   for i in np.unique(quarter)}}


def span_errors(known: Sequence[Prediction], protocol: Protocol) -> dict[str, Any]:
    """Entities by kind of error, and what would be reached if the misheard ones were recognised and
    then tagged as well as the others."""
    kinds = entity_errors(place(known, protocol))
    gold, pred = kinds["reference"], kinds["predicted"]
    n_gold, n_pred, right = sum(gold.values()), sum(pred.values()), gold["right"]
    heard = prf(right, n_gold - gold["misheard"], n_pred - pred["misheard"])
    return {"scores": {"n": len(known), **prf(right, n_gold, n_pred),
                       "recognised_recall": heard["recall"], "recognised_f1": heard["f1"]},
            **kinds}


def label_errors(known: Sequence[Prediction], task: LabelTask,
                 protocol: Protocol) -> dict[str, Any]:
    """Scores of a label task, its confusion, and accuracy by the utterance's WER in percent."""
    wer = [WER.of(row[None]).wer for row in edits(known, protocol)]
    bucket = np.searchsorted([0.0, 20.0, 50.0], wer)  # a border belongs to the bucket below it
    scores = label_scores(known, task, protocol)
    shown = {key: scores[key] for key in ("n", "macro_f1", "accuracy", "missing", "unknown")}
    for i, name in enumerate(("0", "0-20", "20-50", ">50")):
        part = [p for p, b in zip(known, bucket, strict=True) if b == i]
        shown[f"accuracy_at_{name}"] = label_scores(part, task, protocol)["accuracy"]
    columns = scores["confusion_labels"]
    return {"scores": shown, "confusion": {
        label: dict(zip(columns, row, strict=True))
        for label, row in zip(task.labels, scores["confusion"] or (), strict=False)}}


# ---- two systems


def compare(first: Sequence[Prediction], other: Sequence[Prediction], registry: TaskRegistry,
            options: Options) -> dict[str, Any]:
    """A system beside the first one, on the same examples in the same order.

    Returns:
        Plain data: `scores`: by name those of both, and their difference `other - first` with its
        95 % interval and p-value; `utterances`: by corpus, how many have fewer (`better`), as many
        (`equal`) or more word errors (`worse`); `examples`: those with the largest difference.
    """
    before, after = (utterance_counts(some, registry, options.protocol) for some in (first, other))
    scores = {}
    for name in after:
        span = bootstrap(difference(after[name], before[name]), resamples=options.resamples)
        scores[name] = {"first": before[name].value, "other": after[name].value,
                        "difference": span.pop("value"), **span}
    a, b = spoken_once(first, registry), spoken_once(other, registry)
    errors = np.stack([edits(some, options.protocol)[:, :3].sum(axis=1) for some in (a, b)], 1)
    change = errors[:, 1] - errors[:, 0]
    corpora = np.array([p.corpus for p in a])
    groups = {name: change[corpora == name] for name in by_corpus(a)} | {ALL: change}
    most = sorted(range(len(a)), key=lambda i: (-abs(int(change[i])), a[i].key))
    return {
        "scores": scores,
        "utterances": {name: {"better": int((part < 0).sum()), "equal": int((part == 0).sum()),
                              "worse": int((part > 0).sum())} for name, part in groups.items()},
        "examples": [{"id": a[i].id, "corpus": a[i].corpus, "ref": a[i].ref_text,
                      "errors": errors[i].tolist(), "first": a[i].hyp_text, "other": b[i].hyp_text}
                     for i in most[:options.examples] if change[i]]}


# ---- tables


def markdown(result: Block) -> str:
    """The report of the numbers: systems side by side in every table."""
    systems = {name: system["corpora"] for name, system in result["systems"].items()}
    left = f"; {result['left_out']} that not all systems have left out" * bool(result["left_out"])
    parts = [f"# Errors of {', '.join(systems)}",
             f"Protocol `{result['protocol']}`; {result['predictions']} predictions{left}.",
             "## Words", side_by_side("corpus", {
                 name: {c: block["words"] for c, block in own.items()}
                 for name, own in systems.items()}),
             "### WER by length", grouped("length", systems)]
    first = next(iter(systems.values()))
    for task in dict.fromkeys(task for block in first.values() for task in block["tasks"]):
        own = {name: {c: block["tasks"][task] for c, block in blocks.items()
                      if task in block["tasks"]} for name, blocks in systems.items()}
        parts += [f"## `{task}`", side_by_side("corpus", {
            name: {c: block["scores"] for c, block in blocks.items()}
            for name, blocks in own.items()})]
        if any("confusion" in block for block in next(iter(own.values())).values()):
            parts += ["### Confusion", grouped("confusion", own)]
            continue
        for side in KINDS:
            labelled = {name: {c: {side: {label: shares(part[side]) for label, part in
                                          {"all": block, **block["by_label"]}.items()}}
                               for c, block in blocks.items()} for name, blocks in own.items()}
            parts += [f"### {side.capitalize()} entities", grouped(side, labelled)]
    for name, pair in result["comparisons"].items():
        parts += comparison(name, result["compared_to"], pair)
    return "\n\n".join(parts)


def side_by_side(first: str, systems: Mapping[str, Mapping[str, Block]]) -> str:
    """A row a group and system."""
    groups = dict.fromkeys(group for rows in systems.values() for group in rows)
    return table({first: group, "system": name, **rows[group]} for group in groups
                 for name, rows in systems.items() if group in rows)


def grouped(key: str, systems: Mapping[str, Mapping[str, Block]]) -> str:
    """Tables that each corpus has under a key, below each other."""
    return side_by_side(key, {name: {f"{corpus}: {group}": row for corpus, block in blocks.items()
                                     for group, row in block[key].items()}
                              for name, blocks in systems.items()})


def table(rows: Iterable[Block]) -> str:
    shown = [{key: f"{cell:.1f}" if isinstance(cell, float) else cell for key, cell in row.items()}
             for row in rows]
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True,
                    missingval="-")


def shares(kinds: Mapping[str, int]) -> dict[str, str]:
    total = max(sum(kinds.values()), 1)
    return {kind: f"{n} ({100 * n / total:.0f} %)" for kind, n in kinds.items()}


def comparison(name: str, first: str, pair: Block) -> list[str]:
    """The part of the report on two systems."""
    scores = [{"score": score, first: v["first"], name: v["other"],
               "difference": f"{v['difference']:+.1f}",
               "95 % interval": f"{v['low']:+.1f} to {v['high']:+.1f}", "p": f"{v['p_value']:.3f}"}
              for score, v in pair["scores"].items()]
    shown = [f"- `{e['id']}` ({e['corpus']})\n  - reference: {e['ref']}\n"
             f"  - {first}, {e['errors'][0]} errors: {e['first'] or '(empty)'}\n"
             f"  - {name}, {e['errors'][1]} errors: {e['other'] or '(empty)'}"
             for e in pair["examples"]]
    return [f"## {name} compared to {first}", table(scores), "Utterances by their word errors:",
            table([{"corpus": c, **part} for c, part in pair["utterances"].items()]),
            "### Largest differences", "\n".join(shown) or "none"]


if __name__ == "__main__":
    with reported():
        report(tyro.cli(Options, description=str(__doc__), config=(tyro.conf.FlagCreatePairsOff,)))
