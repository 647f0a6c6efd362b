"""Runs from configuration files, or parts of them; started by tests, by torchrun.

    python run.py MODE KIND CONFIG.yaml [KIND CONFIG.yaml ...]   one after the other

MODE: `train`; `stop:STEPS`: the processes end before the step after STEPS; `first`: metrics and
gradients of the first global batch, beside the run's folder; `each`: a run that keeps its first
gradients.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unislu_llm.config import Config
from unislu_llm.config_file import config_from_file
from unislu_llm.errors import reported
from unislu_llm.models.base import gathered
from unislu_llm.training.process import processes
from unislu_llm.training.stages import train
from unislu_llm.training.trainer import Trainer

GRADIENTS = "gradients.safetensors"


def first_step(kind: str, config: Config) -> None:
    """Forward and backward of step one; the main process saves what came of it."""
    trainer = Trainer(kind, config)
    micro = next(iter(trainer.batches(0)))
    total = trainer.totals(micro)
    trainer.backward(micro, total)
    trainer.window.add(total, 0.0, 1.0)
    metrics = trainer.window.read(trainer.accelerator)
    if trainer.main:
        save_file({n: p.grad.clone() for n, p in trainer.model.named_parameters()
                   if p.grad is not None}, config.output + ".safetensors")
        Path(config.output + ".json").write_text(json.dumps(
            metrics | {"steps": trainer.total_steps}))
    trainer.wrapped = trainer.model
    trainer.accelerator.free_memory()


def stop_at(steps: int) -> None:
    """Make every trainer end its process before a step."""
    step = Trainer.step

    def step_or_stop(self: Trainer, micro: Any) -> None:
        if self.progress.step == steps:
            raise SystemExit(3)
        step(self, micro)

    Trainer.step = step_or_stop  # type: ignore[method-assign]


def whole(parameter: Any) -> torch.Tensor:
    """The gradient of a parameter, wherever it is; of a ZeRO engine all processes call this."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return gathered(parameter.grad)


class Recorded(Trainer):
    """A run that keeps the gradients of its first step, before they are clipped, and the share of
    its parameters that is here; it is killed before the step after `stop`."""

    stop = -1
    spoilt = -1  # a step whose loss is not finite

    def backward(self, micro: Any, total: dict[str, float]) -> None:
        spoils = self.progress.step == self.spoilt
        super().backward(micro, dict.fromkeys(total, math.nan) if spoils else total)
        if self.progress.step == self.stop:
            raise KeyboardInterrupt
        if self.progress.step == 0:
            parameters = list(self.model.parameters())
            here = sum(getattr(p, "ds_tensor", getattr(p, "to_local", lambda p=p: p)()).numel()
                       for p in parameters)
            found = {n: whole(p).clone() for n, p in self.model.named_parameters()
                     if p.requires_grad}
            if self.main:
                share = torch.tensor(here / sum(getattr(p, "ds_numel", p.numel())
                                                for p in parameters))
                save_file({**found, "share": share}, self.run / GRADIENTS)


def record(kind: str, config: Config) -> None:
    """A run; `KIND:3` is killed after step 3, and the loss of `KIND:nan` is one in that step."""
    kind, _, how = kind.partition(":")
    trainer = Recorded(kind, config)
    trainer.stop, trainer.spoilt = (int(how), -1) if how.isdecimal() else (-1, 2 if how else -1)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.fit()


def run(mode: str, runs: list[tuple[str, str]]) -> None:
    """Several runs in the same processes."""
    mode, _, steps = mode.partition(":")
    if mode == "stop":
        stop_at(int(steps))
    for kind, file in runs:
        config = config_from_file(file, resolve=False)
        {"first": first_step, "each": record}.get(mode, train)(kind, config)
    if mode in ("first", "each"):
        processes().destroy_process_group()


if __name__ == "__main__":
    with reported():
        run(sys.argv[1], [*zip(sys.argv[2::2], sys.argv[3::2], strict=True)])
