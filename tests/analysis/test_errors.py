"""Every error has exactly one cause, the causes of handmade rows are those known by hand, and the scores are the scorers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unislu_llm.analysis.error_options import ErrorOptions
from unislu_llm.analysis.error_pairs import compare
from unislu_llm.analysis.error_report import report
from unislu_llm.analysis.errors import align, analyse, entity_errors, label_errors, place_reference, sort_entities, word_errors
from unislu_llm.scoring.ner import entity_f1, prepare
from unislu_llm.scoring.rows import hyp_entities, ref_entities
from unislu_llm.scoring.slue import score_rows
from unislu_llm.scoring.text import PROTOCOLS, Protocol
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.tasks import SA, TaskRegistry

REGISTRY = TaskRegistry()
Pairs = Sequence[tuple[str, str]]


def ner(ref_text: str, ref: Pairs, hyp_text: str, hyp: Pairs | None, number: int = 0, **more: Any) -> dict[str, Any]:
    """A row whose reference phrases stand in the order of speech."""
    spans, behind = [], 0
    for label, phrase in ref:
        start = ref_text.index(phrase, behind)
        behind = start + len(phrase)
        spans.append([label, phrase, start, behind])
    answer = None if hyp is None else [list(pair) for pair in hyp]
    return {"id": f"n{number}", "corpus": "vp", "task": "ner", "duration": 1.0, "ref_text": ref_text, "ref": spans,
            "hyp_text": hyp_text, "hyp": answer, "raw": "", "problems": [], "n_tokens": 1} | more


def sa(number: int, ref: str, hyp: str | None, ref_text: str = "so it goes", hyp_text: str = "so it goes") -> dict[str, Any]:
    return {"id": f"s{number}", "corpus": "vc", "task": "sa", "duration": 1.0, "ref_text": ref_text, "ref": ref,
            "hyp_text": hyp_text, "hyp": hyp, "raw": "", "problems": [], "n_tokens": 1}


TEXT = "the bank of england met in paris on monday"
GOLD = [("ORG", "bank of england"), ("PLACE", "paris"), ("WHEN", "monday")]
HEARD_WRONG = "the tank of england met in paris on sunday"
CASES: dict[str, tuple[str, Pairs, list[str], list[str]]] = {
    "perfect": (TEXT, GOLD, ["correct"] * 3, ["correct"] * 3),
    "other case and marks": ("The Bank of England met in Paris, on Monday.", GOLD, ["correct"] * 3, ["correct"] * 3),
    "nothing predicted": (TEXT, [], ["not_tagged"] * 3, []),
    "wrong label": (TEXT, [("PLACE", "bank of england"), ("ORG", "paris")], ["wrong_label", "wrong_label", "not_tagged"],
                    ["wrong_label", "wrong_label"]),
    "boundary": (TEXT, [("ORG", "england"), ("WHEN", "on monday")], ["boundary", "not_tagged", "boundary"], ["boundary"] * 2),
    "overlap with another label is none": (TEXT, [("PLACE", "england")], ["not_tagged"] * 3, ["not_an_entity"]),
    "misheard": (HEARD_WRONG, [("ORG", "tank of england"), ("PLACE", "paris"), ("WHEN", "sunday")],
                 ["misheard", "correct", "misheard"], ["misheard", "correct", "misheard"]),
    "misheard, the label too": (HEARD_WRONG, [("LAW", "tank of england")], ["misheard", "not_tagged", "misheard"],
                                ["not_an_entity"]),
    "nothing heard": ("", [("PLACE", "rome")], ["misheard"] * 3, ["hallucinated"]),
    "hallucinated": (TEXT, [("PLACE", "rome"), ("WHEN", "monday"), ("PLACE", "the bank")],
                     ["not_tagged", "not_tagged", "correct"], ["hallucinated", "correct", "not_an_entity"]),
    "predicted more often than said": (TEXT, [("PLACE", "paris")] * 3, ["not_tagged", "correct", "not_tagged"],
                                       ["correct", "hallucinated", "hallucinated"]),
    "right though the transcript is not": (HEARD_WRONG, GOLD, ["correct"] * 3, ["correct"] * 3),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", CASES)
def test_kinds_known_by_hand(case: str, protocol: Protocol) -> None:
    hyp_text, hyp, gold_kinds, pred_kinds = CASES[case]
    row = ner(TEXT, GOLD, hyp_text, hyp)
    words = align([TEXT], [hyp_text], protocol)[0]
    gold, spans = place_reference(row, words.ref, protocol)
    assert spans == [(1, 4), (6, 7), (8, 9)]
    assert sort_entities(gold, spans, prepare(hyp_entities(row), protocol), words) == (gold_kinds, pred_kinds)


def test_a_phrase_heard_once_serves_one_entity_and_numbers_are_compared_as_they_are_normalised() -> None:
    twice = ner("paris is not paris", [("PLACE", "paris"), ("PLACE", "paris")], "paris is not harris", [], 1)
    number = ner("twenty one people", [("QUANT", "twenty one")], "21 people", [("QUANT", "21")], 2)
    block = entity_errors([twice, number], "whisper")
    assert block["reference"] == {"correct": 1, "wrong_label": 0, "boundary": 0, "misheard": 1, "not_tagged": 1}
    assert block["by_label"]["PLACE"]["reference"]["misheard"] == 1
    # One of three reference words in entities is wrong, none of three outside: 21 is one word.
    assert (block["words"]["inside"]["errors"], block["words"]["inside"]["ref_words"]) == (1, 3)
    assert (block["words"]["outside"]["errors"], block["words"]["outside"]["ref_words"]) == (0, 3)


def test_f1_on_heard_entities_leaves_out_what_was_misheard_on_both_sides() -> None:
    rows = [ner(TEXT, GOLD, HEARD_WRONG, [("ORG", "tank of england"), ("PLACE", "paris")], 1),
            ner(TEXT, GOLD, TEXT, None, 2, problems=["wrong_task"])]
    block = entity_errors(rows, "whisper")
    assert (block["tp"], block["n_gold"], block["n_pred"]) == (1, 6, 2)
    assert block["f1"] == 25.0
    assert (block["heard"]["n_gold"], block["heard"]["n_pred"]) == (4, 1)
    assert block["heard"]["f1"] == pytest.approx(40.0)
    assert block["unanswered"] == {"rows": 1, "reference": 3}
    assert block["words"]["inside"]["errors"] == 2


def test_an_insertion_inside_an_entity_counts_there_and_beside_it_not() -> None:
    inside = entity_errors([ner("the bank of england", [("ORG", "bank of england")], "the bank of old england", [])], "whisper")
    beside = entity_errors([ner("the bank of england", [("ORG", "bank of england")], "the old bank of england", [])], "whisper")
    assert [b["words"]["inside"]["errors"] for b in (inside, beside)] == [1, 0]
    assert [b["words"]["outside"]["errors"] for b in (inside, beside)] == [0, 1]


WORDS = ("rome", "Rome", "bank", "of", "england", "twenty", "one", "don't", "the")
texts = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)
labels = st.sampled_from(["ORG", "PLACE"])


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    ref_text, hyp_text = draw(texts), draw(texts)
    words = ref_text.split()
    cuts = sorted(draw(st.sets(st.integers(0, len(words)), max_size=5)))
    spans = []
    for a, b in zip(cuts[::2], cuts[1::2], strict=False):
        start = len(" ".join([*words[:a], ""]))
        phrase = " ".join(words[a:b])
        spans.append([draw(labels), phrase, start, start + len(phrase)])
    phrases = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
    return ner("", [], hyp_text, draw(st.lists(st.tuples(labels, phrases), max_size=4))) | {"ref_text": ref_text, "ref": spans}


@settings(deadline=None, max_examples=40)
@given(st.lists(rows(), min_size=1, max_size=3), st.sampled_from(PROTOCOLS))
def test_kinds_add_up_and_scores_are_those_of_the_scorers(some: list[dict[str, Any]], protocol: Protocol) -> None:
    block = entity_errors(some, protocol)
    scored = entity_f1([ref_entities(row) for row in some], [hyp_entities(row) for row in some], protocol)
    micro = scored.to_dict()
    assert {key: block[key] for key in ("tp", "n_gold", "n_pred", "precision", "recall", "f1")} == {
        key: micro[key] for key in ("tp", "n_gold", "n_pred", "precision", "recall", "f1")}
    assert sum(block["reference"].values()) == micro["n_gold"]
    assert sum(block["predicted"].values()) == micro["n_pred"]
    assert all(block["reference"][kind] == block["predicted"][kind] for kind in ("correct", "wrong_label", "boundary"))
    assert block["predicted"]["misheard"] <= block["reference"]["misheard"]
    assert {label: part["f1"] for label, part in block["by_label"].items()} == {
        label: prf.f1 for label, prf in scored.by_label.items()}
    parts = [block["words"][part] for part in ("inside", "outside")]
    if protocol == "whisper":  # there phrases and transcripts have the same words
        wer = corpus_wer([row["ref_text"] for row in some], [row["hyp_text"] for row in some], protocol)
        assert [sum(part[key] for part in parts) for key in ("errors", "ref_words")] == [wer.errors, wer.ref_words]


def test_words_by_kind_of_error_length_and_field() -> None:
    spoken = [ner("a b c d", [], "a x c", [], 1, condition="clean"),                              # 1 substitution, 1 deletion
              ner("e f", [], "e f g h i", [], 2, condition="noisy"),                              # 3 insertions, too long
              ner("k l m n o p", [], "k l m n o p", [], 3, problems=["loop"], condition="clean"),
              ner("q r s t u v w y", [], "a x c", [], 4)]                                         # 3 substitutions, 5 deletions
    fields = {f"vp/{row['id']}": {"condition": row["condition"]} for row in spoken if "condition" in row}
    block = word_errors(spoken, "slue", fields)
    assert [block[key] for key in ("n", "substitutions", "deletions", "insertions", "ref_words")] == [4, 4, 6, 3, 20]
    assert block["wer"] == 65.0
    assert (block["long"], block["loop"], block["hallucinated"], block["same_answer"]) == (1, 1, 2, 2)
    assert (block["without_hallucinated"]["errors"], block["without_hallucinated"]["ref_words"]) == (10, 12)
    assert {name: part["errors"] for name, part in block["by_length"].items()} == {
        "2 words": 3, "4 words": 2, "6 words": 0, "8 words": 8}
    assert {name: (part["n"], part["errors"]) for name, part in block["by"]["condition"].items()} == {
        "clean": (2, 2), "noisy": (1, 3), "unknown": (1, 8)}


def test_many_values_of_a_field_are_grouped_without_their_numbers() -> None:
    spoken = [ner("a", [], "a", [], i) for i in range(12)]
    fields = {f"vp/n{i}": {"condition": f"reverb0.{i}+pink{i}dB" if i else "clean"} for i in range(12)}
    by = word_errors(spoken, "whisper", fields)["by"]["condition"]
    assert {name: part["n"] for name, part in by.items()} == {"clean": 1, "reverb+pink": 11}


def test_labels_by_confusion_and_by_wer() -> None:
    some = [sa(1, "Positive", "Positive"), sa(2, "Positive", "Negative"),
            sa(3, "Neutral", "Neutral", "a b c d e", "a b c d x"),  # 20 %
            sa(4, "Negative", None, "a b", "a x"),                   # 50 %
            sa(5, "Negative", "Negative", "a b", "x x x"), sa(6, "Disagreement", "Neutral")]
    block = label_errors(some, SA, "slue")
    assert block["confusion"] == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert (block["n"], block["skipped"], block["accuracy"]) == (5, 1, 60.0)
    assert block["by_wer"] == {"0": {"n": 2, "accuracy": 50.0}, "0-20": {"n": 1, "accuracy": 100.0},
                               "20-50": {"n": 1, "accuracy": 0.0}, ">50": {"n": 1, "accuracy": 100.0}}


def system(quality: int) -> list[dict[str, Any]]:
    """Predictions of 12 entity and 12 sentiment rows; the first `quality` of each are right."""
    spoken = [ner(f"{TEXT} row {i}", GOLD, f"{TEXT} row {i}" if i < quality else HEARD_WRONG, GOLD if i < quality else [], i)
              for i in range(12)]
    felt = [sa(i, SA.labels[i % 3], SA.labels[(i if i < quality else i + 1) % 3]) for i in range(12)]
    return [*spoken, *felt]


def test_the_better_system_is_better_and_equal_ones_are_equal() -> None:
    bad, good = system(3), system(9)
    pair = compare(bad, good[::-1], REGISTRY, "whisper", resamples=200)
    assert set(pair["scores"]) == {"wer", "wer/vp", "wer/vc", "ner/f1", "sa/macro_f1", "slue_score"}
    assert pair["scores"]["wer"]["high"] < 0 < pair["scores"]["ner/f1"]["low"] <= pair["scores"]["ner/f1"]["difference"]
    assert pair["utterances"]["vp"] == {"better": 6, "equal": 6, "worse": 0}
    assert pair["utterances"]["all"] == {"better": 6, "equal": 18, "worse": 0}
    assert [e["id"] for e in pair["examples"]] == ["n3", "n4", "n5", "n6", "n7"]
    assert pair["examples"][0]["first"] == HEARD_WRONG
    assert pair["examples"][0]["errors"] == [4, 0]
    assert pair == compare(bad, good, REGISTRY, "whisper", resamples=200)
    score = compare(bad, bad, REGISTRY, "whisper", resamples=20)["scores"]["wer"]
    assert (score["difference"], score["low"], score["high"], score["p_value"]) == (0, 0, 0, 1)
    scored = score_rows(good, REGISTRY)["protocols"]["whisper"]
    found = analyse(good, REGISTRY, "whisper", {})["all"]
    assert pair["scores"]["ner/f1"]["other"] == pytest.approx(scored["tasks"]["ner"]["entity"]["f1"])
    assert found["tasks"]["ner"]["f1"] == scored["tasks"]["ner"]["entity"]["f1"]
    assert found["tasks"]["sa"]["macro_f1"] == scored["tasks"]["sa"]["macro_f1"]
    assert found["words"]["wer"] == scored["wer"]["overall"]["wer"]


def write(path: Path, some: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs with predictions, and a manifest with a condition."""
    monkeypatch.chdir(tmp_path)
    for name, quality in (("bad", 3), ("good", 9)):
        best = Path("runs") / name / "best"
        best.mkdir(parents=True)
        (best.parent / "config.yaml").write_text("{}\n")
        (best / "config.json").write_text("{}")
        (best / "model.safetensors").write_bytes(b"")
        write(best.parent / "predictions/best-dev.jsonl", system(quality))
    fields = [{"id": row["id"], "corpus": "vp", "text": row["ref_text"], "condition": "clean" if i < 6 else "babble5dB"}
              for i, row in enumerate(system(3)[:12])]
    write(Path("dev.jsonl"), fields)
    return tmp_path


def test_runs_and_files_make_the_same_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ErrorOptions([Path("runs/bad"), Path("runs/good")], out=Path("out/e.md"), manifest=[Path("dev.jsonl")], resamples=50)
    assert report(runs, ["eval/errors.py", "runs/bad"]) == 0
    text, result = Path("out/e.md").read_text(), json.loads(Path("out/e.json").read_text())
    assert list(result["systems"]) == ["bad", "good"]
    assert str(here.parent) not in text + Path("out/e.json").read_text()
    words = result["systems"]["good"]["corpora"]["vp"]["words"]
    assert {name: part["n"] for name, part in words["by"]["condition"].items()} == {"babble5dB": 6, "clean": 6}
    for title in ("WER by `condition`", "Reference entities by label", "Labels: `sa`", "good compared to bad",
                  "`n3` (vp, 11 words)"):
        assert title in text
    capsys.readouterr()
    files = [Path(shutil.copy(run / "predictions/best-dev.jsonl", f"{run.name}.jsonl")) for run in runs.systems]
    assert report(ErrorOptions(files, manifest=runs.manifest, resamples=50)) == 0
    assert capsys.readouterr().out == text


def test_rows_that_differ_are_refused_or_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(Path("a.jsonl"), system(3)[2:]), write(Path("b.jsonl"), system(9)[:-1])]
    assert report(ErrorOptions(files)) == 2
    error = capsys.readouterr().err
    assert "'a' lacks 2 of 24 (e.g. vp/n0#ner), 'b' lacks 1 of 24 (e.g. vc/s11#sa)" in error
    assert "--common" in error
    assert report(ErrorOptions(files, common=True, resamples=20)) == 0
    assert "21 rows, 3 that not all systems have left out" in capsys.readouterr().out
    write(files[1], [row | {"ref_text": row["ref_text"] + " too"} for row in system(3)[2:]])
    assert report(ErrorOptions(files)) == 2
    assert "different references of vp/n2#ner (field 'ref_text')" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [
    ('{"id": "a", "text": "b", "corpus": "c"}\n', "x.jsonl:1, field 'task'"),
    ('{\n "run": "a"\n}\n', "not JSON"),
    ("", "has no rows"),
    ('{"id": "a", "corpus": "c", "task": "asr", "ref_text": "b"}\n', "no transcript in the field 'hyp_text'"),
    ("\udcff", "not UTF-8"),
])
def test_what_is_no_prediction_file_is_one_message(content: str, message: str, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert report(ErrorOptions([file])) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert message in error
    assert "eval/evaluate.py" in error


def test_other_bad_input_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/bad")
    write(Path("other.jsonl"), [{"id": "z", "text": "z"}])
    for options, message in ((ErrorOptions(), "no system is named"), (ErrorOptions([run, run]), "named twice"),
                             (ErrorOptions([run], out=Path("a.json")), "names the Markdown report"),
                             (ErrorOptions([run], manifest=[Path("other.jsonl")]), "--manifest other.jsonl: none of its rows")):
        assert report(options) == 2
        assert message in capsys.readouterr().err
    (run / "predictions/best-dev.jsonl").unlink()
    assert report(ErrorOptions([run])) == 2
    assert "run eval/evaluate.py runs/bad first" in capsys.readouterr().err
