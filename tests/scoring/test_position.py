from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from unislu_llm.errors import UserError
from unislu_llm.scoring.position import ERRORS, PositionItem, place, position_counts, position_scores

LABELS = ["ORG", "PERSON", "PLACE"]
WORDS = ["angela", "merkel", "said", "eu", "europe's", "the", "council,", "pan-europe"]


def item(ref: str, gold: list[tuple[str, str]], hyp: str, pred: list[tuple[str, str]]) -> PositionItem:
    """An utterance whose reference entities are given as phrases, located by their first occurrence."""
    spans = [(label, ref.index(phrase), ref.index(phrase) + len(phrase)) for label, phrase in gold]
    return PositionItem(ref, spans, hyp, pred)


def errors(*items: PositionItem) -> dict[str, int]:
    return {kind: n for kind, n in position_scores(items).errors.items() if n}


REF = "yesterday angela merkel said the eu council agreed"
GOLD = [("PERSON", "angela merkel"), ("ORG", "eu council")]


@pytest.mark.parametrize(
    ("hyp", "pred", "expected"),
    [
        (REF, GOLD, {"correct": 2}),
        # Recognised wrongly, labelled rightly; also with a word more or less than the reference has.
        ("yesterday angel ammer said the eu council agreed", [("PERSON", "angel ammer"), GOLD[1]],
         {"correct": 1, "transcript_slip": 1}),
        ("yesterday angelamerkel said the eu council agreed", [("PERSON", "angelamerkel"), GOLD[1]],
         {"correct": 1, "transcript_slip": 1}),
        ("yesterday merkel said the eu council agreed", [("PERSON", "merkel"), GOLD[1]],
         {"correct": 1, "transcript_slip": 1}),
        ("yesterday angela mer kel said the eu council agreed", [("PERSON", "angela mer kel"), GOLD[1]],
         {"correct": 1, "transcript_slip": 1}),
        (REF, [GOLD[1]], {"correct": 1, "missed": 1}),
        (REF, [*GOLD, ("WHEN", "yesterday")], {"correct": 2, "spurious": 1}),
        (REF, [("ORG", "angela merkel"), GOLD[1]], {"correct": 1, "wrong_label": 1}),
        (REF, [("PERSON", "merkel"), GOLD[1]], {"correct": 1, "boundary": 1}),
        (REF, [GOLD[0], ("ORG", "the eu council")], {"correct": 1, "boundary": 1}),
        (REF, [*GOLD, ("LAW", "treaty")], {"correct": 2, "spurious": 1, "unlocatable": 1}),
        (REF, [*GOLD, GOLD[1]], {"correct": 2, "spurious": 1, "unlocatable": 1}),
        (f"{REF} in paris", [*GOLD, ("PLACE", "paris")], {"correct": 2, "spurious": 1}),
        ("", [], {"missed": 2}),
        ("", GOLD, {"missed": 2, "spurious": 2, "unlocatable": 2}),
    ],
)  # fmt: skip
def test_kinds_of_errors(hyp: str, pred: list[tuple[str, str]], expected: dict[str, int]) -> None:
    assert errors(item(REF, GOLD, hyp, pred)) == expected


def test_phrase_with_another_word_count_around_it_is_still_located() -> None:
    assert errors(item("the eu said", [("ORG", "eu")], "well the uh eu then said", [("ORG", "eu")])) == {
        "correct": 1
    }


def test_repeated_phrases_are_located_in_order() -> None:
    ref = "the eu and the un and the eu"
    gold = [("ORG", 4, 6), ("ORG", 15, 17), ("ORG", 26, 28)]
    pred = [("ORG", "eu"), ("ORG", "un"), ("ORG", "eu")]
    ((golds, preds),) = place([PositionItem(ref, gold, ref, pred)])
    assert [p.span for p in preds] == [g.span for g in golds] == [(1, 2), (4, 5), (7, 8)]


def test_repeated_phrase_gets_the_benefit_of_the_doubt() -> None:
    ref = "eu rules of the eu"
    assert errors(PositionItem(ref, [("ORG", 16, 18)], ref, [("ORG", "eu")])) == {"correct": 1}
    assert errors(PositionItem(ref, [("LAW", 0, 8)], ref, [("ORG", "eu")])) == {"missed": 1, "spurious": 1}


def test_punctuation_apostrophes_and_case_do_not_move_entities() -> None:
    ref, hyp = "in europe's law, of today.", "In Europe 's law of today"
    gold = [("PLACE", 3, 9), ("LAW", 12, 15), ("WHEN", 20, 25)]
    pred = [("PLACE", "Europe"), ("LAW", "law"), ("WHEN", "today")]
    assert errors(PositionItem(ref, gold, hyp, pred)) == {"correct": 3}


def test_part_of_a_hyphenated_word_is_located() -> None:
    assert errors(item("pan-europe", [("PLACE", "europe")], "pan-europe", [("PLACE", "europe")])) == {
        "correct": 1
    }


@pytest.mark.parametrize("part", ["muse", "um", "useu"])
def test_part_of_a_word_is_not_located(part: str) -> None:
    got = errors(item("a museum", [("ORG", "museum")], "a museum", [("ORG", part)]))
    assert got == {"missed": 1, "spurious": 1, "unlocatable": 1}


def test_phrase_is_sought_behind_the_entity_before() -> None:
    text = "eu said merkel saw eu"
    pred = [("PERSON", "merkel"), ("PLACE", "eu")]
    assert errors(PositionItem(text, [("PERSON", 8, 14), ("ORG", 19, 21)], text, pred)) == {
        "correct": 1, "wrong_label": 1,
    }  # fmt: skip


def test_nested_entities_are_counted() -> None:
    gold = [("ORG", "eu council"), ("PLACE", "eu")]
    assert errors(item("the eu council", gold, "the eu council", gold)) == {"correct": 2}


def test_span_outside_the_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"ORG 0\.\.9"):
        position_scores([PositionItem("short", [("ORG", 0, 9)], "short", [])])


@st.composite
def utterances(draw: st.DrawFn) -> PositionItem:
    """Reference words with flat entities, a hypothesis with edits, and phrases cut out of it (or not)."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
    starts = [sum(len(w) + 1 for w in words[:i]) for i in range(len(words))]
    gold, behind = [], 0
    while behind < len(words) and draw(st.booleans()):
        first = draw(st.integers(behind, len(words) - 1))
        behind = draw(st.integers(first + 1, len(words)))
        gold.append(
            (draw(st.sampled_from(LABELS)), starts[first], starts[behind - 1] + len(words[behind - 1]))
        )
    hyp = [w for w in words if draw(st.integers(0, 4))] if draw(st.booleans()) else words
    hyp = [draw(st.sampled_from(WORDS)) if not draw(st.integers(0, 3)) else w for w in hyp]
    pred = []
    for _ in range(draw(st.integers(0, 3)) if hyp else 0):
        first = draw(st.integers(0, len(hyp) - 1))
        last = draw(st.integers(first, len(hyp) - 1))
        pred.append((draw(st.sampled_from(LABELS)), " ".join(hyp[first : last + 1])))
    return PositionItem(" ".join(words), gold, " ".join(hyp), pred)


@given(utterances())
def test_gold_against_gold_is_perfect(utterance: PositionItem) -> None:
    text = utterance.ref_text
    pred = [(label, text[start:end]) for label, start, end in utterance.gold]
    got = position_scores([utterance._replace(hyp_text=text, pred=pred)])
    assert got.errors == {**dict.fromkeys(ERRORS, 0), "correct": len(utterance.gold)}
    assert got.scores.micro.f1 == (100.0 if utterance.gold else 0.0)


@given(st.lists(utterances(), max_size=4))
def test_errors_partition_the_entities(items: list[PositionItem]) -> None:
    got = position_scores(items)
    micro, kinds = got.scores.micro, got.errors
    pairs = kinds["correct"] + kinds["transcript_slip"] + kinds["wrong_label"] + kinds["boundary"]
    assert micro.tp == kinds["correct"] + kinds["transcript_slip"]
    assert micro.n_gold == pairs + kinds["missed"]
    assert micro.n_pred == pairs + kinds["spurious"]
    assert kinds["unlocatable"] <= kinds["spurious"]
    assert tuple(position_counts(items).sum(axis=0)) == (micro.tp, micro.n_gold, micro.n_pred)


@given(st.lists(utterances(), min_size=1, max_size=4))
def test_f1_is_seqevals_strict_f1_on_bio_tags(items: list[PositionItem]) -> None:
    """What BIO cannot write over the reference words (overlaps, no place) stands behind them."""
    truth, predicted = [], []
    for gold, pred in place(items):
        length = max([s.span[1] for s in (*gold, *pred) if s.span], default=0)
        tags: list[str] = ["O"] * length
        other = ["O"] * length
        for entity in gold:
            assert entity.span
            _write(tags, entity.label, entity.span)
        keys = {entity.key for entity in gold}
        for entity in sorted(pred, key=lambda p: p.key not in keys):
            if entity.span and set(other[slice(*entity.span)]) == {"O"}:
                _write(other, entity.label, entity.span)
            else:
                other.append(f"B-{entity.label}")
        truth.append([*tags, *["O"] * (len(other) - len(tags))])
        predicted.append(other)
    got = position_scores(items).scores
    if not got.micro.n_gold + got.micro.n_pred:
        return
    report = classification_report(
        truth, predicted, mode="strict", scheme=IOB2, output_dict=True, zero_division=0
    )
    for key, name in (("precision", "precision"), ("recall", "recall"), ("f1-score", "f1")):
        assert getattr(got.micro, name) == pytest.approx(100 * report["micro avg"][key])
        assert got.macro[name] == pytest.approx(100 * report["macro avg"][key])


def _write(tags: list[str], label: str, span: tuple[int, int]) -> None:
    tags[span[0]] = f"B-{label}"
    tags[span[0] + 1 : span[1]] = [f"I-{label}"] * (span[1] - span[0] - 1)
