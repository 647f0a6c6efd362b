"""Tiny random models, tokenizers and utterances for every test: built from configuration in milliseconds, no network.

Every fixture returns a factory, because the models change what they are given (markers are added to tokenizers,
embeddings are wrapped): call it once for each independent object.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.tiny import (
    TEXTS,
    make_llm,
    make_speech_llm,
    make_tokenizer,
    make_whisper,
    make_whisper_encoder,
    make_whisper_slu,
)
from unislu_llm.models.whisper_slu import WhisperSLU
from unislu_llm.tasks import Span
from unislu_llm.utterance import Utterance

SAMPLE_RATE = 16_000
def write_utterances(folder: Path, *, seconds: Sequence[float] = (0.9, 1.6, 0.6, 1.2),
                     seed: int = 0) -> list[Utterance]:
    """Utterances with WAV files of their own (16 kHz, tone and noise) in `folder`, of different lengths.

    In turn: two entities, sentiment, not annotated, annotated as without entities; then from the start again.
    """
    rng = np.random.default_rng(seed)
    kinds: list[tuple[str, dict[str, Any]]] = [
        (TEXTS[0], {"ner": (Span("PLACE", 19, 24), Span("WHEN", 28, 34))}),
        (TEXTS[2], {"sa": "Positive"}),
        (TEXTS[1], {}),
        (TEXTS[3], {"ner": ()}),
    ]
    utterances = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, length in enumerate(seconds):
        time = np.arange(round(length * SAMPLE_RATE)) / SAMPLE_RATE
        tone = np.sin(2 * np.pi * (200 + 90 * i) * time * (1 + 0.2 * time))
        wave = 0.3 * tone + 0.05 * rng.standard_normal(len(time))
        path = folder / f"u{i}.wav"
        soundfile.write(path, wave.astype(np.float32), SAMPLE_RATE)
        text, labels = kinds[i % len(kinds)]
        utterances.append(Utterance(f"u{i}", path, text, labels, corpus="tiny", duration=len(time) / SAMPLE_RATE))
    return utterances


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Factory: :func:`make_tokenizer`."""
    return make_tokenizer


@pytest.fixture(scope="session")
def tiny_whisper() -> Callable[..., tuple[WhisperForConditionalGeneration, PreTrainedTokenizerFast]]:
    """Factory: :func:`make_whisper`, a whole Whisper and its tokenizer."""
    return make_whisper


@pytest.fixture(scope="session")
def tiny_whisper_encoder() -> Callable[..., WhisperEncoder]:
    """Factory: :func:`make_whisper_encoder`."""
    return make_whisper_encoder


@pytest.fixture(scope="session")
def tiny_llm() -> Callable[..., Any]:
    """Factory: :func:`make_llm`."""
    return make_llm


@pytest.fixture(scope="session")
def tiny_speech_llm() -> Callable[..., SpeechLLM]:
    """Factory: :func:`make_speech_llm`."""
    return make_speech_llm


@pytest.fixture(scope="session")
def tiny_whisper_slu() -> Callable[..., WhisperSLU]:
    """Factory: :func:`make_whisper_slu`."""
    return make_whisper_slu


@pytest.fixture
def make_utterances(tmp_path: Path) -> Callable[..., list[Utterance]]:
    """Factory: :func:`write_utterances` into a folder of this test."""
    return lambda **options: write_utterances(tmp_path / "audio", **options)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny Whisper and a tiny LLM, as `from_pretrained` reads them."""
    root = tmp_path_factory.mktemp("checkpoints")
    whisper, whisper_tokenizer = make_whisper()
    tokenizer = make_tokenizer()
    llm = make_llm("llama", tokenizer)
    for name, model, text in (("whisper", whisper, whisper_tokenizer), ("llm", llm, tokenizer)):
        model.save_pretrained(root / name)
        text.save_pretrained(root / name)
    return {"whisper": str(root / "whisper"), "llm": str(root / "llm")}


def train_tiny_run(kind: str, folder: Path, checkpoints: dict[str, str]) -> None:
    """Two steps of training in `folder`: `corpus/dev.jsonl` (8 utterances) and `runs/tiny`."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from unislu_llm.data.manifest import write_manifest
    from unislu_llm.training.config import Config, apply
    from unislu_llm.training.loop import Trainer

    write_manifest(folder / "corpus" / "dev.jsonl",
                   write_utterances(folder / "corpus" / "audio", seconds=(0.9, 1.6, 0.6, 1.2, 0.7, 0.8, 1.0, 0.5)))
    config = Config(output="runs/tiny")
    apply(config, {
        "model": {"encoder": checkpoints["whisper"], "llm": checkpoints["llm"],
                  "projector_options": {"stack": 5, "hidden": 32}, "lora": {"rank": 4, "target_modules": ["q_proj"]}},
        "data": {"train": ["corpus/dev.jsonl"], "dev": ["corpus/dev.jsonl"]},
        "train": {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "trackers": [], "threads": 1},
        "decode": {"max_new_tokens": 12, "batch_size": 3}}, "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Trainer(kind, config).fit()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoints: dict[str, str]) -> Callable[[str], Path]:
    @cache
    def train(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        train_tiny_run(kind, folder, tiny_checkpoints)
        return folder

    return train


@pytest.fixture
def tiny_run(_trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Factory: the run folder of a finished :func:`train_tiny_run`, a copy, seen from the current folder."""

    def make(kind: str = "speech_llm") -> Path:
        shutil.copytree(_trained(kind), tmp_path / kind)
        monkeypatch.chdir(tmp_path / kind)
        return Path("runs/tiny")

    return make
