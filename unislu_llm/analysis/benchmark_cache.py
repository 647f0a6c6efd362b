"""Training with and without the encoder cache: how far the losses are apart, and what a step costs.

Losses are compared twice: over a pass of the data with the weights of the start, where only the rounding of frames differs, and
along the first steps of training, where a difference feeds on itself. A control run without cache, its trained weights
changed a little at the start, shows how far any small change leads.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unislu_llm.analysis.benchmark_options import CacheBenchmark
from unislu_llm.analysis.benchmarking import environment, shown, table, write
from unislu_llm.errors import UserError
from unislu_llm.loss import weighted_loss
from unislu_llm.models.frames import complete
from unislu_llm.training.config import Config, apply_file
from unislu_llm.training.loop import Trainer

VARIANTS = {"no cache": "", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "control": ""}


def run(options: CacheBenchmark, command: Sequence[str] = ()) -> int:
    """Train each variant for some steps, print a table, write the result; returns the exit status."""
    try:
        found = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    write({"command": shown(command), "environment": environment(), "steps": options.steps, "control": options.control,
           "variants": found}, options.out)
    return 0


def measure(options: CacheBenchmark) -> list[dict[str, Any]]:
    """A row a variant; differences are relative to no cache.

    Raises:
        UserError: a config that cannot be read or trained.
    """
    runs: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in VARIANTS.items():
            runs[name] = _run(options, Path(folder), name, dtype)
            print(f"{name}: done", flush=True)
    plain = runs["no cache"]
    rows = []
    for name, losses in runs.items():
        same, path = (_differences(plain[key], losses[key]) for key in ("same weights", "training"))
        rows.append({"variant": name, "same weights, mean": statistics.fmean(same), "same weights, most": max(same),
                     "steps within 1e-3": next((i for i, d in enumerate(path) if d > 1e-3), len(path)),
                     "last step": path[-1], "seconds a step": statistics.median(losses["seconds"])})
    return rows


def _differences(plain: Sequence[float], other: Sequence[float]) -> list[float]:
    return [abs(a - b) / abs(a) for a, b in zip(plain, other, strict=True)]


def _run(options: CacheBenchmark, folder: Path, name: str, dtype: str) -> dict[str, list[float]]:
    config = Config(output=str(folder / name))
    apply_file(config, options.config)
    config.train.max_steps, config.train.threads, config.train.trackers = options.steps, options.threads, []
    config.train.log_every, config.data.dev = 1, []
    if dtype:
        config.data.encoder_cache, config.data.cache_dtype = str(folder / "cache"), dtype  # type: ignore[assignment]
    trainer = Trainer(options.kind, config)
    if name == "control":
        _perturb(trainer, options.control)
    same = _losses(trainer, options.steps)  # also fills the cache
    trainer.fit(final=False)
    rows = [json.loads(line) for line in (trainer.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["part"] == "train"]
    return {"same weights": same, "training": [row["loss"] for row in steps], "seconds": [row["seconds"] for row in steps]}


@torch.no_grad()
def _perturb(trainer: Trainer, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.0 + size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def _losses(trainer: Trainer, steps: int) -> list[float]:
    """Losses of the batches of the first steps with the weights as they are, without dropout."""
    trainer.model.eval()
    losses = []
    for _, micro in zip(range(steps), trainer.batches(0, 0), strict=False):
        for batch in micro:
            encoder: Any = trainer.model.encoder
            whole = complete(batch, encoder, trainer.cache) if trainer.cache is not None else batch
            losses.append(float(weighted_loss(trainer.model.losses(whole), whole.target_parts, trainer.config.train.loss)))
    return losses
