"""From manifests to examples and their hypotheses; rows over 30 s are cut, or refused."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.config import ModelConfig
from unislu_llm.data.loading import check_hypotheses, handle_long, load_examples
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

REGISTRY = TaskRegistry()
READS = ModelConfig(hypothesis="manifest")
READS_ALONE = ModelConfig(hypothesis="manifest", projector="none")


@pytest.fixture
def manifest(make_utterances: Callable[..., list[Utterance]], tmp_path: Path) -> Callable[..., str]:
    """Factory: a manifest of as many rows as there are changes, each changed so."""
    def make(name: str, *changes: dict[str, Any]) -> str:
        utterances = make_utterances(seconds=[0.5 + 0.1 * i for i in range(len(changes))])
        path = tmp_path / f"{name}.jsonl"
        write_manifest(path, [replace(u, corpus="default", **change)
                              for u, change in zip(utterances, changes, strict=True)])
        return str(path)

    return make


def test_examples_of_manifests(manifest: Callable[..., str]) -> None:
    one, two = manifest("one", *[{}] * 8), manifest("two", {}, {})
    examples = load_examples([one, two], REGISTRY)
    assert Counter(e.utterance.corpus for e in examples) == {"one": 8, "two": 2}
    assert [e.task for e in examples[:4]] == ["ner", "sa", None, "ner"]
    spread = load_examples([one, two], REGISTRY, limit=4)
    assert [e.utterance.id for e in spread] == ["u0", "u2", "u4", "u6", "u0", "u1"]
    with pytest.raises(UserError, match=r"data\.dev names no manifest"):
        load_examples([], REGISTRY, flag="data.dev")


def test_what_is_scored_has_audio_and_is_warned_of_pseudo_labels_once(
        manifest: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    path = manifest("half", {"text_source": "whisper"}, {"audio": None, "duration": None})
    assert len(load_examples([path], REGISTRY)) == 2
    assert not caplog.records
    for _ in range(2):
        load_examples([path], REGISTRY, flag="data.dev")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "1 of 2 rows were written by a recogniser" in caplog.text
    with pytest.raises(UserError, match=r"half\.jsonl:2: field 'audio'.*out of data\.dev"):
        load_examples([path], REGISTRY, flag="data.dev", scored=True)


def examples_with(*hypotheses: str | None, audio: str | None = "a.wav") -> list[Example]:
    path = None if audio is None else Path(audio)
    return [Example(Utterance(str(i), path, "text", hypothesis=h, source=f"m.jsonl:{i + 1}"), None)
            for i, h in enumerate(hypotheses)]


def test_hypotheses_are_those_that_a_run_asks_for(caplog: pytest.LogCaptureFixture) -> None:
    examples = examples_with("a", None, "")
    assert check_hypotheses(examples, ModelConfig()) == examples
    found = check_hypotheses(examples, ModelConfig(hypothesis="reference"))
    assert [e.utterance.hypothesis for e in found] == ["text"] * 3
    assert check_hypotheses(examples_with("a", ""), READS_ALONE) == examples_with("a", "")
    assert not caplog.text
    assert check_hypotheses(examples, READS_ALONE) == examples, "they are made before training"
    assert not caplog.text
    own = READS.model_copy(update={"recogniser": "ctc"})
    assert check_hypotheses(examples, own) == examples
    assert "1 of 3 examples have no hypothesis, the first m.jsonl:2; they train" in caplog.text


@pytest.mark.parametrize(("examples", "model", "message"), [
    (examples_with(None, None), READS.model_copy(update={"recogniser": "ctc"}),
     r"data\.train: 2 of 2 .* m\.jsonl:1; .*unislu transcribe`$"),
    (examples_with("a", None, audio=None), READS_ALONE, "whisper-base FILE --out DIR --copy-text`"),
])
def test_missing_hypotheses_are_refused(examples: list[Example], model: ModelConfig,
                                        message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_hypotheses(examples, model)


# Rows over 30 s


SEGMENTS = [{"start": 0.0, "end": 12.0, "text": "in paris", "hypothesis": "in paris",
             "ner": [{"label": "PLACE", "start": 3, "end": 8}]},
            {"start": 12.0, "end": 25.0, "text": "and rome", "hypothesis": "",
             "ner": [["PLACE", 4, 8]]},
            {"start": 25.0, "end": 40.0, "text": "it was late", "ner": []},
            {"start": 44.0, "end": 50.0, "text": "good night", "sa": "Positive"}]


def write_long(folder: Path, **row: Any) -> Path:
    """A manifest of a short row and one of 50 s."""
    soundfile.write(folder / "long.wav", np.zeros(50 * 8000), 8000)
    rows = [{"id": "s", "audio": "long.wav", "text": "short", "end": 3.0},
            {"id": "t", "audio": "long.wav", "text": "all", **row}]
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_long_rows_are_cut_at_segments(tmp_path: Path) -> None:
    path = write_long(tmp_path, corpus="talks", text_source="asr", segments=SEGMENTS)
    short, first, second, third = handle_long(read_manifest(path, REGISTRY), REGISTRY)
    assert short.id == "s"
    assert (first.id, first.start, first.end) == ("t-000", 0.0, 25.0)
    assert (first.text, first.hypothesis) == ("in paris and rome", "in paris")
    assert first.labels["ner"] == (Span("PLACE", 3, 8), Span("PLACE", 13, 17))
    assert (second.start, second.end) == (25.0, 40.0), "a third would pass 30 s"
    assert (second.labels, second.hypothesis) == ({"ner": ()}, None)
    assert (third.start, third.end, third.labels) == (44.0, 50.0, {"sa": "Positive"})
    assert {(p.corpus, p.audio, p.text_source) for p in (first, second, third)} == {
        ("talks", tmp_path / "long.wav", "asr")}


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


@pytest.mark.parametrize(("length", "samples", "start", "message"), [
    (0, 0, 0.0, "cannot be read as audio"), (44, 0, 0.0, "holds no samples"),
    (44, 9, 0.0, "0 of 18 bytes"), (None, 16_000, 2.0, "start 2 s is outside the file"),
    (None, 16_000, 0.25, "")])
def test_lengths_are_measured_and_files_without_samples_refused(
        tmp_path: Path, length: int | None, samples: int, start: float, message: str) -> None:
    """Before training, and an empty file as one that is a header alone."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(samples), 16_000)
    path.write_bytes(path.read_bytes()[:length])
    rows = [Utterance("t", None, "x"), Utterance("a", path, "x", start=start, source="m:1")]
    if not message:
        assert [u.duration for u in handle_long(rows, REGISTRY)] == [None, 0.75]
        return
    with pytest.raises(UserError, match=rf"m:1: field 'audio': .*a\.wav: .*{message}"):
        handle_long(rows, REGISTRY)
