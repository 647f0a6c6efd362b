from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from tests.scoring.rows import ACTS
from unislu_llm.scoring.labels import label_scores
from unislu_llm.scoring.predictions import Prediction
from unislu_llm.scoring.text import PROTOCOLS, Protocol
from unislu_llm.tasks import SA, LabelTask

ONE = LabelTask("topic", "[TOPIC]", ("news", "sport"), "[W]", "[/W]")
ANSWERS = st.sampled_from([*SA.labels, "Great", None])
PAIRS = st.lists(st.tuples(st.sampled_from(SA.labels), ANSWERS), min_size=1, max_size=12)
SETS = st.lists(st.sampled_from(ACTS.labels), unique=True, max_size=3)
Pairs = list[tuple[str, str | None]]


def predicted(pairs: Sequence[tuple[Any, Any]], **more: Any) -> list[Prediction]:
    """Predictions with these references and answers."""
    return [Prediction(id=str(i), corpus="vc", task="sa", ref_text="", hyp_text="", ref=ref,
                       hyp=hyp, **more) for i, (ref, hyp) in enumerate(pairs)]


def scores(pairs: Sequence[tuple[Any, Any]], task: LabelTask, protocol: Protocol) -> Any:
    return label_scores(predicted(pairs), task, protocol)


def test_confusion_and_rates_by_hand() -> None:
    got = scores([("Positive", "Positive"), ("Positive", "Neutral"), ("Neutral", "Neutral"),
                  ("Negative", None)], SA, "slue")
    assert got["confusion"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert got["confusion_labels"] == ["Positive", "Neutral", "Negative", "(none)"]
    assert got["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    assert got["weighted_f1"] == pytest.approx(100 * (2 * 2 / 3 + 2 / 3) / 4)
    assert [got[k] for k in ("accuracy", "n", "missing", "unknown", "skipped")] == [50, 4, 1, 0, 0]
    for nothing, protocol in product((None, "", " "), PROTOCOLS):
        missing = scores([("Neutral", nothing), ("Neutral", "Neutral")], SA, protocol)
        assert (missing["accuracy"], missing["missing"]) == (50.0, 1)


@pytest.mark.parametrize("word", ["Great", "<unknown>", "positive"])
def test_unknown_word_is_neutral_for_the_authors_and_wrong_for_the_toolkit(word: str) -> None:
    pairs = [("Neutral", word), ("Positive", "Positive")]
    assert scores(pairs, SA, "whisper")["accuracy"] == 100.0
    slue = scores(pairs, SA, "slue")
    assert (slue["accuracy"], slue["unknown"]) == (50.0, 1)
    assert scores([("news", word)], ONE, "whisper")["accuracy"] == 0.0  # it has no Neutral
    assert scores([("news", ["news", word])], ONE, "slue")["accuracy"] == 100.0


def test_references_outside_the_label_set_are_left_out() -> None:
    for refs, expected in ((("Disagreement", "Positive", "<mixed>"), [1, 2, 100.0, 100.0]),
                           (("Disagreement",), [0, 1, 0.0, 0.0])):
        got = scores([(ref, "Positive") for ref in refs], SA, "slue")
        assert [got[key] for key in ("n", "skipped", "accuracy", "macro_f1")] == expected


def test_what_counts_as_an_answer() -> None:
    for hyp, problem, labels in ((None, "unknown_label", ("<unknown>",)),
                                 (None, "missing_label", None), ("ask", "wrong_task", None),
                                 ([["ORG", "a"]], "missing_label", None)):
        assert predicted([("Neutral", hyp)], problems=[problem])[0].hyp_labels == labels


@given(PAIRS, st.sampled_from(PROTOCOLS))
def test_single_label_scores_equal_sklearn(pairs: Pairs, protocol: Protocol) -> None:
    refs = [r for r, _ in pairs]
    hyps = [h if h in SA.labels else "Neutral" if h and protocol == "whisper" else "nothing"
            for _, h in pairs]
    got = scores(pairs, SA, protocol)
    present = [label for label in SA.labels if label in (*refs, *hyps)]
    for average in ("macro", "weighted"):
        expected = f1_score(refs, hyps, labels=present, average=average, zero_division=0)
        assert got[f"{average}_f1"] == pytest.approx(100 * expected)
    assert got["accuracy"] == pytest.approx(100 * accuracy_score(refs, hyps))
    assert np.sum(got["confusion"]) == len(pairs)


@given(st.lists(st.tuples(SETS, SETS), min_size=1, max_size=8))
def test_multi_label_scores_equal_sklearn(pairs: list[tuple[list[str], list[str]]]) -> None:
    gold, pred = ([[int(a in labels) for a in ACTS.labels] for labels in side]
                  for side in zip(*pairs, strict=True))
    present = [i for i in range(3) if any(row[i] for row in (*gold, *pred))]
    got = scores(pairs, ACTS, "slue")
    macro = present and f1_score(gold, pred, labels=present, average="macro", zero_division=0)
    assert got["macro_f1"] == pytest.approx(100 * (macro or 0.0))
    assert got["accuracy"] == pytest.approx(100 * accuracy_score(gold, pred))
    assert got["confusion"] is None
