"""Scores of prediction rows under both protocols: WER by corpus, tasks, malformed outputs, SLUE score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from unislu_llm.scoring.bootstrap import Counts, bootstrap, error_rate, macro_f1, micro_f1, slue_statistic
from unislu_llm.scoring.ner import entity_counts, entity_f1, label_f1
from unislu_llm.scoring.position import PositionItem, position_counts, position_scores
from unislu_llm.scoring.rows import (
    Row,
    annotated_rows,
    check_rows,
    combine_labels,
    hyp_entities,
    hyp_labels,
    ref_entities,
    ref_spans,
    transcript_rows,
    utterance_key,
)
from unislu_llm.scoring.sentiment import label_counts, label_scores
from unislu_llm.scoring.text import PROTOCOLS, Protocol
from unislu_llm.scoring.wer import corpus_wer, utterance_errors
from unislu_llm.tasks import NER, SA, LabelTask, SpanTask, TaskRegistry


def slue_score(wer_vp: float, wer_vc: float, ner_f1: float, sa_f1: float) -> float:
    """SLUE score in percent: mean of word accuracy (the mean of both corpora's), NER F1 and SA macro-F1.

    Args:
        wer_vp, wer_vc: WER of VoxPopuli and VoxCeleb. ner_f1: micro-F1. sa_f1: macro-F1. All in percent.
    """
    return _slue([wer_vp, wer_vc], ner_f1, sa_f1)


def score_rows(
    rows: Sequence[Row],
    registry: TaskRegistry,
    protocols: Sequence[Protocol] = PROTOCOLS,
    *,
    raw_to_combined: bool = False,
) -> dict[str, Any]:
    """Score prediction rows (:mod:`~unislu_llm.scoring.rows`) of one system. Rates are percent, not rounded.

    Args:
        raw_to_combined: map raw OntoNotes entity labels to SLUE's seven combined ones first
            (:func:`~unislu_llm.scoring.rows.combine_labels`).

    Returns:
        Plain data::

            n_rows, n_utterances: int
            malformed: {share: percent of rows with a problem, rows: int, kinds: {kind: occurrences}}
            position: {span task: {n, precision, recall, f1, macro, by_label, errors}}
            protocols: {protocol: {
                wer: {overall: {wer, errors, ...}, by_corpus: {corpus: {...}}},
                tasks: {span task: {n, entity: {f1, ...}, label: {f1, ...}}, label task: {n, macro_f1, ...}},
                slue_score: float, or None without both NER and SA rows}}

        Each utterance's transcript is counted once (:func:`~unislu_llm.scoring.rows.transcript_rows`). The
        word accuracy of the SLUE score is the mean over the corpora that have NER or SA rows.

    Raises:
        UserError: a row cannot be scored, see :func:`~unislu_llm.scoring.rows.check_rows`.
    """
    check_rows(rows, registry)
    rows = combine_labels(rows) if raw_to_combined else rows
    spoken = transcript_rows(rows, registry)
    return {
        "n_rows": len(rows),
        "n_utterances": len(spoken),
        "malformed": _malformed(rows),
        "position": _position_blocks(rows, registry),
        "protocols": {p: _protocol_block(rows, spoken, registry, p) for p in protocols},
    }


def utterance_counts(rows: Sequence[Row], registry: TaskRegistry, protocol: Protocol) -> dict[str, Counts]:
    """Per-utterance counts of every score, for :func:`~unislu_llm.scoring.bootstrap.compare_counts`.

    Keys: `wer`, `wer/<corpus>`, `<span task>/f1`, `<span task>/label_f1`, `<span task>/position_f1` (the same
    under every protocol), `<label task>/macro_f1`, and with NER and SA rows `slue_score`, whose corpora are
    resampled each by itself.

    Raises:
        UserError: a row cannot be scored.
    """
    check_rows(rows, registry)
    counts: dict[str, Counts] = {}
    spoken = transcript_rows(rows, registry)
    corpora = {f"wer/{corpus}": group for corpus, group in _by_corpus(spoken).items()}
    for name, group in {"wer": spoken, **corpora}.items():
        errors = utterance_errors([r["ref_text"] for r in group], [_hyp_text(r) for r in group], protocol)
        counts[name] = Counts(_keys(group), errors, error_rate)
    for task in registry:
        group = annotated_rows(rows, task)
        if not group:
            continue
        keys = _keys(group)
        if isinstance(task, LabelTask):
            refs, hyps = [r["ref"] for r in group], [hyp_labels(r) for r in group]
            counts[f"{task.name}/macro_f1"] = Counts(keys, label_counts(refs, hyps, task, protocol), macro_f1)
            continue
        gold, pred = [ref_entities(r) for r in group], [hyp_entities(r) for r in group]
        counts[f"{task.name}/f1"] = Counts(keys, entity_counts(gold, pred, protocol), micro_f1)
        counts[f"{task.name}/label_f1"] = Counts(
            keys, entity_counts(gold, pred, protocol, labels_only=True), micro_f1
        )
        items = _position_items(group)
        if items is not None:
            counts[f"{task.name}/position_f1"] = Counts(keys, position_counts(items), micro_f1)
    return counts | _slue_counts(rows, counts)


def intervals(rows: Sequence[Row], registry: TaskRegistry, protocol: Protocol, *, resamples: int = 1000,
              seed: int = 0) -> dict[str, dict[str, float]]:
    """95 % bootstrap interval of every score of :func:`utterance_counts`, as `{score: {low, high}}`.

    Corpora are resampled each by itself, so that a score over several of them keeps their sizes.

    Raises:
        UserError: a row cannot be scored.
    """
    corpus = {utterance_key(row): str(row["corpus"]) for row in rows}
    found = {}
    for name, counts in utterance_counts(rows, registry, protocol).items():
        strata = counts.strata if counts.strata is not None else tuple(corpus[key] for key in counts.keys)
        interval = bootstrap(counts.matrix, counts.statistic, resamples, seed, strata=strata)
        found[name] = {"low": interval.low, "high": interval.high}
    return found


def format_table(results: Mapping[str, Mapping[str, Any]], tablefmt: str = "github") -> str:
    """Tables of :func:`score_rows` results, one a protocol with one row a run; percent to two digits.

    Args:
        results: result by run name. tablefmt: any format of the tabulate package.
    """
    protocols = list(dict.fromkeys(p for result in results.values() for p in result["protocols"]))
    tables = []
    for protocol in protocols:
        cells = {
            run: _cells(result, protocol)
            for run, result in results.items()
            if protocol in result["protocols"]
        }
        columns = _columns(cells.values())
        body = [[run, *(row.get(column) for column in columns)] for run, row in cells.items()]
        table = tabulate(
            body,
            headers=["run", *columns],
            tablefmt=tablefmt,
            floatfmt=".2f",
            missingval="-",
            disable_numparse=[0],
        )
        tables.append(f"Protocol: {protocol}\n\n{table}")
    return "\n\n".join(tables)


def _slue(wers: Sequence[float], ner_f1: float, sa_f1: float) -> float:
    return (100.0 - float(np.mean(wers)) + ner_f1 + sa_f1) / 3.0


def _protocol_block(
    rows: Sequence[Row], spoken: Sequence[Row], registry: TaskRegistry, protocol: Protocol
) -> dict[str, Any]:
    wer = {corpus: _wer(group, protocol) for corpus, group in _by_corpus(spoken).items()}
    tasks: dict[str, Any] = {}
    for task in registry:
        group = annotated_rows(rows, task)
        if group:
            tasks[task.name] = _task_block(group, task, protocol)
    return {
        "wer": {"overall": _wer(spoken, protocol), "by_corpus": wer},
        "tasks": tasks,
        "slue_score": _slue_of(rows, wer, tasks),
    }


def _task_block(group: Sequence[Row], task: SpanTask | LabelTask, protocol: Protocol) -> dict[str, Any]:
    if isinstance(task, LabelTask):
        return label_scores(
            [r["ref"] for r in group], [hyp_labels(r) for r in group], task, protocol
        ).to_dict()
    gold, pred = [ref_entities(r) for r in group], [hyp_entities(r) for r in group]
    return {
        "n": len(group),
        "entity": entity_f1(gold, pred, protocol).to_dict(),
        "label": label_f1(gold, pred, protocol).to_dict(),
    }


def _slue_of(rows: Sequence[Row], wer: Mapping[str, Any], tasks: Mapping[str, Any]) -> float | None:
    if "entity" not in tasks.get(NER.name, {}) or "macro_f1" not in tasks.get(SA.name, {}):
        return None
    wers = [wer[corpus]["wer"] for corpus in _slue_corpora(rows)]
    return _slue(wers, tasks[NER.name]["entity"]["f1"], tasks[SA.name]["macro_f1"])


def _slue_corpora(rows: Sequence[Row]) -> list[str]:
    """The corpora that have NER or SA rows."""
    return sorted({r["corpus"] for task in (NER, SA) for r in annotated_rows(rows, task)})


def _slue_counts(rows: Sequence[Row], counts: Mapping[str, Counts]) -> dict[str, Counts]:
    """The SLUE score's counts out of those of its parts, one row an utterance of its corpora.

    An utterance's transcript and annotations are drawn together; each corpus' words have columns of their own, because
    the score averages error rates of corpora.
    """
    ner, sa = counts.get(f"{NER.name}/f1"), counts.get(f"{SA.name}/macro_f1")
    if ner is None or sa is None:
        return {}
    corpora = _slue_corpora(rows)
    parts = [*(counts[f"wer/{corpus}"] for corpus in corpora), ner, sa]
    where = {key: i for i, key in enumerate(key for part in parts[: len(corpora)] for key in part.keys)}
    blocks = []
    for part in parts:
        block = np.zeros((len(where), part.matrix.shape[1]), dtype=np.int64)
        block[[where[key] for key in part.keys]] = part.matrix
        blocks.append(block)
    strata = tuple(corpus for corpus in corpora for _ in counts[f"wer/{corpus}"].keys)
    return {"slue_score": Counts(tuple(where), np.concatenate(blocks, axis=1), slue_statistic(len(corpora)), strata)}


def _position_blocks(rows: Sequence[Row], registry: TaskRegistry) -> dict[str, Any]:
    blocks = {}
    for task in registry:
        group = annotated_rows(rows, task) if isinstance(task, SpanTask) else []
        items = _position_items(group)
        if group and items is not None:
            blocks[task.name] = {"n": len(group), **position_scores(items).to_dict()}
    return blocks


def _position_items(group: Sequence[Row]) -> list[PositionItem] | None:
    """What position scores read; None where references lack offsets."""
    items = []
    for row in group:
        spans = ref_spans(row)
        if spans is None:
            return None
        items.append(PositionItem(row["ref_text"], spans, _hyp_text(row), hyp_entities(row)))
    return items


def _malformed(rows: Sequence[Row]) -> dict[str, Any]:
    bad = sum(bool(row.get("problems")) for row in rows)
    kinds = Counter(kind for row in rows for kind in row.get("problems") or ())
    return {
        "share": 100.0 * bad / len(rows) if rows else 0.0,
        "rows": bad,
        "kinds": dict(sorted(kinds.items())),
    }


def _wer(group: Sequence[Row], protocol: Protocol) -> dict[str, Any]:
    scored = corpus_wer([r["ref_text"] for r in group], [_hyp_text(r) for r in group], protocol)
    return {"n": len(group), **scored.to_dict()}


def _by_corpus(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["corpus"], []).append(row)
    return dict(sorted(groups.items()))


def _hyp_text(row: Row) -> str:
    return row.get("hyp_text") or ""


def _keys(group: Sequence[Row]) -> tuple[str, ...]:
    return tuple(utterance_key(row) for row in group)


def _cells(result: Mapping[str, Any], protocol: str) -> dict[str, float]:
    """One run's table row, by column title; the titles start with what they are grouped by."""
    block = result["protocols"][protocol]
    cells = {f"WER {corpus}": wer["wer"] for corpus, wer in block["wer"]["by_corpus"].items()}
    cells["WER all"] = block["wer"]["overall"]["wer"]
    for name, task in block["tasks"].items():
        if "entity" in task:
            cells[f"{name.upper()} F1"] = task["entity"]["f1"]
            cells[f"{name.upper()} label-F1"] = task["label"]["f1"]
            if name in result["position"]:
                cells[f"{name.upper()} position-F1"] = result["position"][name]["f1"]
        else:
            cells[f"{name.upper()} macro-F1"] = task["macro_f1"]
    if block["slue_score"] is not None:
        cells["SLUE"] = block["slue_score"]
    cells["malformed %"] = result["malformed"]["share"]
    return cells


def _columns(rows: Any) -> list[str]:
    """Titles of all runs: WER by corpus, WER all, tasks, SLUE, malformed."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    ends = {"WER all": 1, "SLUE": 3, "malformed %": 4}
    return sorted(titles, key=lambda title: ends.get(title, 0 if title.startswith("WER ") else 2))
