"""A configuration that trains on tiny checkpoints, for tests of the loop through its real entry points."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unislu_llm.data.manifest import write_manifest
from unislu_llm.training.config import Config, apply


@pytest.fixture
def tiny_config(tiny_checkpoints: dict[str, str], make_utterances: Any, tmp_path: Path) -> Callable[..., Config]:
    """Factory of configurations: a tiny corpus of 12 utterances, tiny models, no trackers; sections can be overridden."""

    def make(output: str = "run", **sections: dict[str, Any]) -> Config:
        manifest = tmp_path / "corpus" / "train.jsonl"
        if not manifest.exists():
            utterances = make_utterances(seconds=[0.6, 1.9, 0.7, 1.0, 0.8, 2.5, 1.2, 0.5, 1.4, 1.1, 0.9, 3.0])
            manifest.parent.mkdir(exist_ok=True)
            write_manifest(manifest, utterances)
        config = Config(output=str(tmp_path / output))
        base: dict[str, dict[str, Any]] = {
            "model": {"encoder": tiny_checkpoints["whisper"], "llm": tiny_checkpoints["llm"],
                      "projector_options": {"stack": 5, "hidden": 32},
                      "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}},
            "data": {"train": [str(manifest)], "dev": [str(manifest)]},
            "train": {"epochs": 2, "batch_size": 8, "micro_batch_size": 8, "eval_start": False, "trackers": [], "threads": 1,
                      "lr": {"projector": 1e-2, "lora": 1e-2, "markers": 1e-2}},
            "decode": {"max_new_tokens": 12},
        }
        for section in (base, sections):
            apply(config, section, "test")
        return config

    return make


@pytest.fixture(autouse=True)
def _one_accelerator_state() -> Any:
    """Accelerate keeps its state in the process; each test starts anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(max(1, torch.get_num_threads()))
