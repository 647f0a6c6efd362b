"""Entity F1 and label-F1 of SLUE (slue-toolkit): multisets of labelled phrases, without positions.

In each utterance the reference and the hypothesis are multisets of (label, phrase); what both have is right.
Counts are pooled over the corpus (micro). Label-F1 ignores the phrase. The macro average is the mean over the
labels that occur in reference or hypothesis, as in the toolkit. 0/0 is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unislu_llm.data.slue import RAW_TO_COMBINED
from unislu_llm.errors import UserError
from unislu_llm.scoring.text import Protocol, normalise_phrase

Entity = tuple[str, str]
"""Label and phrase."""

Utterances = Sequence[Iterable[Sequence[Any]]]
"""Entities of each utterance, `(label, phrase, ...)` as they were annotated or decoded."""


@dataclass(frozen=True)
class PRF:
    """Precision, recall and F1 in percent, with the counts they come from; 0/0 is 0."""

    precision: float
    recall: float
    f1: float
    tp: int
    n_gold: int
    n_pred: int

    @classmethod
    def of(cls, tp: int, n_gold: int, n_pred: int) -> PRF:
        """Scores of `tp` right ones among `n_pred` predicted and `n_gold` in the reference."""
        return cls(
            _percent(tp, n_pred), _percent(tp, n_gold), _percent(2 * tp, n_gold + n_pred), tp, n_gold, n_pred
        )


@dataclass(frozen=True)
class SpanScores:
    """Micro average, macro average (means over labels, in percent) and the table by label."""

    micro: PRF
    macro: dict[str, float]
    by_label: dict[str, PRF]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self.micro),
            "macro": dict(self.macro),
            "by_label": {label: asdict(prf) for label, prf in self.by_label.items()},
        }


def prepare(
    entities: Iterable[Sequence[Any]], protocol: Protocol, *, raw_to_combined: bool = False
) -> list[Entity]:
    """Entities as they are compared: phrases normalised under `protocol`, labels mapped on demand.

    Args:
        entities: `(label, phrase, ...)`; what follows the phrase is ignored.
        raw_to_combined: map the 18 raw labels to the seven combined ones and drop the others; labels that are
            combined already stay.

    An entity of whose phrase nothing is left is none, as in the toolkit.
    """
    prepared = []
    for label, phrase, *_ in entities:
        name = RAW_TO_COMBINED.get(label, label) if raw_to_combined else label
        text = normalise_phrase(phrase, protocol)
        if name is not None and text:
            prepared.append((str(name), text))
    return prepared


def entity_f1(
    gold: Utterances, pred: Utterances, protocol: Protocol, *, raw_to_combined: bool = False
) -> SpanScores:
    """F1 of (label, phrase): both have to be right.

    Args:
        gold, pred: `(label, phrase)` pairs of each utterance.

    Raises:
        UserError: unequal numbers of utterances, or an unknown protocol.
    """
    return span_scores(*_prepared(gold, pred, protocol, raw_to_combined))


def label_f1(
    gold: Utterances, pred: Utterances, protocol: Protocol, *, raw_to_combined: bool = False
) -> SpanScores:
    """F1 of labels alone: an entity of that kind was found in the utterance, whatever the words recognised.

    Takes and raises what :func:`entity_f1` does.
    """
    golds, preds = _prepared(gold, pred, protocol, raw_to_combined)
    return span_scores(_labels_only(golds), _labels_only(preds))


def entity_counts(
    gold: Utterances,
    pred: Utterances,
    protocol: Protocol,
    *,
    raw_to_combined: bool = False,
    labels_only: bool = False,
) -> NDArray[np.int64]:
    """`(utterances, 3)`: true positives, reference and predicted entities, the input of a bootstrap."""
    golds, preds = _prepared(gold, pred, protocol, raw_to_combined)
    if labels_only:
        golds, preds = _labels_only(golds), _labels_only(preds)
    rows = [(matches(g, p).total(), len(g), len(p)) for g, p in zip(golds, preds, strict=True)]
    return np.array(rows, dtype=np.int64).reshape(len(rows), 3)


def matches(gold: Iterable[Entity], pred: Iterable[Entity]) -> Counter[Entity]:
    """What one utterance's reference and hypothesis have in common, as a multiset."""
    return Counter(gold) & Counter(pred)


def span_scores(golds: Sequence[Sequence[Entity]], preds: Sequence[Sequence[Entity]]) -> SpanScores:
    """Scores of entities as they are; the second field may be anything that identifies a phrase."""
    tp: Counter[str] = Counter()
    n_gold = Counter(label for entities in golds for label, _ in entities)
    n_pred = Counter(label for entities in preds for label, _ in entities)
    for gold, pred in zip(golds, preds, strict=True):
        for (label, _), n in matches(gold, pred).items():
            tp[label] += n
    by_label = {
        label: PRF.of(tp[label], n_gold[label], n_pred[label]) for label in sorted({*n_gold, *n_pred})
    }
    micro = PRF.of(tp.total(), n_gold.total(), n_pred.total())
    return SpanScores(micro, macro_average(by_label.values()), by_label)


def macro_average(by_label: Iterable[PRF]) -> dict[str, float]:
    """Mean precision, recall and F1 over the labels that occur in reference or prediction; else zeros."""
    present = [prf for prf in by_label if prf.n_gold or prf.n_pred]
    mean = {key: sum(getattr(prf, key) for prf in present) for key in ("precision", "recall", "f1")}
    return {key: total / len(present) if present else 0.0 for key, total in mean.items()}


def _prepared(
    gold: Utterances,
    pred: Utterances,
    protocol: Protocol,
    raw_to_combined: bool,
) -> tuple[list[list[Entity]], list[list[Entity]]]:
    if len(gold) != len(pred):
        raise UserError(
            f"entities of {len(gold)} reference utterances but of {len(pred)} hypotheses; give one list each"
        )
    return (
        [prepare(entities, protocol, raw_to_combined=raw_to_combined) for entities in gold],
        [prepare(entities, protocol, raw_to_combined=raw_to_combined) for entities in pred],
    )


def _labels_only(utterances: list[list[Entity]]) -> list[list[Entity]]:
    return [[(label, "") for label, _ in entities] for entities in utterances]


def _percent(numerator: float, denominator: float) -> float:
    return 100.0 * numerator / denominator if denominator else 0.0
