"""Systems beside each other as plain data, from which words, tables and pages are made."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from unislu_llm.errors import UserError
from unislu_llm.io import write_json, write_text
from unislu_llm.prediction_file import differences
from unislu_llm.report import details
from unislu_llm.report import systems as read
from unislu_llm.report.details import interval
from unislu_llm.report.systems import Key
from unislu_llm.report.text import caption, latex, markdown, score_table, verdict
from unislu_llm.run_folder import find_run
from unislu_llm.scoring import score as scoring
from unislu_llm.scoring.bootstrap import Counts, bootstrap
from unislu_llm.scoring.calibration import calibrate
from unislu_llm.scoring.labels import label_scores
from unislu_llm.scoring.predictions import annotated, spoken_once
from unislu_llm.scoring.text import Protocol
from unislu_llm.scoring.wer import edits
from unislu_llm.tasks import SpanTask, TaskRegistry

Tables = dict[str, dict[str, list[Counts]]]  # of each seed, by score and system
# Where length groups end: seconds, and words of the normalised reference.
EDGES = {"audio": (2, 5, 10, 15, 20, 30), "words": (5, 10, 20, 30, 50)}
MOST_GROUPS = 20  # of speakers, of whom a corpus may have thousands


def compare(paths: Sequence[Path], protocol: Protocol = "whisper", resamples: int = 1000,
            tasks_file: Path | None = None, *, common: bool = False, examples: int = 10,
            out: Path | None = None) -> str:
    """Verdict and scores of systems, the first beside each other one, as :func:`make_report` has
    them; with `out` the whole report as well, as `report.json`, `.md`, `.tex`, `.html` in there."""
    report = make_report(paths, protocol, resamples, tasks_file, common, examples)
    text = [*report["verdict"], "", caption(report), "", score_table(report), *report["notes"]]
    if out is not None:
        write_json(out / "report.json", report)
        write_text(out / "report.md", markdown(report))
        write_text(out / "report.tex", latex(report))
        from unislu_llm.report.page import write_page  # with matplotlib, slow to import

        write_page(report, out)
        text.append(f"report: {out}")
    return "\n".join(text)


def make_report(paths: Sequence[Path], protocol: Protocol = "whisper", resamples: int = 1000,
                tasks_file: Path | None = None, common: bool = False,
                examples: int = 10) -> dict[str, Any]:
    """All that is known of systems, as plain data: what :func:`analyse` returns, and `title`,
    `protocol`, `resamples`, `systems` (each with the `seeds` pooled, its `decoding` and `cost`),
    `verdict`, `notes` and `curves`. If one lacks predictions, only scores and tasks are analysed.
    Arguments are `unislu compare`'s. Raises UserError: no system, or some of other data."""
    if not paths or resamples < 1 or examples < 0:
        raise UserError("--resamples must be 1 or more" if resamples < 1 else
                        "--examples must be 0 or more" if examples < 0 else
                        "name the systems: run folders, score files or prediction files")
    registry = TaskRegistry.from_yaml(tasks_file) if tasks_file else next(
        (find_run(path).registry() for path in paths if path.is_dir()), TaskRegistry())
    members = read.find_members(paths)
    pooled, notes = read.pool_seeds(members)
    notes += differences({name: member.decoding for name, member in members.items()})
    there = {name: read.read_predictions(m.predictions, registry)
             for name, m in members.items() if m.predictions}
    if lacking := members.keys() - there.keys():
        scores = {name: m.about.get("scores") or scoring.score_predictions(there[name], registry)
                  for name, m in members.items()}
        for fault in scoring.same_data(scores):
            raise UserError(fault.removeprefix("warning: ") + "; score them on the same manifests")
        made = {name: v for name, m in members.items() if (v := m.about.get("versions", {}).get(
            "packages", {}).get("whisper-normalizer"))}  # older files do not say it
        if len(set(made.values())) > 1:
            raise UserError("score them again, with one version of whisper-normalizer; it was " +
                            ", ".join(f"{v} in {name}" for name, v in made.items()))
        found = analyse({}, registry) | {"scores": score_rows(
            {name: [scoring.flat_scores(scores[seed], protocol) for seed in seeds]
             for name, seeds in pooled.items()}, {}, resamples)}
        known = next(iter(scores.values()))["protocols"][protocol]["tasks"]
        found["data"]["tasks"] = {task.name: {
            "kind": "span" if isinstance(task, SpanTask) else "label", "labels": list(task.labels),
            "n": known[task.name]["n"]} for task in registry if task.name in known}
        notes.append("no intervals of the differences: the predictions of "
                     f"{', '.join(sorted(lacking))} are not there, or have changed since")
    else:
        there, left_out = read.same_data(there, common)
        facts = next((f for m in members.values() if (f := m.facts(registry))), {})
        phrases = details.training_phrases(next(iter(members.values())), registry, protocol)
        found = analyse({name: [there[seed] for seed in seeds] for name, seeds in pooled.items()},
                        registry, protocol, resamples=resamples, examples=examples, facts=facts,
                        phrases=phrases)
        notes += [f"{left_out} predictions that not all systems have are left out"] * bool(left_out)
        notes += ["no audio and no speakers: the dev manifests are not here"] * (not facts)
        notes += ["no rarity: the baseline's training manifests are not here"] * (phrases is None)
    report = {
        "title": " against ".join(pooled), "protocol": protocol, "resamples": resamples, **found,
        "systems": [{
            "name": name, "baseline": name == next(iter(pooled)), "seeds": seeds,
            "decoding": members[seeds[0]].decoding, "cost": {
                key: read.mean([members[seed].cost[key] for seed in seeds])
                for key in members[seeds[0]].cost}} for name, seeds in pooled.items()],
        "curves": {name: curve for name, seeds in pooled.items()
                   if (curve := read.mean_curve([members[seed].curve for seed in seeds]))},
        "notes": notes}
    return report | {"verdict": verdict(report)}


def analyse(systems: details.Systems, registry: TaskRegistry, protocol: Protocol = "whisper", *,
            resamples: int = 1000, examples: int = 10,
            facts: Mapping[Key, Mapping[str, Any]] | None = None,
            phrases: details.Phrases | None = None) -> dict[str, Any]:
    """Everything that predictions say of systems, the baseline first, all of the same examples in
    one order, as plain data. A score is `{value, low, high}` in percent; a difference, which is
    other minus baseline, has `p` besides. Where they are known, `facts` are `audio`, `speaker` and
    `condition` of utterances, and `phrases` the entities of the baseline's training data."""
    first = next(iter(systems.values()), [[]])[0]
    flat, tables = count_scores(systems, registry, protocol)
    spoken = spoken_once(first, registry)
    tasks = [task for task in registry if annotated(first, task)]
    words = edits(spoken, protocol)[:, [0, 1, 3]].sum(axis=1).tolist()
    sizes = {"audio": {p.utterance: p.duration for p in spoken if p.duration is not None},
             "words": dict(zip((p.utterance for p in spoken), words, strict=True))}
    calibrations = {name: calibrate((p for some in seeds for p in some), registry)
                    for name, seeds in systems.items()}
    return {
        "data": {"utterances": len(spoken), "seconds": round(sum(sizes["audio"].values()), 3),
                 "corpora": dict(sorted(Counter(p.corpus for p in spoken).items())),
                 "tasks": {task.name: {
                     "kind": "span" if isinstance(task, SpanTask) else "label", "labels":
                     list(task.labels), "n": len(annotated(first, task))} for task in tasks}},
        "scores": score_rows(flat, tables, resamples),
        "words": {name: details.word_errors(seeds, registry, protocol)
                  for name, seeds in systems.items()},
        "conditions": [{"by": by, "rows": _grouped(groups, tables, resamples)} for by, groups in
                       _conditions((p.utterance for p in spoken), facts or {}).items()],
        "entities": {task.name: details.span_details(systems, task, protocol, resamples, phrases)
                     for task in tasks if isinstance(task, SpanTask)},
        "confusion": {task.name: {name: {"labels": [*task.labels, "none"], "rows": np.sum(
            [label_scores(annotated(some, task), task, protocol)["confusion"] for some in seeds],
            axis=0).tolist()} for name, seeds in systems.items()}
            for task in tasks if not isinstance(task, SpanTask) and not task.multi},
        "calibration": {task.name: rated for task in tasks if (rated := {
            name: {key: found[task.name][key] for key in ("ece", "bins")}
            for name, found in calibrations.items() if task.name in found})},
        "lengths": [_lengths(by, own, tables, resamples) for by, own in sizes.items() if own],
        "examples": details.most_different(systems, registry, protocol, examples, facts or {})}


def count_scores(systems: details.Systems, registry: TaskRegistry,
                 protocol: Protocol) -> tuple[dict[str, Any], Tables]:
    """Scores of each seed by system, and the counts that they are made of: for `score_rows`."""
    flat = {name: [scoring.flat_scores(scoring.score_predictions(some, registry), protocol)
                   for some in seeds] for name, seeds in systems.items()}
    tables: Tables = {}
    for name, seeds in systems.items():
        every = [scoring.utterance_counts(some, registry, protocol) for some in seeds]
        for key in flat[name][0]:
            if known := scoring.interval_of(key, every[0]):
                tables.setdefault(key, {})[name] = [counts[known] for counts in every]
    return flat, tables


def score_rows(flat: Mapping[str, Any], tables: Tables, resamples: int) -> list[dict[str, Any]]:
    """The rows of the table of scores: means over seeds, with intervals where `tables` has the
    counts, and by how much each other system is over the first, if on the same utterances."""
    first, rows = next(iter(flat), ""), []
    for key in dict.fromkeys(key for seeds in flat.values() for some in seeds for key in some):
        # What a seed lacks is no score of its system. `score` picks a checkpoint: a mean of others.
        means = {name: fmean(some[key] for some in seeds) for name, seeds in flat.items()
                 if key != "score" and all(key in some for some in seeds)}
        values: dict[str, Any] = {name: {"value": value, "low": None, "high": None}
                                  for name, value in means.items()}
        differences = {name: {**value, "value": means[name] - means[first], "p": None}
                       for name, value in values.items() if name != first and first in means}
        for name, counts in tables.get(key, {}).items():
            values[name] = interval(bootstrap(counts, resamples=resamples))
            base = tables[key].get(first)
            if differences.pop(name, None) and base and base[0].utterances == counts[0].utterances:
                span = bootstrap(counts, base, resamples=resamples)
                differences[name] = {**interval(span), "p": span["p_value"]}
        rows.append({
            "key": key, "title": re.sub(r"\b(wer|cer|ctc|slue|f1)\b(?!-)", lambda m: m[0].upper(),
                                        key.replace("_", " ")),
            "better": "lower" if {"wer", "cer", "malformed"} & set(key.split("_")) else "higher",
            "values": values, "differences": differences})
    return [row for row in rows if row["values"]]


def _grouped(groups: Mapping[str, set[Key]], tables: Tables, resamples: int) -> list[Any]:
    """Every score of each group of utterances."""
    rows: list[Any] = []
    for group, members in groups.items():
        rows.append({"name": group, "n": len(members), "values": {}})
        for key, systems in tables.items():
            whole = next(iter(systems.values()))[0].utterances
            kept = [i for i, utterance in enumerate(whole) if utterance in members]
            part = tuple(whole[i] for i in kept)
            # The SLUE score is a mean over corpora, and needs all of them.
            if key.startswith(("wer_", "cer_")) or not kept or (
                    key == "slue" and len({c for c, _ in whole}) > len({c for c, _ in part})):
                continue
            rows[-1]["values"][key] = {name: interval(bootstrap(
                [Counts(part, c.matrix[kept], c.statistic) for c in seeds], resamples=resamples))
                for name, seeds in systems.items()}
    return rows


def _conditions(utterances: Iterable[Key], facts: Mapping[Key, Any]) -> dict[str, Any]:
    """The largest groups by corpus, speaker and condition, where there are several."""
    found: dict[str, dict[str, set[Key]]] = {"corpus": {}, "speaker": {}, "condition": {}}
    for utterance in utterances:
        known = {"corpus": utterance[0], **facts.get(utterance, {})}
        for by, groups in found.items():
            if known.get(by) is not None:
                groups.setdefault(str(known[by]), set()).add(utterance)
    return {by: dict(sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))[:MOST_GROUPS])
            for by, groups in found.items() if len(groups) > 1}


def _lengths(by: str, sizes: Mapping[Key, float], tables: Tables, resamples: int) -> Any:
    """Scores by length, in groups `low < length <= high`; empty ones are joined to the next."""
    edges, groups, longest = [0], dict[str, set[Key]](), max(1, math.ceil(max(sizes.values())))
    for high in [*(edge for edge in EDGES[by] if edge < longest), longest]:
        # What has no length (a reference without words) is in the first group.
        low = edges[-1] or -1
        if members := {key for key, size in sizes.items() if low < size <= high}:
            start = edges[-1] + (by == "words" and len(edges) > 1)  # of whole numbers
            groups[f"{start}-{high} {'s' if by == 'audio' else by}"] = members
            edges.append(high)
    return {"by": by, "edges": edges, "rows": _grouped(groups, tables, resamples)}
