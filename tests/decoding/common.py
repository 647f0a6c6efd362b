"""What the tests of decoding share: tasks of every kind, clips, and the one way to decode them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.config import DecodeConfig
from unislu_llm.data.batch import Batch
from unislu_llm.decoding import engine
from unislu_llm.decoding.answer import Answer
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.search import Decoded
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]
EMOTION = LabelTask("emotion", "[EMO]", ("sad", "sad face", "happy", "sad face mask"), "[E]",
                    "[/E]")
ACTS = LabelTask("acts", "[ACT]", ("question", "answer", "question mark", "thanks"), "[A]", "[/A]",
                 multi=True)
REGISTRY = TaskRegistry([NER, SA, EMOTION, ACTS])


def noise(n: int, seed: int = 0) -> list[Tensor]:
    """Clips of noise, of 0.3 to 1.3 s."""
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(int(16_000 * (0.3 + 0.25 * (i % 5))), generator=generator)
            for i in range(n)]


def batch_of(model: SLUModel, waves: Sequence[Tensor],
             hypotheses: Sequence[str | None] | None = None) -> Batch:
    """A batch to decode."""
    texts = hypotheses or [None] * len(waves)
    blanks = [Example(Utterance(str(i), None, "", hypothesis=text), None)
              for i, text in enumerate(texts)]
    return model.collator().from_waves(blanks, waves)


def decode(model: SLUModel, waves: Sequence[Tensor], tasks: Sequence[Sequence[str]],
           hypotheses: Sequence[str | None] | None = None, n_best: int = 1,
           **options: Any) -> list[Answer]:
    """Answers under the grammar, with forced tasks, unless the options say otherwise."""
    how = DecodeConfig(**{"grammar": True, "force_task": True} | options)
    batch = batch_of(model, waves, hypotheses)
    return Engine(model, how).answer(batch, tasks, n_best=n_best)


def decode_ids(monkeypatch: pytest.MonkeyPatch, *given: Any,
               **options: Any) -> list[tuple[Answer, dict[str, Decoded]]]:
    """As :func:`decode`, with the best answers' token ids by task beside each answer."""
    seen: list[dict[str, Decoded]] = []
    fill = engine.fill

    def watch(answer: Answer, tokenizer: Any, ranked: Any, *rest: Any, **more: Any) -> Answer:
        seen.append({name: answers[0] for name, answers in ranked.items()})
        return fill(answer, tokenizer, ranked, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "fill", watch)
        answers = decode(*given, **options)
    return list(zip(answers, seen, strict=True))
