from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.errors import UserError
from unislu_llm.scoring.bootstrap import bootstrap, compare_counts
from unislu_llm.scoring.rows import combine_labels, hyp_labels, read_rows, transcript_rows
from unislu_llm.scoring.sentiment import UNKNOWN
from unislu_llm.scoring.slue import format_table, intervals, score_rows, slue_score, utterance_counts
from unislu_llm.scoring.text import PROTOCOLS, Protocol
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry

REGISTRY = TaskRegistry()
ACTS = LabelTask("acts", "[DA]", ("ask", "answer"), "[A]", "[/A]", multi=True)


def row(
    key: str, task: str, ref_text: str, hyp_text: str, ref: Any = None, hyp: Any = None, **more: Any
) -> dict[str, Any]:
    corpus = "people" if key.startswith("p") else "moods"
    return {"id": key, "corpus": corpus, "task": task, "duration": 1.0, "ref_text": ref_text, "ref": ref,
            "hyp_text": hyp_text, "hyp": hyp, "raw": "", "problems": [], "n_tokens": 5, **more}  # fmt: skip


ROWS = [
    row("p1", "ner", "the eu council met today.", "the eu council meets today.",
        [["ORG", "eu council", 4, 14], ["WHEN", "today", 19, 24]], [["ORG", "eu council"]]),
    row("p2", "ner", "thank you", "", [], None, problems=["missing_separator"]),
    row("p1", "asr", "the eu council met today.", "the eu council met today"),
    row("m1", "sa", "i like it", "i like it", "Positive", "Positive"),
    row("m2", "sa", "it is bad", "it is mad", "Negative", None, problems=["unknown_label", "missing_label"]),
    row("m3", "sa", "it is so so", "it is so so", None, "Neutral"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("vp", "vc", "ner", "sa", "score"),
    [
        (0.0, 0.0, 81.4, 66.8, 82.7),
        (9.3, 11.1, 71.8, 65.5, 75.7),
        (12.3, 16.1, 69.2, 65.4, 73.5),
        (9.3, 11.1, 64.8, 50.1, 68.2),
    ],
)
def test_slue_scores_of_the_leaderboard_are_recomputed(vp: float, vc: float, ner: float, sa: float, score: float) -> None:
    assert round(slue_score(vp, vc, ner, sa), 1) == score


@pytest.mark.parametrize(
    ("vp", "vc", "ner", "sa", "score"),
    [
        (8.63, 10.92, 63.83, 60.92, 71.65),
        (7.70, 13.33, 55.16, 68.65, 71.09),
        (11.63, 14.16, 64.05, 63.27, 71.47),
        (8.77, 11.47, 69.95, 61.60, 73.81),
    ],
)
def test_slue_scores_of_the_authors_are_recomputed(vp: float, vc: float, ner: float, sa: float, score: float) -> None:
    """Rounding of the inputs moves the result by half a unit of the last digit at most, and it is rounded itself."""
    assert slue_score(vp, vc, ner, sa) == pytest.approx(score, abs=0.01)


def test_every_block_by_hand() -> None:
    got = score_rows(ROWS, REGISTRY)
    assert (got["n_rows"], got["n_utterances"]) == (6, 5)
    assert got["malformed"] == {
        "share": pytest.approx(100 / 3), "rows": 2,
        "kinds": {"missing_label": 1, "missing_separator": 1, "unknown_label": 1},
    }  # fmt: skip
    slue, whisper = got["protocols"]["slue"], got["protocols"]["whisper"]
    # p1 counts once, by its asr row; p2 is deleted; m2 has one substitution.
    assert slue["wer"]["by_corpus"]["people"]["errors"] == 2
    assert slue["wer"]["by_corpus"]["people"]["wer"] == pytest.approx(100 * 2 / 7)
    assert slue["wer"]["by_corpus"]["moods"]["wer"] == pytest.approx(100 * 1 / 10)
    assert slue["wer"]["overall"]["wer"] == pytest.approx(100 * 3 / 17)
    assert slue["tasks"]["ner"]["n"] == 2
    assert slue["tasks"]["ner"]["entity"]["f1"] == pytest.approx(100 * 2 / 3)
    assert slue["tasks"]["ner"]["label"]["recall"] == pytest.approx(50.0)
    assert got["position"]["ner"]["errors"]["missed"] == 1
    # m2's unknown word: Neutral for the authors (a third label enters the mean), nothing for the toolkit.
    assert slue["tasks"]["sa"]["macro_f1"] == pytest.approx(100 / 2)
    assert whisper["tasks"]["sa"]["macro_f1"] == pytest.approx(100 / 3)
    assert slue["slue_score"] == pytest.approx(slue_score(200 / 7, 10.0, 200 / 3, 50.0))


def test_result_is_plain_data() -> None:
    got = score_rows(ROWS, REGISTRY)
    assert json.loads(json.dumps(got)) == got


def test_order_of_rows_does_not_matter() -> None:
    for seed in range(5):
        shuffled = random.Random(seed).sample(ROWS, len(ROWS))
        assert score_rows(shuffled, REGISTRY) == score_rows(ROWS, REGISTRY)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gold_against_gold_is_perfect(protocol: Protocol) -> None:
    perfect = []
    for r in ROWS:
        hyp = [e[:2] for e in r["ref"]] if r["task"] == "ner" else r["ref"]
        perfect.append({**r, "hyp_text": r["ref_text"], "hyp": hyp, "problems": []})
    got = score_rows(perfect, REGISTRY, (protocol,))["protocols"][protocol]
    assert got["wer"]["overall"]["wer"] == 0.0
    assert got["tasks"]["ner"]["entity"]["f1"] == got["tasks"]["ner"]["label"]["f1"] == 100.0
    assert got["tasks"]["sa"]["macro_f1"] == 100.0
    assert got["slue_score"] == pytest.approx(100.0)


def test_no_slue_score_without_both_tasks() -> None:
    got = score_rows([r for r in ROWS if r["task"] != "sa"], REGISTRY)
    assert got["protocols"]["slue"]["slue_score"] is None
    assert "sa" not in got["protocols"]["slue"]["tasks"]


def test_corpus_without_a_slue_task_stays_out_of_the_slue_score() -> None:
    extra = {**row("x", "asr", "read speech", "nothing alike"), "corpus": "read"}
    with_it, without = (score_rows(rows, REGISTRY)["protocols"]["slue"] for rows in ([*ROWS, extra], ROWS))
    assert with_it["slue_score"] == without["slue_score"]
    assert with_it["wer"]["by_corpus"]["read"]["wer"] == 100.0


def test_transcript_is_the_asr_rows_else_the_first_tasks() -> None:
    rows = [row("p1", task, "a b", task, ref=None) for task in ("sa", "ner", "asr")]
    assert [r["task"] for r in transcript_rows(rows, REGISTRY)] == ["asr"]
    assert [r["task"] for r in transcript_rows(rows[:2], REGISTRY)] == ["ner"]


def test_new_tasks_are_scored_like_the_built_in_ones() -> None:
    registry = TaskRegistry([NER, SA, ACTS])
    rows = [row("p1", "acts", "a", "a", ["ask"], ["ask", "answer"]), row("p2", "acts", "b", "b", [], [])]
    got = score_rows(rows, registry)["protocols"]["slue"]["tasks"]["acts"]
    assert got["accuracy"] == 50.0
    assert got["macro_f1"] == pytest.approx(50.0)
    assert got["confusion"] is None


def test_answer_to_another_task_counts_as_none() -> None:
    rows = [row("p1", "ner", "a b", "a b", [["ORG", "a", 0, 1]], "Positive", problems=["wrong_task"]),
            row("m1", "sa", "a b", "a b", "Positive", [["ORG", "a"]], problems=["wrong_task"])]  # fmt: skip
    got = score_rows(rows, REGISTRY)["protocols"]["whisper"]["tasks"]
    assert got["ner"]["entity"]["n_pred"] == 0
    assert got["sa"]["missing"] == 1


def test_unknown_word_is_told_from_no_word() -> None:
    assert hyp_labels(ROWS[4]) == UNKNOWN
    assert hyp_labels({**ROWS[4], "problems": ["missing_label"]}) is None
    assert hyp_labels({**ROWS[4], "hyp": "ask", "problems": ["wrong_task"]}) is None


def test_raw_labels_are_combined_everywhere() -> None:
    raw = [row("p1", "ner", "paris at dawn", "paris at dawn",
               [["GPE", "paris", 0, 5], ["EVENT", "dawn", 9, 13]], [["LOC", "paris"]])]  # fmt: skip
    got = score_rows(raw, REGISTRY, raw_to_combined=True)
    assert got["protocols"]["slue"]["tasks"]["ner"]["entity"]["f1"] == got["position"]["ner"]["f1"] == 100.0
    assert score_rows(raw, REGISTRY)["position"]["ner"]["f1"] == 0.0
    assert combine_labels([ROWS[3]]) == [ROWS[3]]


def test_references_without_offsets_have_no_position_scores() -> None:
    rows = [row("p1", "ner", "the eu", "the eu", [["ORG", "eu"]], [["ORG", "eu"]])]
    got = score_rows(rows, REGISTRY)
    assert got["position"] == {}
    assert got["protocols"]["slue"]["tasks"]["ner"]["entity"]["f1"] == 100.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_utterance_counts_give_the_same_scores(protocol: Protocol) -> None:
    counts, scores = utterance_counts(ROWS, REGISTRY, protocol), score_rows(ROWS, REGISTRY)
    block = scores["protocols"][protocol]
    expected = {
        "wer": block["wer"]["overall"]["wer"],
        "wer/people": block["wer"]["by_corpus"]["people"]["wer"],
        "wer/moods": block["wer"]["by_corpus"]["moods"]["wer"],
        "ner/f1": block["tasks"]["ner"]["entity"]["f1"],
        "ner/label_f1": block["tasks"]["ner"]["label"]["f1"],
        "ner/position_f1": scores["position"]["ner"]["f1"],
        "sa/macro_f1": block["tasks"]["sa"]["macro_f1"],
        "slue_score": block["slue_score"],
    }
    got = {name: bootstrap(c.matrix, c.statistic, 10, strata=c.strata).value for name, c in counts.items()}
    assert got == pytest.approx(expected)
    assert counts["wer"].keys == ("people/p1", "people/p2", "moods/m1", "moods/m2", "moods/m3")


def test_slue_scores_are_compared_corpus_by_corpus() -> None:
    """Rows of the other system in any order; a corpus without a SLUE task has no part in it."""
    read = {**row("x", "asr", "read speech", "nothing alike"), "corpus": "read"}
    worse = [{**r, "hyp_text": f"{r['hyp_text']} more"} for r in ROWS]
    one, two = (utterance_counts(rows, REGISTRY, "slue")["slue_score"] for rows in ([read, *ROWS], worse[::-1]))
    assert one.strata == ("moods",) * 3 + ("people",) * 2
    assert len(one.keys) == 5
    got = compare_counts(one, two, n_resamples=500)
    # One word more in each utterance: 3 of 10 in one corpus; 1 of 7 in the other, where it also replaces a deleted one.
    assert got.value == pytest.approx((30 + 100 / 7) / 2 / 3)
    assert got.low > 0
    assert got.p_value is not None
    assert got.p_value <= 2 / 501 + 1e-12
    assert "slue_score" not in utterance_counts(ROWS[:3], REGISTRY, "slue")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_score_lies_in_its_interval_and_perfect_ones_have_none_to_speak_of(protocol: Protocol) -> None:
    many = [{**r, "id": f"{r['id']}-{i}"} for i in range(20) for r in ROWS]
    counts, found = utterance_counts(many, REGISTRY, protocol), intervals(many, REGISTRY, protocol)
    assert found.keys() == counts.keys()
    for name, span in found.items():
        value = bootstrap(counts[name].matrix, counts[name].statistic, 1).value
        assert span["low"] <= value <= span["high"], name
    assert found["wer"]["low"] < found["wer"]["high"]
    right = [{**r, "hyp_text": r["ref_text"]} for r in many]
    assert intervals(right, REGISTRY, protocol)["wer"] == {"low": 0.0, "high": 0.0}
    assert intervals(many, REGISTRY, protocol) == found  # the same draws again


def test_table_has_a_row_for_each_run_and_a_part_for_each_protocol() -> None:
    asr_only = score_rows([ROWS[2]], REGISTRY)
    table = format_table({"llm": score_rows(ROWS, REGISTRY), "1e5": asr_only})
    slue, whisper = table.split("Protocol: whisper")
    for part in (slue, whisper):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        titles = [cell.strip() for cell in lines[0].strip("|").split("|")]
        assert titles == ["run", "WER moods", "WER people", "WER all", "NER F1", "NER label-F1",
                          "NER position-F1", "SA macro-F1", "SLUE", "malformed %"]  # fmt: skip
        assert [line.strip("|").split("|")[0].strip() for line in lines[2:]] == ["llm", "1e5"]
        assert lines[3].count("-") == 6
    assert "66.67" in slue
    assert "33.33" in slue


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_text": None}, "row 1, field 'ref_text': expected text, found None"),
        ({"task": "emotion"}, "row 1, field 'task': unknown task 'emotion'"),
        ({"ref": "ORG"}, r"field 'ref': task 'ner' needs a list of \[label, phrase, start, end\]"),
        ({"task": "sa"}, "field 'ref': task 'sa' needs a label or null"),
    ],
)
def test_bad_rows_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_rows([{**ROWS[0], **change}], REGISTRY)


def test_a_row_twice_is_refused() -> None:
    with pytest.raises(
        UserError, match="row 2: utterance 'p1' of corpus 'people' has a row of task 'ner' already"
    ):
        score_rows([ROWS[0], ROWS[0]], REGISTRY)


def test_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n\n".join(json.dumps(r) for r in ROWS) + "\n", encoding="utf-8")
    assert read_rows(path, REGISTRY) == ROWS
    path.write_text(json.dumps(ROWS[0]) + "\n{oops\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"predictions.jsonl:2: not JSON"):
        read_rows(path, REGISTRY)
    path.write_text(json.dumps({**ROWS[0], "id": 5}), encoding="utf-8")
    with pytest.raises(UserError, match=r"predictions.jsonl:1, field 'id'"):
        read_rows(path, REGISTRY)
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "nowhere.jsonl", REGISTRY)
