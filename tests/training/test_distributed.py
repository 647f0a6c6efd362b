"""One global batch gives one loss and one gradient, however processes and micro-batches share it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unislu_llm.training.config import Config

SCRIPT = Path(__file__).with_name("first_step.py")


def first_step(kind: str, config: Config, folder: Path, name: str, processes: int = 1) -> dict[str, Any]:
    """Run `first_step.py` in as many processes and load what it saved."""
    config.output = str(folder / f"run-{name}")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config.to_dict()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = (launcher if processes > 1 else [sys.executable]) + [
        str(SCRIPT), kind, str(folder / f"{name}.yaml"), str(folder / f"{name}.pt")]
    done = subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize(("kind", "loss"), [("speech_llm", "dynamic"), ("speech_llm", "fixed"), ("whisper_slu", "dynamic")])
def test_processes_and_accumulation_change_nothing(kind: str, loss: str, tiny_config: Callable[..., Config],
                                                   tmp_path: Path) -> None:
    """1 process x 8, 4 micro-batches of 2, and 2 processes x 2 micro-batches of 2 agree on loss and gradients."""
    layouts = {"whole": (8, 1), "accumulated": (2, 1), "two": (2, 2)}
    found = {name: first_step(kind, tiny_config(train={"micro_batch_size": size, "loss": loss}), tmp_path, name, processes)
             for name, (size, processes) in layouts.items()}
    whole = found["whole"]
    assert max(float(g.abs().max()) for g in whole["gradients"].values()) > 1e-4
    for name in ("accumulated", "two"):
        other = found[name]
        assert other["steps"] == whole["steps"]
        for key in ("loss", "loss_asr", "loss_task", "w_asr", "tokens"):
            assert other["figures"][key] == pytest.approx(whole["figures"][key], rel=1e-5), (name, key)
        assert other["gradients"].keys() == whole["gradients"].keys()
        for parameter, gradient in whole["gradients"].items():
            torch.testing.assert_close(other["gradients"][parameter], gradient, rtol=1e-3, atol=1e-5,
                                       msg=lambda m, p=parameter: f"{p}: {m}")
