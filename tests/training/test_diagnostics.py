"""The failure signatures, each provoked in a real run, are named with what to do; a run that learns
has none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TEXTS, write_utterances
from unislu_llm.config import Config
from unislu_llm.data.manifest import write_manifest
from unislu_llm.loss import TASK_PART
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.tasks import SA, Span
from unislu_llm.tokenizer import Target, UnifiedTokenizer
from unislu_llm.training import objectives
from unislu_llm.training.trainer import Trainer
from unislu_llm.utterance import Utterance

Clips = list[Utterance]
NAMES = "missing delimiter|one class only|loss imbalance|no end|not listening"


def labelled(clips: Clips, *labels: str) -> Clips:
    """With these sentiments in turn; without any, with nothing annotated."""
    return [replace(u, labels={"sa": labels[i % len(labels)]} if labels else {})
            for i, u in enumerate(clips)]


def no_end(patch: pytest.MonkeyPatch) -> None:
    whole = UnifiedTokenizer.target

    def cut(tokenizer: UnifiedTokenizer, example: Any) -> Target:
        found = whole(tokenizer, example)
        return Target(found.ids[:-1], found.parts[:-1])

    patch.setattr(UnifiedTokenizer, "target", cut)


def no_sound(patch: pytest.MonkeyPatch) -> None:
    forward = SpeechEncoder.forward
    patch.setattr(SpeechEncoder, "forward", lambda *given: (
        (found := forward(*given))[0] * 0, found[1]))


def transcripts_outweigh(patch: pytest.MonkeyPatch) -> None:
    loss = objectives.weighted_loss
    patch.setattr(objectives, "weighted_loss", lambda losses, parts, *rest: loss(
        losses.masked_fill(parts == TASK_PART, 0.0), parts, *rest))


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


def two(clips: Clips) -> Clips:
    return clips[:2]


@pytest.mark.parametrize(("spoil", "train", "dev", "steps", "says"), [
    (nothing, two, two, 90, ""),
    (nothing, lambda c: labelled(c[:2]), two, 30,
     r"missing delimiter: 2 of 2 answers have no \[T/L\].*train\.lr\.markers"),
    (nothing, lambda c: labelled(c, "Negative"), lambda c: labelled(c, *SA.labels), 30,
     r"one class only: every sa answer is 'Negative'.*data\.weights"),
    (transcripts_outweigh, two, two, 60,
     r"loss imbalance: the transcript improves .* while ner stalls \(F1 0.0 to 0.0\).*train\.loss"),
    (no_end, two, two, 30, r"no end: 2 of 2 answers ran into.*decode\.tokens_per_second"),
    (no_sound, list, list, 30,
     r"not listening: \d+ of 10 utterances have one transcript.*model\.hypothesis"),
    (nothing, two, lambda c: [replace(u, text="oh no", labels={}) for u in c[:2]], 30,
     r"not listening: hardly a word is right \(WER .*model\.hypothesis")])
def test_each_failure_is_named_once_it_occurs(
        spoil: Callable[[pytest.MonkeyPatch], None], train: Callable[[Clips], Clips],
        dev: Callable[[Clips], Clips], steps: int, says: str, tiny_config: Callable[..., Config],
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whisper's decoder, all of which trains at high rates, until it knows its clips by heart."""
    texts = [f"{word} {text}" for word in ("first", "second") for text in TEXTS]
    clips = [replace(u, text=text, labels={"ner": (Span("ORG", 0, text.index(" ")),)}) for u, text
             in zip(write_utterances(tmp_path, seconds=[0.5] * 10), texts, strict=True)]
    data = {"train": train(clips), "dev": dev(clips)}
    for name, some in data.items():
        write_manifest(tmp_path / f"{name}.jsonl", some)
    asked = dict.fromkeys(("grammar", "force_task"), "one class" in says)  # so all answers parse
    spoil(monkeypatch)
    trainer = Trainer("whisper_slu", tiny_config(
        data={name: [str(tmp_path / f"{name}.jsonl")] for name in data},
        model={"encoder_mode": "full"}, decode={"max_new_tokens": 60} | asked,
        train={"batch_size": 10, "epochs": steps, "eval_every": steps // 2, "warmup_steps": 4,
               "lr": dict.fromkeys(("decoder", "encoder", "markers"), 1e-2)}))
    trainer.fit()
    _, first, _, last = (trainer.run / "log.txt").read_text().split("\nvalidation after ")
    untrained, found = (re.findall(f"^warning: ((?:{NAMES}): .*)$", said, re.MULTILINE)
                        for said in (first, last))
    assert untrained == []
    assert any(re.match(says, line) for line in found) if says else found == []
