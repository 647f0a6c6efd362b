"""Which samples form which batch: length buckets, the same on every rank, reproducible from a seed.

A plan is a list of *global* batches, of as many samples each (:class:`BatchPlan`) or of as many tokens (:class:`TokenPlan`).
How many processes and micro-batches share one does not change what is in it, so that runs with other numbers of processes
see the same steps. Equal step counts on every rank follow from the plan being global.
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

    def steps(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        return epochs * len(self)

    def epoch(self, epoch: int) -> list[list[int]]:
        """Global batches of one epoch: every sample once (or what the mixture draws), members sorted by length.

        Batches come in random order, with a mixture such that its shares hold at every step. A last batch too small to
        give each part a sample joins the one before it.
        """
        rng = np.random.default_rng((self.seed, epoch))
        batches = self._cut(self._order(epoch, rng))
        if self.mixture is None:
            rng.shuffle(batches)
        else:
            batches = self.mixture.arrange(batches, self._window(batches), rng)
        return [[int(i) for i in batch[np.argsort(self.lengths[batch], kind="stable")]] for batch in batches]

    def _order(self, epoch: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Sample indices of an epoch as they are drawn."""
        rng = rng or np.random.default_rng((self.seed, epoch))
        return rng.permutation(len(self.lengths)) if self.mixture is None else self.mixture.epoch(epoch)

    def _pools(self, order: np.ndarray, pool: int) -> list[np.ndarray]:
        """Stretches of an epoch's draw of about `pool` samples, each sorted by length."""
        # A mixture arranges whole pools, so theirs end where a batch ends.
        chunks = (np.array_split(order, max(1, round(len(order) / pool))) if self.mixture is None
                  else np.split(order, range(pool, len(order), pool)))
        return [chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Global batches of an epoch's draw."""
        if self.bucket:
            order = np.concatenate(self._pools(order, self.batch_size * self.bucket))
        batches = [order[i:i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if len(batches) > 1 and len(batches[-1]) < self.parts:
            last = batches.pop()
            batches[-1] = np.concatenate([batches[-1], last])
        return batches

    def _window(self, batches: list[np.ndarray]) -> int:
        """Batches that a mixture arranges among themselves."""
        return self.bucket

    def _deal(self, batch: list[int]) -> list[np.ndarray]:
        """Places of a global batch's members in each of its micro-batches."""
        return np.array_split(np.arange(len(batch)), self.parts)

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
            cuts = self._deal(batch)[rank * per_rank:(rank + 1) * per_rank]
            steps.append([[drawn[int(place)] for place in part] for part in cuts])
        return steps

    def indices(self, epoch: int) -> np.ndarray:
        """Samples that an epoch draws, in no particular order, without making batches of them."""
        return np.arange(len(self.lengths)) if self.mixture is None else self.mixture.epoch(epoch)


class TokenPlan(BatchPlan):
    """Global batches by a budget of tokens: many short samples or few long ones, at about equal cost.

    The cost of a batch is its padded size in rows of a decoder that reads speech and text one after the other:
    `samples x most tokens of a sample`. Samples are sorted by `2 x speech + text` inside a pool, since speech is padded twice,
    in the encoder's batch and in the decoder's, and both are to be bounded. The pool is cut into as few batches as the budget
    allows, and these are made as equal as they can be.

    What is in a batch does not depend on `parts`, unless a rest has fewer samples than parts. The micro-batches of a batch
    have about equal cost, so that no process waits long for another.

    Args:
        sizes: `(samples, 2)` speech and text tokens of each sample; the text includes the prompt.
        batch_tokens: budget of a global batch.
        parts, seed, mixture: see :class:`BatchPlan`. bucket: a pool has `4 x bucket` batches; 0: an epoch is one pool.

    Raises:
        UserError: fewer samples than parts, or a budget that cannot hold one of the longest samples for each part.
    """

    def __init__(self, sizes: np.ndarray, batch_tokens: int, parts: int = 1, seed: int = 0, bucket: int = 16,
                 mixture: Mixture | None = None) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        self.rows = self.sizes.sum(1)
        super().__init__((self.rows + self.sizes[:, 0]).tolist(), parts, parts, seed, bucket, mixture)
        self.batch_tokens = batch_tokens
        if (least := parts * int(self.rows.max())) > batch_tokens:
            raise UserError(f"batch_tokens={batch_tokens} is too few: {parts} micro-batches a step and at most "
                            f"{least // parts} tokens a sample need {least}; raise it, or lower data.max_seconds")

    def __len__(self) -> int:
        """Steps of the first epoch; others may have a step more or less."""
        return self.steps(1)

    def steps(self, epochs: int) -> int:
        return sum(len(self._cut(self._order(epoch))) for epoch in range(epochs))

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        batch = self.batch_tokens / float(self.rows[order].mean())
        # Two lengths are to be alike in a batch, not one: a pool for it is larger.
        pool = round(4 * self.bucket * batch) if self.bucket else len(order)
        batches: list[np.ndarray] = []
        for members in self._pools(order, max(pool, self.parts)):
            batches += self._balanced(members)
        return self._filled(batches)

    def _balanced(self, members: np.ndarray) -> list[np.ndarray]:
        """Sorted samples in as few batches as the budget allows, of costs as equal as they can be."""
        fewest = len(self._greedy(members, self.batch_tokens))
        low, high = self.parts * int(self.rows[members].max()) - 1, self.batch_tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._greedy(members, middle)) <= fewest else (middle, high)
        return self._greedy(members, high)

    def _greedy(self, members: np.ndarray, budget: int) -> list[np.ndarray]:
        """Cut sorted samples into batches of at most `budget`, from the longest on: what is left over is short."""
        batches: list[np.ndarray] = []
        stop = len(members)
        while stop:
            rows = self.rows[members[max(0, stop - budget):stop]][::-1]
            cost = np.maximum.accumulate(rows) * np.arange(1, len(rows) + 1)
            n = max(1, int(np.searchsorted(cost, budget, side="right")))
            batches.append(members[stop - n:stop])
            stop -= n
        return batches

    def _filled(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """Join a batch of fewer samples than parts with the one before it, or share theirs out where both can be had."""
        filled: list[np.ndarray] = []
        for batch in batches:
            if filled and len(batch) < self.parts:
                both = np.concatenate([batch, filled.pop()])
                if len(both) >= 2 * self.parts:
                    filled.append(both[self.parts:])
                    both = both[:self.parts]
                batch = both
            filled.append(batch)
        if len(filled) > 1 and len(filled[0]) < self.parts:  # the first pool is too small, and what came next filled itself
            filled[1] = np.concatenate([filled.pop(0), filled[0]])
        return filled

    def _window(self, batches: list[np.ndarray]) -> int:
        return len(batches)

    def _deal(self, batch: list[int]) -> list[np.ndarray]:
        """Contiguous stretches of least greatest cost, none empty."""
        members = np.asarray(batch)
        low, high = 0, self.cost(batch)
        while high - low > 1:
            middle = (low + high) // 2
            fits = middle >= self.rows[members].max() and len(self._greedy(members, middle)) <= self.parts
            low, high = (low, middle) if fits else (middle, high)
        counts = [len(part) for part in self._greedy(members, high)][::-1]
        while len(counts) < self.parts:
            widest = max(range(len(counts)), key=counts.__getitem__)
            counts[widest:widest + 1] = [counts[widest] // 2, counts[widest] - counts[widest] // 2]
        return np.split(np.arange(len(batch)), np.cumsum(counts)[:-1])

    def cost(self, batch: Sequence[int]) -> int:
        """Padded size of a batch in tokens."""
        return len(batch) * int(self.rows[np.asarray(batch)].max())

    def padding_share(self, batches: Sequence[Sequence[int]]) -> float:
        """Share of the batches' rows that is padding."""
        return 1.0 - sum(int(self.rows[np.asarray(b)].sum()) for b in batches) / sum(self.cost(b) for b in batches)


def sorted_batches(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (a batch that does not fit in memory fails at once)."""
    order = sorted(range(len(samples)), key=lambda i: -seconds(samples[i].utterance))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
