"""Scores of label tasks: one label an utterance (sentiment) or several (dialogue acts).

docs/scoring.md says what no label counts as. References outside the label set (`Disagreement`,
`<mixed>`) are left out, as in slue-toolkit, whose "micro" is `weighted_f1` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unislu_llm.scoring.entities import macro_average, prf
from unislu_llm.scoring.predictions import Prediction
from unislu_llm.scoring.text import Protocol
from unislu_llm.tasks import LabelTask


def label_scores(predictions: Sequence[Prediction], task: LabelTask,
                 protocol: Protocol) -> dict[str, Any]:
    """Scores of the annotated predictions of a label task, as plain data, in percent: `macro` means
    over labels, `accuracy` (of whole sets), `confusion` (rows: reference; None for sets); numbers
    of utterances: n, `skipped` (no reference label), `missing` (no word), `unknown` (no label)."""
    gold, pred, kept = indicators(predictions, task, protocol)
    answers = [p.hyp_labels for p, counts in zip(predictions, kept, strict=True) if counts]
    # One label is the case of several in which each row has one: the same arrays serve both.
    sums = ((gold & pred).sum(0).tolist(), gold.sum(0).tolist(), pred.sum(0).tolist())
    by_label = {label: prf(*n) for label, *n in zip(task.labels, *sums, strict=True)}
    macro = macro_average(by_label.values())
    weighted = sum(scores["f1"] * scores["n_gold"] for scores in by_label.values())
    confusion = np.zeros((len(task.labels), len(task.labels) + 1), dtype=np.int64)
    answered = np.where(pred.any(axis=1), pred.argmax(axis=1), len(task.labels))
    np.add.at(confusion, (gold.argmax(axis=1)[kept], answered[kept]), 1)
    return {
        "macro_f1": macro["f1"],
        "macro": macro,
        "weighted_f1": weighted / max(int(gold.sum()), 1),
        "accuracy": 100.0 * float((gold == pred)[kept].all(axis=1).mean()) if answers else 0.0,
        "by_label": by_label,
        "confusion": None if task.multi else confusion.tolist(),
        "confusion_labels": [*task.labels, "(none)"],
        "n": len(answers),
        "skipped": len(predictions) - len(answers),
        "missing": sum(labels is None for labels in answers),
        "unknown": sum(not set(labels or ()) <= set(task.labels) for labels in answers),
    }


def indicators(predictions: Sequence[Prediction], task: LabelTask,
               protocol: Protocol) -> tuple[NDArray[np.bool_], ...]:
    """Which labels hold, `(utterances, labels)`, in the reference and as predicted; and which
    `(utterances,)` count: rows of the others are empty, so that two systems' rows stay aligned."""
    gold, pred = np.zeros((2, len(predictions), len(task.labels)), dtype=np.bool_)
    kept = np.zeros(len(predictions), dtype=np.bool_)
    for i, p in enumerate(predictions):
        labels = p.ref_labels
        # A task with several labels may have none of them: only there an empty reference counts.
        if labels is not None and (labels or task.multi) and set(labels) <= set(task.labels):
            answer = _resolve(p.hyp_labels or (), task, protocol)
            gold[i] = [label in labels for label in task.labels]
            pred[i] = [label in answer for label in task.labels]
            kept[i] = True
    return gold, pred, kept


def _resolve(labels: tuple[str, ...], task: LabelTask, protocol: Protocol) -> tuple[str, ...]:
    """What an answer stands for; of a task with one label the first word counts."""
    labels = labels if task.multi else labels[:1]
    if protocol == "whisper" and "Neutral" in task.labels:
        return tuple(label if label in task.labels else "Neutral" for label in labels)
    return labels
