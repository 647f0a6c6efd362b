"""Fixtures for every test: factories of tiny models, tokenizers and utterances; no network.

A fixture returns a factory, because the models change what they are given (markers are added to
tokenizers, embeddings are wrapped): call it once for each independent object.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# One thread in each process, before torch is imported: tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import tiny
from unislu_llm.utterance import Utterance


def _factory(make: Callable[..., Any]) -> Any:
    """A fixture that gives a function."""
    return pytest.fixture(scope="session")(lambda: make)


tiny_tokenizer = _factory(tiny.make_tokenizer)
tiny_whisper_encoder = _factory(tiny.make_whisper_encoder)
tiny_speech_llm = _factory(tiny.make_speech_llm)
tiny_whisper_slu = _factory(tiny.make_whisper_slu)


@pytest.fixture
def make_utterances(tmp_path: Path) -> Callable[..., list[Utterance]]:
    """Factory: :func:`tests.tiny.write_utterances` into a folder of this test."""
    return lambda **options: tiny.write_utterances(tmp_path / "audio", **options)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny Whisper and a tiny LLM, as `from_pretrained` reads them."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = tiny.make_tokenizer()
    parts = {"whisper": tiny.make_whisper(), "llm": (tiny.make_llm("llama", tokenizer), tokenizer)}
    for name, (model, its_tokenizer) in parts.items():
        model.save_pretrained(root / name)
        its_tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in parts}


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory,
             tiny_checkpoints: dict[str, str]) -> Callable[[str], Path]:
    @cache
    def train(kind: str) -> Path:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        folder = tmp_path_factory.mktemp(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            tiny.train_tiny_run(kind, folder, tiny_checkpoints)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # the next run of this process may have other settings
        return folder

    return train


@pytest.fixture
def tiny_run(_trained: Callable[[str], Path], tmp_path: Path,
             monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Factory: the run folder of a finished :func:`tests.tiny.train_tiny_run`.

    It is a copy, seen from the current folder: `runs/tiny`, beside `corpus/dev.jsonl`.
    """

    def make(kind: str = "speech_llm") -> Path:
        source, copy = _trained(kind), tmp_path / kind
        shutil.copytree(source, copy)
        config = copy / "runs" / "tiny" / "config.yaml"  # whose paths are absolute
        config.write_text(config.read_text().replace(str(source), str(copy)))
        monkeypatch.chdir(copy)
        return Path("runs/tiny")

    return make
