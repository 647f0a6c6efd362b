"""Rows over 30 s are cut at their segments, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.data.long_rows import handle_long
from unislu_llm.data.manifest import read_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.utterance import Utterance

REGISTRY = TaskRegistry()
SEGMENTS = [{"start": 0.0, "end": 12.0, "text": "in paris", "hypothesis": "in paris",
             "ner": [{"label": "PLACE", "start": 3, "end": 8}]},
            {"start": 12.0, "end": 25.0, "text": "and rome", "hypothesis": "",
             "ner": [["PLACE", 4, 8]]},
            {"start": 25.0, "end": 40.0, "text": "it was late", "ner": []},
            {"start": 44.0, "end": 50.0, "text": "good night", "sa": "Positive"}]


def write_long(folder: Path, **row: Any) -> Path:
    """A manifest of a short row and one of 50 s."""
    soundfile.write(folder / "long.wav", np.zeros(50 * 8000, dtype=np.float32), 8000)
    rows = [{"id": "s", "audio": "long.wav", "text": "short", "end": 3.0},
            {"id": "t", "audio": "long.wav", "text": "all", **row}]
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_long_rows_are_cut_at_segments(tmp_path: Path) -> None:
    path = write_long(tmp_path, corpus="talks", segments=SEGMENTS)
    short, first, second, third = handle_long(read_manifest(path, REGISTRY), REGISTRY)
    assert short.id == "s"
    assert (first.id, first.start, first.end) == ("t-000", 0.0, 25.0)
    assert (first.text, first.hypothesis) == ("in paris and rome", "in paris")
    assert first.labels["ner"] == (Span("PLACE", 3, 8), Span("PLACE", 13, 17))
    assert (second.start, second.end) == (25.0, 40.0), "a third would pass 30 s"
    assert (second.labels, second.hypothesis) == ({"ner": ()}, None)
    assert (third.start, third.end, third.labels) == (44.0, 50.0, {"sa": "Positive"})
    assert {(p.corpus, p.audio) for p in (first, second, third)} == {
        ("talks", tmp_path / "long.wav")}


@pytest.mark.parametrize(("change", "message"), [
    ({"segments": None}, r"m\.jsonl:2: segments: is missing; 't' has 50\.0 s"),
    ({"segments": {}}, r"segments: is missing"),
    ({"segments": [{"start": 0, "end": 31, "text": "a"}]}, r"segments\[0\]: has 31\.0 s"),
    ({"segments": [{"start": 0, "text": "a"}]}, r"segments\[0\]\.end: is missing"),
    ({"segments": [{"start": 0, "end": 9}]}, r"segments\[0\]\.text: is missing"),
    ({"segments": [{"start": 0, "end": 9, "text": "a", "ner": [["ORGG", 0, 1]]}]},
     r"segments\[0\]\.ner\[0\]\.label.*ORG"),
    ({"segments": [SEGMENTS[1], SEGMENTS[0]]}, r"segments\[1\]\.start: 0 s is before"),
    ({"segments": [{"start": 45, "end": 55, "text": "a"}]}, r"segments\[0\].*outside the row"),
])
def test_rows_that_cannot_be_cut_say_why(change: dict[str, Any], message: str,
                                         tmp_path: Path) -> None:
    utterances = read_manifest(write_long(tmp_path, **change), REGISTRY)
    with pytest.raises(UserError, match=message):
        handle_long(utterances, REGISTRY)


def test_long_rows_are_refused_together() -> None:
    many = [Utterance(f"u{i}", None, "a", duration=31.0) for i in range(13)]
    with pytest.raises(UserError, match=r"13 rows are longer than 30 s(.|\n)*'u9'(.|\n)*3 more"):
        handle_long(many, REGISTRY)


def test_rows_that_fit_have_their_length_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(16_000), 16_000)
    (u, text) = handle_long([Utterance("a", path, "x", start=0.25), Utterance("b", None, "x")],
                            REGISTRY)
    assert (u.duration, text.duration) == (0.75, None)
    with pytest.raises(UserError, match=r"m:1: field 'audio': .*start 2 s is outside the file"):
        handle_long([Utterance("a", path, "x", start=2.0, source="m:1")], REGISTRY)


@pytest.mark.parametrize(("length", "declared", "message"), [
    (0, 0, "cannot be read as audio"), (44, 0, "holds no samples"), (44, 9, "0 of 18 bytes")])
def test_files_without_samples_are_refused(tmp_path: Path, length: int, declared: int,
                                           message: str) -> None:
    """An empty file, and a header alone."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(declared), 16_000)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=rf"m:1: field 'audio': .*a\.wav: .*{message}"):
        handle_long([Utterance("a", path, "x", source="m:1")], REGISTRY)
