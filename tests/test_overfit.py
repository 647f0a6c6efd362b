"""Proof of the whole path: 8 utterances on the real weights are learnt to the letter, with both decoders.

    pytest -m slow tests/test_overfit.py        # about 3 minutes a decoder on 2 cores
"""

from __future__ import annotations

from pathlib import Path

import pytest

from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.decoding.generate import predict
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.config import load_config
from unislu_llm.training.loop import Trainer
from unislu_llm.unified import encode, render

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "recipes" / "data" / "mini"


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize(("kind", "config", "rates"), [
    ("speech_llm", "quickstart_llm.yaml", ["--train.lr.lora", "1e-3"]),
    ("whisper_slu", "quickstart_whisper.yaml", []),
])
def test_eight_utterances_are_learnt_to_the_letter(kind: str, config: str, rates: list[str], tmp_path: Path) -> None:
    """4 with entities and 4 with sentiment, 60 steps of all 8; generation gives the exact unified strings."""
    registry = TaskRegistry()
    chosen = [u for name in ("entities", "sentiment") for u in read_manifest(MINI / f"{name}_train.jsonl", registry)[:4]]
    write_manifest(tmp_path / "eight.jsonl", chosen)
    flags = ["--data.train", str(tmp_path / "eight.jsonl"), "--data.dev", "--train.epochs", "60", "--train.trackers",
             "--output", str(tmp_path / "run"), *rates]
    trainer = Trainer(kind, load_config(flags, ROOT / "recipes" / "configs" / config,
                                        ROOT / "adapters" if kind == "speech_llm" else None, ""))
    trainer.fit()
    model = SLUModel.from_pretrained(trainer.run / "last")
    rows = predict(model, trainer.train_samples)
    wanted = [render(encode(s.utterance, registry[str(s.task)])) for s in trainer.train_samples]
    assert len(wanted) == 8
    assert [row["raw"] for row in rows] == wanted
    assert not any(row["problems"] for row in rows)
