"""The steps of a run: batches of this process, gradients, and what may go wrong with them."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from unislu_llm.config import Config
from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.sampler import BatchPlan
from unislu_llm.data.text_injection import SimulationRates
from unislu_llm.errors import Stopped, UserError, cause_of, launched
from unislu_llm.models.base import SLUModel, gathered
from unislu_llm.run_folder import LAST, METRICS, is_run
from unislu_llm.tokenizer import Example
from unislu_llm.training import checkpoint
from unislu_llm.training.checkpoint import Progress, rng_state, set_rng_state, what_is_safe
from unislu_llm.training.data import deal
from unislu_llm.training.interrupt import Clock, Interrupts, ignore_signals
from unislu_llm.training.log import Log, Window, batch_counts
from unislu_llm.training.memory import halve, out_of_memory
from unislu_llm.training.objectives import Objective, Predictions
from unislu_llm.training.optim import set_rates
from unislu_llm.training.process import HostSum, average_gradients, from_main
from unislu_llm.training.sharding import reshard

log = logging.getLogger(__name__)

_NONFINITE_STEPS = 5  # in a row: more are no accident that training gets over


class Steps:
    """What :class:`Trainer` does over and over; the trainer puts everything here in place."""

    config: Config
    run: Path
    home: Path | None  # of a stage: the folder of the whole run
    accelerator: Accelerator
    rank: int
    world: int
    main: bool
    device: torch.device
    host_sum: HostSum
    model: SLUModel
    wrapped: Any  # the model as Accelerate prepared it,
    sharding: Any  # or itself in shards, if this is not None
    together: bool  # whether no process runs the model alone
    optimizer: Optimizer
    objective: Objective
    dataset: SpeechDataset
    dev: list[Example]
    guard: list[Example]
    share: list[Example] | None = None  # of both: what this process decodes, once prepared
    rates: SimulationRates | None  # of text injection
    plan: BatchPlan
    total_steps: int
    progress: Progress
    window: Window  # since the last row of the log
    log: Log
    clock: Clock
    interrupts: Interrupts
    drawn: Mapping[str, Any]  # random generators before the step that is under way
    ends: bool = False  # of all processes, after the step that is under way: the run stops,
    saves: bool = False  # or saves

    def batches(self, epoch: int, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches, a list a step, from step `skip` of an epoch on."""
        steps = self.plan.micro_batches(epoch, self.rank, self.world)[skip:]
        # One loader for all steps, so that its workers fetch beyond the end of a step.
        flat: Any = [micro for step in steps for micro in step]
        # A generator of its own: the loader must not draw from the one that dropout uses, or a
        # resumed run would draw differently.
        own = torch.Generator().manual_seed(self.dataset.seed + epoch)
        items: Any = replace(self.dataset, epoch=epoch)
        workers, on_gpu = self.config.data.num_workers, self.device.type == "cuda"
        workers = 4 * on_gpu if workers < 0 else workers
        loader = iter(DataLoader(
            items, batch_sampler=flat, collate_fn=self.model.collator(), generator=own,
            num_workers=workers, pin_memory=on_gpu,
            prefetch_factor=4 if workers else None, worker_init_fn=ignore_signals))
        for step in steps:
            yield [next(loader) for _ in step]

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """What ends the block, a signal or the disk, is raised with how the run can go on."""
        try:
            with self.interrupts:
                yield
        except Stopped as stop:
            raise Stopped(f"stopped ({stop}) {self._how_to_go_on()}") from None
        except OSError as error:  # of the log, or of predictions
            if (why := cause_of(error)) and self.main and is_run(self.run):
                raise UserError(f"{why}; {what_is_safe(self.run)}") from error
            raise

    def _how_to_go_on(self) -> str:
        run, p = self.home or self.run, self.progress
        # Of several processes the user alone knows how they are launched.
        flags = f"{'' if launched() else 'unislu train '}--resume --output {shlex.quote(str(run))}"
        if not run.name or not is_run(run):
            return "before anything was written; start it again"
        done = (f"after step {p.step} of {self.total_steps}, saved in {self.run / LAST}" if p.step
                else f"before the first step of {self.run}")
        return f"{done}; go on with: {flags}"

    def progress_title(self, name: str) -> str:
        """Title of a short bar, which is for eyes alone; empty shows none."""
        return name if self.main and sys.stderr.isatty() else ""

    def decode_scored(self) -> tuple[Predictions, Predictions]:
        """Predictions for the dev examples and the guard's, made by and known to all processes."""
        scored, of_dev = [*self.dev, *self.guard], len(self.dev)
        # A sharded model decodes everything everywhere: so all take the same steps.
        mine = deal(scored, *((0, 1) if self.together else (self.rank, self.world)))
        # Training goes on with the random numbers that it would have had without this.
        with torch.random.fork_rng(range(torch.cuda.device_count())), self.accelerator.autocast():
            if self.share is None:
                make = partial(self.objective.prepare, self.model, [scored[i] for i in mine],
                               self.progress_title("hypotheses"))
                self.share = from_main(make) if self.together else make()
            if self.together:
                set_rng_state(from_main(rng_state))
            # Apart: with a guard set the batches of dev are those that there are without.
            n, found = sum(i < of_dev for i in mine), Predictions()
            for part in filter(None, (self.share[:n], self.share[n:])):
                found += self.objective.decode(self.model, part, self.dataset.frame_cache,
                                               self.progress_title("validate"))
        reshard(self.model)
        done = list(zip(mine, found, strict=True)) if self.main or not self.together else []
        everyone = [made for _, made in sorted(gather_object(done), key=lambda x: x[0])]
        return everyone[:of_dev], everyone[of_dev:]

    def step(self, micro: Sequence[Batch]) -> None:
        """One optimizer step over this process's micro-batches of a global batch.

        Raises UserError: the loss is not finite, or a micro-batch does not fit the memory; weights
        and moments have not changed then.
        """
        started, self.drawn = time.perf_counter(), rng_state()
        total = self.totals(micro)
        # Each process says whether it should end, and the main one whether to save: so all know.
        self.ends, self.saves = (bool(total.pop(key)) for key in ("ends", "saves"))
        self.backward(micro, total)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        limit = self.config.train.max_grad_norm or math.inf
        set_rates(self.optimizer, self.config.train, self.progress.step, self.total_steps)
        # Reading the norm is the one time in a step that the host waits for the device. A loss
        # that is not finite has such a gradient, which must not reach weights and moments.
        norm = float(gathered(self.accelerator.clip_grad_norm_(parameters, limit)))
        if not math.isfinite(norm):
            self._not_finite(micro)
            return
        self.progress.nonfinite = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        took = time.perf_counter() - started
        self.progress.seconds += took
        self.window.add(total, norm, took)

    def _not_finite(self, micro: Sequence[Batch]) -> None:
        """Leave a step out, and log its samples; raises UserError if that is not wanted."""
        p = self.progress
        self.optimizer.zero_grad()
        self.window = Window(self.objective, self.device)
        ids = gather_object([e.utterance.where for batch in micro for e in batch.examples
                             if batch.counted])
        self.log.write("nonfinite", {"step": p.step + 1, "samples": sorted(set(ids))})
        p.nonfinite, stops = p.nonfinite + 1, self.config.train.on_nonfinite == "stop"
        if stops or p.nonfinite >= _NONFINITE_STEPS:
            times, p.nonfinite = p.nonfinite, 0
            # What is good up to here is kept, and a resumed run takes this step as it was.
            if p.step and all(bool(v.isfinite().all())
                              for v in self.model.trained_state().values()):
                set_rng_state(self.drawn)
                self.save()
            raise UserError(f"loss is nan or infinite at step {p.step + 1}"
                            f"{'' if stops else f', and in {times} steps in a row'}; its "
                            f"samples are in {self.run / METRICS}; lower train.lr or "
                            "train.max_grad_norm"
                            f"{', or set train.on_nonfinite skip' * stops}{self._kept()}")
        if self.main:
            log.warning("step %d was left out: its loss is nan or infinite; its samples are in "
                        "%s", p.step + 1, METRICS)

    def save(self) -> None:
        """Write the checkpoint `last`."""
        rng = gather_object([rng_state()])
        weights = self.model.trained_state()  # by all processes: each may have a shard
        moments = checkpoint.moments(self.optimizer, self.model)

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder, weights)
            if self.rates is not None:
                self.rates.save(folder)
            save_file(moments, folder / checkpoint.OPTIMIZER_FILE)
            checkpoint.save_rng(folder, rng)

        with self.clock.measure("save"):
            from_main(lambda: checkpoint.save_checkpoint(self.run / LAST, write, self.progress,
                                                         self.config.train.keep))

    def _kept(self) -> str:
        """The end of a message: what can be resumed."""
        return f"; {self.run / LAST} can be resumed" if (self.run / LAST).is_dir() else ""

    def totals(self, micro: Sequence[Batch]) -> dict[str, float]:
        """Counts of the global batch, the same in every process."""
        counts: Counter[str] = Counter()
        for batch in micro:
            found: Any = self.objective.counts(batch) | batch_counts(batch)
            counts.update(found)
        ends = bool(self.interrupts.reason) or (self.main and self.clock.time_is_up())
        saves = self.main and self.clock.save_is_due()
        return self.host_sum({**counts, "ends": float(ends), "saves": float(saves)})

    def backward(self, micro: Sequence[Batch], total: dict[str, float]) -> None:
        """Add the gradients of the global loss up, and its sums in the log's window.

        Raises UserError: a micro-batch does not fit the memory.
        """
        self.wrapped.train()
        queue, split = list(micro), self.config.train.on_oom == "split"
        while (place := self._accumulate(queue, total, alone=split)) is not None:
            self.optimizer.zero_grad()  # of a pass that was torn
            queue = halve(queue, place, split, self.progress.step + 1, self._kept())
            log.warning("step %d: a micro-batch did not fit the memory and was split; raise "
                        "train.accumulation to spare the time", self.progress.step + 1)
        if split and self.world > 1:
            average_gradients(self.model)

    def _accumulate(self, micro: Sequence[Batch], total: dict[str, float],
                    alone: bool) -> int | None:
        """One pass over micro-batches; returns the place of one that did not fit the memory.

        With `alone` no process waits for another in it: they may differ in how many they have.
        """
        found = torch.zeros_like(self.window.sums)
        for i, batch in enumerate(micro):
            shares = i == len(micro) - 1 and not alone
            try:
                # Gradients go over the network with the last micro-batch alone.
                if self.sharding:
                    self.wrapped.set_requires_gradient_sync(shares)
                whole = shares or self.sharding
                with contextlib.nullcontext() if whole else self.accelerator.no_sync(self.wrapped):
                    with self.accelerator.autocast():
                        loss, sums = self.objective.loss(self.wrapped, batch.to(self.device), total)
                    # DDP and ZeRO average over processes; the normalizer is global already.
                    self.accelerator.backward(loss * self.world)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                return i
            found += sums
        self.window.sums += found
        return None
