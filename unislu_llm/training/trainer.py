"""The training loop: plain PyTorch over Accelerate, for both decoders and both objectives.

It is exact under accumulation and distribution, and a run that was stopped and resumed ends bit for
bit as one that was not: what happens in a step follows from the plan of batches, the checkpoint and
the random generators that the checkpoint keeps.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from unislu_llm.config import Config
from unislu_llm.data.batch import Batch
from unislu_llm.data.findings import run_findings
from unislu_llm.data.frame_cache import build_frames
from unislu_llm.data.loading import load_examples
from unislu_llm.errors import UserError
from unislu_llm.io import write_json
from unislu_llm.run_folder import BEST, LAST, TRAINER_FILE, create_run, write_finished
from unislu_llm.tokenizer import Example
from unislu_llm.training import checkpoint
from unislu_llm.training.build import build_model, build_registry, fitted_rates
from unislu_llm.training.checkpoint import Progress
from unislu_llm.training.data import (
    attach_hypotheses,
    build_dataset,
    build_plan,
    deal,
    save_hypotheses,
)
from unislu_llm.training.examples import choose, show
from unislu_llm.training.log import (
    Log,
    Notices,
    Window,
    bar,
    batch_counts,
    before_and_after,
    check_trackers,
    describe_run,
    say,
)
from unislu_llm.training.objectives import OBJECTIVES
from unislu_llm.training.optim import build_optimizer, group_rates, set_rates
from unislu_llm.training.process import HostSum, from_main, peak_memory, processes, use_threads

log = logging.getLogger(__name__)


class Trainer:
    """One run: data, model, optimizer and where it stands; see :func:`.stages.train`.

    Raises UserError: bad configuration or data; nothing is written then.
    """

    def __init__(self, kind: str, config: Config, name: str = "run") -> None:
        self.config, train = config, config.train

        # 1. Processes, before anything is put on a device.
        use_threads(train.threads)
        check_trackers(train.trackers)
        process = processes()
        AcceleratorState._reset_state()  # an earlier stage may have had another precision
        self.accelerator = Accelerator(
            mixed_precision="bf16" if train.precision == "bf16" else "no",
            log_with=train.trackers or None, project_dir=".")
        self.rank, self.world = process.process_index, process.num_processes
        self.main, self.device = process.is_main_process, self.accelerator.device
        self.host_sum = HostSum()
        self.notices = Notices(self.main)
        disable_progress_bar()  # of the base checkpoints' tensors

        # 2. Data.
        data = config.data
        self.registry = build_registry(config)
        self.objective = OBJECTIVES[train.objective](config, self.registry)
        examples = self.objective.examples(load_examples(data.train, self.registry), training=True)
        self.dev = [] if not data.dev else self.objective.examples(load_examples(
            data.dev, self.registry, limit=data.dev_limit, flag="data.dev", scored=True),
            training=False)
        self.dev_share: list[Example] | None = None  # what this process decodes, once prepared

        # 3. The model, and what it makes of the data.
        self.model = build_model(kind, config, self.registry,
                                 (e.utterance.text for e in examples), self.device)
        examples, made = attach_hypotheses(config, self.model, examples, self.rank, self.world,
                                           self.device, self._progress("hypotheses"))
        self.rates = fitted_rates(config)
        self.dataset = build_dataset(config, self.model, examples, self.rates)
        if self.dataset.injector is not None:
            self.rates = self.dataset.injector.rates
        self.plan = build_plan(config, self.model, self.dataset, self.world)
        self.total_steps = self.plan.steps(train.epochs)
        if train.max_steps:
            self.total_steps = min(self.total_steps, train.max_steps)
        self._warn_of_data(examples)
        optimizer = build_optimizer(self.model.trainable_groups(), train)

        # 4. The run folder: from here on something is written.
        self.run = self.notices.run = from_main(lambda: create_run(config, name, kind))
        self.notices.flush()
        if self.main:
            save_hypotheses(self.run, made)
        set_seed(train.seed, device_specific=True)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self._fill_cache()

        # 5. Where it stands.
        self.window, self.progress = Window(self.objective, self.device), Progress()
        if config.resume:
            self._resume(self.run / LAST)

    def _resume(self, last: Path) -> None:
        self.model.load_trained(last)
        checkpoint.load_optimizer(last, self.optimizer, self.model)
        self.progress = checkpoint.read_progress(last)
        checkpoint.load_rng(last, self.rank, self.world)

    def _warn_of_data(self, examples: Sequence[Example]) -> None:
        mixture = self.plan.mixture
        drawn = mixture.size if mixture else len(examples)
        for line in run_findings(examples, self.dev, mixture,
                                 drawn * self.total_steps // max(self.plan.steps(1), 1)):
            log.warning(line)

    def _fill_cache(self) -> None:
        cache = self.dataset.frame_cache
        if cache is not None:
            spoken = (*self.dataset.examples, *(self.dev if self.objective.caches_dev else ()))
            clips = [example.utterance for example in spoken]
            build_frames(cache, self.model.encoder, clips, device=self.device, rank=self.rank,
                         world=self.world, progress=self._progress("encode"))
            self.accelerator.wait_for_everyone()

    def _progress(self, name: str) -> str:
        """Title of a short bar, which is for eyes alone; empty shows none."""
        return name if self.main and sys.stderr.isatty() else ""

    def batches(self, epoch: int, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches, a list a step, from step `skip` of an epoch on."""
        steps = self.plan.micro_batches(epoch, self.rank, self.world)[skip:]
        # One loader for all steps, so that its workers fetch beyond the end of a step.
        flat: Any = [micro for step in steps for micro in step]
        # A generator of its own: the loader must not draw from the one that dropout uses, or a
        # resumed run would draw differently.
        own = torch.Generator().manual_seed(self.dataset.seed + epoch)
        items: Any = replace(self.dataset, epoch=epoch)
        workers = self.config.data.num_workers
        loader = iter(DataLoader(
            items, batch_sampler=flat, collate_fn=self.model.collator(), generator=own,
            num_workers=workers, pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if workers else None))
        for step in steps:
            yield [next(loader) for _ in step]

    def step(self, micro: Sequence[Batch]) -> None:
        """One optimizer step over this process's micro-batches of a global batch.

        Raises UserError: the loss is not finite; nothing has changed then.
        """
        started = time.perf_counter()
        total = self.totals(micro)
        self.backward(micro, total)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        limit = self.config.train.max_grad_norm or math.inf
        # Reading the norm is the one time in a step that the host waits for the device. A loss
        # that is not finite has such a gradient, which must not reach weights and moments.
        norm = float(self.accelerator.clip_grad_norm_(parameters, limit) or 0.0)
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            kept = f"; {self.run / LAST} can be resumed" if (self.run / LAST).is_dir() else ""
            raise UserError(f"loss is nan or infinite at step {self.progress.step}; lower train.lr "
                            f"or train.max_grad_norm{kept}")
        set_rates(self.optimizer, self.config.train, self.progress.step, self.total_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        took = time.perf_counter() - started
        self.progress.seconds += took
        self.window.add(total, norm, took)

    def totals(self, micro: Sequence[Batch]) -> dict[str, float]:
        """Counts of the global batch, the same in every process."""
        counts: Counter[str] = Counter()
        for batch in micro:
            found: Any = self.objective.counts(batch) | batch_counts(batch)
            counts.update(found)
        return self.host_sum(dict(counts))

    def backward(self, micro: Sequence[Batch], total: dict[str, float]) -> None:
        """Add the gradients of the global loss up, and its sums in the log's window."""
        self.wrapped.train()
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            # Gradients go over the network with the last micro-batch alone.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    loss, sums = self.objective.loss(self.wrapped, batch.to(self.device), total)
                # DDP averages over processes; the normalizer is global already.
                self.accelerator.backward(loss * self.world)
            self.window.sums += sums

    def fit(self) -> Path:
        """Train to the end; returns the run folder. Raises as :meth:`step`, and for bad audio."""
        p = self.progress
        self.log = Log(self.run, self.accelerator, self.config.train.trackers)
        if self.main:
            say(self.run, describe_run(self.config, self.model, self.dataset.examples, self.dev,
                                       self.plan, self.total_steps, self.world)
                + f"\nrun folder: {self.run}")
        # The first one shows where the model began. A run that was killed in one resumes before it.
        if p.validated < 0 or (p.validated < p.step and self._validates()):
            self.validate()
        with bar(total=self.total_steps, initial=p.step, desc="train", unit="step",
                 disable=not self.main) as steps:
            while p.step < self.total_steps:
                self._epoch(steps)
        self._finish()
        # Stages and notebooks go on in these processes, which the trackers and DDP must leave.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.notices.close()
        # DDP's reducer goes first: freed after the process group, it can hold the GIL while
        # gloo's thread waits for it.
        self.wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        return self.run

    def _epoch(self, shown: Any) -> None:
        p, every = self.progress, self.config.train.save_every
        steps = self.batches(p.epoch, p.step_in_epoch)
        while p.step < self.total_steps:
            started = time.perf_counter()
            micro = next(steps, None)
            if micro is None:
                p.epoch, p.step_in_epoch = p.epoch + 1, 0
                return
            self.window.waited += time.perf_counter() - started
            self.step(micro)
            p.step, p.step_in_epoch = p.step + 1, p.step_in_epoch + 1
            self._log_step(shown)
            if self._validates() or (every and p.step % every == 0):
                self.save()  # first: a validation that fails must not lose the steps before it
            if self._validates():
                self.validate()

    def _validates(self) -> bool:
        step, every = self.progress.step, self.config.train.eval_every
        return step == self.total_steps or bool(every and step % every == 0)

    def _log_step(self, shown: Any) -> None:
        p = self.progress
        shown.update(1)
        row = self.window.read(self.accelerator)
        self.window = Window(self.objective, self.device)
        shown.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "loss_asr", "loss_task", "w_asr")
                         if k in row}, refresh=False)
        self.log.write("train", {"step": p.step, "epoch": p.epoch, **row,
                                 "memory_gib": peak_memory(), **group_rates(self.optimizer)})

    def _finish(self) -> None:
        p = self.progress
        if self.main:
            best = self.run / BEST if p.best_step >= 0 else self.run / LAST
            scores = next((s for s in reversed(p.history) if s["score"] == p.best_score), {})
            told = self.objective.finish(self.model, list(dict.fromkeys([best, self.run / LAST])),
                                         scores, self.dev, self.dataset.frame_cache)
            table = before_and_after(p.history, p.best_step, p.best_score, self.config.train.init)
            if parts := [part for part in (table, told) if part]:
                say(self.run, "\n".join(parts))
            write_finished(self.run, {"step": p.step, "train_seconds": round(p.seconds, 1),
                                      "best_step": p.best_step, "best_score": p.best_score})
        self.accelerator.wait_for_everyone()

    def validate(self) -> None:
        """Decode the dev examples on all processes, score, log, print; keep the best weights."""
        p = self.progress
        p.validated = p.step
        if not self.dev:
            return
        started = time.perf_counter()
        mine = deal(self.dev, self.rank, self.world)
        # Training goes on with the random numbers that it would have had without this.
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices), self.accelerator.autocast():
            if self.dev_share is None:
                self.dev_share = self.objective.prepare(
                    self.model, [self.dev[i] for i in mine], self._progress("hypotheses"))
            found = self.objective.decode(self.model, self.dev_share, self.dataset.frame_cache,
                                          self._progress("validate"))
        everyone = sorted(gather_object(list(zip(mine, found, strict=True))), key=lambda x: x[0])
        predictions = [prediction for _, prediction in everyone]
        result = self.objective.score(predictions, p.history)
        p.history.append(result.scores)
        p.shown = p.shown or choose(predictions, self.registry)
        # A model that has not trained is never the best: there is no checkpoint of it.
        better = p.step > 0 and (p.best_score is None or result.scores["score"] > p.best_score)
        if better:
            p.best_score, p.best_step = result.scores["score"], p.step
        if self.main:
            if better:
                checkpoint.copy_model(self.run / LAST, self.run / BEST, p)
            if p.step > 0:  # saved before: a resumed run must know of this validation
                write_json(self.run / LAST / TRAINER_FILE, p.model_dump())
            self.log.validation(p.step, predictions, result, time.perf_counter() - started,
                                p.history[0], show(predictions, p.shown, self.registry))
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Write the checkpoint `last`."""
        rng = gather_object([checkpoint.rng_state()])

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            if self.rates is not None:
                self.rates.save(folder)
            checkpoint.save_optimizer(folder, self.optimizer, self.model)
            checkpoint.save_rng(folder, rng)

        if self.main:
            checkpoint.save_checkpoint(self.run / LAST, write, self.progress)
        self.accelerator.wait_for_everyone()
