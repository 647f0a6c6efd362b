"""What manifests share is found with bounded memory, and a moved row stays the row it was."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from unislu_llm.data.checks import ERRORS, WARNINGS, Checker, Places, plain_field
from unislu_llm.data.clean import moved
from unislu_llm.tasks import TaskRegistry


def test_places_give_the_first_place_of_a_key() -> None:
    places = Places()
    assert places.first("a", 0, 3, b"v") is None
    assert places.first("\ud800", 0, 4) is None
    assert places.first("a", 1, 9) == places.first("a", 2, 1) == (0, 3, b"v")
    places.close()


def test_memory_does_not_follow_the_rows(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("".join(json.dumps({"id": f"u{i}", "text": f"so it is {i}"}) + "\n" for i in range(rows)))
        tracemalloc.start()
        with Checker(TaskRegistry()) as checker:
            assert sum(not c.errors for c in checker.check(path)) == rows
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(10)  # what is loaded once
    assert peak(4000) < peak(400) + 50_000  # bytes; a dictionary of the ids has 400,000 more


@pytest.mark.parametrize("raw", [
    '{"id":"a",  "audio" : "wav/a.wav","text":"x \\u00e9", "n": 1.50}',
    '{"id": "a", "audio": "wav/\\"a.wav", "text": "\\"audio\\": \\"b\\""}',
    '{"id": "a", "meta": {"audio": "b"}, "audio": "wav/a.wav", "text": "x"}',
])
def test_only_the_audio_path_of_a_moved_row_changes(tmp_path: Path, raw: str) -> None:
    row = json.loads(raw)
    out = moved(raw.encode(), row, tmp_path, tmp_path / "deep/er")
    assert json.loads(out) == row | {"audio": "../../" + row["audio"]}
    assert moved(raw.encode(), row, tmp_path, tmp_path) == raw.encode()
    if "meta" not in row:
        assert out.decode().replace("../../", "") == raw


def test_kinds_and_fields() -> None:
    assert not ERRORS.keys() & WARNINGS.keys()
    assert plain_field("segments[3].ner[12].end") == "segments.ner.end"
