"""Scores of predictions under each protocol: WER by corpus, tasks, malformed outputs, SLUE."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from unislu_llm.errors import UserError
from unislu_llm.scoring import bootstrap as boot
from unislu_llm.scoring import entities
from unislu_llm.scoring.bootstrap import Counts
from unislu_llm.scoring.entities import SLURP_METRICS, slot_pairs
from unislu_llm.scoring.labels import indicators, label_scores
from unislu_llm.scoring.predictions import Prediction, annotated, check_predictions, spoken_once
from unislu_llm.scoring.text import PROTOCOLS, Protocol
from unislu_llm.scoring.wer import WER, edits, rate_of
from unislu_llm.tasks import NER, SA, LabelTask, SpanTask, Task, TaskRegistry


def slue_score(wers: Sequence[float], ner_f1: float, sa_f1: float) -> float:
    """Mean of word accuracy (itself the mean over corpora), NER F1 and SA macro-F1, in percent."""
    return (100.0 - float(np.mean(wers)) + ner_f1 + sa_f1) / 3.0


def score_predictions(predictions: Sequence[Prediction | Mapping[str, Any]],
                      registry: TaskRegistry) -> dict[str, Any]:
    """Score the predictions of one system, records or plain data. Rates are percent, not rounded.

    Raises UserError: a prediction cannot be scored. Returns plain data::

        n_predictions, n_utterances, no_speech: int (utterances that use would not answer)
        malformed: {share: percent with a problem, n, kinds: {kind: occurrences}}
        position: {span task: {n, f1, ...}}
        protocols: {protocol: {
            wer: {overall: {wer, errors, ..., cer, rate: what `wer` is}, by_corpus: ...},
            hypothesis_wer, ctc_wer: where all are known; ..._by_corpus: likewise,
            tasks: {span task: {n, entity: {f1, ...}, label: {f1, ...},
                                errors: {reference: {kind: n}, predicted: {kind: n}},
                                of protocol slurp: {word_f1, char_f1, slu_f1: {f1, ...}}},
                    label task: {n, macro_f1, ...}},
            slue_score: float, or None without both NER and SA}}
    """
    records = check_predictions(predictions, registry)
    spoken = spoken_once(records, registry)
    # Malformed answers are scored, never dropped: what could be read counts, the rest is missing.
    bad = sum(bool(p.problems) for p in records)
    kinds = Counter(kind for p in records for kind in p.problems)
    position = {task.name: {"n": len(known),
                            **entities.span_scores(entities.by_position(entities.place(known)))}
                for task, known in _annotated_tasks(records, registry)
                if isinstance(task, SpanTask)}
    return {
        "n_predictions": len(records),
        "n_utterances": len(spoken),
        "no_speech": sum(p.no_speech for p in spoken),
        "malformed": {"share": 100.0 * bad / max(len(records), 1), "n": bad,
                      "kinds": dict(sorted(kinds.items()))},
        "position": position,
        "protocols": {p: _protocol_block(records, spoken, registry, p)
                      for p in (*PROTOCOLS, *(("slurp",) if "slots" in registry else ()))},
    }


def flat_scores(results: Mapping[str, Any], protocol: Protocol = "whisper") -> dict[str, float]:
    """Headline metrics of :func:`score_predictions`, by the names that logs and tables have;
    `score` picks the best checkpoint: the SLUE score, else the mean of word accuracy and F1s."""
    if (block := results["protocols"].get(protocol)) is None:
        raise UserError(f"not scored under protocol '{protocol}', which is for runs with a task "
                        "`slots`; name another --protocol")
    # Older files lack names and CER.
    overall, named = block["wer"]["overall"], block["wer"]["overall"].get("rate", "wer")
    flat = {f"{wer.get('rate', 'wer')}_{corpus}": wer["wer"]
            for corpus, wer in block["wer"]["by_corpus"].items()}
    flat |= {key: overall[key] for key in (named, "cer") if key in overall}
    flat |= {name.replace("wer", named): block[name] for name in ("hypothesis_wer", "ctc_wer")
             if name in block}
    for name, task in block["tasks"].items():
        if "macro_f1" in task:
            flat[f"{name}_f1"] = task["macro_f1"]
            flat |= {f"{name}_accuracy": task["accuracy"]} if protocol == "slurp" else {}
        else:
            flat |= {f"{name}_f1": task["entity"]["f1"], f"{name}_label_f1": task["label"]["f1"],
                     f"{name}_position_f1": results["position"][name]["f1"]}
            flat |= {f"{name}_{key}": task[key]["f1"] for key in SLURP_METRICS if key in task}
    flat["malformed"] = results["malformed"]["share"]
    if block["slue_score"] is not None:
        return flat | {"slue": block["slue_score"], "score": block["slue_score"]}
    # Without both tasks there is no SLUE score; words then weigh as much as each task.
    f1s = [flat[f"{name}_f1"] for name in block["tasks"]]
    return flat | {"score": (100.0 - overall["wer"] + sum(f1s)) / (1 + len(f1s))}


def interval_of(key: str, known: Container[str]) -> str | None:
    """What a metric of :func:`flat_scores` is called in :func:`utterance_counts`, where it is."""
    names = (key, key.replace("_", "/", 1), key.replace("_f1", "/macro_f1"), f"{key}_score",
             re.sub(r"_(?=((label|position|word|char|slu)_)?(f1|accuracy)$)", "/", key, count=1))
    return next((name for name in names if name in known), None)


def same_data(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line if results of :func:`score_predictions`, by name, are of other data: of other numbers
    of reference words or of annotated utterances."""
    found = {}
    for name, result in results.items():
        block = result["protocols"]["whisper"]
        words = {f"words of {c}": wer["ref_words"] for c, wer in block["wer"]["by_corpus"].items()}
        found[name] = words | {f"utterances with {t}": s["n"] for t, s in block["tasks"].items()}
    for key in dict.fromkeys(key for counts in found.values() for key in counts):
        if len({counts.get(key, 0) for counts in found.values()}) > 1:
            return ["warning: not scored on the same data: " + ", ".join(
                f"{counts.get(key, 0)} {key} in {name}" for name, counts in found.items())]
    return []


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of :func:`flat_scores` by name of the run, one a protocol, to two digits."""
    tables = []
    for protocol in dict.fromkeys(p for result in results.values() for p in result["protocols"]):
        rows = [{"run": run, **flat_scores(result, protocol)} for run, result in results.items()
                if protocol in result["protocols"]]
        table = tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f", missingval="-",
                         disable_numparse=[0])  # a run may be called 1e5
        tables.append(f"Protocol: {protocol}\n\n{table}")
    return "\n\n".join(tables)


def utterance_counts(records: Sequence[Prediction], registry: TaskRegistry,
                     protocol: Protocol) -> dict[str, Counts]:
    """Counts by utterance, for a bootstrap, of `wer`, `cer`, `wer/<corpus>` (or `cer/`), `<span
    task>/f1`, `/label_f1`, `/position_f1`, `<label task>/macro_f1`; NER and SA: `slue_score`."""
    spoken = spoken_once(records, registry)
    counts: dict[str, Counts] = {}

    def add(name: str, some: Sequence[Prediction], matrix: Any, statistic: boot.Statistic) -> None:
        counts[name] = Counts(tuple(p.utterance for p in some), matrix, statistic)

    # Words are counted once an utterance, annotations once a task: these have rows of their own.
    corpora = {f"/{corpus}": some for corpus, some in by_corpus(spoken).items()}
    for name, some in {"": spoken, **corpora}.items():
        for rate in {rate_of([p.language for p in some]): 0} | ({} if name else {"cer": 0}):
            subs, dels, ins, hits = edits(some, protocol, characters=rate == "cer").T
            matrix = np.stack([subs + dels + ins, subs + dels + hits], axis=1)
            add(rate + name, some, matrix, boot.error_rate)
    for task, known in _annotated_tasks(records, registry):
        if isinstance(task, LabelTask):
            gold, pred, kept = indicators(known, task, protocol)
            matrix = np.concatenate([gold & pred, gold, pred], axis=1, dtype=np.int64)
            add(f"{task.name}/macro_f1", known, matrix, boot.macro_f1)
            if protocol == "slurp":  # a share like an error rate, of what is right
                matrix = np.stack([(gold == pred).all(axis=1) & kept, kept], 1).astype(np.int64)
                add(f"{task.name}/accuracy", known, matrix, boot.error_rate)
            continue
        placed = entities.place(known, protocol)
        for name, sides in (("f1", entities.by_phrase(placed)),
                            ("label_f1", entities.by_label(placed)),
                            ("position_f1", entities.by_position(entities.place(known)))):
            add(f"{task.name}/{name}", known, entities.span_counts(sides), boot.micro_f1)
        for name in SLURP_METRICS if protocol == "slurp" else ():
            sums = [np.sum([[0.0] * 3, *(c[1:] for c in slot_pairs(p, name))], 0) for p in known]
            add(f"{task.name}/{name}", known, np.array(sums), boot.micro_f1)
    return counts | _slue_counts(counts)


def intervals(records: Sequence[Prediction], registry: TaskRegistry,
              protocol: Protocol) -> dict[str, dict[str, float]]:
    """95 % interval of every score of :func:`utterance_counts`, as `{score: {low, high}}`."""
    spans = {name: boot.bootstrap(counts)
             for name, counts in utterance_counts(records, registry, protocol).items()}
    return {name: {"low": span["low"], "high": span["high"]} for name, span in spans.items()}


def by_corpus(records: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions of each corpus, by name."""
    return {c: [p for p in records if p.corpus == c] for c in sorted({p.corpus for p in records})}


def _annotated_tasks(records: Sequence[Prediction],
                     registry: TaskRegistry) -> list[tuple[Task, list[Prediction]]]:
    # A task without annotations is left out, where a score of 0 would look like a bad model's.
    return [(task, known) for task in registry if (known := annotated(records, task))]


def _protocol_block(records: Sequence[Prediction], spoken: Sequence[Prediction],
                    registry: TaskRegistry, protocol: Protocol) -> dict[str, Any]:
    corpora = by_corpus(spoken)

    def wer(some: Sequence[Prediction], field: str = "hyp_text") -> dict[str, Any]:
        return {"n": len(some), **WER.of(edits(some, protocol, field))._asdict(),
                "cer": WER.of(edits(some, protocol, field, characters=True)).wer,
                "rate": rate_of([p.language for p in some])}

    wers = {name: wer(some) for name, some in corpora.items()}
    block: dict[str, Any] = {"wer": {"overall": wer(spoken), "by_corpus": wers}}
    for name, field in (("hypothesis_wer", "hypothesis"), ("ctc_wer", "ctc_hypothesis")):
        # Of a part of the utterances it would mislead.
        if spoken and all(getattr(p, field) is not None for p in spoken):
            block[name] = wer(spoken, field)["wer"]
            block[f"{name}_by_corpus"] = {c: wer(some, field)["wer"] for c, some in corpora.items()}
    tasks = {task.name: _task_block(task, known, protocol)
             for task, known in _annotated_tasks(records, registry)}
    slue = None
    if "entity" in tasks.get(NER.name, {}) and "macro_f1" in tasks.get(SA.name, {}):
        # Corpora without either annotation have no part in it.
        scored = {p.corpus for task in (NER, SA) for p in annotated(records, task)}
        slue = slue_score([wers[corpus]["wer"] for corpus in sorted(scored)],
                          tasks[NER.name]["entity"]["f1"], tasks[SA.name]["macro_f1"])
    return block | {"tasks": tasks, "slue_score": slue}


def _task_block(task: Task, known: Sequence[Prediction], protocol: Protocol) -> dict[str, Any]:
    if isinstance(task, LabelTask):
        return label_scores(known, task, protocol)
    placed = entities.place(known, protocol)
    return {"n": len(known), "entity": entities.span_scores(entities.by_phrase(placed)),
            "label": entities.span_scores(entities.by_label(placed)),
            "errors": entities.entity_errors(placed),
            **{name: entities.averaged(c for p in known for c in slot_pairs(p, name))
               for name in SLURP_METRICS if protocol == "slurp"}}


def _slue_counts(counts: Mapping[str, Counts]) -> dict[str, Counts]:
    """The SLUE score's counts out of those of its parts, one row an utterance of its corpora."""
    ner, sa = counts.get(f"{NER.name}/f1"), counts.get(f"{SA.name}/macro_f1")
    if ner is None or sa is None:
        return {}
    # An utterance's transcript and annotations are drawn together; each corpus' words have columns
    # of their own, because the score averages error rates of corpora.
    words = [next(counts[name] for name in (f"wer/{c}", f"cer/{c}") if name in counts)
             for c in sorted({c for c, _ in ner.utterances + sa.utterances})]
    utterances = tuple(utterance for part in words for utterance in part.utterances)
    where = {utterance: i for i, utterance in enumerate(utterances)}
    blocks = []
    for part in (*words, ner, sa):
        # Rows that a part lacks are zero: drawing them changes nothing of it.
        block = np.zeros((len(utterances), part.matrix.shape[1]), dtype=np.int64)
        block[[where[utterance] for utterance in part.utterances]] = part.matrix
        blocks.append(block)
    return {"slue_score": Counts(utterances, np.concatenate(blocks, axis=1),
                                 boot.slue_statistic(len(words)))}
