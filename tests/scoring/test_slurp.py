"""SLURP's scores, computed by hand from their definition (arXiv 2011.13205)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scoring.rows import REGISTRY, Pairs, row
from unislu_llm.errors import UserError
from unislu_llm.scoring.predictions import check_predictions
from unislu_llm.scoring.score import flat_scores, interval_of, intervals, score_predictions
from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry

SLURP = TaskRegistry([SpanTask("slots", "[SLOTS]", ("person", "date")),
                      LabelTask("intent", "[INTENT]", ("set", "query"), "[I]", "[/I]")])
BOB = [("person", "bob smith")], [("person", "rob smith")]


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
