"""Entities: F1 by phrase and by position, and what became of those that are not right.

docs/scoring.md says what the scores are. F1 and label-F1 are slue-toolkit's; 0/0 is 0. F1 by
position is the strict F1 of seqeval on BIO tags over the reference words, and also takes what BIO
cannot write: nested entities, and those elsewhere. Two rules of placing:

1. Predicted phrases are located in their transcript from left to right; one that occurs several
   times gets the place that is right, if one is.
2. A reference word that was not recognised counts as labelled next to a labelled word of the same
   reference entity.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jiwer import AlignmentChunk
from numpy.typing import NDArray
from rapidfuzz.distance.Levenshtein import distance, normalized_distance

from unislu_llm.scoring.predictions import Entity, Prediction
from unislu_llm.scoring.text import Protocol, normalise_phrase, places_of, written_in_characters
from unislu_llm.scoring.wer import align

Sides = Sequence[tuple[Counter[Entity], Counter[Entity]]]
"""Entities of reference and prediction of each utterance, as a score compares them."""
WordSpan = tuple[int, int]  # first word and the one behind the last

KINDS = {
    "reference": ("right", "misheard", "not_tagged", "wrong_label", "wrong_boundary"),
    "predicted": ("right", "misheard", "wrong_label", "wrong_boundary", "hallucinated"),
}
"""Kinds of errors of each side's entities; docs/scoring.md says what they mean."""


class Placed(NamedTuple):
    """An entity with its place."""

    label: str
    phrase: str  # normalised
    span: WordSpan | None  # of reference words; None where all of its words are insertions


# An utterance's normalised hypothesis, and its entities of reference and prediction.
Placement = tuple[str, list[Placed], list[Placed]]


def by_phrase(placed: Sequence[Placement]) -> Sides:
    return [(Counter(e[:2] for e in gold), Counter(e[:2] for e in pred))
            for _, gold, pred in placed]


def by_label(placed: Sequence[Placement]) -> Sides:
    return [(Counter((e.label, "") for e in gold), Counter((e.label, "") for e in pred))
            for _, gold, pred in placed]


def by_position(placed: Sequence[Placement]) -> Sides:
    # What has no place equals nothing.
    return [(Counter((e.label, str(e.span or "nowhere")) for e in gold),
             Counter((e.label, str(e.span)) for e in pred)) for _, gold, pred in placed]


def span_scores(sides: Sides) -> dict[str, Any]:
    """:func:`averaged` over entities."""
    # The intersection of multisets: a phrase said twice and found once is right once.
    return averaged((e[0], min(ref[e], hyp[e]), ref[e], hyp[e])
                    for ref, hyp in sides for e in ref | hyp)


def averaged(counts: Iterable[tuple[str, float, float, float]]) -> dict[str, Any]:
    """Micro average as of :func:`prf`, `macro` average (means over labels) and `by_label`, of
    labels with their right, reference and predicted ones."""
    sums = defaultdict[str, list[float]](lambda: [0, 0, 0])
    for label, *more in counts:
        sums[label] = [a + b for a, b in zip(sums[label], more, strict=True)]
    by_label = {label: prf(*sums[label]) for label in sorted(sums)}
    return {**prf(*map(sum, zip((0, 0, 0), *sums.values(), strict=True))),
            "macro": macro_average(by_label.values()), "by_label": by_label}


def span_counts(sides: Sides) -> NDArray[np.int64]:
    """`(utterances, 3)`: right, reference and predicted entities, the input of a bootstrap."""
    return np.array([((ref & hyp).total(), ref.total(), hyp.total()) for ref, hyp in sides])


SLURP_METRICS = {"word_f1": ("word",), "char_f1": ("char",), "slu_f1": ("word", "char")}


def slot_pairs(p: Prediction, metric: str) -> Iterator[tuple[str, float, float, float]]:
    """What :func:`averaged` makes SLURP's own F1 of (arXiv 2011.13205), of an annotated prediction.

    A predicted slot takes the nearest reference slot of its label that is left, in the order of
    prediction. The pair is one true positive, and its distance is added to false positives and
    false negatives; a slot without a pair is one of these. The distance is the word error rate
    (over 1 with insertions), or of characters the edit distance by the longer length.
    """
    def units(phrase: str) -> Sequence[str]:
        phrase = normalise_phrase(phrase, "slurp", p.language)
        # Words of languages without blanks are characters already.
        return phrase.split() if unit == "word" or written_in_characters(p.language) else phrase

    for unit in SLURP_METRICS[metric]:
        left = [(label, units(phrase)) for label, phrase, *_ in p.ref]
        for label, said in ((label, units(phrase)) for label, phrase in p.hyp_entities):
            # The first of equally near ones, as in SLURP's evaluation.
            off, i = min(((distance(slot, said) / max(len(slot), 1) if unit == "word" else
                           normalized_distance(slot, said), i)
                          for i, (name, slot) in enumerate(left) if name == label), default=(0, -1))
            yield label, i >= 0, (1 + off) * (i >= 0), 1 + off
            if i >= 0:
                left.pop(i)
        yield from ((label, 0, 1, 0) for label, _ in left)


def prf(tp: float, n_gold: float, n_pred: float) -> dict[str, float]:
    """Precision, recall and F1 in percent, of so many right, reference and predicted ones."""
    return {"precision": 100.0 * tp / max(n_pred, 1), "recall": 100.0 * tp / max(n_gold, 1),
            "f1": 200.0 * tp / max(n_gold + n_pred, 1),
            "tp": tp, "n_gold": n_gold, "n_pred": n_pred}


def macro_average(by_label: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean scores over the labels that occur in reference or prediction; zeros without any."""
    # The toolkit's rule; over all labels a rare one would drag the mean down in a small dev set.
    present = [scores for scores in by_label if scores["n_gold"] + scores["n_pred"]]
    return {key: sum(scores[key] for scores in present) / max(len(present), 1)
            for key in ("precision", "recall", "f1")}


def entity_errors(placed: Iterable[Placement]) -> dict[str, dict[str, int]]:
    """Entities of each side (`reference`, `predicted`) by kind."""
    counts: dict[str, Counter[str]] = {side: Counter() for side in KINDS}
    for utterance in placed:
        for own, kinds in zip(counts.values(), name_kinds(utterance), strict=True):
            own.update(kinds)
    return {side: {kind: counts[side][kind] for kind in kinds} for side, kinds in KINDS.items()}


def name_kinds(placed: Placement) -> tuple[list[str], list[str]]:
    """Kind of each reference and of each predicted entity of one utterance."""
    hyp, gold, pred = placed
    of_gold, of_pred = [""] * len(gold), [""] * len(pred)

    def pair(kind: str, agree: Callable[[Placed, Placed], bool], among: Iterable[int]) -> None:
        # First come, first served: the entities of an utterance are few and in order of speech.
        for i, (j, entity) in product(among, enumerate(pred)):
            if not of_gold[i] and not of_pred[j] and agree(gold[i], entity):
                of_gold[i] = of_pred[j] = kind

    def meet(one: Placed, two: Placed) -> bool:
        a, b = one.span, two.span
        return bool(one.label == two.label and a and b and a[0] < b[1] and b[0] < a[1])

    # Phrases decide first, as in entity F1; places decide about what is left.
    pair("right", lambda one, two: one[:2] == two[:2], range(len(gold)))
    pair("wrong_label", lambda one, two: one.phrase == two.phrase, range(len(gold)))
    # A phrase that is in the transcript once makes one entity recognised, a paired one before.
    present, said = set(), Counter[str]()
    for i in sorted(range(len(gold)), key=lambda i: not of_gold[i]):
        said[gold[i].phrase] += 1
        if said[gold[i].phrase] <= len(occurrences(gold[i].phrase, hyp)):
            present.add(i)
    pair("wrong_boundary", meet, sorted(present))
    pair("misheard", meet, range(len(gold)))
    return ([kind or ("not_tagged" if i in present else "misheard")
             for i, kind in enumerate(of_gold)], [kind or "hallucinated" for kind in of_pred])


def place(predictions: Sequence[Prediction], protocol: Protocol | None = None) -> list[Placement]:
    """Entities of annotated predictions of one span task among the reference words.

    Words are those of the protocol's phrases; without one lower-case words of the NER text.
    """
    def normaliser(p: Prediction) -> Callable[[str], str]:
        return (partial(normalise_phrase, protocol=protocol, language=p.language) if protocol else
                lambda text: normalise_phrase(text, "slue").lower())

    refs = [normaliser(p)(p.ref_text) for p in predictions]
    hyps = [normaliser(p)(p.hyp_text) for p in predictions]
    found = []
    for p, ref, hyp, chunks in zip(predictions, refs, hyps, align(refs, hyps), strict=True):
        normalise = normaliser(p)
        gold = place_reference(p, ref, normalise)
        # An entity of whose phrase nothing is left by normalisation is none, as in the toolkit.
        named = [(label, normalise(phrase)) for label, phrase in p.hyp_entities]
        found.append((hyp, gold, _place_predicted([e for e in named if e[1]], hyp, chunks, gold)))
    return found


def occurrences(phrase: str, text: str) -> list[WordSpan]:
    """Every stretch of words that holds `phrase`; parts of hyphenated words count."""
    # Blanks before a place count its words.
    return [(text.count(" ", 0, at), text.count(" ", 0, end) + 1)
            for at, end in places_of(phrase, text)]


def place_reference(p: Prediction, ref: str, normalise: Callable[[str], str]) -> list[Placed]:
    """Reference entities of a prediction among the words of its normalised reference `ref`."""
    found, behind = [], 0
    for label, text, *offsets in p.ref:
        if not (phrase := normalise(text)):
            continue  # punctuation alone
        places = occurrences(phrase, ref)
        # Normalisation rewrites numbers and spellings, so that offsets do not survive it; they
        # tell which of several places is meant: that with as many words before it.
        if offsets and len(places) > 1:
            behind = len(normalise(p.ref_text[:offsets[0]]).split())
        span = min(places, key=lambda at: abs(at[0] - behind), default=None)
        behind = span[1] if span else behind
        found.append(Placed(label, phrase, span))
    return found


def _place_predicted(entities: Sequence[Entity], hyp: str, chunks: Sequence[AlignmentChunk],
                     gold: Sequence[Placed]) -> list[Placed]:
    ref_of = {c.hyp_start_idx + k: c.ref_start_idx + k for c in chunks
              if c.type in ("equal", "substitute") for k in range(c.hyp_end_idx - c.hyp_start_idx)}
    right = {(entity.label, entity.span) for entity in gold if entity.span}
    placed: list[Placed] = []
    taken: list[WordSpan] = [(0, 0)]
    for label, phrase in entities:
        free = {at: _carry_over(at, ref_of, gold) for at in occurrences(phrase, hyp)
                if at not in taken}
        if free:
            # Rule 1 of the module: the right place first, then the order of speech.
            behind = taken[-1][1]
            at = min(free, key=lambda at: ((label, free[at]) not in right, at[0] < behind, at))
            taken.append(at)
        placed.append(Placed(label, phrase, free[at] if free else None))
    return placed


def _carry_over(at: WordSpan, ref_of: dict[int, int], gold: Sequence[Placed]) -> WordSpan | None:
    """The reference words that a stretch of hypothesis words stands for."""
    words = [ref_of[i] for i in range(*at) if i in ref_of]
    if not words:
        return None
    start, end, recognised = min(words), max(words) + 1, set(ref_of.values())
    # Reference words that are followed by one of the same entity.
    joined = {i for e in gold if e.span for i in range(e.span[0], e.span[1] - 1)}
    # Rule 2 of the module, in both directions.
    while start - 1 in joined - recognised:
        start -= 1
    while end - 1 in joined and end not in recognised:
        end += 1
    return start, end
