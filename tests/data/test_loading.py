"""From manifests to examples and their hypotheses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.config import ModelConfig
from unislu_llm.data.loading import check_hypotheses, load_examples
from unislu_llm.data.manifest import write_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

READS = ModelConfig(hypothesis="manifest")
READS_ALONE = ModelConfig(hypothesis="manifest", projector="none")


@pytest.fixture
def manifest(make_utterances: Callable[..., list[Utterance]],
             tmp_path: Path) -> Callable[..., str]:
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
    registry = TaskRegistry()
    examples = load_examples([one, two], registry)
    assert Counter(e.utterance.corpus for e in examples) == {"one": 8, "two": 2}
    assert [e.task for e in examples[:4]] == ["ner", "sa", None, "ner"]
    spread = load_examples([one, two], registry, limit=4)
    assert [e.utterance.id for e in spread] == ["u0", "u2", "u4", "u6", "u0", "u1"]
    with pytest.raises(UserError, match=r"data\.dev names no manifest"):
        load_examples([], registry, flag="data.dev")


def test_what_is_scored_has_audio_and_is_warned_of_pseudo_labels_once(
        manifest: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    path = manifest("half", {"text_source": "whisper"}, {"audio": None, "duration": None})
    assert len(load_examples([path], TaskRegistry())) == 2
    assert not caplog.records
    for _ in range(2):
        load_examples([path], TaskRegistry(), flag="data.dev")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "1 of 2 rows were written by a recogniser" in caplog.text
    with pytest.raises(UserError, match=r"half\.jsonl:2: field 'audio'.*out of data\.dev"):
        load_examples([path], TaskRegistry(), flag="data.dev", scored=True)


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
    assert check_hypotheses(examples, READS) == examples
    assert "1 of 3 examples have no hypothesis" in caplog.text


@pytest.mark.parametrize(("examples", "model", "message"), [
    (examples_with(None, None), READS, r"data\.train: 2 of 2 .* m\.jsonl:1; .*unislu transcribe`$"),
    (examples_with("a", None), READS_ALONE, r"1 of 2 examples have no hypothesis, .* m\.jsonl:2"),
    (examples_with("a", None, audio=None), READS_ALONE, "transcribe --copy-text"),
])
def test_missing_hypotheses_are_refused(examples: list[Example], model: ModelConfig,
                                        message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_hypotheses(examples, model)
