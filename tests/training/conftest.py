"""A configuration that trains on tiny checkpoints, for tests of runs by their real entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from unislu_llm.config import Config
from unislu_llm.config_file import config_from_dict, merge, to_yaml
from unislu_llm.data.manifest import write_manifest
from unislu_llm.training.trainer import Trainer

SECONDS = [0.6, 1.9, 0.7, 1.0, 0.8, 2.5, 1.2, 0.5, 1.4, 1.1, 0.9, 3.0]
_OF_OTHERS = "Failed to load CPU gemm_4bit"  # bitsandbytes
CTC: dict[str, Any] = {"projector": "ctc", "projector_options": {
    "stack": 2, "layers": 1, "heads": 2, "hidden": 16, "blank_bias": 1.0}}
"""Model section of a tiny `ctc` projector."""


@pytest.fixture
def tiny_config(tiny_checkpoints: dict[str, str], make_utterances: Any,
                tmp_path: Path) -> Callable[..., Config]:
    """Factory of configurations: 12 utterances, tiny models, no trackers; sections lie over it."""

    def make(output: str = "run", **sections: Any) -> Config:
        manifest = tmp_path / "corpus" / "train.jsonl"
        if not manifest.exists():
            write_manifest(manifest, make_utterances(seconds=SECONDS))
        base = {
            "output": str(tmp_path / output),
            "model": {"encoder": tiny_checkpoints["whisper"], "llm": tiny_checkpoints["llm"],
                      "projector_options": {"stack": 5, "hidden": 32},
                      "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}},
            "data": {"train": [str(manifest)], "dev": [str(manifest)]},
            "train": {"epochs": 2, "batch_size": 8, "trackers": [], "threads": 1,
                      "lr": {"projector": 1e-2, "lora": 1e-2, "markers": 1e-2}},
            "decode": {"max_new_tokens": 12},
        }
        return config_from_dict(merge(Config, base, sections), "test")

    return make


@pytest.fixture(autouse=True)
def _one_accelerator_state() -> Iterator[None]:
    """Accelerate keeps its state in the process; each test starts anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., str]:
    """Factory: train configurations by `torchrun` in as many processes, in a mode of `run.py`; what
    was printed."""

    def run(processes: int, *runs: tuple[str, Config], mode: str = "train",
            fails: bool = False) -> str:
        asked = list[str]()
        for kind, config in runs:
            file = tmp_path / f"{Path(config.output).name}{'-on' * config.resume}.yaml"
            file.write_text(to_yaml(config))
            asked += [kind, str(file)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", str(processes), str(Path(__file__).with_name("run.py")),
                   mode, *asked]
        env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        told = done.stderr.partition("elastic/multiprocessing")[0]  # the launcher's own traceback
        assert (done.returncode != 0) == fails, told[-4000:]
        if not fails and not runs[0][1].stages:  # libraries say nothing, and one process warns
            lines = [line for line in told.replace("\r", "\n").splitlines()
                     if line.strip() and not line.startswith(("train:", _OF_OTHERS))]
            own = "warning: " if mode == "each" else "warning: data."
            assert all(line.startswith(own) for line in lines), told
            assert mode == "each" or all(lines.count(s) <= len(runs) for s in lines), told
        return done.stdout

    return run


def logged(run: Path, part: str = "train") -> list[dict[str, Any]]:
    """Rows of one part of a run's log."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["part"] == part]


def weights(folder: Path) -> dict[str, Tensor]:
    """Trained weights in a folder of a saved model."""
    return load_file(folder / "model.safetensors")


def fitted(kind: str, config: Config) -> Trainer:
    """A run that came to its end."""
    trainer = Trainer(kind, config)
    trainer.fit()
    return trainer


def stop_after(trainer: Trainer, steps: int) -> None:
    """Train until the run is killed behind its step number `steps`."""
    step = trainer.step

    def killed(micro: Any) -> None:
        if trainer.progress.step == steps:
            raise KeyboardInterrupt
        step(micro)

    trainer.step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
