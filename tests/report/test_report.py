"""Predictions made by hand, whose errors are known: all of them are counted, exactly."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.scoring.rows import NAMES, REGISTRY, TEXT, WRONG, ner, records, row
from unislu_llm.errors import UserError
from unislu_llm.report.compare import analyse, compare, make_report
from unislu_llm.scoring.score import flat_scores, score_predictions
from unislu_llm.tasks import SA

Rows = list[dict[str, Any]]


def system(quality: int, n: int = 12) -> Rows:
    """`n` predictions of entities and of sentiment; the first `quality` of each are right."""
    spoken = [ner(f"{TEXT} row {i}", NAMES, f"{TEXT} row {i}" if i < quality else WRONG,
                  NAMES if i < quality else [], i, duration=1.0 + i % 25) for i in range(n)]
    felt = [row(i, "sa", "so it goes", "so it goes", SA.labels[i % 3],
                SA.labels[(i if i < quality else i + 1) % 3], corpus="vc",
                probabilities={label: 0.8 if label == SA.labels[i % 3] else 0.1
                               for label in SA.labels}) for i in range(n)]
    return [*spoken, *felt]


def write(path: Path, some: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A bad and a good system."""
    monkeypatch.chdir(tmp_path)
    return [write(Path("bad.jsonl"), system(3)), write(Path("good.jsonl"), system(9))]


def test_every_cause_and_every_word_is_counted() -> None:
    text = "angela merkel met the commission in paris on monday"
    names = [("PERSON", "angela merkel"), ("ORG", "commission"), ("PLACE", "paris"),
             ("WHEN", "monday")]
    one = ner(text, names, text, [("PERSON", "angela merkel"), ("PLACE", "commission"),
                                  ("PLACE", "paris on"), ("LAW", "met")], 0)
    # An entity lost a word and one is misheard; outside, a word more and one misheard.
    two = ner(text, names, "angela met the old commission in par is monday",
              [("PLACE", "par is"), ("WHEN", "monday")], 1)
    found = analyse({"a": [records(one, two)]}, REGISTRY, resamples=20)
    assert found["entities"]["ner"]["causes"] == {"a": {
        "right": 2, "misheard": 2, "not_tagged": 2, "wrong_label": 1, "wrong_boundary": 1,
        "hallucinated": 1}}
    assert found["words"]["a"] == {
        "all": {"words": 18, "errors": 4, "substitutions": 2, "deletions": 1, "insertions": 1},
        "inside": {"words": 10, "errors": 2, "substitutions": 1, "deletions": 1, "insertions": 0},
        "outside": {"words": 8, "errors": 2, "substitutions": 1, "deletions": 0, "insertions": 1}}
    assert [(r["name"], r["n"]) for r in found["entities"]["ner"]["by_length"]] == [
        ("1 word", 6), ("2 words", 2)]
    assert [(r["name"], r["n"], round(r["f1"]["a"]["value"], 1))
            for r in found["entities"]["ner"]["by_label"]] == [
        ("PLACE", 2, 0.0), ("ORG", 2, 0.0), ("WHEN", 2, 66.7), ("PERSON", 2, 66.7)]
    example = next(e for e in found["examples"] if e["id"] == "1")
    assert example["change"] == 4 + 3
    assert ["delete", "merkel", ""] in example["systems"]["a"]["diff"]
    assert example["systems"]["a"]["wrong"] == {"ner": ["par is"]}
    assert example["reference_outputs"]["ner"][0] == ["PERSON", "angela merkel"]


def test_insertions_are_inside_an_entity_between_its_words() -> None:
    some = ner("in new york today", [("PLACE", "new york")], "in so new old york now today", [])
    assert analyse({"a": [records(some)]}, REGISTRY, resamples=2)["words"]["a"] == {
        "all": {"words": 4, "errors": 3, "substitutions": 0, "deletions": 0, "insertions": 3},
        "inside": {"words": 2, "errors": 1, "substitutions": 0, "deletions": 0, "insertions": 1},
        "outside": {"words": 2, "errors": 2, "substitutions": 0, "deletions": 0, "insertions": 2}}


def test_two_copies_do_not_differ(files: list[Path]) -> None:
    report = make_report([files[0], write(Path("copy.jsonl"), system(3)[::-1])], resamples=50)
    for score in report["scores"]:
        change = score["differences"]["copy"]
        assert change["value"] == 0
        if change["p"] is not None:
            assert (change["low"], change["high"], change["p"]) == (0, 0, 1)
    assert report["verdict"] == ["copy beside bad: no score differs."]
    assert not report["examples"]
    seeds = [records(*system(quality)) for quality in (3, 5, 9)]
    for score in analyse({"a": seeds, "b": seeds}, REGISTRY, resamples=200)["scores"]:
        change = score["differences"]["b"]
        assert change["value"] == 0
        assert change["p"] is None or change["p"] > 0.5, "seeds of each are drawn by themselves"


def test_entities_that_are_removed_are_missed_exactly(files: list[Path]) -> None:
    """100 utterances with one right entity each, and one in ten of them not tagged."""
    whole = [ner(f"{TEXT} row {i}", NAMES[1:2], f"{TEXT} row {i}", NAMES[1:2], i)
             for i in range(100)]
    fewer = [p | {"hyp": []} if i % 10 == 0 else p for i, p in enumerate(whole)]
    report = make_report([write(Path("all.jsonl"), whole), write(Path("fewer.jsonl"), fewer)])
    causes = report["entities"]["ner"]["causes"]
    assert causes["all"] == dict.fromkeys(causes["all"], 0) | {"right": 100}
    assert causes["fewer"] == dict.fromkeys(causes["all"], 0) | {"right": 90, "not_tagged": 10}
    scores = {score["key"]: score for score in report["scores"]}
    assert scores["wer"]["differences"]["fewer"]["value"] == 0
    assert scores["ner_f1"]["values"]["fewer"]["value"] == pytest.approx(100 * 180 / 190)
    assert scores["ner_f1"]["differences"]["fewer"]["high"] < 0
    assert report["verdict"] == [
        "fewer beside all: has the same WER [0.0, 0.0], finds 5.3 less ner F1 "
        + f"[{-scores['ner_f1']['differences']['fewer']['high']:.1f}, "
        + f"{-scores['ner_f1']['differences']['fewer']['low']:.1f}].",
        "Of 100 entities (ner) 10 fewer are right (10.0 %): +10 not tagged."]


def test_the_better_system_is_better_and_all_tables_say_so(files: list[Path]) -> None:
    printed = compare(files, out=Path("out"), resamples=200, examples=3)
    report = json.loads(Path("out/report.json").read_text())
    scores = {score["key"]: score for score in report["scores"]}
    flat = flat_scores(score_predictions(system(9), REGISTRY))
    assert {key: score["values"]["good"]["value"] for key, score in scores.items()
            } == pytest.approx({key: value for key, value in flat.items() if key != "score"})
    assert scores["wer"]["differences"]["good"]["high"] < 0
    assert scores["ner_f1"]["differences"]["good"]["low"] > 0
    assert scores["sa_f1"]["better"] == "higher" != scores["wer_vp"]["better"]
    assert "transcribes" in printed.splitlines()[0]
    assert "better" in printed.splitlines()[0]
    assert report["data"] == {
        "utterances": 24, "seconds": 90.0, "corpora": {"vc": 12, "vp": 12}, "tasks": {
            "ner": {"kind": "span", "labels": list(REGISTRY["ner"].labels), "n": 12},
            "sa": {"kind": "label", "labels": list(SA.labels), "n": 12}}}
    assert report["confusion"]["sa"]["good"] == {
        "labels": [*SA.labels, "none"], "rows": [[3, 1, 0, 0], [0, 3, 1, 0], [1, 0, 3, 0]]}
    assert report["calibration"]["sa"]["bad"]["ece"] == pytest.approx(0.2)
    assert [(part["by"], part["edges"]) for part in report["lengths"]] == [
        ("audio", [0, 2, 5, 10, 12]), ("words", [0, 5, 11])]
    for part in (*report["lengths"], *report["conditions"]):
        assert sum(group["n"] for group in part["rows"]) == 24
    by_corpus = {group["name"]: group["values"] for group in report["conditions"][0]["rows"]}
    assert by_corpus["vp"]["wer"] == scores["wer_vp"]["values"]
    assert "sa_f1" not in by_corpus["vp"], "nothing is annotated"
    assert "slue" not in by_corpus["vp"], "it is a mean over corpora"
    assert [e["id"] for e in report["examples"]] == ["3", "4", "5"]
    assert report["examples"][0]["change"] < 0
    markdown, latex = (Path(f"out/report.{end}").read_text() for end in ("md", "tex"))
    assert all(part in markdown for part in ("## ner: entities by cause", "| good", "n = 24",
                                             "| SLUE "))
    assert latex.count("\\toprule") == markdown.count("\n## ") == latex.count("95 \\% interval")
    assert "wrong\\_label" not in latex


def test_a_system_alone_and_groups_by_speaker(files: list[Path]) -> None:
    report = make_report(files[1:], resamples=20)
    assert report["verdict"] == []
    assert report["scores"][0]["differences"] == {}
    some = records(*system(9))
    facts = {p.utterance: {"speaker": f"s{i % 3}" if i else None, "condition": None}
             for i, p in enumerate(some)}
    found = analyse({"a": [some]}, REGISTRY, resamples=5, facts=facts,
                    phrases={"ner": Counter({"paris": 4, "monday": 50})})
    assert [part["by"] for part in found["conditions"]] == ["corpus", "speaker"]
    assert {r["name"]: r["n"] for r in found["conditions"][1]["rows"]} == {
        "s0": 7, "s1": 8, "s2": 8}
    assert [(r["name"], r["n"]) for r in found["entities"]["ner"]["by_rarity"]] == [
        ("never", 12), ("1-4 times", 12), ("20 times or more", 12)]


def test_data_that_differ_are_refused_or_left_out(files: list[Path]) -> None:
    write(files[0], system(3)[2:])
    write(files[1], system(9)[:-1])
    with pytest.raises(UserError, match=r"'bad' lacks 2 of 24 \(e.g. vp/0#ner\), 'good' lacks 1 of"
                                        r" 24.*--common"):
        compare(files)
    report = make_report(files, common=True, resamples=20)
    assert report["data"]["utterances"] == 21
    assert "3 predictions that not all systems have are left out" in report["notes"]
    with pytest.raises(UserError, match="--examples must be 0 or more"):
        compare(files, examples=-1)


def test_a_thousand_rows_take_seconds(files: list[Path]) -> None:
    for file, quality in zip(files, (100, 400), strict=True):
        write(file, system(quality, 500))
    begun = time.process_time()
    make_report(files)
    assert time.process_time() - begun < 60
