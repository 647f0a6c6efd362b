"""The task registry: what is refused, and that a new task needs data and no code."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import unified_string
from unislu_llm.data.row_reader import FIELDS
from unislu_llm.decoding.answer import Answer
from unislu_llm.errors import UserError
from unislu_llm.scoring.predictions import Prediction
from unislu_llm.tasks import NER, RESERVED, SA, SEPARATOR, LabelTask, SpanTask, TaskRegistry
from unislu_llm.unified import parse
from unislu_llm.utterance import Utterance

SLOTS = {"kind": "span", "name": "slots", "marker": "[SLOTS]", "labels": ["CITY", "TIME"],
         "words": {"CITY": "town"}}
ACTS = {"kind": "label", "name": "acts", "marker": "[DA]", "open": "[A]", "close": "[/A]",
        "labels": ["question", "greeting", "thanks a lot"], "multi": True,
        "words": {"[A]": "greeting thanks"}}


def write(path: Path, rows: Any) -> Path:
    path.write_text(yaml.safe_dump(rows, sort_keys=False), encoding="utf-8")
    return path


def test_the_nineteen_markers_of_the_paper() -> None:
    kinds = ("PLACE", "QUANT", "ORG", "WHEN", "NORP", "PERSON", "LAW")
    tags = [tag for kind in kinds for tag in (f"[{kind}]", f"[/{kind}]")]
    markers = TaskRegistry().markers
    assert len(markers) == 19
    assert markers == ("[T/L]", "[NER]", *tags, "[SA]", "[S]", "[/S]")
    assert SA.labels == ("Positive", "Neutral", "Negative")
    assert not SA.multi


def test_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'nerr'.*asr, ner, sa"):
        TaskRegistry()["nerr"]
    assert "nerr" not in TaskRegistry()


def test_every_marker_has_a_meaning_in_plain_words() -> None:
    registry = TaskRegistry.from_dict([SLOTS, ACTS, {"builtin": "ner"}, {"builtin": "sa"}])
    meanings = {m: registry.meaning(m) for m in registry.markers}
    assert all(words.strip() and "[" not in words for words in meanings.values())
    assert len(set(meanings.values())) == len(meanings), "two markers would start as one"
    # The mean of one word's row is that row: the marker's logit would tie with the word's.
    assert all(len(words.split()) > 1 for marker,
               words in meanings.items() if marker != "[CITY]"), meanings
    assert meanings["[CITY]"] == "town"
    assert "town" in meanings["[/CITY]"]
    assert "time" in meanings["[TIME]"]
    assert "thanks" in meanings["[A]"]


@pytest.mark.parametrize(("task", "message"), [
    (SpanTask("ner", "[N2]", ("A",)), "'ner' is registered twice"),
    (SpanTask("asr", "[N2]", ("A",)), "not 'asr'"),
    (SpanTask("problems", "[N2]", ("A",)), "not 'problems', which has a meaning already"),
    (SpanTask("ner_label", "[N2]", ("A",)), "scores would be called as another task's"),
    (SpanTask("My Task", "[N2]", ("A",)), "lower-case"),
    (SpanTask("n2", "[NER]", ("A",)), r"\[NER\]' is already in use"),
    (SpanTask("n2", SEPARATOR, ("A",)), r"\[T/L\]' is already in use"),
    (SpanTask("n2", "[N2]", ("ORG",)), r"\[ORG\]' is already in use"),
    (SpanTask("n2", "[N2]", ("S",)), r"\[S\]' is already in use"),
    (SpanTask("n2", "[N2]", ("N2",)), r"\[N2\]' is already in use"),
    (SpanTask("n2", "[N2]", ("A", "/A")), r"\[/A\]' is already in use"),
    (SpanTask("n2", "[N2]", ("A", "A")), "differ from each other"),
    (SpanTask("n2", "[N2]", ()), "labels must be given"),
    (SpanTask("n2", "N2", ("A",)), r"must look like \[NAME\]"),
    (SpanTask("n2", "[N2]", ("two words",)), r"must look like \[NAME\]"),
    (SpanTask("n2", "[N2]", ("A",), words={"B": "bee"}), r"words: 'B'"),
    (SpanTask("n2", "[N2]", ("A",), words={"A": " "}), r"words: 'A'"),
    (LabelTask("n2", "[N2]", ("a",), "[X]", "[X]"), r"\[X\]' is already in use"),
    (LabelTask("n2", "[N2]", ("a",), "[S]", "[/X]"), r"\[S\]' is already in use"),
    (LabelTask("n2", "[N2]", ("a", " b"), "[X]", "[/X]"), "outer blanks"),
    (LabelTask("n2", "[N2]", ("a", ""), "[X]", "[/X]"), "plain text"),
    (LabelTask("n2", "[N2]", ("a[NER]",), "[X]", "[/X]"), "without markers")])
def test_a_task_that_cannot_be_told_apart_is_refused(task: SpanTask | LabelTask,
                                                     message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskRegistry([NER, SA, task])


def test_what_rows_and_answers_call_otherwise_is_reserved(tmp_path: Path) -> None:
    parts = {"text", "file", *Answer("", 0.0, hypothesis="").to_dict(),
             *(part.name for part in fields(Answer))} - {"transcript", "outputs", "n_tokens"}
    assert {*FIELDS, *parts, *Prediction.model_fields} - RESERVED == {
        "ref", "hyp", "ref_text", "hyp_text"}
    file = write(tmp_path / "tasks.yaml", [SLOTS, ACTS | {"name": "file"}])
    line = file.read_text().splitlines().index("- kind: label") + 1
    with pytest.raises(UserError, match=rf"tasks\.yaml:{line}: tasks\[1\]: task 'file': .*rename"):
        TaskRegistry.from_yaml(file)


def test_a_new_task_comes_from_yaml_alone(tmp_path: Path) -> None:
    made = TaskRegistry.from_dict([{"builtin": "sa"}, SLOTS, ACTS, {"builtin": "ner"}])
    assert made.names == ("sa", "slots", "acts", "ner")
    registry = TaskRegistry.from_yaml(write(tmp_path / "tasks.yaml", made.to_dict()))
    assert list(registry) == list(made)
    utterance = Utterance("1", None, "hello how are you",
                          {"acts": ("greeting", "question"), "ner": ()})
    text = unified_string(utterance, registry["acts"])
    assert text == "hello how are you[T/L][DA][A]question[/A][A]greeting[/A]"
    parsed = parse(text, registry, "acts")
    assert parsed.outputs == ("question", "greeting")
    assert not parsed.problems
    none = parse("hello[T/L][DA]", registry, "acts")
    assert (none.outputs, none.problems) == ((), ())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"name": "x"}, "expected a YAML list"),
        (None, "expected a YAML list"),
        (["ner"], r"\[0\]: expected a mapping, found str"),
        ([{"builtin": "nerr"}], r"\[0\].builtin: 'nerr' is not one of ner, sa; did you mean 'ner'"),
        ([{"builtin": "ner", "labels": ["A"]}], r"\[0\]: .*builtin.*labels"),
        ([{"builtin": "ner"}, {"builtin": "ner"}], "registered twice"),
        ([SLOTS, SLOTS | {"kind": "spans"}],
         r"\[1\].kind: must be 'span' or 'label', found 'spans'"),
        ([SLOTS | {"label": ["A"]}], r"\[0\].label: unknown key; did you mean 'labels'"),
        ([SLOTS | {"multi": True}], r"\[0\].multi: unknown key; known: name, marker"),
        ([{"kind": "label", "name": "x", "marker": "[X]", "labels": ["a"]}],
         r"(?s)\[0\].open: is missing.*\[0\].close: is missing"),
        ([SLOTS | {"labels": "CITY"}], r"\[0\].labels: .*list"),
        ([SLOTS | {"labels": {"CITY": 1}}], r"\[0\].labels: .*list"),
        ([ACTS | {"labels": [True, False]}], r"\[0\].labels\[0\]: .*quotes"),
        ([SLOTS | {"labels": [1, 2]}], r"\[0\].labels\[0\]: .*quotes"),
        ([SLOTS | {"name": 3}], r"\[0\].name: .*quotes"),
        ([ACTS | {"multi": "yes please"}], r"\[0\].multi: .*true or false"),
        ([SLOTS | {"words": ["town"]}], r"\[0\].words: "),
        ([SLOTS | {"words": {"CITY": 5}}], r"\[0\].words.CITY: .*quotes")])
def test_a_bad_task_file_is_named(tmp_path: Path, rows: Any, message: str) -> None:
    path = write(tmp_path / "tasks.yaml", rows)
    with pytest.raises(UserError, match=message):
        TaskRegistry.from_yaml(path)
    path.write_text("- name: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)tasks\.yaml:1: not valid YAML"):
        TaskRegistry.from_yaml(path)
    with pytest.raises(UserError, match=r"gone\.yaml does not exist"):
        TaskRegistry.from_yaml(tmp_path / "gone.yaml")
