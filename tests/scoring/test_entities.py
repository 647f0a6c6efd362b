"""F1 is the toolkit's and by position seqeval's; every entity has exactly one kind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from tests.scoring.rows import NAMES, REGISTRY, TEXT, WRONG, Pairs, ner, records, row
from unislu_llm.errors import UserError
from unislu_llm.scoring import entities
from unislu_llm.scoring.entities import KINDS, entity_errors, place, span_counts, span_scores
from unislu_llm.scoring.predictions import check_predictions
from unislu_llm.scoring.score import flat_scores, interval_of, intervals, score_predictions
from unislu_llm.scoring.text import PROTOCOLS, Protocol
from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry

Corpus = list[tuple[Pairs, Pairs]]
SLURP = TaskRegistry([SpanTask("slots", "[SLOTS]", ("person", "date")),
                      LabelTask("intent", "[INTENT]", ("set", "query"), "[I]", "[/I]")])
BOB = [("person", "bob smith")], [("person", "rob smith")]


def f1(corpus: Corpus, protocol: Protocol, by: Any = entities.by_phrase) -> dict[str, Any]:
    """Scores of (reference, predicted) entities of utterances, whatever their texts."""
    some = records(*(row(i, ref=ref, hyp=hyp) for i, (ref, hyp) in enumerate(corpus)))
    return span_scores(by(place(some, protocol)))


def numbers(scores: dict[str, Any]) -> tuple[int, int, int]:
    """Right, reference and predicted entities."""
    return scores["tp"], scores["n_gold"], scores["n_pred"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_vectors_of_the_toolkit(protocol: Protocol) -> None:
    corpus: Corpus = [
        ([("PLACE", "eu"), ("WHEN", "today"), ("PLACE", "eu")],
         [("PLACE", "eu"), ("WHEN", "to day"), ("PLACE", "eu"), ("PLACE", "eu")]),
        ([("ORG", "council")], [("NORP", "council")]), ([], [("LAW", "x")])]
    entity, label = f1(corpus, protocol), f1(corpus, protocol, entities.by_label)
    assert numbers(entity) == (2, 4, 6)
    assert [entity[k] for k in ("precision", "recall", "f1")] == pytest.approx([100 / 3, 50, 40])
    assert [label[k] for k in ("precision", "recall", "f1")] == pytest.approx([50, 75, 60])
    assert (entity["macro"]["f1"], label["macro"]["f1"]) == pytest.approx((16.0, 36.0))
    assert list(entity["by_label"]) == ["LAW", "NORP", "ORG", "PLACE", "WHEN"]
    assert entity["by_label"]["PLACE"] == entities.prf(2, 2, 3)
    assert f1([([], [])], protocol).items() >= entities.prf(0, 0, 0).items()


def test_phrases_are_normalised_on_both_sides() -> None:
    gold = [("ORG", "The Council's")]
    assert f1([(gold, [("ORG", "The Council 's.")])], "slue")["f1"] == 100.0
    assert f1([(gold, [("ORG", "the council's")])], "slue")["f1"] == 0.0
    assert f1([(gold, [("ORG", "the council's")])], "whisper")["f1"] == 100.0
    assert f1([([("ORG", " . ")], [])], "slue")["n_gold"] == 0  # punctuation alone is none


# ---- by position

REF = "yesterday angela merkel said the eu council agreed"
GOLD = [("PERSON", "angela merkel"), ("ORG", "eu council")]


def position(ref: str, gold: Pairs, hyp: str, pred: Pairs) -> tuple[int, int, int]:
    return numbers(span_scores(entities.by_position(place(records(ner(ref, gold, hyp, pred))))))


@pytest.mark.parametrize(("hyp", "pred", "right"), [
    (REF, GOLD, 2),
    # Recognised wrongly, labelled rightly; also with a word more or less than the reference has.
    ("yesterday angel ammer said the eu council agreed", [("PERSON", "angel ammer"), GOLD[1]], 2),
    ("yesterday merkel said the eu council agreed", [("PERSON", "merkel"), GOLD[1]], 2),
    ("yesterday angela mer kel said the eu council", [("PERSON", "angela mer kel"), GOLD[1]], 2),
    (REF, [("ORG", "angela merkel"), GOLD[1]], 1),
    (REF, [("PERSON", "merkel"), GOLD[1]], 1),
    (REF, [*GOLD, GOLD[1], ("LAW", "treaty")], 2),
    (f"{REF} in paris", [*GOLD, ("PLACE", "paris")], 2),
    ("", GOLD, 0),
])
def test_position_forgives_words_and_nothing_else(hyp: str, pred: Pairs, right: int) -> None:
    assert position(REF, GOLD, hyp, pred) == (right, 2, len(pred))


def test_phrases_are_located_in_the_order_of_speech() -> None:
    ref = "the eu and the un and the eu"
    named = [("ORG", "eu"), ("ORG", "un"), ("ORG", "eu")]
    ((_, gold, pred),) = place(records(ner(ref, named, ref, named)))
    assert [p.span for p in pred] == [g.span for g in gold] == [(1, 2), (4, 5), (7, 8)]
    noisy = "well the uh eu then said"
    assert position("the eu said", [("ORG", "eu")], noisy, [("ORG", "eu")]) == (1, 1, 1)
    text, said = "eu said merkel saw eu", [("PERSON", "merkel"), ("PLACE", "eu")]
    ((_, _, pred),) = place(records(ner(text, said[:1], text, said)))
    assert pred[1].span == (4, 5)
    # A phrase that is there twice gets the benefit of the doubt.
    text = "eu rules of the eu"
    second = row(0, "ner", text, text, [["ORG", "eu", 16, 18]], [["ORG", "eu"]])
    assert span_counts(entities.by_position(place(records(second)))).tolist() == [[1, 1, 1]]


def test_punctuation_apostrophes_case_hyphens_and_nesting() -> None:
    pred = [("PLACE", "Europe"), ("LAW", "law"), ("WHEN", "today")]
    gold = [("PLACE", "europe"), ("LAW", "law"), ("WHEN", "today")]
    assert position("in europe's law, of today.", gold, "In Europe 's law of today", pred)[0] == 3
    part = [("PLACE", "europe")]
    assert position("pan-europe", part, "pan-europe", part) == (1, 1, 1)
    assert position("a museum", [("ORG", "museum")], "a museum", [("ORG", "muse")]) == (0, 1, 1)
    text, nested = "the eu council", [["ORG", "eu council", 4, 14], ["PLACE", "eu", 4, 6]]
    both = row(0, "ner", text, text, nested, [["ORG", "eu council"], ["PLACE", "eu"]])
    assert span_counts(entities.by_position(place(records(both)))).tolist() == [[2, 2, 2]]


# ---- by cause

R, M, N, L, B, H = (*KINDS["reference"], "hallucinated")
CASES: dict[str, tuple[str, Pairs, list[str], list[str]]] = {
    "case and marks": ("The Bank of England met in Paris, on Monday.", NAMES, [R] * 3, [R] * 3),
    "label": (TEXT, [("PLACE", "bank of england"), ("ORG", "paris")], [L, L, N], [L, L]),
    "boundary": (TEXT, [("ORG", "england"), ("WHEN", "on monday")], [B, N, B], [B] * 2),
    "misheard": (WRONG, [("ORG", "tank of england"), ("PLACE", "paris"), ("WHEN", "sunday")],
                 [M, R, M], [M, R, M]),
    "misheard, the label too": (WRONG, [("LAW", "tank of england")], [M, N, M], [H]),
    "nothing recognised": ("", [("PLACE", "rome")], [M] * 3, [H]),
    "hallucinated": (TEXT, [("PLACE", "rome"), ("WHEN", "monday"), ("PLACE", "the bank")],
                     [N, N, R], [H, R, H]),
    "predicted too often": (TEXT, [("PLACE", "paris")] * 3, [N, R, N], [R, H, H]),
    "right though the transcript is not": (WRONG, NAMES, [R] * 3, [R] * 3),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", CASES)
def test_kinds_known_by_hand(case: str, protocol: Protocol) -> None:
    hyp_text, hyp, of_gold, of_pred = CASES[case]
    (placed,) = place(records(ner(TEXT, NAMES, hyp_text, hyp)), protocol)
    assert [entity.span for entity in placed[1]] == [(1, 4), (6, 7), (8, 9)]
    assert entities.name_kinds(placed) == (of_gold, of_pred)


def test_a_phrase_recognised_once_serves_one_entity_and_numbers_are_normalised() -> None:
    twice = ner("paris is not paris", [("PLACE", "paris")] * 2, "paris is not harris", [])
    number = ner("twenty one people", [("QUANT", "twenty one")], "21 people", [("QUANT", "21")], 1)
    block = entity_errors(place(records(twice, number), "whisper"))
    assert block["reference"] == {R: 1, M: 1, N: 1, L: 0, B: 0}


# ---- of anything

WORDS = ["angela", "merkel", "eu", "Eu", "europe's", "the", "council,", "pan-europe", "twenty"]


@st.composite
def utterances(draw: st.DrawFn) -> dict[str, Any]:
    """Reference words with flat entities, a hypothesis with edits, phrases cut out of it or not."""
    labels = st.sampled_from(["ORG", "PERSON", "PLACE"])
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
    gold, behind = [], 0
    while behind < len(words) and draw(st.booleans()):
        first = draw(st.integers(behind, len(words) - 1))
        behind = draw(st.integers(first + 1, len(words)))
        start, phrase = len(" ".join([*words[:first], ""])), " ".join(words[first:behind])
        gold.append([draw(labels), phrase, start, start + len(phrase)])
    hyp = [w for w in words if draw(st.integers(0, 4))] if draw(st.booleans()) else words
    hyp = [draw(st.sampled_from(WORDS)) if not draw(st.integers(0, 3)) else w for w in hyp]
    pred = []
    for _ in range(draw(st.integers(0, 3)) if hyp else 0):
        source = hyp if draw(st.integers(0, 4)) else WORDS
        first = draw(st.integers(0, len(source) - 1))
        last = draw(st.integers(first, len(source) - 1))
        pred.append([draw(labels), " ".join(source[first:last + 1])])
    return {"ref_text": " ".join(words), "hyp_text": " ".join(hyp), "ref": gold, "hyp": pred}


SEVERAL = st.lists(utterances(), min_size=1, max_size=4).map(
    lambda drawn: [row(i, **values) for i, values in enumerate(drawn)])


@settings(max_examples=60)
@given(SEVERAL, st.sampled_from(PROTOCOLS))
def test_kinds_and_counts_add_up(rows: list[dict[str, Any]], protocol: Protocol) -> None:
    placed = place(records(*rows), protocol)
    block, scores = entity_errors(placed), span_scores(entities.by_phrase(placed))
    assert tuple(span_counts(entities.by_phrase(placed)).sum(axis=0)) == numbers(scores)
    assert scores["f1"] <= span_scores(entities.by_label(placed))["f1"]
    for side, total in zip(KINDS, ("n_gold", "n_pred"), strict=True):
        assert sum(block[side].values()) == scores[total]
        assert block[side][R] == scores["tp"]
    assert all(block["reference"][kind] == block["predicted"][kind] for kind in (R, L, B))
    assert block["predicted"][M] <= block["reference"][M]


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(utterances())
def test_position_f1_is_seqevals_strict_f1_on_bio_tags(values: dict[str, Any]) -> None:
    """Of what BIO can write over the reference words: no overlaps, and a place for each."""
    placed = place(records(row(0, **values)))

    def tags(some: list[entities.Placed]) -> list[str]:
        found = ["O"] * 20
        for entity in some:
            assume(entity.span and set(found[slice(*entity.span)]) == {"O"})
            first, end = entity.span or (0, 0)
            found[first:end] = [f"B-{entity.label}"] + [f"I-{entity.label}"] * (end - first - 1)
        return found

    (_, gold, pred), = placed
    assume(gold or pred)
    report = classification_report([tags(gold)], [tags(pred)], mode="strict", scheme=IOB2,
                                   output_dict=True, zero_division=0)
    got = span_scores(entities.by_position(placed))
    for key, name in (("precision", "precision"), ("recall", "recall"), ("f1-score", "f1")):
        assert got[name] == pytest.approx(100 * report["micro avg"][key])
        assert got["macro"][name] == pytest.approx(100 * report["macro avg"][key])


# ---- SLURP's own, by hand from its definition (arXiv 2011.13205)


def slots(ref: Pairs, hyp: Pairs, **more: Any) -> dict[str, Any]:
    return row(task="slots", ref_text="x", hyp_text="x", ref=ref, hyp=hyp, **more)


@pytest.mark.parametrize(("sides", "word", "char"), [
    # Right, reference and predicted slots. One word of two is wrong, one of nine characters.
    (BOB, (1, 1.5, 1.5), (1, 1 + 1 / 9, 1 + 1 / 9)),
    # The word error rate is by the reference, the distance of characters by the longer one.
    (([("date", "noon")], [("date", "at noon now")]), (1, 3, 3), (1, 1 + 7 / 11, 1 + 7 / 11)),
    # The nearest of its label, in the order of prediction, and each once; no other label.
    (([("date", "may"), ("date", "june")], [("date", "june"), ("date", "day"), ("person", "may")]),
     (2, 3, 4), (2, 2 + 1 / 3, 3 + 1 / 3)),
    (([("date", "may")], []), (0, 1, 0), (0, 1, 0)),
    # A clitic is a word, and case is nothing.
    (([("person", "Bob's")], [("person", "bob")]), (1, 1.5, 1.5), (1, 1.5, 1.5)),
])
def test_a_slot_counts_by_how_far_its_phrase_is_off(
        sides: tuple[Pairs, Pairs], word: tuple[float, ...], char: tuple[float, ...]) -> None:
    block = score_predictions([slots(*sides)], SLURP)["protocols"]["slurp"]["tasks"]["slots"]
    both = tuple(a + b for a, b in zip(word, char, strict=True))
    for name, counts in (("word_f1", word), ("char_f1", char), ("slu_f1", both)):
        got = block[name]
        assert (got["tp"], got["n_gold"], got["n_pred"]) == pytest.approx(counts)
        assert got["f1"] == pytest.approx(200 * counts[0] / (counts[1] + counts[2]))


def test_scores_of_a_slurp_run() -> None:
    rows = [slots(*BOB), slots([("date", "noon")], [("date", "noon")], number=1, language="zh"),
            row(task="intent", ref="set", hyp="set"), row(1, "intent", ref="set", hyp="query")]
    scores = score_predictions(rows, SLURP)
    flat = flat_scores(scores, "slurp")
    assert (flat["intent_accuracy"], flat["slots_f1"]) == (50, 50)
    assert flat["slots_slu_f1"] == pytest.approx(100 * 4 / (4 + 0.5 + 1 / 9))
    by_label = scores["protocols"]["slurp"]["tasks"]["slots"]["slu_f1"]["by_label"]
    assert by_label["date"]["f1"] == 100
    known = intervals(check_predictions(rows, SLURP), SLURP, "slurp")
    for key in ("slots_f1", "slots_slu_f1", "intent_accuracy"):
        span = known[str(interval_of(key, known))]
        assert span["low"] <= flat[key] <= span["high"]
    with pytest.raises(UserError, match="with a task `slots`"):
        flat_scores(score_predictions([], REGISTRY), "slurp")
