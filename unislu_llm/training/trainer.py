"""The training loop: plain PyTorch over Accelerate, for both decoders and both objectives.

It is exact under accumulation and distribution, and a run that was stopped and resumed ends bit for
bit as one that was not: what happens in a step follows from the plan of batches, the checkpoint and
the random generators that the checkpoint keeps.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment, set_seed
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from unislu_llm.config import Config
from unislu_llm.data.findings import run_findings, unspelled
from unislu_llm.data.frame_cache import build_frames
from unislu_llm.data.loading import load_examples
from unislu_llm.errors import Stopped, UserError
from unislu_llm.run_folder import BEST, LAST, create_run, is_run, lock_run, write_finished
from unislu_llm.tokenizer import Example
from unislu_llm.training import checkpoint
from unislu_llm.training.build import build_model, build_registry, fitted_rates
from unislu_llm.training.checkpoint import Progress, newest
from unislu_llm.training.data import attach_hypotheses, build_dataset, build_plan, save_hypotheses
from unislu_llm.training.diagnostics import forgetting
from unislu_llm.training.examples import choose, show
from unislu_llm.training.interrupt import Clock, Interrupts
from unislu_llm.training.log import (
    Log,
    Notices,
    Window,
    bar,
    before_and_after,
    check_trackers,
    describe_run,
    say,
)
from unislu_llm.training.objectives import OBJECTIVES, guard_scores
from unislu_llm.training.optim import build_optimizer, group_rates
from unislu_llm.training.process import HostSum, from_main, peak_memory, processes, use_threads
from unislu_llm.training.sharding import shard, sharding_of
from unislu_llm.training.steps import Steps
from unislu_llm.training.zero import ZeroAccelerator, zero_of

log = logging.getLogger(__name__)


class Trainer(Steps):
    """One run: data, model, optimizer and where it stands; see :func:`.stages.train`.

    `started` is when the run began, by `time.monotonic()`; of a stage, `said` has the warnings of
    those before, and `home` is the folder of the whole run. Raises UserError: bad configuration or
    data; nothing is written then. Stopped: a signal.
    """

    def __init__(self, kind: str, config: Config, name: str = "run", started: float | None = None,
                 said: set[str] | None = None, home: Path | None = None) -> None:
        self.config, train = config, config.train
        self.clock = Clock(train.save_minutes, train.time_limit, started or time.monotonic())
        self.interrupts, self.progress = Interrupts(), Progress()
        self.run, self.home = Path(config.output), home
        with self.interruptible():
            self._prepare(kind, name, set() if said is None else said)

    def _prepare(self, kind: str, name: str, said: set[str]) -> None:
        config, train = self.config, self.config.train
        # 1. Processes, before anything is put on a device.
        use_threads(train.threads)
        check_trackers(train.trackers)
        process = processes(train.timeout)
        self.sharding, zero = sharding_of(config), zero_of(config)
        self.together = bool(self.sharding or (zero and zero["zero_optimization"]["stage"] == 3))
        AcceleratorState._reset_state()  # an earlier stage may have had another precision
        with patch_environment(accelerate_use_deepspeed="false"):
            self.accelerator = (partial(ZeroAccelerator, zero) if zero else Accelerator)(
                log_with=train.trackers or None, project_dir=".",
                mixed_precision="bf16" if train.precision == "bf16" else "no")
        self.rank, self.world = process.process_index, process.num_processes
        self.main, self.device = process.is_main_process, self.accelerator.device
        self.host_sum = HostSum(timedelta(minutes=train.timeout))
        self.notices = Notices(self.main, said)
        from_main(self._claim)
        disable_progress_bar()  # of the base checkpoints' tensors

        # 2. Data.
        data = config.data
        self.registry = build_registry(config)
        self.objective = OBJECTIVES[train.objective](config, self.registry)
        examples = self.objective.examples(load_examples(
            data.train, self.registry, language=config.model.language), training=True)
        self.dev, self.guard = ([] if not files else self.objective.examples(load_examples(
            files, self.registry, limit=data.dev_limit, flag=flag, scored=True,
            language=config.model.language), training=False)
            for flag, files in (("data.dev", data.dev), ("data.guard", data.guard)))

        # 3. The model, and what it makes of the data.
        self.model = build_model(kind, config, self.registry,
                                 (e.utterance.text for e in examples), self.device)
        examples, made = attach_hypotheses(config, self.model, examples, self.rank, self.world,
                                           self.device, self.progress_title("hypotheses"))
        rates = fitted_rates(config)
        self.dataset = build_dataset(config, self.model, examples, rates)
        self.rates = self.dataset.injector.rates if self.dataset.injector else rates
        self.plan = build_plan(config, self.model, self.dataset, self.world)
        self.total_steps = min(self.plan.steps(train.epochs), train.max_steps or sys.maxsize)
        self._warn_of_data(examples)
        optimizer = build_optimizer(self.model.trainable_groups(), train)
        self._check_length()

        # 4. The run folder: from here on something is written.
        self.run = self.notices.run = from_main(lambda: self._create(name, kind))
        self.notices.flush()
        if self.main:
            save_hypotheses(self.run, made)
        set_seed(train.seed, device_specific=True)
        self._fill_cache()
        self.wrapped, self.optimizer = (self._shard() if self.sharding else
                                        self.accelerator.prepare(self.model, optimizer))

        # 5. Where it stands.
        self.window = Window(self.objective, self.device)
        if config.resume and (self.run / LAST).is_dir():
            self._resume(self.run / LAST)
        self.log = Log(self.run, self.accelerator, train.trackers, self.progress)

    def _claim(self) -> None:
        run = Path(self.config.output)
        if self.config.resume and is_run(run):  # before it is looked at, and mended
            self.lock, damaged = lock_run(run), list[str]()
            if newest(run, damaged.append) is None and damaged:
                raise UserError("--resume: " + "\n".join(damaged))
            if not (run / LAST).is_dir():
                damaged = ["the run was stopped before its first checkpoint; it begins again"]
            for line in damaged:
                log.warning(line)

    def _create(self, name: str, kind: str) -> Path:
        self.lock = lock_run(run := create_run(self.config, name, kind))
        return run

    def _shard(self) -> tuple[Any, Any]:
        shard(self.model, self.sharding, self.device)  # whose parameters are others then
        return self.model, build_optimizer(self.model.trainable_groups(), self.config.train)

    def _check_length(self) -> None:
        if self.config.resume and (self.run / LAST).is_dir() and self.total_steps < (
                done := checkpoint.read_progress(self.run / LAST).step):
            raise UserError(f"--resume: {self.run} has taken {done} steps, and would end after "
                            f"{self.total_steps}; give more train.max_steps or train.epochs")

    def _resume(self, last: Path) -> None:
        try:
            self.model.load_trained(last)
            checkpoint.load_optimizer(last, self.optimizer, self.model)
            self.progress = checkpoint.read_progress(last)
            checkpoint.load_rng(last, self.rank, self.world)
        except UserError:
            raise
        # Of a checkpoint without hashes, which earlier versions wrote.
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{last} is damaged ({error}); start a new run from it with "
                            "--train.init") from error

    def _warn_of_data(self, examples: Sequence[Example]) -> None:
        mixture = self.plan.mixture
        drawn = (mixture.size if mixture else len(examples)) * self.total_steps
        for line in [*unspelled(examples, self.model.tokenizer), *run_findings(
                examples, self.dev, mixture, drawn // max(self.plan.steps(1), 1), self.guard)]:
            log.warning(line)

    def _fill_cache(self) -> None:
        cache = self.dataset.frame_cache
        if cache is not None and (encoder := self.model.encoder) is not None:
            spoken = (*self.dataset.examples,
                      *((*self.dev, *self.guard) if self.objective.caches_dev else ()))
            clips = [example.utterance for example in spoken]
            build_frames(cache, encoder.to(self.device), clips, device=self.device, rank=self.rank,
                         world=self.world, progress=self.progress_title("encode"))
            self.accelerator.wait_for_everyone()

    def fit(self) -> Path:
        """Train to the end; returns the run folder.

        Raises as :meth:`step`, for bad audio, and Stopped: a signal, the time or the guard limit.
        """
        try:
            with self.interruptible():
                self._fit()
        finally:
            # Stages and notebooks go on in these processes, which the trackers must leave.
            for tracker in self.accelerator.trackers:
                tracker.finish()
            # DDP's reducer goes first: freed after the process group, it can hold the GIL while
            # gloo's thread waits for it.
            self.wrapped = self.model
            self.accelerator.free_memory()
            gc.collect()
        self.notices.close()
        return self.run

    def _fit(self) -> None:
        p = self.progress
        if self.main:
            say(self.run, describe_run(self.config, self.model, self.dataset.examples, self.dev,
                                       self.guard, self.plan, self.total_steps, self.world)
                + f"\nrun folder: {self.run}")
        # The first one shows where the model began. A run that was killed in one resumes before it.
        if p.validated < 0 or (p.validated < p.step and self._validates()):
            self.validate()
        with bar(total=self.total_steps, initial=p.step, desc="train", unit="step",
                 disable=not self.main) as steps, self.interrupts.held():
            while p.step < self.total_steps:
                self._epoch(steps)
        self._finish()

    def _epoch(self, shown: Any) -> None:
        p, every = self.progress, self.config.train.save_every
        steps = self.batches(p.epoch, p.step_in_epoch)
        while p.step < self.total_steps:
            if why := forgetting(p.history, limit := self.config.train.guard_limit):
                log.warning(why)
                raise Stopped(f"train.guard_limit {limit:g}; best is of step {p.best_step}")
            started = time.perf_counter()
            self.clock.step()
            micro = next(steps, None)
            if micro is None:
                p.epoch, p.step_in_epoch = p.epoch + 1, 0
                return
            self.window.waited += time.perf_counter() - started
            self.step(micro)
            p.step, p.step_in_epoch = p.step + 1, p.step_in_epoch + 1
            self._log_step(shown)
            due = self.ends or self.saves or (every and p.step % every == 0)
            if due or self._validates():
                self.save()  # first: a validation that fails must not lose the steps before it
            if self.ends and p.step < self.total_steps:
                raise Stopped(self.interrupts.reason or self._why_it_ends())
            if self._validates():
                self.validate()

    def _why_it_ends(self) -> str:
        limit = self.config.train.time_limit
        return f"train.time_limit of {limit:g} minutes" if limit else "another process was stopped"

    def _validates(self) -> bool:
        step, every = self.progress.step, self.config.train.eval_every
        return step == self.total_steps or bool(every and step % every == 0)

    def _log_step(self, shown: Any) -> None:
        p = self.progress
        shown.update(1)
        if not self.window.steps:  # it was left out
            return
        row = self.window.read(self.accelerator)
        self.window = Window(self.objective, self.device)
        shown.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "loss_asr", "loss_task", "w_asr")
                         if k in row}, refresh=False)
        self.log.write("train", {"step": p.step, "epoch": p.epoch, **row,
                                 "memory_gib": peak_memory(), **group_rates(self.optimizer)})

    def _finish(self) -> None:
        p = self.progress
        best, told = self.run / BEST if p.best_step >= 0 else self.run / LAST, ""
        scores = next((s for s in reversed(p.history) if s["score"] == p.best_score), {})
        if self.main or self.together:  # which no process runs alone
            folders = list(dict.fromkeys([best, self.run / LAST])) if self.main else []
            told = self.objective.finish(self.model, best, folders, scores, self.dev,
                                         self.dataset.frame_cache)
        if self.main:
            table = before_and_after(p.history, p.best_step, p.best_score, self.config.train.init)
            if parts := [part for part in (table, told) if part]:
                say(self.run, "\n".join(parts))
            write_finished(self.run, {"step": p.step, "train_seconds": round(p.seconds, 1),
                                      "best_step": p.best_step, "best_score": p.best_score})
            self.lock.release(force=True)
        self.accelerator.wait_for_everyone()

    def validate(self) -> None:
        """Decode dev and guard examples on all processes, score, log, print; keep the best weights.

        Raises Stopped: a signal came, or the time that is left does not suffice.
        """
        p = self.progress
        if not self.dev:
            p.validated = p.step
            return
        if from_main(partial(self.clock.time_is_up, validation=True)):
            raise Stopped(self._why_it_ends())
        with self.interrupts.released(), self.clock.measure("validation"):
            self._validate()

    def _validate(self) -> None:
        p = self.progress
        p.validated = p.step
        started = time.perf_counter()
        predictions, guarded = self.decode_scored()
        result = self.objective.score(predictions, p.history)
        result.scores.update(guard_scores(guarded, self.guard))
        p.history.append(result.scores)
        p.shown = p.shown or choose(predictions, self.registry)
        # A model that has not trained is never the best: there is no checkpoint of it.
        better = p.step > 0 and (p.best_score is None or result.scores["score"] > p.best_score)
        if better:
            p.best_score, p.best_step = result.scores["score"], p.step
        with self.interrupts.held():
            if self.main:
                if better:
                    checkpoint.copy_model(self.run / LAST, self.run / BEST, p)
                self.log.validation(p.step, predictions, guarded, result,
                                    time.perf_counter() - started, p.history[0],
                                    show(predictions, p.shown, self.registry))
                if p.step > 0:  # saved before: a resumed run must know of this one, and its row
                    checkpoint.update_progress(self.run / LAST, p)
            self.accelerator.wait_for_everyone()
