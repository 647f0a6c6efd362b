"""Which samples form which batch: length buckets, the same on every rank, reproducible from a seed.

A plan is a list of *global* batches. How many processes and micro-batches share one does not change what is in it, so
that runs with other numbers of processes see the same steps. Equal step counts on every rank follow from the plan being
global.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import soundfile

from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.utterance import Utterance


def seconds(utterance: Utterance) -> float:
    """Length of an utterance in seconds, from its manifest row or, failing that, from the audio header."""
    if utterance.duration is not None:
        return utterance.duration
    if utterance.end is not None:
        return utterance.end - utterance.start
    if utterance.audio is None:
        return 0.0
    try:
        return float(soundfile.info(str(utterance.audio)).duration) - utterance.start
    except (OSError, RuntimeError) as error:
        where = utterance.source or utterance.id
        raise UserError(f"{where}: field 'audio': cannot read {utterance.audio}: {error}") from error


class BatchPlan:
    """Global batches of every epoch.

    Args:
        lengths: length of each sample, any unit.
        batch_size: samples a global batch.
        parts: micro-batches that share a global batch (processes times accumulation steps).
        seed: of the shuffling.
        bucket: batches within whose pool samples are sorted by length; 0 shuffles freely.

    Raises:
        UserError: fewer samples than parts, or a batch size below the number of parts.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, parts: int = 1, seed: int = 0,
                 bucket: int = 16) -> None:
        if batch_size < parts:
            raise UserError(f"batch_size={batch_size} is smaller than processes x accumulation = {parts}; raise it")
        if len(lengths) < parts:
            raise UserError(f"{len(lengths)} training samples cannot feed {parts} micro-batches a step; "
                            "use fewer processes")
        self.lengths = np.asarray(lengths, dtype=np.float64)
        self.batch_size, self.parts, self.seed, self.bucket = batch_size, parts, seed, bucket

    def __len__(self) -> int:
        """Steps an epoch."""
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full + (1 if rest >= self.parts else 0) or 1

    def epoch(self, epoch: int) -> list[list[int]]:
        """Global batches of one epoch: every sample once, batches in random order, members sorted by length.

        A last batch too small to give each part a sample joins the one before it.
        """
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        pool = self.batch_size * self.bucket or 1
        if self.bucket:
            order = np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")]
                                    for chunk in np.array_split(order, max(1, round(len(order) / pool)))])
        batches = [order[i:i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if len(batches) > 1 and len(batches[-1]) < self.parts:
            last = batches.pop()
            batches[-1] = np.concatenate([batches[-1], last])
        rng.shuffle(batches)
        return [[int(i) for i in batch[np.argsort(self.lengths[batch], kind="stable")]] for batch in batches]

    def micro_batches(self, epoch: int, rank: int = 0, world: int = 1) -> list[list[list[int]]]:
        """For one rank: for each step, its micro-batches of sample indices. All ranks have the same number of both.

        Raises:
            UserError: `world` processes cannot share the micro-batches of a step evenly, or there is no such rank.
        """
        if self.parts % world or not 0 <= rank < world:
            raise UserError(f"{self.parts} micro-batches a step cannot be dealt evenly to rank {rank} of {world}")
        per_rank = self.parts // world
        steps = []
        for batch in self.epoch(epoch):
            dealt = [[int(i) for i in part] for part in np.array_split(np.asarray(batch), self.parts)]
            steps.append(dealt[rank * per_rank:(rank + 1) * per_rank])
        return steps


def sorted_batches(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (a batch that does not fit in memory fails at once)."""
    order = sorted(range(len(samples)), key=lambda i: -seconds(samples[i].utterance))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
