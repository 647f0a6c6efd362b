"""SLURP's F1 of slots, in which a misheard phrase counts by how far it is off (arXiv 2011.13205).

A predicted slot takes the nearest reference slot of its label that is left, in the order of
prediction. The pair is one true positive, and its distance is added to both false positives and
false negatives; a slot without a pair is one. In word-F1 the distance is the word error rate (over
1 with insertions), in char-F1 the edit distance of characters by the longer length; SLU-F1 is of
the sums of both. The exact F1 is :func:`unislu_llm.scoring.entities.by_phrase`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance.Levenshtein import distance, normalized_distance

from unislu_llm.scoring.entities import macro_average, prf
from unislu_llm.scoring.predictions import Prediction
from unislu_llm.scoring.text import normalise_phrase, written_in_characters

METRICS = {"word_f1": ("word",), "char_f1": ("char",), "slu_f1": ("word", "char")}


def slurp_scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """By metric the micro average as of :func:`prf`, the `macro` average, and `by_label`, of
    annotated predictions of one span task; all counts are of pairs and what was added to them."""
    scores = {}
    for name, units in METRICS.items():
        sums = defaultdict[str, NDArray[np.float64]](lambda: np.zeros(3))
        for label, *counts in (c for p in predictions for unit in units for c in _paired(p, unit)):
            sums[label] += counts
        by_label = {label: prf(*sums[label].tolist()) for label in sorted(sums)}
        scores[name] = {**prf(*sum(sums.values(), np.zeros(3)).tolist()),
                        "macro": macro_average(by_label.values()), "by_label": by_label}
    return scores


def slurp_counts(predictions: Sequence[Prediction], metric: str) -> NDArray[np.float64]:
    """`(utterances, 3)`: right, reference and predicted slots, the input of a bootstrap."""
    units = METRICS[metric]
    return np.array([np.sum([[0.0] * 3, *(c[1:] for unit in units for c in _paired(p, unit))], 0)
                     for p in predictions])


def _paired(p: Prediction, unit: str) -> Iterator[tuple[str, float, float, float]]:
    """Label, right, reference and predicted slots of each pair, and of each slot without one."""
    def units(phrase: str) -> Sequence[str]:
        phrase = normalise_phrase(phrase, "slurp", p.language)
        # Words of languages without blanks are characters already.
        return phrase.split() if unit == "word" or written_in_characters(p.language) else phrase

    left = [(label, units(phrase)) for label, phrase, *_ in p.ref]
    for label, said in ((label, units(phrase)) for label, phrase in p.hyp_entities):
        # The first of equally near ones, as in SLURP's own evaluation.
        off, i = min(((distance(slot, said) / max(len(slot), 1) if unit == "word" else
                       normalized_distance(slot, said), i)
                      for i, (name, slot) in enumerate(left) if name == label), default=(0.0, -1))
        if i >= 0:
            left.pop(i)
        yield label, float(i >= 0), (1.0 + off) * (i >= 0), 1.0 + off
    yield from ((label, 0.0, 1.0, 0.0) for label, _ in left)
