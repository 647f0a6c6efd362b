"""Entities by position: is the right stretch of speech labelled, whatever the words recognised there?

Reference and hypothesis transcripts are aligned word by word (jiwer), each hypothesis entity is carried over
to the reference words that its own words are aligned with, and it is right when label and reference word span
agree. That is the strict entity-level F1 that seqeval computes from BIO tags over the reference words; here
it is counted from the spans themselves, which also allows what BIO cannot write: nested entities, and
hypothesis entities outside the reference words.

Words are those of the NER text (:func:`~unislu_llm.scoring.text.ner_tokens`), in lower case on both sides.

Three rules that the measure needs:

* Hypothesis entities are phrases without offsets. They are located in their transcript from left to right,
  each behind the one before it. A phrase that occurs several times gets the benefit of the doubt: the place
  that is right, if one is. A phrase that its transcript does not contain is `unlocatable` and a false
  positive.
* A reference word that was not recognised at all cannot be labelled; next to a labelled word of the same
  reference entity it counts as labelled.
* An entity all of whose words are insertions has no place among the reference words and is a false positive.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jiwer
import numpy as np
from numpy.typing import NDArray

from unislu_llm.errors import UserError
from unislu_llm.scoring.ner import SpanScores, matches, span_scores
from unislu_llm.scoring.text import Token, ner_tokens

WordSpan = tuple[int, int]
"""First word and the one behind the last."""

ERRORS: dict[str, str] = {
    "correct": "label, position and phrase are right",
    "transcript_slip": "label and position are right, the words recognised there are not",
    "wrong_label": "the position is right, the label is not",
    "boundary": "the label is right, the position overlaps the reference's but differs",
    "missed": "a reference entity that is none of the above",
    "spurious": "a hypothesis entity that is none of the above",
    "unlocatable": "those of the spurious ones whose phrase does not occur in their own transcript",
}
"""What :attr:`PositionScores.errors` counts; the first four pair a reference and a hypothesis entity."""


class PositionItem(NamedTuple):
    """One utterance.

    `gold` is `(label, start, end)` in characters of `ref_text`; `pred` is `(label, phrase)` in the order
    decoded.
    """

    ref_text: str
    gold: Sequence[tuple[str, int, int]]
    hyp_text: str
    pred: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PositionScores:
    """F1 by position, and the entities by kind of error (:data:`ERRORS`)."""

    scores: SpanScores
    errors: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.scores.to_dict(), "errors": dict(self.errors)}


class Placed(NamedTuple):
    """An entity among the reference words; `span` is None without a place there."""

    label: str
    span: WordSpan | None
    phrase: str
    located: bool = True

    @property
    def key(self) -> tuple[str, str]:
        return self.label, str(self.span)


def position_scores(items: Sequence[PositionItem]) -> PositionScores:
    """Score entities by position.

    Raises:
        UserError: a reference span does not fit its text.
    """
    placed = place(items)
    errors = Counter(dict.fromkeys(ERRORS, 0))
    for gold, pred in placed:
        errors.update(_split_errors(gold, pred))
    scores = span_scores(
        [[g.key for g in gold] for gold, _ in placed], [[p.key for p in pred] for _, pred in placed]
    )
    return PositionScores(scores, dict(errors))


def position_counts(items: Sequence[PositionItem]) -> NDArray[np.int64]:
    """`(utterances, 3)`: right, reference and predicted entities, the input of a bootstrap."""
    rows = [
        (matches([g.key for g in gold], [p.key for p in pred]).total(), len(gold), len(pred))
        for gold, pred in place(items)
    ]
    return np.array(rows, dtype=np.int64).reshape(len(rows), 3)


def place(items: Sequence[PositionItem]) -> list[tuple[list[Placed], list[Placed]]]:
    """Reference and hypothesis entities of each utterance, among its reference words."""
    refs = [_lower(ner_tokens(item.ref_text)) for item in items]
    hyps = [[token.text for token in _lower(ner_tokens(item.hyp_text))] for item in items]
    placed = []
    for item, ref, hyp, aligned in zip(items, refs, hyps, _align(refs, hyps), strict=True):
        gold = [entity for label, start, end in item.gold if (entity := _gold(item, ref, label, start, end))]
        placed.append((gold, _place_pred(item.pred, hyp, aligned, gold)))
    return placed


def _gold(item: PositionItem, ref: list[Token], label: str, start: int, end: int) -> Placed | None:
    """A reference entity over the words that it touches; None where these are punctuation alone."""
    if not 0 <= start < end <= len(item.ref_text):
        raise UserError(
            f"entity {label} {start}..{end} does not fit its reference text of {len(item.ref_text)} "
            f"characters: '{item.ref_text[:60]}'"
        )
    touched = [i for i, token in enumerate(ref) if token.start < end and token.end > start]
    phrase = _phrase(item.ref_text[start:end])
    return Placed(label, (touched[0], touched[-1] + 1), phrase) if touched and phrase else None


def _align(refs: list[list[Token]], hyps: list[list[str]]) -> list[dict[int, int]]:
    """For each utterance, the reference word that each hypothesis word matches or replaces."""
    maps: list[dict[int, int]] = [{} for _ in refs]
    both = [i for i, (ref, hyp) in enumerate(zip(refs, hyps, strict=True)) if ref and hyp]
    if not both:
        return maps
    out = jiwer.process_words(
        [" ".join(t.text for t in refs[i]) for i in both], [" ".join(hyps[i]) for i in both]
    )
    for i, chunks in zip(both, out.alignments, strict=True):
        for chunk in chunks:
            if chunk.type in ("equal", "substitute"):
                maps[i].update(
                    zip(
                        range(chunk.hyp_start_idx, chunk.hyp_end_idx),
                        range(chunk.ref_start_idx, chunk.ref_end_idx),
                        strict=True,
                    )
                )
    return maps


def _place_pred(
    pred: Sequence[tuple[str, str]], hyp: list[str], aligned: dict[int, int], gold: list[Placed]
) -> list[Placed]:
    placed: list[Placed] = []
    taken: set[WordSpan] = set()
    right = {entity.key for entity in gold}
    behind = 0
    for label, raw in pred:
        phrase = _phrase(raw)
        if not phrase:
            continue
        places = [
            (span, Placed(label, _carry_over(span, aligned, gold), phrase))
            for span in _occurrences(phrase, hyp)
            if span not in taken
        ]
        if not places:
            placed.append(Placed(label, None, phrase, located=False))
            continue
        # The right place first (see the module's first rule), then the order of speech.
        span, entity = min(places, key=lambda p: (p[1].key not in right, p[0][0] < behind, p[0]))
        taken.add(span)
        behind = span[1]
        placed.append(entity)
    return placed


def _occurrences(phrase: str, hyp: list[str]) -> list[WordSpan]:
    """Every stretch of hypothesis words that holds `phrase`; parts of hyphenated words count."""
    text = " ".join(hyp)
    starts = np.cumsum([0, *(len(word) + 1 for word in hyp)])
    found = re.finditer(rf"(?<!\w)(?={re.escape(phrase)}(?!\w))", text)
    firsts = [(m.start(), m.start() + len(phrase) - 1) for m in found]
    return [
        (int(np.searchsorted(starts, a, "right")) - 1, int(np.searchsorted(starts, b, "right")))
        for a, b in firsts
    ]


def _carry_over(span: WordSpan, aligned: dict[int, int], gold: list[Placed]) -> WordSpan | None:
    """The reference words that a stretch of hypothesis words stands for."""
    words = [aligned[i] for i in range(*span) if i in aligned]
    if not words:
        return None
    start, end = min(words), max(words) + 1
    recognised = set(aligned.values())
    while _same_entity(start - 1, start, gold) and start - 1 not in recognised:
        start -= 1
    while _same_entity(end - 1, end, gold) and end not in recognised:
        end += 1
    return start, end


def _same_entity(left: int, right: int, gold: list[Placed]) -> bool:
    return any(entity.span and entity.span[0] <= left and right < entity.span[1] for entity in gold)


def _split_errors(gold: list[Placed], pred: list[Placed]) -> Counter[str]:
    """Pair the entities of one utterance, best agreement first; name each pair and what is left over."""
    counts: Counter[str] = Counter()
    golds, preds = list(gold), list(pred)
    rules: dict[str, Callable[[Placed, Placed], bool]] = {
        "correct": lambda g, p: g.key == p.key and g.phrase == p.phrase,
        "transcript_slip": lambda g, p: g.key == p.key,
        "wrong_label": lambda g, p: g.span == p.span,
        "boundary": lambda g, p: g.label == p.label and _overlap(g.span, p.span),
    }
    for kind, agree in rules.items():
        for g in list(golds):
            p = next((p for p in preds if agree(g, p)), None)
            if p is not None:
                golds.remove(g)
                preds.remove(p)
                counts[kind] += 1
    counts["missed"] = len(golds)
    counts["spurious"] = len(preds)
    counts["unlocatable"] = sum(not p.located for p in preds)
    return counts


def _overlap(a: WordSpan | None, b: WordSpan | None) -> bool:
    return a is not None and b is not None and a[0] < b[1] and b[0] < a[1]


def _lower(tokens: list[Token]) -> list[Token]:
    return [token._replace(text=token.text.lower()) for token in tokens]


def _phrase(text: str) -> str:
    return " ".join(token.text for token in _lower(ner_tokens(text)))
