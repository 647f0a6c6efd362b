from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from unislu_llm.errors import UserError
from unislu_llm.scoring.sentiment import UNKNOWN, label_counts, label_scores
from unislu_llm.scoring.text import PROTOCOLS, Protocol
from unislu_llm.tasks import SA, LabelTask

ACTS = LabelTask("acts", "[DA]", ("ask", "answer", "thank"), "[A]", "[/A]", multi=True)
ONE = LabelTask("topic", "[TOPIC]", ("news", "sport"), "[W]", "[/W]")
ANSWERS = st.sampled_from([*SA.labels, "Great", None])
PAIRS = st.lists(st.tuples(st.sampled_from(SA.labels), ANSWERS), min_size=1, max_size=12)
SETS = st.lists(st.sampled_from(ACTS.labels), unique=True, max_size=3)


def test_confusion_and_rates_by_hand() -> None:
    refs = ["Positive", "Positive", "Neutral", "Negative"]
    got = label_scores(refs, ["Positive", "Neutral", "Neutral", None], SA, "slue")
    assert got.confusion == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert got.confusion_labels == ["Positive", "Neutral", "Negative", "(none)"]
    assert got.accuracy == 50.0
    assert got.macro_f1 == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    assert got.weighted_f1 == pytest.approx(100 * (2 * 2 / 3 + 2 / 3) / 4)
    assert (got.n, got.missing, got.unknown, got.skipped) == (4, 1, 0, 0)


@pytest.mark.parametrize("word", ["Great", UNKNOWN, "positive"])
def test_unknown_word_is_neutral_for_the_authors_and_wrong_for_the_toolkit(word: str) -> None:
    refs, hyps = ["Neutral", "Positive"], [word, "Positive"]
    assert label_scores(refs, hyps, SA, "whisper").accuracy == 100.0
    assert label_scores(refs, hyps, SA, "slue").accuracy == 50.0
    assert label_scores(refs, hyps, SA, "slue").unknown == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("nothing", [None, "", " "])
def test_missing_label_is_wrong(protocol: Protocol, nothing: str | None) -> None:
    got = label_scores(["Neutral", "Neutral"], [nothing, "Neutral"], SA, protocol)
    assert (got.accuracy, got.missing) == (50.0, 1)
    assert got.by_label["Neutral"].recall == 50.0


def test_unknown_word_is_wrong_for_a_task_without_a_neutral_label() -> None:
    assert label_scores(["news"], ["weather"], ONE, "whisper").accuracy == 0.0


def test_first_of_several_labels_counts_for_a_single_label_task() -> None:
    assert label_scores(["news"], [["news", "sport"]], ONE, "slue").accuracy == 100.0
    assert label_scores(["news"], [["sport", "news"]], ONE, "slue").accuracy == 0.0


def test_references_outside_the_label_set_are_left_out() -> None:
    got = label_scores(["Disagreement", "Positive", "<mixed>"], ["Positive"] * 3, SA, "slue")
    assert (got.n, got.skipped, got.accuracy, got.macro_f1) == (1, 2, 100.0, 100.0)


def test_nothing_to_score_is_zero() -> None:
    got = label_scores(["Disagreement"], ["Positive"], SA, "slue")
    assert (got.n, got.macro_f1, got.accuracy, got.weighted_f1) == (0, 0.0, 0.0, 0.0)


@given(PAIRS, st.sampled_from(PROTOCOLS))
def test_single_label_scores_equal_sklearn(pairs: list[tuple[str, str | None]], protocol: Protocol) -> None:
    refs = [r for r, _ in pairs]
    hyps = [
        h if h in SA.labels else "Neutral" if h and protocol == "whisper" else "nothing" for _, h in pairs
    ]
    got = label_scores(refs, [h for _, h in pairs], SA, protocol)
    present = [label for label in SA.labels if label in (*refs, *hyps)]
    macro = f1_score(refs, hyps, labels=present, average="macro", zero_division=0)
    weighted = f1_score(refs, hyps, labels=present, average="weighted", zero_division=0)
    assert got.macro_f1 == pytest.approx(100 * macro)
    assert got.weighted_f1 == pytest.approx(100 * weighted)
    assert got.accuracy == pytest.approx(100 * accuracy_score(refs, hyps))
    assert got.confusion
    assert np.sum(got.confusion) == len(pairs)


@given(st.lists(st.tuples(SETS, SETS), min_size=1, max_size=8))
def test_multi_label_scores_equal_sklearn(pairs: list[tuple[list[str], list[str]]]) -> None:
    gold, pred = (
        [[int(a in labels) for a in ACTS.labels] for labels in side] for side in zip(*pairs, strict=True)
    )
    present = [i for i in range(3) if any(row[i] for row in (*gold, *pred))]
    got = label_scores([r for r, _ in pairs], [h for _, h in pairs], ACTS, "slue")
    macro = f1_score(gold, pred, labels=present, average="macro", zero_division=0) if present else 0.0
    assert got.macro_f1 == pytest.approx(100 * macro)
    assert got.accuracy == pytest.approx(100 * accuracy_score(gold, pred))
    assert got.confusion is None


@given(st.lists(st.sampled_from(SA.labels), min_size=1), st.sampled_from(PROTOCOLS))
def test_gold_against_gold_is_perfect(refs: list[str], protocol: Protocol) -> None:
    got = label_scores(refs, refs, SA, protocol)
    assert [got.macro_f1, got.weighted_f1, got.accuracy] == pytest.approx([100.0] * 3)


@given(PAIRS, st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs: list[tuple[str, str | None]], rng: random.Random) -> None:
    shuffled = rng.sample(pairs, len(pairs))
    one, other = (
        label_scores([r for r, _ in p], [h for _, h in p], SA, "whisper") for p in (pairs, shuffled)
    )
    assert one == other


@given(PAIRS, st.sampled_from(PROTOCOLS))
def test_utterance_counts_sum_to_the_table(pairs: list[tuple[str, str | None]], protocol: Protocol) -> None:
    refs, hyps = [*(r for r, _ in pairs), "Disagreement"], [*(h for _, h in pairs), "Positive"]
    counts = label_counts(refs, hyps, SA, protocol)
    table = label_scores(refs, hyps, SA, protocol).by_label.values()
    assert counts.shape == (len(refs), 9)
    assert not counts[-1].any()
    expected = [prf.tp for prf in table], [prf.n_gold for prf in table], [prf.n_pred for prf in table]
    assert counts.sum(axis=0).tolist() == [n for part in expected for n in part]


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="1 references but 0 hypotheses of task 'sa'"):
        label_scores(["Neutral"], [], SA, "slue")
