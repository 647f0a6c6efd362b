"""What a run says of itself: the plan before its first step, `metrics.jsonl`, trackers."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from unislu_llm.config import Config
from unislu_llm.data.batch import Batch
from unislu_llm.data.sampler import BatchPlan
from unislu_llm.errors import UserError
from unislu_llm.io import append_json, append_text, write_json, write_text
from unislu_llm.models.base import SLUModel
from unislu_llm.run_folder import METRICS, read_metrics
from unislu_llm.tasks import ASR
from unislu_llm.tokenizer import Example
from unislu_llm.training.checkpoint import Progress
from unislu_llm.training.examples import LEGEND
from unislu_llm.training.objectives import Objective, Predictions, Sums, Validation

_PACKAGE = logging.getLogger("unislu_llm")
LOG_FILE = "log.txt"  # in the run folder: all that was printed but the bars


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError: a tracker that is unknown, or not installed."""
    # Accelerate would leave out, without a word, what is not installed.
    there = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in there:
            raise UserError(f"train.trackers: '{name}' is not installed, or no tracker of "
                            f"accelerate; available here: {', '.join(there) or 'none'}")


def say(run: Path, text: str) -> None:
    """Print, beside any bar, and write to the log of a run."""
    tqdm.write(text)
    append_text(run / LOG_FILE, text + "\n")


def bar(**options: Any) -> Any:
    """A progress bar; where nobody watches it a line a minute, not one a step."""
    return tqdm(**options, mininterval=0.1 if sys.stderr.isatty() else 60.0)


class Notices(logging.Handler):
    """Warnings of the package: printed at once, and in the log of the run once it has a folder.

    With several processes those of the main one alone: all read the same data. What has been `said`
    by an earlier stage is not said again.
    """

    def __init__(self, main: bool, said: set[str]) -> None:
        super().__init__(logging.WARNING)
        self.main, self.said, self.lines, self.run = main, said, list[str](), Path()
        if not main:
            warnings.simplefilter("ignore")
        for handler in [h for h in _PACKAGE.handlers if isinstance(h, Notices)]:
            handler.close()  # of a run of this process that did not come to its end
        _PACKAGE.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if self.main and (text := record.getMessage()) not in self.said:
            self.said.add(text)
            self.lines.append(f"warning: {text}")
            tqdm.write(self.lines[-1], file=sys.stderr)
            self.flush()

    def close(self) -> None:
        """Leave later warnings of this process to others."""
        _PACKAGE.removeHandler(self)
        super().close()

    def flush(self) -> None:
        """Write what has been held to the log of the run, where there is one."""
        if self.run.name and self.lines:
            append_text(self.run / LOG_FILE, "\n".join(self.lines) + "\n")
            self.lines.clear()


class Log:
    """The log of a run in the folder `run`, which goes on where it was `resumed`; the main process
    alone writes."""

    def __init__(self, run: Path, accelerator: Accelerator, trackers: Sequence[str],
                 resumed: Progress) -> None:
        self.file, self.accelerator, self.trackers = run / METRICS, accelerator, trackers
        if accelerator.is_main_process and self.file.is_file():
            # What will be written again goes, and a torn line, which the next would continue.
            ends = {"train": resumed.step, "nonfinite": resumed.step, "dev": resumed.validated}
            rows = [row for row in read_metrics(run) if row["step"] <= ends.get(row["part"], 0)]
            write_text(self.file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        self.shown: Mapping[str, str] = {}  # examples as the last validation printed them
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

    def validation(self, step: int, predictions: Predictions, guard: Predictions,
                   result: Validation, seconds: float, first: Sums,
                   examples: Mapping[str, str]) -> None:
        """What a validation after `step` steps gave, for people and as files."""
        stem = self.file.with_name("predictions") / f"step-{step:06d}"
        for end, some in ((".jsonl", predictions), (".guard.jsonl", guard))[:1 + bool(guard)]:
            write_text(stem.with_suffix(end), "".join(
                json.dumps(row, ensure_ascii=False) + "\n" for row in some))
        write_json(stem.with_suffix(".scores.json"), result.report)
        self.write("dev", {"step": step, **result.scores, "seconds": seconds})
        # The headlines, in one line of a screen; the files have the rest.
        rows = {"first": first} if step else {}
        table = [{"": name, **{key: scores[key] for key in _headlines(scores)
                               if not key.startswith(("wer_", "cer_", "guard_wer_"))}}
                 for name, scores in {**rows, f"step {step}": result.scores}.items()]
        told = [f"  {key}\n{text}" if self.shown.get(key) != text else f"  {key}: as before"
                for key, text in examples.items()]
        self.shown = examples
        say(self.file.parent, "\n".join([
            f"\nvalidation after {step} steps: {result.what}, {len(predictions)} dev samples, "
            f"{seconds:.0f} s",
            tabulate(table, headers="keys", floatfmt=".2f", missingval="-", disable_numparse=[0]),
            f"examples ({LEGEND})", *told, *(f"warning: {text}" for text in result.warnings)]))


def _headlines(scores: Sums) -> list[str]:
    beside = {"slue", "cer"} if "wer" in scores else {"slue"}  # which is `score`
    return [name for name in scores
            if not name.endswith(("_label_f1", "_position_f1")) and name not in beside]


def before_and_after(history: Sequence[Sums], best_step: int, best_score: float | None,
                     init: str) -> str:
    """What training has changed: scores of the first validation and the best, and in words whether
    it made the model worse; nothing where there was no validation."""
    if best_score is None:
        return ""
    first, last = history[0], history[-1]
    best = next(scores for scores in reversed(history) if scores["score"] == best_score)
    rows = [(key, first.get(key), best[key], best[key] - first.get(key, best[key]))
            for key in _headlines(best)]
    lines = ["", tabulate(rows, headers=("dev", "first", f"best (step {best_step})", "change"),
                          floatfmt=("", ".2f", ".2f", "+.2f"), missingval="-")]
    if best_score < first["score"]:
        lines.append(f"warning: training made the model worse: its score was {first['score']:.2f} "
                     f"before and is {best_score:.2f} at best; try lower rates (train.lr), fewer "
                     f"train.epochs, more data{f', or keep {init}' * bool(init)}")
    elif last["score"] < first["score"]:
        lines.append(f"warning: the score was {first['score']:.2f} before training and is "
                     f"{last['score']:.2f} after it; best is an earlier checkpoint. Train for "
                     "fewer epochs (train.epochs), or at lower rates (train.lr)")
    return "\n".join(lines)


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


def describe_run(config: Config, model: SLUModel, examples: Sequence[Example],
                 dev: Sequence[Example], guard: Sequence[Example], plan: BatchPlan, steps: int,
                 world: int) -> str:
    """The plan of a run as text: data, batches for `steps` on `world` processes, parameters."""
    train = config.train
    counts = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    sizes = {group: sum(counts[name] for name, _ in named)
             for group, named in model.trainable_groups().items()}
    trained, total = sum(sizes.values()), sum(counts.values())
    # Weights as they are, gradients and Adam's two moments in fp32.
    mine = [(getattr(p, "ds_tensor", getattr(p, "to_local", lambda p=p: p)()), p.requires_grad)
            for p in model.parameters()]
    memory = sum(p.numel() * (p.element_size() + 12 * trains) for p, trains in mine)
    hours = sum(e.utterance.seconds for e in examples) / 3600
    size = (f"at most {train.batch_tokens} tokens" if train.batch_tokens
            else f"{train.batch_size} samples")
    return "\n".join([
        f"data: {_samples(examples)}, {hours:.2f} h",
        f"dev: {_samples(dev) if dev else 'none; the last checkpoint is the model'}",
        *([f"guard: {_samples(guard)}"] if guard else []),
        *([str(plan.mixture)] if plan.mixture is not None else []),
        f"batch: {size}, shared by {world} process(es) x {train.accumulation} micro-batch(es); "
        f"{plan.steps(1)} steps an epoch, {steps} in all",
        "parameters:",
        *(f"  {name:<10} {size / 1e6:9.3f} M   lr {getattr(train.lr, name):g}"
          for name, size in sizes.items()),
        f"  {'trained':<10} {trained / 1e6:9.3f} M   of {total / 1e6:.1f} M; "
        f"{memory / 2**30:.2f} GiB a process, plus activations"])


def _samples(examples: Sequence[Example]) -> str:
    tasks = Counter(example.task or ASR for example in examples)
    return f"{len(examples)} samples ({', '.join(f'{n} {task}' for task, n in tasks.items())})"
