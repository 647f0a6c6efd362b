"""Spans that begin or end inside a word, and characters that nobody sees: said, and mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.data.mending import inside_word
from unislu_llm.data.validate import validate
from unislu_llm.io import read_json_lines

TEXT = "so 😀 Änne met mira"
# `we` and `mété` in the second row; `Änne` and `mira` in the first.
WRONG = {"UTF-16": (0, 2, 3, 7, 6, 10, 15, 19), "UTF-8": (0, 2, 3, 9, 8, 13, 18, 22),
         "from 1": (1, 3, 4, 8, 6, 10, 15, 19), "is inclusive": (0, 1, 3, 6, 5, 8, 14, 17),
         "from 1 and": (1, 2, 4, 7, 6, 9, 15, 18), "a length": (0, 2, 3, 4, 5, 4, 14, 4)}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"id": f"r{i}"} | row) + "\n" for i, row in enumerate(rows)))
    return path


def test_what_is_inside_a_word_is_told_with_a_guess(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl",
                 {"text": "so 😀 mira, then left", "ner": [["PERSON", 6, 10]]},
                 {"text": "we met mira, then left", "ner": [["PERSON", 8, 12]]},
                 {"text": "the council's seat is paris.", "ner": [["ORG", 4, 11], ["LAW", 22, 27]]})
    first, second, *rest = validate([path], audio="none", fix=tmp_path / "o").page().splitlines()
    assert first == (f"{path}:1: ner: warning: 6..10 'ira,' begins inside a word; 'mira' is 5..9, "
                     "if offsets count UTF-16 units, in which an emoji is two")
    assert second.endswith("'ira,' begins inside a word; 'mira' is 7..11, if offsets count from 1")
    assert rest[0].startswith("no errors and 2 warnings")
    # No guess fits all of them: the copy keeps their spans as they are.
    assert read_json_lines(tmp_path / "o") == read_json_lines(path)
    assert not any(inside_word(text, 2) for text in ("eu-law", "我在北京", "서울에서"))


@pytest.mark.parametrize("name", WRONG)
def test_a_guess_that_fits_all_spans_is_written_by_fix(name: str, tmp_path: Path) -> None:
    e, f, g, h, a, b, c, d = WRONG[name]
    path, out = tmp_path / "m.jsonl", tmp_path / "out.jsonl"
    write(path, {"text": TEXT, "ner": [["ORG", a, b], {"label": "ORG", "start": c, "end": d}]},
          {"text": "we mété paris", "ner": [["ORG", e, f], ["ORG", g, h]]})
    assert "--fix FILE writes them so" in validate([path], audio="none").page()
    report = validate([path], audio="none", fix=out)
    assert report.status(strict=True) == 0
    assert name in report.mended[0]
    assert [row["ner"] for row in read_json_lines(out)] == [
        [["ORG", 5, 9], {"label": "ORG", "start": 14, "end": 18}], [["ORG", 0, 2], ["ORG", 3, 7]]]


def test_characters_are_told_and_mended_with_their_spans(tmp_path: Path) -> None:
    text = "\ufeffanne\u2019s zu\u0308\u00adrich \u200b is old\u200e"
    segment = {"start": 0, "end": 9, "text": "it\u2019s", "ner": [["ORG", 3, 4]]}
    row = {"text": text, "hypothesis": "it\u2019s", "segments": [segment], "condition": "it\u2019s",
           "ner": [["PERSON", 1, 5], ["PLACE", text.index("z"), text.index("h") + 1]]}
    joined = {"text": "ok \U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e"}
    path, out = write(tmp_path / "m.jsonl", row, joined), tmp_path / "out.jsonl"
    told = validate([path], audio="none").page()
    for part in ("(U+2019) is a curly", "(U+00AD) is invisible", "(U+200B)", "(U+FEFF)", "NFD",
                 "hypothesis: warning", "segments[0].text: warning"):
        assert part in told, part
    assert "m.jsonl:2" not in told, "joiners of emoji and of Persian mean something"
    report = validate([path], audio="none", fix=out)
    assert report.mended == [f"{out}: mended in 1 rows: characters"]
    assert read_json_lines(out) == [{"id": "r0"} | row | {
        "text": "anne's z\u00fcrich is old", "hypothesis": "it's",
        "segments": [segment | {"text": "it's"}], "ner": [["PERSON", 0, 4], ["PLACE", 7, 13]],
    }, {"id": "r1"} | joined]
    assert validate([out], audio="none").status(strict=True) == 0
