"""What a run says of itself: the plan before its first step, `metrics.jsonl`, trackers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from tqdm import tqdm

from unislu_llm.config import Config
from unislu_llm.data.batch import Batch
from unislu_llm.data.sampler import BatchPlan
from unislu_llm.errors import UserError
from unislu_llm.io import append_json, write_json, write_text
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import ASR
from unislu_llm.tokenizer import Example
from unislu_llm.training.objectives import Objective, Predictions, Validation


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError: a tracker that is unknown, or not installed."""
    # Accelerate would leave out, without a word, what is not installed.
    there = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in there:
            raise UserError(f"train.trackers: '{name}' is not installed, or no tracker of "
                            f"accelerate; available here: {', '.join(there) or 'none'}")


class Log:
    """The log of a run in the folder `run`; the main process alone writes."""

    def __init__(self, run: Path, accelerator: Accelerator, trackers: Sequence[str]) -> None:
        self.file, self.accelerator, self.trackers = run / "metrics.jsonl", accelerator, trackers
        if trackers:
            accelerator.project_configuration.logging_dir = str(run / "trackers")
            # The project, where a tracker keeps those of many; a run in it has its folder's name.
            accelerator.init_trackers("unislu_llm", init_kwargs={"wandb": {"name": run.name}})

    def write(self, part: str, row: Mapping[str, Any]) -> None:
        """A row of `train` or `dev`; its `step` is the trackers'."""
        if not self.accelerator.is_main_process:
            return
        append_json(self.file, {"part": part, **row})
        if self.trackers:
            self.accelerator.log({f"{part}/{key}": value for key, value in row.items()
                                  if key != "step"}, step=row["step"])

    def validation(self, step: int, predictions: Predictions, result: Validation,
                   seconds: float) -> None:
        """What a validation after `step` steps gave, for people and as files."""
        stem = self.file.with_name("predictions") / f"step-{step:06d}"
        write_text(stem.with_suffix(".jsonl"), "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
        write_json(stem.with_suffix(".scores.json"), result.report)
        self.write("dev", {"step": step, **result.scores, "seconds": seconds})
        tqdm.write("\n".join([f"\nstep {step} ({len(predictions)} dev samples, {seconds:.0f} s)",
                              result.table, *(f"warning: {text}" for text in result.warnings)]))


class Window:
    """The steps since the last row of the log."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.sums = torch.zeros(len(objective.sum_names), device=device)
        self.counts: Counter[str] = Counter()
        self.steps, self.worked, self.waited, self.norm = 0, 0.0, 0.0, 0.0

    def add(self, counts: Mapping[str, float], norm: float, seconds: float) -> None:
        """A step: counts of the global batch, norm of the gradient, seconds."""
        self.counts.update(counts)  # type: ignore[arg-type]
        self.steps, self.worked, self.norm = self.steps + 1, self.worked + seconds, norm

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """What the log says of these steps; all processes call this."""
        total = accelerator.reduce(self.sums, "sum")
        assert isinstance(total, Tensor)
        counts = self.counts
        sums = {**counts, **dict(zip(self.objective.sum_names, total.tolist(), strict=True))}
        return {
            "loss": sums["loss"] / self.steps, **self.objective.metrics(sums),
            "tokens": counts["tokens"], "audio_seconds": counts["audio_seconds"],
            "padding": 1.0 - counts["filled"] / max(counts["room"], 1), "grad_norm": self.norm,
            "seconds": self.worked / self.steps, "tokens_per_s": counts["tokens"] / self.worked,
            "data_wait": self.waited / (self.waited + self.worked)}


def batch_counts(batch: Batch) -> dict[str, float]:
    """Seconds of audio in a batch, and how much of its tensors is filled."""
    if not batch.counted:
        return {"audio_seconds": 0.0, "filled": 0, "room": 0}
    speech, target = batch.speech_lengths, batch.target_lengths
    return {"audio_seconds": sum(batch.durations), "filled": sum(speech) + sum(target),
            "room": len(batch) * (max(speech) + max(target))}


def describe_run(config: Config, model: SLUModel, examples: Sequence[Example], plan: BatchPlan,
                 steps: int, world: int) -> str:
    """The plan of a run as text: data, batches for `steps` on `world` processes, parameters."""
    train, tasks = config.train, Counter(example.task or ASR for example in examples)
    sizes = {name: sum(p.numel() for _, p in named)
             for name, named in model.trainable_groups().items()}
    trained, total = sum(sizes.values()), sum(p.numel() for p in model.parameters())
    # Weights as they are, gradients and AdamW's two moments in fp32.
    memory = sum(p.numel() * p.element_size() for p in model.parameters()) + trained * 4 * 3
    hours = sum(e.utterance.seconds for e in examples) / 3600
    size = (f"at most {train.batch_tokens} tokens" if train.batch_tokens
            else f"{train.batch_size} samples")
    return "\n".join([
        f"data: {len(examples)} samples ({', '.join(f'{n} {task}' for task, n in tasks.items())}), "
        f"{hours:.2f} h",
        *([str(plan.mixture)] if plan.mixture is not None else []),
        f"batch: {size}, shared by {world} process(es) x {train.accumulation} micro-batch(es); "
        f"{plan.steps(1)} steps an epoch, {steps} in all",
        "parameters:",
        *(f"  {name:<10} {size / 1e6:9.3f} M   lr {getattr(train.lr, name):g}"
          for name, size in sizes.items()),
        f"  {'trained':<10} {trained / 1e6:9.3f} M   of {total / 1e6:.1f} M; "
        f"{memory / 2**30:.2f} GiB a process, plus activations"])
