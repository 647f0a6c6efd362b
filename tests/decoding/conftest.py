"""Models and tokenizers for the tests of decoding."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import pytest
import torch
from tokenizers import decoders

from tests.decoding.common import REGISTRY, Build
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SEPARATOR
from unislu_llm.tokenizer import UnifiedTokenizer


@pytest.fixture
def tokenizer(tiny_tokenizer: Callable[..., Any]) -> UnifiedTokenizer:
    """A byte-level tokenizer with these tasks."""
    return UnifiedTokenizer(tiny_tokenizer(), REGISTRY)


@pytest.fixture(scope="session")
def tokenizer_of(tiny_tokenizer: Callable[..., Any]) -> Callable[[str | None], Any]:
    """A tokenizer of each kind, trained once; those that start texts with a blank are Llama 2's."""

    @lru_cache
    def trained(metaspace: str | None) -> Any:
        tokenizer = tiny_tokenizer(metaspace=metaspace)
        if metaspace in ("always", "first"):
            tokenizer.backend_tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                 decoders.Strip(" ", 1, 0)])
        return tokenizer

    return lambda metaspace: deepcopy(trained(metaspace))


@pytest.fixture
def build(tiny_speech_llm: Build, tiny_whisper_slu: Build) -> Build:
    """A model with these tasks; its markers are as likely as words.

    `kind` is whisper or an architecture of LLM, `separator` added to the logit of `[T/L]`: random
    models end few transcripts themselves.
    """

    def made(kind: str, seed: int = 0, separator: float = 0.0, **more: Any) -> SLUModel:
        options: dict[str, Any] = {"registry": REGISTRY, "seed": seed,
                                   "whisper_options": {"init_std": 0.3}} | more
        model = (tiny_whisper_slu(**options) if kind == "whisper"
                 else tiny_speech_llm(arch="llama" if kind == "llm" else kind, **options))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".rows"):
                    parameter.normal_(std=0.15 if kind == "gemma3_text" else 0.45)
        if separator:
            louder = torch.zeros(len(model.tokenizer.base))
            louder[model.tokenizer.marker_ids[SEPARATOR]] = separator
            model.lm.get_output_embeddings().register_forward_hook(
                lambda _, __, logits: logits + louder.to(logits))
        return model

    return made
