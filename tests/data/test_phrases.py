"""Phrases in place of offsets: found as words, read in every form, and refused where it is not
plain which words are meant."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.phrases import _Transcript, _words, place_phrases
from unislu_llm.data.validate import validate
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, SpanTask, TaskRegistry

REGISTRY = TaskRegistry([SpanTask("drugs", "[DRUGS]", ("DRUG", "DOSE"))])
TEXT = "take aspirin and two tablets of aspirin with milk"
TABLETS, MILK = Span("DOSE", 17, 28), Span("DRUG", 45, 49)
BOTH = [Span("DRUG", 5, 12), Span("DRUG", 32, 39)]


def manifest(folder: Path, annotation: Any) -> Path:
    path = folder / "m.jsonl"
    path.write_text(json.dumps({"id": "a", "text": "nothing", "drugs": {}}) + "\n"
                    + json.dumps({"id": "b", "text": TEXT, "drugs": annotation}) + "\n")
    return path


def test_phrases_are_found_as_words() -> None:
    def said(text: str, phrase: str) -> list[str]:
        return [text[a:b] for a, b in _Transcript(text).find(phrase, _words(phrase))]

    assert said("a latte, then a LATTE!", "latte") == ["latte", "LATTE"]
    assert said("platters", "latte") == []
    assert said("some Light-Roast mocha", "light roast") == ["Light-Roast"]
    assert said("twenty, um, ounces of um milk", "20 ounces") == ["twenty, um, ounces"]
    assert said("20 ounces", "twenty ounces") == ["20 ounces"]
    assert said("some text", "...") == []
    composed, other = (unicodedata.normalize(form, "zürich") for form in ("NFC", "NFD"))
    assert said(f"in {other}!", composed) == [other]


def test_a_phrase_has_as_many_places_as_it_is_given() -> None:
    milk, almond = ("drink", "milk"), ("size", "almond milk")
    # The long one first: nothing overlaps.
    both = [Span("size", 0, 11), Span("drink", 16, 20)]
    assert place_phrases("almond milk and milk", [milk, almond]) == (both, {})
    assert place_phrases("anything", []) == ([], {})
    for text, phrases, spans, why in (
            ("almond milk", [milk, almond], [Span("size", 0, 11)], {0: "where another span is"}),
            ("milk", [milk, milk], [], {0: "is given 2 times and is in the text once", 1: "given"}),
            ("milk or milk", [milk], [], {0: "is in the text 2 times and given once"}),
            ("may in may", [("when", "may"), ("person", "may")], [],
             {0: "as person and as when", 1: "give start and end"})):
        placed, reasons = place_phrases(text, phrases)
        assert (placed, list(reasons)) == (spans, list(why))
        assert all(part in reasons[i] for i, part in why.items())
    assert place_phrases("milk or milk", [milk], first=True) == ([Span("drink", 0, 4)], {})


@pytest.mark.parametrize(("annotation", "spans"), [
    ({"DRUG": ["aspirin", "Aspirin"], "DOSE": "2 tablets"}, [BOTH[0], TABLETS, BOTH[1]]),
    ([["DRUG", "milk"], {"label": "DOSE", "phrase": "two  tablets"}], [TABLETS, MILK]),
    ([["DRUG", 5, 12], ["DRUG", "aspirin"]], BOTH),
    ({"DRUG": []}, []), ({}, []),
])
def test_every_form_is_read(annotation: Any, spans: list[Span], tmp_path: Path) -> None:
    path = manifest(tmp_path, annotation)
    assert read_manifest(path, REGISTRY)[1].labels == {"drugs": tuple(spans)}


@pytest.mark.parametrize(("annotation", "message"), [
    ({"DRUG": ["milk", "aspirin"]}, r"drugs\.DRUG\[1\]: 'aspirin' is in the text 2 times and"),
    ({"DRUG": "aspirn"}, r"drugs\.DRUG: 'aspirn' is not in the text .*did you mean 'aspirin'"),
    ([["DOSE", "pill"], ["DRUG", "milk"]], r"drugs\[0\]\.phrase: 'pill' is not in the text"),
    ([["DRUG", 5, 12], ["DRUG", 32, 39], ["DRUG", "aspirin"]], r"drugs\[2\]\.phrase: .*another"),
    ([["DRUG", "{x}"]], r"drugs\[0\]\.phrase: '{x}' is not"),
    ({"DRGU": ["milk"]}, r"drugs\.DRGU: 'DRGU' is not a label .*did you mean 'DRUG'"),
    ({"DRUG": [3]}, r"drugs\.DRUG\[0\]: must be a valid string, found 3"),
    ({"DRUG": [" "]}, r"drugs\.DRUG\[0\]: "),
    ({"label": "DRUG", "phrase": "milk"}, r"drugs: .*brackets"),
    ([{"label": "DRUG", "end": 3}], r"drugs\[0\]\.start: is missing; .*or label and phrase"),
    ([["DRUG"]], r"drugs\[0\]: must be"),
])
def test_what_is_not_plain_is_named(annotation: Any, message: str, tmp_path: Path) -> None:
    path = manifest(tmp_path, annotation)
    with pytest.raises(UserError, match=r"m\.jsonl:2: " + message):
        read_manifest(path, REGISTRY)


def test_validation_knows_phrases(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("- {kind: span, name: drugs, marker: '[DRUGS]', labels: [DRUG, DOSE]}\n")
    good = validate([manifest(tmp_path, {"DRUG": "milk"})], tasks_file=tasks)
    assert (good.status(), "DRUG 1, DOSE 0" in good.page()) == (0, True)
    bad = validate([manifest(tmp_path, {"DRUG": "aspirin"})], tasks_file=tasks)
    assert bad.status() == 1
    assert "m.jsonl:2: drugs.DRUG: 'aspirin' is in the text 2 times" in bad.page()
