"""The training loop: plain PyTorch over Accelerate, for both decoders, exact under accumulation and distribution."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from unislu_llm.data.audio import MAX_SECONDS
from unislu_llm.data.augment import Augmenter
from unislu_llm.data.collate import Batch
from unislu_llm.data.mixture import Tally, describe_mixture
from unislu_llm.decoding.generate import DecodeOptions, predict
from unislu_llm.errors import UserError
from unislu_llm.loss import Counts, floor_at, weighted_loss
from unislu_llm.models.base import SLUModel
from unislu_llm.scoring.slue import format_table, score_rows
from unislu_llm.training import state
from unislu_llm.training.build import (
    add_drafts,
    build_cache,
    build_dropout,
    build_mixture,
    build_model,
    build_plan,
    build_registry,
    choose_attention,
    load_samples,
)
from unislu_llm.training.config import Config
from unislu_llm.training.figures import micro_sums, read_sums, sum_names
from unislu_llm.training.loading import Loader, is_sharded
from unislu_llm.training.monitors import flat_scores, loss_summary, validation_warnings
from unislu_llm.training.optim import build_optimizer, build_schedule, group_rates
from unislu_llm.training.plan import accumulation, describe, peak_memory, use_threads
from unislu_llm.training.simulation import build_simulator, keep_simulation

log = logging.getLogger(__name__)


class Trainer:
    """One run: data, model, optimizer and where it stands.

    Args:
        kind: speech_llm or whisper_slu.
        config: the run's configuration.
        name: start of the default run folder's name.
        model: built already; default: from the configuration.

    Raises:
        UserError: bad configuration or data; nothing is written then.
    """

    def __init__(self, kind: str, config: Config, name: str = "run", model: SLUModel | None = None) -> None:
        self.config = config
        if config.train.objective == "ctc":
            raise UserError("train.objective ctc is trained by unislu_llm.training.ctc_run.run_ctc, not by Trainer")
        use_threads(config.train.threads)
        self.registry = build_registry(config)
        self.train_samples = load_samples(config.data.train, self.registry, max_seconds=config.data.max_seconds,
                                          long_audio=config.data.long_audio)
        self.train_samples = add_drafts(self.train_samples, config.model)
        self.dropout = build_dropout(config, self.train_samples)
        self.mixture = build_mixture(config, self.train_samples)
        self.augmenter = Augmenter(config.augment, config.data.max_seconds) if config.augment.active else None
        self.dev_samples = []
        if config.data.dev:
            self.dev_samples = load_samples(config.data.dev, self.registry, config.data.dev_limit, "data.dev", MAX_SECONDS,
                                            config.data.long_audio, scored=True)
        self.model = model or build_model(kind, config, self.registry, (s.utterance.text for s in self.train_samples))
        self.accelerator = Accelerator(mixed_precision="bf16" if config.train.precision == "bf16" else "no",
                                       log_with=config.train.trackers or None, project_dir=".")
        choose_attention(self.model, self.accelerator.device, config.train.precision)
        world = self.accelerator.num_processes
        self.per_rank = accumulation(config, world)
        self.simulator = build_simulator(config, self.model, self.train_samples)
        self.plan = build_plan(config, self.model, self.train_samples, self.mixture, world * self.per_rank, self.simulator)
        self.total_steps = self.plan.steps(config.train.epochs)
        if config.train.max_steps:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        self.cache = build_cache(config, self.model)
        self.loader = Loader(config, self.accelerator, self.model, self.train_samples, self.plan, self.cache, self.augmenter,
                             self.simulator, self.dropout)
        self.run = self._run_folder(name)
        if self.accelerator.is_main_process:
            keep_simulation(config, self.simulator, self.run)
        set_seed(config.train.seed, device_specific=True)
        self._prepare()
        self.progress = state.Progress()
        self.tally = Tally(self.mixture, self.train_samples)
        self.history: list[dict[str, float]] = []
        if config.resume:
            self._resume()

    def _run_folder(self, name: str) -> Path:
        """The main process makes the folder; the others learn its name, or that it could not be made."""
        made: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                made = [state.create_run(self.config, name)]
            except UserError as error:
                made = [error]
        if self.accelerator.num_processes > 1:
            made = gather_object(made)
        if isinstance(made[0], UserError):
            raise made[0]
        return Path(made[0])

    def _prepare(self) -> None:
        self.optimizer = build_optimizer(self.model.trainable_groups(), self.config.train)
        self.schedule = build_schedule(self.optimizer, self.config.train, self.total_steps)
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None:  # it wants to know; our loader is not its own
            deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = self.config.train.micro_batch_size
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)  # type: ignore[assignment]

    def batches(self, epoch: int, skip: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches, a list a step, from step `skip` of the epoch on."""
        return self.loader.steps(epoch, skip)

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, micro: list[Batch]) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches of a global batch; returns its figures.

        Raises:
            UserError: the loss is not finite.
        """
        self.wrapped.train()
        totals = self.totals(micro)
        figures = self.backward(micro, Counts(float(totals[0]), float(totals[1])))
        norm = float("nan")
        if self.config.train.max_grad_norm:
            params = [p for p in self.model.parameters() if p.requires_grad]
            norm = float(self.accelerator.clip_grad_norm_(params, self.config.train.max_grad_norm) or 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return self.figures(figures, norm)

    def totals(self, micro: list[Batch]) -> Tensor:
        counts = sum((Counts.of(b.target_parts) for b in micro), Counts(0, 0))
        return self._sum(torch.tensor([counts.asr, counts.task], dtype=torch.float64))

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over processes, on the CPU in double precision where the backend can."""
        if self.accelerator.num_processes == 1:
            return values
        device = self.accelerator.device
        kind = torch.float32 if device.type == "mps" else values.dtype
        return self.accelerator.reduce(values.to(device, kind), "sum").cpu().double()  # type: ignore[union-attr]

    def backward(self, micro: list[Batch], total: Counts) -> Tensor:
        """Accumulate gradients of the global loss; returns this rank's sums for the log (see :meth:`figures`)."""
        sums = torch.zeros(len(sum_names(self.registry)), dtype=torch.float64)
        for i, cpu_batch in enumerate(micro):
            last = i == len(micro) - 1
            batch = cpu_batch.to(self.accelerator.device)
            self.accelerator.sync_gradients = last
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    batch = self.loader.complete(batch)
                    losses = self.wrapped(batch.mel, batch.mel_lengths, batch.target_ids, batch.target_parts,
                                          batch.frames, batch.frame_lengths, **batch.extras())
                loss = weighted_loss(losses, batch.target_parts, self.config.train.loss, total, self.floor)
                # Processes' gradients are averaged; the normalizer is global already.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            sums += micro_sums(losses.detach(), loss.detach(), cpu_batch, self.registry, self.floor)
        return sums

    @property
    def floor(self) -> float:
        """Least share of the transcript in this step's loss."""
        return floor_at(self.progress.step, self.config.train.asr_floor, self.config.train.asr_floor_steps)

    def figures(self, sums: Tensor, norm: float) -> dict[str, float]:
        """What the log says of a step, over all processes.

        Args:
            sums: of this process, from :meth:`backward`. norm: of the gradient before clipping.

        Raises:
            UserError: the loss is not finite.
        """
        figures = read_sums(self._sum(sums), self.registry, self.accelerator.num_processes * self.per_rank)
        if not math.isfinite(figures["loss"]):
            raise UserError(f"loss is {figures['loss']} at step {self.progress.step}; lower train.lr or max_grad_norm; "
                            f"the last good weights are in {self.run}")
        return figures | {"grad_norm": norm}

    # ---- the run ---------------------------------------------------------------------------------------------------

    def fit(self, *, final: bool = True) -> dict[str, Any]:
        """Train to the end; returns the last score report.

        Args:
            final: nothing is trained in these processes afterwards.

        Raises:
            UserError: as :meth:`step`, and unreadable audio.
        """
        self._announce()
        every = self.config.train.eval_every
        results = self.validate("before training") if self.config.train.eval_start and not self.progress.step else {}
        bar = tqdm(total=self.total_steps, initial=self.progress.step, desc="train", unit="step",
                   disable=not self.accelerator.is_local_main_process)
        while self.progress.step < self.total_steps:
            p = self.progress
            drawn = self.plan.epoch(p.epoch)
            for micro in self.batches(p.epoch, p.step_in_epoch):
                started = time.perf_counter()
                figures = self.step(micro)
                self.tally.add(drawn[p.step_in_epoch])
                p.step, p.step_in_epoch = p.step + 1, p.step_in_epoch + 1
                took = time.perf_counter() - started
                p.seconds += took
                self._log_step(figures, took, bar)
                if p.step >= self.total_steps:
                    break
                if every and p.step % every == 0:
                    results = self.validate(f"step {p.step}")
                    self.save()
                elif self.config.train.save_every and p.step % self.config.train.save_every == 0:
                    self.save()
            if self.accelerator.is_main_process:
                done = chain.from_iterable(drawn[:p.step_in_epoch])
                self._record("epoch", {"step": p.step, "epoch": p.epoch, **self.tally.shares(done)})
            if p.step < self.total_steps:
                p.epoch, p.step_in_epoch = p.epoch + 1, 0
        bar.close()
        if self.accelerator.is_main_process:
            print(loss_summary(self.run / "metrics.jsonl"))
        results = self.validate("after training")
        self.save()
        if self.accelerator.is_main_process:
            p = self.progress
            best = {"best_step": p.best_step, "best_score": p.best_score} if p.best_step >= 0 else {}
            state.write_finished(self.run, {"step": p.step, "train_seconds": round(p.seconds, 1), **best})
        self.close(final=final)
        return results

    def close(self, *, final: bool = True) -> None:
        """End trackers and, with `final`, the process group; the model stays usable."""
        self.accelerator.wait_for_everyone()
        # DDP's reducer goes first: freed after the group, it can hold the GIL while gloo's thread waits for it (seen at exit).
        self.wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        if final:
            self.accelerator.end_training()
        else:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _announce(self) -> None:
        tasks = Counter(s.task or "asr" for s in self.train_samples)
        if self.accelerator.is_main_process:
            print(describe(self.config, self.model, dict(tasks), self.total_steps, self.accelerator.num_processes,
                           describe_mixture(self.mixture, self.train_samples)))
            print(f"run folder: {self.run}", flush=True)
        if self.config.train.trackers:
            self.accelerator.project_configuration.logging_dir = str(self.run)
            self.accelerator.init_trackers("tensorboard")

    def _log_step(self, figures: dict[str, float], took: float, bar: Any) -> None:
        step = self.progress.step
        bar.update(1)
        shown = {k: f"{figures[k]:.3f}" for k in ("loss", "loss_asr", "loss_task", "w_asr") if k in figures}
        bar.set_postfix(shown, refresh=False)
        if step % self.config.train.log_every or not self.accelerator.is_main_process:
            return
        row = {"step": step, "epoch": self.progress.epoch, **figures, "seconds": took, "tokens_per_s": figures["tokens"] / took,
               "data_wait": self.loader.waited / (self.loader.waited + took),
               "memory_gib": peak_memory(), **{f"lr_{k}": v for k, v in group_rates(self.optimizer).items()},
               **self._norm_ratio(step), **self.tally.shares()}
        self._record("train", row)

    def _norm_ratio(self, step: int) -> dict[str, float]:
        """RMS of the projector's output gain against the embeddings' at the start: 1 means speech is as loud as text."""
        norm = getattr(getattr(self.model, "projector", None), "norm", None)
        return {} if norm is None else {"embedding_norm_ratio": float(norm.gain.detach().float().pow(2).mean().sqrt())}

    def _record(self, part: str, row: dict[str, Any]) -> None:
        state.append_json(self.run / "metrics.jsonl", {"part": part, **row})
        if self.config.train.trackers:
            self.accelerator.log({f"{part}/{k}": v for k, v in row.items() if k != "step"}, step=row["step"])

    # ---- validation and checkpoints ------------------------------------------------------------------------------------

    def validate(self, title: str) -> dict[str, Any]:
        """Decode the dev samples on all processes, score, log, print, and keep the best weights."""
        if not self.dev_samples:
            return {}
        started = time.perf_counter()
        options = DecodeOptions(**self.config.decode.settings())
        mine = self.dev_samples[self.accelerator.process_index::self.accelerator.num_processes]
        with self.accelerator.autocast():
            rows = predict(self.model, mine, options, progress="validate" if self.accelerator.is_local_main_process else "")
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        results = score_rows(rows, self.registry)
        scores = flat_scores(results, self.registry)
        self.history.append(scores)
        step = self.progress.step
        better = step > 0 and scores["score"] > self.progress.best_score
        if better:
            self.progress.best_score, self.progress.best_step = scores["score"], step
            self._save_model(state.BEST)
        if self.accelerator.is_main_process:
            self._report(title, rows, results, {"step": step, **scores, "seconds": time.perf_counter() - started})
        return results

    def _report(self, title: str, rows: list[dict[str, Any]], results: dict[str, Any], row: dict[str, Any]) -> None:
        folder = self.run / "predictions"
        folder.mkdir(exist_ok=True)
        stem = f"step-{row['step']:06d}"
        state.write_text(folder / f"{stem}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        state.write_text(folder / f"{stem}.scores.json", json.dumps(results, indent=1) + "\n")
        self._record("dev", row)
        tqdm.write(f"\n{title} ({len(rows)} dev samples, {row['seconds']:.0f} s)\n{format_table({self.run.name: results})}")
        for warning in validation_warnings(self.history, rows, self.registry):
            tqdm.write(f"monitor: {warning}")

    def _gathered(self) -> dict[str, Tensor]:
        """Trained weights by name on every process, gathered from shards where there are any."""
        full = self.accelerator.get_state_dict(self.wrapped) if is_sharded(self.accelerator) else None
        if full is None:
            return self.model.trained_state()
        names = set(self.model.trained_state())
        return {n: t.detach().cpu().contiguous() for n, t in full.items() if n in names}

    def _save_model(self, name: str, folder: Path | None = None) -> None:
        weights = self._gathered()
        if self.accelerator.is_main_process:
            new = folder or self.run / f"{name}.new"
            self.model.save_pretrained(new, weights)
            if folder is None:
                state.swap_folder(new, self.run / name)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Write the resumable checkpoint `last`."""
        new = self.run / f"{state.LAST}.new"
        self._save_model(state.LAST, new)
        rng = gather_object([state.rng_state()]) if self.accelerator.num_processes > 1 else [state.rng_state()]
        if self.accelerator.is_main_process:
            state.save_state(new, self.progress, self.optimizer.state_dict(), self.schedule.state_dict(), rng)
            state.swap_folder(new, self.run / state.LAST)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        folder = self.run / state.LAST
        self.model.load_trained(folder)
        saved = state.load_state(folder)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.progress = p = state.Progress(**saved["progress"])
        for epoch in range(p.epoch):
            self.tally.add(self.plan.indices(epoch))
        self.tally.add(chain.from_iterable(self.plan.epoch(p.epoch)[:p.step_in_epoch]))
        if len(saved["rng"]) == self.accelerator.num_processes:
            state.set_rng_state(saved["rng"][self.accelerator.process_index])
