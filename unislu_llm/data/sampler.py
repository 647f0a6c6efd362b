"""Which examples form which batch: length buckets, the same on every rank, all from a seed.

A plan is a list of *global* batches, of as many examples each (:class:`BatchPlan`) or of as many
tokens (:class:`TokenPlan`). How many processes and micro-batches share one does not change it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, get_args

import numpy as np

from unislu_llm.data.batch import InputKind
from unislu_llm.data.mixture import Mixture
from unislu_llm.errors import UserError
from unislu_llm.tokenizer import Example

BUCKET = 16  # batches within whose pool examples are sorted by length
Draw = tuple[int, int]  # index of an example, and how often all ranks drew it before in the epoch


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: members that have the same kind of input."""

    kind: InputKind
    members: tuple[Draw, ...]
    counted: bool = True  # False for another rank's member, repeated for company: it weighs nothing


@dataclass(eq=False)
class BatchPlan:
    """Global batches of every epoch; raises UserError: parts that would be empty."""

    lengths: Any  # of each example, in any unit
    batch_size: int  # examples of a global batch
    parts: int = 1  # shares of a global batch: processes times accumulation steps
    seed: int = 0
    mixture: Mixture | None = None  # says which examples an epoch draws; None: every example once
    kinds: Sequence[InputKind] = ()  # kind of input of each example; empty: all are audio
    window: ClassVar[int] = BUCKET  # batches that a mixture arranges among themselves

    def __post_init__(self) -> None:
        drawn = len(self.lengths) if self.mixture is None else self.mixture.size
        if self.batch_size < self.parts:
            raise UserError(f"train.batch_size: {self.batch_size} is smaller than processes x "
                            f"accumulation = {self.parts}; raise it")
        if drawn < self.parts:
            raise UserError(f"{drawn} training examples cannot feed {self.parts} micro-batches a "
                            "step; use fewer processes or a smaller train.accumulation")
        self.lengths = np.asarray(self.lengths, dtype=np.float64)
        self.kinds = self.kinds or ["audio"] * len(self.lengths)

    def steps(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        return sum(len(self._draw(epoch)[0]) for epoch in range(epochs))

    def epoch(self, epoch: int) -> list[list[int]]:
        """Global batches of one epoch in random order, members sorted by length."""
        batches, rng = self._draw(epoch)
        if self.mixture is None:
            rng.shuffle(batches)
        else:  # such that its shares hold at every step
            batches = self.mixture.arrange(batches, self.window, rng)
        return [self._by_length(batch).tolist() for batch in batches]

    def micro_batches(self, epoch: int, rank: int = 0, world: int = 1) -> list[list[MicroBatch]]:
        """The micro-batches of each step for one rank of `world`, which divides the parts. All
        ranks have as many of the same kinds in the same order: under DDP and FSDP each pass runs
        collectives that every process has to take part in."""
        # Counted over the global batches, so that augmentation is the same on any number of ranks.
        times: defaultdict[int, Iterator[int]] = defaultdict(count)
        turns, steps = self.parts // world, []
        for batch in self.epoch(epoch):
            draws = [(i, next(times[i])) for i in batch]
            parts = [[draws[place] for place in part] for part in self._deal(batch)]
            steps.append([micro for turn in range(turns)
                          for micro in self._by_kind(parts[turn::turns], rank)])
        return steps

    def _by_kind(self, parts: list[list[Draw]], rank: int) -> list[MicroBatch]:
        """One rank's micro-batches out of the parts that all ranks take at one time."""
        out = []
        for kind in get_args(InputKind):
            of_kind = [[d for d in part if self.kinds[d[0]] == kind] for part in parts]
            if of_kind[rank]:
                out.append(MicroBatch(kind, tuple(of_kind[rank])))
            elif others := [draw for part in of_kind for draw in part]:
                # The shortest: this pass is run for its company alone.
                least = min(others, key=lambda draw: self.lengths[draw[0]])
                out.append(MicroBatch(kind, (least,), counted=False))
        return out

    def _draw(self, epoch: int) -> tuple[list[np.ndarray], np.random.Generator]:
        """Global batches of an epoch by length, and what their order is drawn from."""
        # Of the epoch alone: one that is resumed needs no generator's state.
        rng = np.random.default_rng((self.seed, epoch))
        order = (rng.permutation(len(self.lengths)) if self.mixture is None
                 else self.mixture.epoch(epoch))
        return self._cut(order), rng

    def _by_length(self, members: np.ndarray) -> np.ndarray:
        # Stable: which of two alike comes first must not depend on the sorting algorithm.
        return members[np.argsort(self.lengths[members], kind="stable")]

    def _pools(self, order: np.ndarray, pool: int) -> list[np.ndarray]:
        """Stretches of an epoch's draw of about `pool` examples, each sorted by length."""
        # A mixture arranges whole pools, so theirs end where a batch ends.
        chunks = (np.array_split(order, max(1, round(len(order) / pool))) if self.mixture is None
                  else np.split(order, range(pool, len(order), pool)))
        return [self._by_length(chunk) for chunk in chunks]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        order = np.concatenate(self._pools(order, self.batch_size * BUCKET))
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        # A rest that cannot give each part an example joins the batch before it.
        if len(batches) > 1 and len(batches[-1]) < self.parts:
            batches[-2:] = [np.concatenate(batches[-2:])]
        return batches

    def _deal(self, batch: list[int]) -> list[np.ndarray]:
        """Places of a global batch's members in each of its parts."""
        return np.array_split(np.arange(len(batch)), self.parts)


class TokenPlan(BatchPlan):
    """Global batches by a budget of tokens: many short examples or few long ones, at equal cost.

    A batch costs its padded size, `examples x most tokens of an example`. A pool is cut into as few
    batches as the budget allows, as equal as they can be, and so are the parts of each. `sizes`
    `(examples, 2)` are speech and text tokens of each, the text with its prompt; only a rest that
    cannot be shared out exceeds the budget `batch_tokens` of a global batch.
    """

    window = sys.maxsize  # an epoch: pools are not all of as many batches

    def __init__(self, sizes: np.ndarray, batch_tokens: int, parts: int = 1, seed: int = 0, *,
                 mixture: Mixture | None = None, kinds: Sequence[InputKind] = ()) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        self.tokens, self.batch_tokens = self.sizes.sum(1), batch_tokens
        # By `2 x speech + text`: speech is padded twice, in the encoder's batch and the decoder's.
        super().__init__(self.tokens + self.sizes[:, 0], parts, parts, seed, mixture=mixture,
                         kinds=kinds)
        if (least := parts * int(self.tokens.max())) > batch_tokens:
            raise UserError(f"train.batch_tokens: {batch_tokens} is too few: {parts} micro-batches "
                            f"a step and at most {least // parts} tokens an example need {least}; "
                            "raise it, or leave long clips out")

    def cost(self, batch: Sequence[int]) -> int:
        """Padded size of a batch in tokens."""
        return len(batch) * int(self.tokens[batch].max())

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        mean = self.batch_tokens / float(self.tokens[order].mean())  # examples a batch
        batches: list[np.ndarray] = []
        # Two lengths are to be alike in a batch, not one: a pool for it is larger.
        for members in self._pools(order, max(round(4 * BUCKET * mean), self.parts)):
            # Cutting at the full budget leaves a small last batch. The least budget that needs no
            # more batches spreads that rest over all of them: steps then weigh alike.
            fewest = len(self._greedy(members, self.batch_tokens))
            least = self.parts * int(self.tokens[members].max())
            batches += self._even(members, fewest, least, self.batch_tokens)
        # A rest of fewer examples than parts joins the batch before it, or shares its examples. The
        # first is none: the budget holds the longest of each part.
        filled: list[np.ndarray] = []
        for batch in batches:
            if filled and len(batch) < self.parts:
                batch = np.concatenate([batch, filled.pop()])
                if len(batch) >= 2 * self.parts:
                    filled.append(batch[self.parts:])
                    batch = batch[:self.parts]
            filled.append(batch)
        return filled

    def _even(self, members: np.ndarray, most: int, low: int, high: int) -> list[np.ndarray]:
        """Sorted examples in at most so many batches by the least budget from `low` to `high`."""
        # By bisection: the larger the budget, the fewer the batches.
        while low < high:
            middle = (low + high) // 2
            fits = len(self._greedy(members, middle)) <= most
            low, high = (low, middle) if fits else (middle + 1, high)
        return self._greedy(members, high)

    def _greedy(self, members: np.ndarray, budget: int) -> list[np.ndarray]:
        """Cut sorted examples into batches of at most `budget`, beginning with the longest."""
        batches: list[np.ndarray] = []
        stop = len(members)
        while stop:
            tokens = self.tokens[members[max(0, stop - budget):stop]][::-1]
            # Cost of a batch of the 1, 2, 3, ... longest examples that are left; it only grows.
            cost = np.maximum.accumulate(tokens) * np.arange(1, len(tokens) + 1)
            n = max(1, int(np.searchsorted(cost, budget, side="right")))
            batches.append(members[stop - n:stop])
            stop -= n
        return batches

    def _deal(self, batch: list[int]) -> list[np.ndarray]:
        """Contiguous stretches of least greatest cost, none empty."""
        longest = int(self.tokens[batch].max())
        parts = self._even(np.asarray(batch), self.parts, longest, self.cost(batch))
        # It may need fewer; no part may be empty, so the largest are halved.
        counts = [len(part) for part in parts][::-1]
        while len(counts) < self.parts:
            widest = counts.index(max(counts))
            half = counts[widest] // 2
            counts[widest:widest + 1] = [half, counts[widest] - half]
        return np.split(np.arange(len(batch)), np.cumsum(counts)[:-1])


def sorted_batches(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: what does not fit fails at once."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].utterance.seconds)
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
