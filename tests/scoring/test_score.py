from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.scoring.rows import REGISTRY, records, row
from unislu_llm.errors import UserError
from unislu_llm.scoring import score as scoring
from unislu_llm.scoring.bootstrap import bootstrap
from unislu_llm.scoring.score import flat_scores, score_predictions, slue_score
from unislu_llm.scoring.text import PROTOCOLS, Protocol

P, M = {"corpus": "people"}, {"corpus": "moods"}
ROWS = [
    row("p1", "ner", "the eu council met today.", "the eu council meets today.",
        [["ORG", "eu council", 4, 14], ["WHEN", "today", 19, 24]], [["ORG", "eu council"]], **P),
    row("p2", "ner", "thank you", "", [], None, **P, problems=["missing_separator"]),
    row("p1", "asr", "the eu council met today.", "the eu council met today", **P),
    row("m1", "sa", "i like it", "i like it", "Positive", "Positive", **M),
    row("m2", "sa", "it is bad", "it is mad", "Negative", None, **M,
        problems=["unknown_label", "missing_label"]),
    row("m3", "sa", "it is so so", "it is so so", None, "Neutral", **M),
]
READ = row("x", "asr", "read speech", "nothing alike", corpus="read")


def test_published_slue_scores_are_recomputed() -> None:
    for vp, vc, ner, sa, score, within in (
            # The leaderboard's, then the authors': rounding of the parts moves them a little.
            (0.0, 0.0, 81.4, 66.8, 82.7, 0.05), (9.3, 11.1, 71.8, 65.5, 75.7, 0.05),
            (12.3, 16.1, 69.2, 65.4, 73.5, 0.05), (9.3, 11.1, 64.8, 50.1, 68.2, 0.05),
            (8.63, 10.92, 63.83, 60.92, 71.65, 0.01), (7.70, 13.33, 55.16, 68.65, 71.09, 0.01),
            (11.63, 14.16, 64.05, 63.27, 71.47, 0.01), (8.77, 11.47, 69.95, 61.60, 73.81, 0.01)):
        assert slue_score([vp, vc], ner, sa) == pytest.approx(score, abs=within)


def test_every_block_by_hand() -> None:
    got = score_predictions(ROWS, REGISTRY)
    assert (got["n_predictions"], got["n_utterances"]) == (6, 5)
    assert got["malformed"] == {
        "share": pytest.approx(100 / 3), "n": 2,
        "kinds": {"missing_label": 1, "missing_separator": 1, "unknown_label": 1}}
    slue, whisper = got["protocols"]["slue"], got["protocols"]["whisper"]
    # p1 counts once, by its asr prediction; p2 is deleted; m2 has one substitution.
    assert slue["wer"]["by_corpus"]["people"]["errors"] == 2
    ner = slue["tasks"]["ner"]
    assert (ner["n"], ner["label"]["recall"]) == (2, 50.0)
    assert ner["errors"]["reference"] | {"right": 1, "not_tagged": 1} == ner["errors"]["reference"]
    # m2's unknown word: Neutral for the authors (a third label enters the mean), else nothing.
    assert whisper["tasks"]["sa"]["macro_f1"] == pytest.approx(100 / 3)
    slue_by_hand = slue_score([200 / 7, 10.0], 200 / 3, 50.0)
    assert flat_scores(got, "slue") == pytest.approx({
        "wer_people": 100 * 2 / 7, "wer_moods": 100 * 1 / 10, "wer": 100 * 3 / 17,
        "cer": 100 * (9 + 1) / 62,  # "thank you" of nine characters, a blank among them
        "ner_f1": 200 / 3, "ner_label_f1": 200 / 3, "ner_position_f1": 200 / 3, "sa_f1": 100 / 2,
        "malformed": 100 / 3, "slue": slue_by_hand, "score": slue_by_hand})
    assert json.loads(json.dumps(got)) == got
    for seed in range(5):
        assert score_predictions(random.Random(seed).sample(ROWS, len(ROWS)), REGISTRY) == got


def test_score_of_one_task_and_of_other_corpora() -> None:
    alone = flat_scores(score_predictions(ROWS[:3], REGISTRY), "slue")
    assert alone["score"] == pytest.approx((100 - alone["wer"] + alone["ner_f1"]) / 2)
    assert "slue" not in alone
    # A corpus without a SLUE task has no part in its score.
    one, more = (flat_scores(score_predictions(r, REGISTRY)) for r in (ROWS, [*ROWS, READ]))
    assert one["slue"] == more["slue"]


def test_first_pass_transcripts_are_scored_where_all_are_known() -> None:
    some = [row("a", "asr", "the council met", hypothesis="the council met", ctc_hypothesis="x",
                corpus="x"),
            row("b", "sa", "i loved it all", hypothesis="i loved all", corpus="y"),
            row("b", "ner", "i loved it all", hypothesis="i loved all", corpus="y")]
    block = score_predictions(some, REGISTRY)["protocols"]["slue"]
    assert block["hypothesis_wer"] == pytest.approx(100 / 7)
    assert block["hypothesis_wer_by_corpus"] == {"x": 0.0, "y": 25.0}
    assert "ctc_wer" not in block  # of a part it would mislead


def test_an_answer_of_another_task_is_none_and_offsets_may_lack() -> None:
    rows = [row("p1", "ner", "a", "a", [["ORG", "a"]], [["ORG", "a"]], problems=["wrong_task"]),
            row("p2", "ner", "the eu", "the eu", [["ORG", "eu"]], [["ORG", "eu"]])]
    got = score_predictions(rows, REGISTRY)["protocols"]["whisper"]["tasks"]["ner"]["entity"]
    assert (got["tp"], got["n_pred"]) == (1, 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_utterance_counts_give_the_same_scores(protocol: Protocol) -> None:
    counts = scoring.utterance_counts(records(*ROWS), REGISTRY, protocol)
    flat = flat_scores(score_predictions(ROWS, REGISTRY), protocol)
    assert {name: c.value for name, c in counts.items()} == pytest.approx({
        "wer": flat["wer"], "wer/people": flat["wer_people"], "wer/moods": flat["wer_moods"],
        "cer": flat["cer"],
        "ner/f1": flat["ner_f1"], "ner/label_f1": flat["ner_label_f1"],
        "ner/position_f1": flat["ner_position_f1"], "sa/macro_f1": flat["sa_f1"],
        "slue_score": flat["slue"]})
    found = scoring.intervals(records(*ROWS), REGISTRY, protocol)
    assert found.keys() == counts.keys()
    assert all(span["low"] <= counts[name].value <= span["high"] for name, span in found.items())


def test_a_task_of_several_words_has_its_interval() -> None:
    for task, kind in (("medical_terms", "f1"), ("my_task", "accuracy"), ("a_b", "label_f1"),
                       ("a_b_c", "slu_f1"), ("ner", "position_f1")):
        assert scoring.interval_of(f"{task}_{kind}", {f"{task}/{kind}"}) == f"{task}/{kind}"


def test_slue_scores_are_compared_corpus_by_corpus() -> None:
    """A corpus without a SLUE task has no part in it."""
    worse = [{**r, "hyp_text": f"{r['hyp_text']} more"} for r in ROWS]
    one, two = (scoring.utterance_counts(records(*rows), REGISTRY, "slue")["slue_score"]
                for rows in ([READ, *ROWS], worse))
    assert [corpus for corpus, _ in one.utterances] == ["moods"] * 3 + ["people"] * 2
    got = bootstrap(one, [two])
    # One word more in each utterance: 3 of 10 in one corpus; 1 of 7 in the other, where it also
    # replaces a deleted one.
    assert got["value"] == pytest.approx((30 + 100 / 7) / 2 / 3)
    assert got["low"] > 0
    assert got["p_value"] == pytest.approx(2 / 1001)
    assert "slue_score" not in scoring.utterance_counts(records(*ROWS[:3]), REGISTRY, "slue")


def test_table_has_a_row_for_each_run_and_a_part_for_each_protocol() -> None:
    one, other = score_predictions(ROWS, REGISTRY), score_predictions([ROWS[2]], REGISTRY)
    for part in scoring.format_table({"llm": one, "1e5": other}).split("Protocol: whisper"):
        rows = [line.split() for line in part.splitlines() if line.startswith("|")]
        assert rows[0][1::2] == ["run", "wer_moods", "wer_people", "wer", "cer", "ner_f1",
                                 "ner_label_f1", "ner_position_f1", "sa_f1", "malformed", "slue",
                                 "score"]
        assert rows[2][1::2][:4] == ["llm", "10.00", "28.57", "17.65"]
        assert (rows[3][1], rows[3].count("-")) == ("1e5", 6)  # what it lacks


@pytest.mark.parametrize(("change", "message"), [
    ({"ref_text": None}, "prediction 1, field 'ref_text'"),
    ({"hyp_text": None}, "prediction 1, field 'hyp_text'"),
    ({"task": "emotion"}, "prediction 1, field 'task': unknown task 'emotion'"),
    ({"ref": "ORG"}, r"field 'ref': task 'ner' needs a list of \[label, phrase, start, end\]"),
    ({"ref": [["ORG", "eu", 4]]}, r"field 'ref': task 'ner' needs a list of \[label, phrase"),
    ({"task": "sa"}, "field 'ref': task 'sa' needs a label or null"),
    ({"task": "acts", "ref": "ask"}, "field 'ref': task 'acts' needs a list of labels or null"),
    ({"hyp": [{"label": "ORG", "phrase": "eu"}]}, r"field 'hyp': must be a list of \[label, phr"),
    ({"hyp": [["ORG"]]}, "field 'hyp': must be"), ({"hyp": 5}, "field 'hyp': must be"),
    ({}, "prediction 2: utterance 'p1' of corpus 'people' has a prediction of task 'ner' already"),
])
def test_bad_predictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_predictions([{**ROWS[0], **change}, ROWS[0], ROWS[0]], REGISTRY)
