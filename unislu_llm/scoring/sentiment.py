"""Scores of label tasks: sentiment (one label an utterance) and multi-label tasks such as dialogue acts.

What counts as a prediction follows the protocol:

* `whisper` (the authors of UniSLU): a word that is no label counts as `Neutral`, where the task has that
  label; no word at all is wrong.
* `slue` (slue-toolkit): its classifiers can only answer with a label, so both cases, which they cannot have,
  are wrong.

References outside the label set (`Disagreement`, `<mixed>`) are left out, as in the toolkit. The macro
average is the mean over the task's labels that occur in reference or prediction (scikit-learn's rule); that
is all three on any test set of size. What the toolkit prints as "micro" is the support-weighted average,
`weighted_f1` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped,unused-ignore]

from unislu_llm.errors import UserError
from unislu_llm.scoring.ner import PRF, macro_average
from unislu_llm.scoring.text import Protocol, check_protocol
from unislu_llm.tasks import LabelTask

UNKNOWN = "<unknown>"
"""Stands for a hypothesis whose word is no label, where the word itself was not kept."""

NO_LABEL = "(none)"
"""Column of the confusion matrix for utterances without a usable label."""

FALLBACK = "Neutral"
"""The label that an unknown word counts as under the authors' rule."""

Label = str | Sequence[str] | None


@dataclass(frozen=True)
class LabelScores:
    """Scores in percent, counts in utterances.

    Args:
        accuracy: utterances whose label (with several, whose whole set) is right.
        confusion: rows are reference labels, columns `confusion_labels`; None for a multi-label task.
        n: utterances scored. skipped: those left out, their reference being outside the label set.
        missing: hypotheses without any word. unknown: hypotheses with a word that is no label.
    """

    macro: dict[str, float]
    weighted_f1: float
    accuracy: float
    by_label: dict[str, PRF]
    confusion: list[list[int]] | None
    confusion_labels: list[str]
    n: int
    skipped: int
    missing: int
    unknown: int

    @property
    def macro_f1(self) -> float:
        return self.macro["f1"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"macro_f1": self.macro_f1, **asdict(self)}


def label_scores(
    refs: Sequence[Label], hyps: Sequence[Label], task: LabelTask, protocol: Protocol
) -> LabelScores:
    """Score one label (or, for a multi-label task, a set of labels) an utterance.

    Args:
        refs: reference label or labels.
        hyps: predicted ones; None is missing, a word that is no label (or :data:`UNKNOWN`) is unknown.

    Raises:
        UserError: unequal numbers of utterances, or an unknown protocol.
    """
    gold, pred, kept = _indicators(refs, hyps, task, protocol)
    tp, n_gold, n_pred = (gold & pred).sum(axis=0), gold.sum(axis=0), pred.sum(axis=0)
    by_label = {
        label: PRF.of(int(tp[i]), int(n_gold[i]), int(n_pred[i])) for i, label in enumerate(task.labels)
    }
    support = sum(prf.n_gold for prf in by_label.values())
    weighted = sum(prf.f1 * prf.n_gold for prf in by_label.values())
    answers = [_words(hyps[i]) for i in kept]
    return LabelScores(
        macro=macro_average(by_label.values()),
        weighted_f1=weighted / support if support else 0.0,
        accuracy=100.0 * float((gold == pred).all(axis=1).mean()) if kept else 0.0,
        by_label=by_label,
        confusion=None if task.multi else _confusion(gold, pred, task),
        confusion_labels=[*task.labels, NO_LABEL],
        n=len(kept),
        skipped=len(refs) - len(kept),
        missing=sum(answer is None for answer in answers),
        unknown=sum(answer is not None and not set(answer) <= set(task.labels) for answer in answers),
    )


def label_counts(
    refs: Sequence[Label], hyps: Sequence[Label], task: LabelTask, protocol: Protocol
) -> NDArray[np.int64]:
    """`(utterances, 3 * labels)`: true positives, references, predictions by label: input of a bootstrap.

    Utterances left out of the scores have a row of zeros, so that rows stay aligned between systems.
    """
    gold, pred, kept = _indicators(refs, hyps, task, protocol)
    counts = np.zeros((len(refs), 3 * len(task.labels)), dtype=np.int64)
    counts[kept] = np.concatenate([gold & pred, gold, pred], axis=1)
    return counts


def _indicators(
    refs: Sequence[Label], hyps: Sequence[Label], task: LabelTask, protocol: Protocol
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], list[int]]:
    """Boolean `(utterances kept, labels)` of reference and prediction; the indices of the utterances kept."""
    check_protocol(protocol)
    if len(refs) != len(hyps):
        raise UserError(
            f"{len(refs)} references but {len(hyps)} hypotheses of task '{task.name}'; give one of each"
        )
    golds = [_words(ref) for ref in refs]
    kept = [
        i
        for i, ref in enumerate(golds)
        if ref is not None and (ref or task.multi) and set(ref) <= set(task.labels)
    ]
    gold = np.zeros((len(kept), len(task.labels)), dtype=np.bool_)
    pred = np.zeros_like(gold)
    for row, i in enumerate(kept):
        for label in golds[i] or ():
            gold[row, task.labels.index(label)] = True
        for label in _resolve(_words(hyps[i]), task, protocol):
            pred[row, task.labels.index(label)] = True
    return gold, pred, kept


def _resolve(words: tuple[str, ...] | None, task: LabelTask, protocol: Protocol) -> list[str]:
    """The task's labels that an answer stands for; a single-label task takes the first word."""
    words = words or ()
    if not task.multi:
        words = words[:1]
    if protocol == "whisper" and FALLBACK in task.labels:
        words = tuple(word if word in task.labels else FALLBACK for word in words)
    return [word for word in words if word in task.labels]


def _words(value: Label) -> tuple[str, ...] | None:
    if value is None:
        return None
    words = (value,) if isinstance(value, str) else tuple(value)
    words = tuple(word.strip() for word in words)
    # An empty string is no answer; an empty list is one (of a multi-label task): none of the labels.
    return None if words == ("",) else words


def _confusion(gold: NDArray[np.bool_], pred: NDArray[np.bool_], task: LabelTask) -> list[list[int]]:
    none = len(task.labels)
    if not len(gold):
        return [[0] * (none + 1) for _ in task.labels]
    answered = np.where(pred.any(axis=1), pred.argmax(axis=1), none)
    matrix = confusion_matrix(gold.argmax(axis=1), answered, labels=range(none + 1))
    return [[int(n) for n in row] for row in matrix[:none]]
