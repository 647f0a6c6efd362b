"""A model, tokenizers and tasks for the tests of the grammar."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import pytest
import torch
from tokenizers import decoders

from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry

Build = Callable[..., SLUModel]
EMOTION = LabelTask("emotion", "[EMO]", ("sad", "sad face", "happy", "sad face mask"), "[E]", "[/E]")
ACTS = LabelTask("acts", "[ACT]", ("question", "answer", "question mark", "thanks"), "[A]", "[/A]", multi=True)


@pytest.fixture(scope="session")
def registry() -> TaskRegistry:
    """Tasks of every kind: `ner`, `sa`, `emotion` and, of several labels, `acts`."""
    return TaskRegistry([NER, SA, EMOTION, ACTS])


@pytest.fixture(scope="session")
def tokenizer_of(tiny_tokenizer: Callable[..., Any]) -> Callable[[str | None], Any]:
    """A tokenizer of each kind, trained once; those that start texts with a blank decode as Llama 2 does."""

    @lru_cache
    def trained(metaspace: str | None) -> Any:
        tokenizer = tiny_tokenizer(metaspace=metaspace)
        if metaspace in ("always", "first"):
            tokenizer.backend_tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        return tokenizer

    return lambda metaspace: deepcopy(trained(metaspace))


@pytest.fixture
def build(registry: TaskRegistry, tiny_speech_llm: Build, tiny_whisper_slu: Build) -> Build:
    """A model with these tasks; markers as likely as words, so that random answers have a task part too."""

    def made(kind: str, seed: int = 0, louder: float = 1.5, **more: Any) -> SLUModel:
        options: dict[str, Any] = {"tasks": registry.to_dict(), "seed": seed, "whisper_options": {"init_std": 0.3}} | more
        model = tiny_speech_llm(**options) if kind == "llm" else tiny_whisper_slu(**options)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".rows"):
                    parameter.normal_(std=louder * 0.3)
        return model

    return made
