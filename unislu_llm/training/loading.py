"""Micro-batches of a run: from its samples and their plan through a DataLoader, or from a cache of frames."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from unislu_llm.data.augment import AugmentedCollator, AugmentedSpeech, Augmenter
from unislu_llm.data.batching import BatchPlan
from unislu_llm.data.cache import FrameCache
from unislu_llm.data.collate import Batch, CachedSpeech, SpeechDataset
from unislu_llm.data.draft_dropout import DraftDropout, DroppedDrafts
from unislu_llm.data.targets import Sample
from unislu_llm.data.text_rows import DraftsAlone, TextSimulator, WithText
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.models.frames import complete
from unislu_llm.training.config import Config


@dataclass
class Loader:
    """This process's share of the batches of a run.

    Args:
        config: the run's. accelerator: says which process this is. model: makes the batches.
        samples: to train on. plan: which of them each step takes.
        cache: frames in place of audio. augmenter, simulator, dropout: what is done to the samples; None: nothing.
    """

    config: Config
    accelerator: Accelerator
    model: SLUModel
    samples: list[Sample]
    plan: BatchPlan
    cache: FrameCache | None = None
    augmenter: Augmenter | None = None
    simulator: TextSimulator | DraftsAlone | None = None
    dropout: DraftDropout | None = None
    waited: float = 0.0
    """Seconds for the data of the last step."""

    def steps(self, epoch: int, skip: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches, a list a step, from step `skip` of the epoch on."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        dataset, collate, counted = self._dataset(epoch)
        deal = self.plan.draws if counted else self.plan.micro_batches
        steps: list[list[list[Any]]] = deal(epoch, rank, world)[skip:]
        flat = [indices for step in steps for indices in step]
        workers = self.config.data.num_workers
        # A generator of its own: the loader must not draw from the one that dropout uses, or a resumed run would differ.
        own = torch.Generator().manual_seed(self.config.train.seed + epoch)
        loader = DataLoader(dataset, batch_sampler=flat, collate_fn=collate, num_workers=workers, generator=own,
                            pin_memory=self.accelerator.device.type == "cuda", prefetch_factor=4 if workers else None)
        batches = iter(loader)
        for step in steps:
            started = time.perf_counter()
            micro = [next(batches) for _ in step]
            self.waited = time.perf_counter() - started
            yield micro

    def _dataset(self, epoch: int) -> tuple[Any, Any, bool]:
        """Samples of an epoch, their collator, and whether they are asked for with how often each was drawn before.

        They are, where something random is done to them: it follows from that count, so that a resumed run repeats it.
        """
        seed = self.config.train.seed
        dataset: Any = SpeechDataset(self.samples, self.config.data.max_seconds)
        if self.cache is not None:
            self.cache.refresh()
            dataset = CachedSpeech(self.samples, self.cache, self.config.data.max_seconds)
        collate: Any = self.model.collator()
        counted = False
        if self.augmenter is not None:
            dataset, counted = AugmentedSpeech(dataset, self.augmenter, seed, epoch), True
            collate = AugmentedCollator(collate, self.augmenter)
        if self.simulator is not None:
            dataset, counted = WithText(dataset, self.samples, self.simulator, seed, epoch, draws=counted), True
        if self.dropout is not None:
            dataset, counted = DroppedDrafts(dataset, self.dropout, seed, epoch, draws=counted), True
        return dataset, collate, counted

    def complete(self, batch: Batch) -> Batch:
        """The batch with the frames that the cache lacks, computed and stored; as it is where none are missing.

        Args:
            batch: on the model's device.

        Raises:
            UserError: the model is sharded, so that its encoder cannot run on its own.
        """
        if not batch.missing or self.cache is None:
            return batch
        if is_sharded(self.accelerator):
            raise UserError("data.encoder_cache lacks frames, and under FSDP or DeepSpeed they cannot be added while training; "
                            "store them before with `unislu cache build`")
        encoder: Any = self.model.encoder
        return complete(batch, encoder, self.cache)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP or DeepSpeed spreads the model's weights over processes."""
    return str(accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED")
