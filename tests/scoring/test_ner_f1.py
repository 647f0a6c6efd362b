from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unislu_llm.errors import UserError
from unislu_llm.scoring.ner import PRF, RAW_TO_COMBINED, entity_counts, entity_f1, label_f1, prepare
from unislu_llm.scoring.text import PROTOCOLS, Protocol

Utterance = list[tuple[str, str]]
GOLD: list[Utterance] = [[("PLACE", "eu"), ("WHEN", "today"), ("PLACE", "eu")], [("ORG", "council")], []]
PRED: list[Utterance] = [
    [("PLACE", "eu"), ("WHEN", "to day"), ("PLACE", "eu"), ("PLACE", "eu")],
    [("NORP", "council")],
    [("LAW", "x")],
]
ENTITIES = st.lists(
    st.tuples(
        st.sampled_from(["ORG", "PLACE", "WHEN"]), st.sampled_from(["eu", "the council", "monday", "un's"])
    ),
    max_size=4,
)
CORPORA = st.lists(st.tuples(ENTITIES, ENTITIES), max_size=5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_vectors_of_the_toolkit(protocol: Protocol) -> None:
    entity, label = entity_f1(GOLD, PRED, protocol), label_f1(GOLD, PRED, protocol)
    assert (entity.micro.tp, entity.micro.n_gold, entity.micro.n_pred) == (2, 4, 6)
    assert _percentages(entity.micro) == pytest.approx((100 / 3, 50.0, 40.0))
    assert entity.macro["f1"] == pytest.approx(16.0)
    assert _percentages(label.micro) == pytest.approx((50.0, 75.0, 60.0))
    assert label.macro["f1"] == pytest.approx(36.0)


def test_table_by_label() -> None:
    table = entity_f1(GOLD, PRED, "slue").by_label
    assert list(table) == ["LAW", "NORP", "ORG", "PLACE", "WHEN"]
    assert table["PLACE"] == PRF(200 / 3, 100.0, 80.0, 2, 2, 3)
    assert table["LAW"] == PRF(0.0, 0.0, 0.0, 0, 0, 1)


def test_no_entities_at_all_is_zero() -> None:
    assert entity_f1([[], []], [[], []], "slue").micro == PRF(0.0, 0.0, 0.0, 0, 0, 0)
    assert entity_f1([], [], "slue").macro == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_phrases_are_normalised_on_both_sides() -> None:
    gold = [[("ORG", "The Council's")]]
    assert entity_f1(gold, [[("ORG", "The Council 's.")]], "slue").micro.f1 == 100.0
    assert entity_f1(gold, [[("ORG", "the council's")]], "slue").micro.f1 == 0.0
    assert entity_f1(gold, [[("ORG", "the council's")]], "whisper").micro.f1 == 100.0


def test_entity_of_punctuation_alone_is_none() -> None:
    assert prepare([("ORG", " . "), ("ORG", "un")], "slue") == [("ORG", "un")]


def test_raw_labels_are_mapped_or_dropped_on_both_sides_first() -> None:
    gold = [[("GPE", "france"), ("EVENT", "the war"), ("MONEY", "5 euro")]]
    pred = [[("LOC", "france"), ("PRODUCT", "x"), ("QUANT", "5 euro")]]
    assert entity_f1(gold, pred, "slue", raw_to_combined=True).micro == PRF.of(2, 2, 2)
    assert entity_f1(gold, pred, "slue").micro == PRF.of(0, 3, 3)


def test_the_map_covers_the_eighteen_tags() -> None:
    assert len(RAW_TO_COMBINED) == 18
    assert {label for label in RAW_TO_COMBINED.values() if label} == {
        "PLACE", "QUANT", "ORG", "WHEN", "NORP", "PERSON", "LAW",
    }  # fmt: skip


@given(CORPORA, st.sampled_from(PROTOCOLS))
def test_gold_against_gold_is_perfect(corpus: list[tuple[Utterance, Utterance]], protocol: Protocol) -> None:
    gold = [g for g, _ in corpus]
    perfect = 100.0 if any(gold) else 0.0
    for scores in (entity_f1(gold, gold, protocol), label_f1(gold, gold, protocol)):
        assert (*_percentages(scores.micro), scores.macro["f1"]) == (perfect,) * 4


@given(CORPORA, st.sampled_from(PROTOCOLS), st.randoms(use_true_random=False))
def test_order_of_utterances_and_entities_does_not_matter(
    corpus: list[tuple[Utterance, Utterance]], protocol: Protocol, rng: random.Random
) -> None:
    shuffled = [(rng.sample(g, len(g)), rng.sample(p, len(p))) for g, p in rng.sample(corpus, len(corpus))]
    assert entity_f1(*_sides(corpus), protocol) == entity_f1(*_sides(shuffled), protocol)


@given(CORPORA, st.sampled_from(PROTOCOLS))
def test_bounds_and_symmetry(corpus: list[tuple[Utterance, Utterance]], protocol: Protocol) -> None:
    gold, pred = _sides(corpus)
    entity, label = entity_f1(gold, pred, protocol).micro, label_f1(gold, pred, protocol).micro
    assert 0.0 <= entity.f1 <= label.f1 <= 100.0
    turned = entity_f1(pred, gold, protocol).micro
    assert (turned.precision, turned.recall, turned.f1) == (entity.recall, entity.precision, entity.f1)


@given(CORPORA, st.booleans())
def test_utterance_counts_sum_to_the_corpus(
    corpus: list[tuple[Utterance, Utterance]], labels_only: bool
) -> None:
    gold, pred = _sides(corpus)
    micro = (label_f1 if labels_only else entity_f1)(gold, pred, "slue").micro
    counts = entity_counts(gold, pred, "slue", labels_only=labels_only)
    assert counts.shape == (len(corpus), 3)
    assert tuple(counts.sum(axis=0)) == (micro.tp, micro.n_gold, micro.n_pred)


@given(st.integers(0, 12), st.integers(0, 5), st.randoms(use_true_random=False))
def test_corruptions_give_the_counts_by_hand(k: int, extra: int, rng: random.Random) -> None:
    """`k` of 12 phrases are replaced and `extra` entities added: 12 - k right of 12 + extra predicted."""
    gold = [[("ORG", f"name{i}x{j}") for j in range(3)] for i in range(4)]
    pred = [list(entities) for entities in gold]
    for n in rng.sample(range(12), k):
        pred[n // 3][n % 3] = ("ORG", "wrong")
    for _ in range(extra):
        rng.choice(pred).append(("LAW", "extra"))
    assert entity_f1(gold, pred, "slue").micro == PRF.of(12 - k, 12, 12 + extra)
    assert label_f1(gold, pred, "slue").micro == PRF.of(12, 12, 12 + extra)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="1 reference utterances but of 2"):
        entity_f1([[]], [[], []], "slue")


def _percentages(prf: PRF) -> tuple[float, float, float]:
    return prf.precision, prf.recall, prf.f1


def _sides(corpus: list[tuple[Utterance, Utterance]]) -> tuple[list[Utterance], list[Utterance]]:
    return [g for g, _ in corpus], [p for _, p in corpus]
