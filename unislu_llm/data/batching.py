"""Which samples form which batch: length buckets, the same on every rank, reproducible from a seed.

A plan is a list of *global* batches. How many processes and micro-batches share one does not change what is in it, so
that runs with other numbers of processes see the same steps. Equal step counts on every rank follow from the plan being
global.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import soundfile

from unislu_llm.data.mixture import Mixture
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
        mixture: says which samples an epoch draws; default: every sample once.

    Raises:
        UserError: fewer samples than parts, or a batch size below the number of parts.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, parts: int = 1, seed: int = 0,
                 bucket: int = 16, mixture: Mixture | None = None) -> None:
        self.samples = len(lengths) if mixture is None else len(mixture)
        if batch_size < parts:
            raise UserError(f"batch_size={batch_size} is smaller than processes x accumulation = {parts}; raise it")
        if self.samples < parts:
            raise UserError(f"{self.samples} training samples cannot feed {parts} micro-batches a step; "
                            "use fewer processes")
        self.lengths = np.asarray(lengths, dtype=np.float64)
        self.mixture = mixture
        self.batch_size, self.parts, self.seed, self.bucket = batch_size, parts, seed, bucket

    def __len__(self) -> int:
        """Steps an epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (1 if rest >= self.parts else 0) or 1

    def epoch(self, epoch: int) -> list[list[int]]:
        """Global batches of one epoch: every sample once (or what the mixture draws), members sorted by length.

        Batches come in random order, with a mixture such that its shares hold at every step. A last batch too small to
        give each part a sample joins the one before it.
        """
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths)) if self.mixture is None else self.mixture.epoch(epoch)
        pool = self.batch_size * self.bucket or 1
        if self.bucket:
            # A mixture arranges whole pools, so theirs end where a batch ends.
            chunks = (np.array_split(order, max(1, round(len(order) / pool))) if self.mixture is None
                      else np.split(order, range(pool, len(order), pool)))
            order = np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks])
        batches = [order[i:i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if len(batches) > 1 and len(batches[-1]) < self.parts:
            last = batches.pop()
            batches[-1] = np.concatenate([batches[-1], last])
        if self.mixture is None:
            rng.shuffle(batches)
        else:
            batches = self.mixture.arrange(batches, self.bucket, rng)
        return [[int(i) for i in batch[np.argsort(self.lengths[batch], kind="stable")]] for batch in batches]

    def micro_batches(self, epoch: int, rank: int = 0, world: int = 1) -> list[list[list[int]]]:
        """For one rank: for each step, its micro-batches of sample indices. All ranks have the same number of both.

        Raises:
            UserError: `world` processes cannot share the micro-batches of a step evenly, or there is no such rank.
        """
        return [[[i for i, _ in part] for part in step] for step in self.draws(epoch, rank, world)]

    def draws(self, epoch: int, rank: int = 0, world: int = 1) -> list[list[list[tuple[int, int]]]]:
        """As :meth:`micro_batches`, each sample with how many times the epoch has drawn it before (all ranks counted)."""
        if self.parts % world or not 0 <= rank < world:
            raise UserError(f"{self.parts} micro-batches a step cannot be dealt evenly to rank {rank} of {world}")
        per_rank = self.parts // world
        before: Counter[int] = Counter()
        steps = []
        for batch in self.epoch(epoch):
            drawn = []
            for i in batch:
                drawn.append((i, before[i]))
                before[i] += 1
            cuts = np.array_split(np.arange(len(drawn)), self.parts)[rank * per_rank:(rank + 1) * per_rank]
            steps.append([[drawn[int(place)] for place in part] for part in cuts])
        return steps

    def indices(self, epoch: int) -> np.ndarray:
        """Samples that an epoch draws, in no particular order, without making batches of them."""
        return np.arange(len(self.lengths)) if self.mixture is None else self.mixture.epoch(epoch)


def sorted_batches(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (a batch that does not fit in memory fails at once)."""
    order = sorted(range(len(samples)), key=lambda i: -seconds(samples[i].utterance))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
