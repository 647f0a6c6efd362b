"""Loss and gradients of the first global batch of a run, saved to a file. Started by test_distributed.py, alone or by torchrun.

    python first_step.py KIND CONFIG.yaml OUT.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from unislu_llm.loss import Counts
from unislu_llm.training.config import Config, apply
from unislu_llm.training.loop import Trainer


def main(kind: str, config_file: str, out: str) -> None:
    """Run forward and backward of step one; the main process saves."""
    config = Config()
    apply(config, yaml.safe_load(Path(config_file).read_text()), config_file)
    trainer = Trainer(kind, config)
    trainer.wrapped.train()
    micro = next(iter(trainer.batches(0, 0)))
    total = trainer.totals(micro)
    figures = trainer.figures(trainer.backward(micro, Counts(*total.tolist())), 0.0)
    if trainer.accelerator.is_main_process:
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save({"figures": figures, "gradients": gradients, "steps": len(trainer.plan)}, out)
    trainer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
