"""Runs on frozen weights of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import save_wide_llm
from tests.training.conftest import logged, weights
from unislu_llm.config import Config
from unislu_llm.training.trainer import Trainer


@pytest.mark.parametrize(("bits", "again"), [("4bit", True), ("4bit", False), ("8bit", False)])
def test_steps_after_a_validation_still_train(bits: str, again: bool,
                                              tiny_config: Callable[..., Config],
                                              tmp_path: Path) -> None:
    """On some CPUs bitsandbytes packs weights anew in eval mode, which lets no gradient through."""
    save_wide_llm(tmp_path / "wide")
    trainer = Trainer("speech_llm", tiny_config(
        model={"llm": str(tmp_path / "wide"), "quantization": bits},
        train={"max_steps": 4, "eval_every": 2, "precision": "bf16",
               "gradient_checkpointing": again}))
    before = {n: value.clone() for n, value in trainer.model.trained_state().items()}
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters()
              if not p.requires_grad}
    run = trainer.fit()
    assert [row["step"] for row in logged(run, "dev")] == [0, 2, 4]
    after = weights(run / "last")
    assert [n for n in before if ".lora_B." in n and torch.equal(before[n], after[n])] == []
    rows = logged(run)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    changed = [n for n, p in trainer.model.named_parameters()
               if n in frozen and not torch.equal(p, frozen[n])]
    assert changed == []
