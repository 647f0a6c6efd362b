"""Learning rates, parameter groups, and the names of what goes wrong, each provoked in a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import TEXTS, write_utterances
from tests.training.conftest import fitted
from unislu_llm.config import Config, TrainConfig
from unislu_llm.data.manifest import write_manifest
from unislu_llm.errors import UserError
from unislu_llm.loss import TASK_PART
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.tasks import SA, Span
from unislu_llm.tokenizer import Target, UnifiedTokenizer
from unislu_llm.training import objectives
from unislu_llm.training.optim import build_optimizer, factor, group_rates, set_rates
from unislu_llm.utterance import Utterance


def test_warm_up_then_cosine_to_zero() -> None:
    values = [factor(step, warmup=10, total=110) for step in range(111)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[110] == pytest.approx(0.0)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_groups_have_their_rates() -> None:
    net, adapter = nn.Linear(3, 2), nn.Parameter(torch.ones(2, 2))
    config = TrainConfig(warmup_steps=10)
    groups = {"projector": list(net.named_parameters()), "lora": [("x", adapter)]}
    optimizer = build_optimizer(groups, config)
    assert [(g["name"], g["peak"]) for g in optimizer.param_groups] == [
        ("projector", config.lr.projector), ("lora", config.lr.lora)]
    set_rates(optimizer, config, 0, total=100)
    assert group_rates(optimizer)["lr_lora"] == pytest.approx(config.lr.lora / 10)
    set_rates(optimizer, config, 1, total=8)  # of a short run a quarter warms up
    assert group_rates(optimizer)["lr_lora"] == config.lr.lora


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing trains"):
        build_optimizer({}, TrainConfig())


def felt(clips: list[Utterance], *labels: str) -> list[Utterance]:
    return [replace(u, labels={"sa": labels[i % len(labels)]} if labels else {})
            for i, u in enumerate(clips)]


# What is taken away from training: where it is done, and what does it then.
SPOILT: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "end": (UnifiedTokenizer, "target", lambda real: lambda *given: Target(
        (found := real(*given)).ids[:-1], found.parts[:-1])),
    "sound": (SpeechEncoder, "forward", lambda real: lambda *given: (
        (found := real(*given))[0] * 0, found[1])),
    "task loss": (objectives, "weighted_loss", lambda real: lambda losses, parts, *rest: real(
        losses.masked_fill(parts == TASK_PART, 0.0), parts, *rest))}


@pytest.mark.parametrize(("lacks", "train", "dev", "steps", "says"), [
    ("", lambda c: c[:2], lambda c: c[:2], 90, ""),
    ("", lambda c: felt(c[:2]), lambda c: c[:2], 30,
     r"missing delimiter: 2 of 2 answers have no \[T/L\].*train\.lr\.markers"),
    ("", lambda c: felt(c, "Negative"), lambda c: felt(c, *SA.labels), 30,
     r"one class only: every sa answer is 'Negative'.*data\.weights"),
    ("task loss", lambda c: c[:2], lambda c: c[:2], 60,
     r"loss imbalance: the transcript improves .* while ner stalls \(F1 0.0 to 0.0\).*train\.loss"),
    ("end", lambda c: c[:2], lambda c: c[:2], 30,
     r"no end: 2 of 2 answers ran into.*decode\.tokens_per_second"),
    ("sound", list, list, 30, r"not listening: \d+ of 10 .* one transcript.*model\.hypothesis"),
    ("", lambda c: c[:2], lambda c: [replace(u, text="oh no", labels={}) for u in c[:2]], 30,
     r"not listening: hardly a word is right \(WER .*model\.hypothesis")])
def test_each_failure_is_named_once_it_occurs(
        lacks: str, train: Any, dev: Any, steps: int, says: str, tmp_path: Path,
        tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whisper's decoder, all of which trains at high rates, until it knows its clips by heart."""
    texts = [f"{word} {text}" for word in ("first", "second") for text in TEXTS]
    clips = [replace(u, text=text, labels={"ner": (Span("ORG", 0, text.index(" ")),)}) for u, text
             in zip(write_utterances(tmp_path, seconds=[0.5] * 10), texts, strict=True)]
    for name, some in (("train", train(clips)), ("dev", dev(clips))):
        write_manifest(tmp_path / f"{name}.jsonl", some)
    for owner, name, spoil in [SPOILT[lacks]] if lacks else []:
        monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    asked = dict.fromkeys(("grammar", "force_task"), "one class" in says)  # so all answers parse
    run = fitted("whisper_slu", tiny_config(
        data={name: [str(tmp_path / f"{name}.jsonl")] for name in ("train", "dev")},
        model={"encoder_mode": "full"}, decode={"max_new_tokens": 60} | asked,
        train={"batch_size": 10, "epochs": steps, "eval_every": steps // 2, "warmup_steps": 4,
               "lr": dict.fromkeys(("decoder", "encoder", "markers"), 1e-2)})).run
    _, first, _, last = (run / "log.txt").read_text().split("\nvalidation after ")
    untrained, found = (re.findall("^warning: ((?!the score|training).*)$", said, re.MULTILINE)
                        for said in (first, last))
    assert untrained == []
    assert any(re.match(says, line) for line in found) if says else found == []
