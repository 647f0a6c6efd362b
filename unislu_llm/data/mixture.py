"""Corpora mixed by weight or by temperature: which examples an epoch draws, and in what shares.

A temperature T draws a corpus of n examples in proportion to `n ** (1 / T)` (as multilingual BERT
and mT5 mix languages): 1 is natural, infinity makes all equal.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unislu_llm.config import DataConfig
from unislu_llm.data.manifest import manifest_name
from unislu_llm.errors import UserError, hint
from unislu_llm.tokenizer import Example

_WALK, _INTERLEAVE = 101, 102  # last number of a seed, so that no two kinds of draw share one


class Mixture:
    """Which examples each epoch draws.

    Every corpus is walked along permutations of its own, one after another, and the next epoch goes
    on where this one stopped. Where it stands follows from the epoch's number: no state to save.
    `shares` of the groups add up to 1; `epoch_samples` are what an epoch draws, 0: as many examples
    as the groups with a share have.
    """

    def __init__(self, groups: Sequence[str], shares: Mapping[str, float],
                 epoch_samples: int = 0, seed: int = 0) -> None:
        self.names, self.seed = list(dict.fromkeys(groups)), seed
        self.groups = np.array([self.names.index(name) for name in groups], dtype=np.int64)
        self.shares = np.array([shares[name] for name in self.names], dtype=np.float64)
        self.members = [np.flatnonzero(self.groups == i) for i in range(len(self.names))]
        self.size = epoch_samples or sum(shares[name] > 0 for name in groups)
        # Examples of each group before each epoch: it follows from the above, and is remembered.
        self._taken = [np.zeros(len(self.names), dtype=np.int64)]

    def __str__(self) -> str:
        """A line a corpus: a small one with a large share is passed over often."""
        return "\n".join([f"mixture: {self.size} samples an epoch", *(
            f"  {name:<16} {100 * share:5.1f} %  {share * self.size / len(members):.2f} passes"
            for name, share, members in zip(self.names, self.shares, self.members, strict=True))])

    def _counts(self, epoch: int) -> np.ndarray:
        """Examples of each group in one epoch, `(groups,)`."""
        # Shares rarely give whole numbers. What is due by the end of an epoch less what was taken
        # before it is rounded down, and the rest goes to the groups that are furthest behind: so
        # what rounding leaves out, later epochs make good.
        while len(self._taken) <= epoch + 1:
            taken = self._taken[-1]
            due = self.shares * (len(self._taken) * self.size) - taken
            # What is due is a whole number at times, and floats fall just short of it.
            new = np.floor(np.maximum(due, 0.0) + 1e-9).astype(np.int64)
            while (rest := self.size - int(new.sum())) != 0:
                behind = (np.where(self.shares > 0, due - new, -np.inf) if rest > 0
                          else np.where(new > 0, new - due, -np.inf))
                new[int(behind.argmax())] += 1 if rest > 0 else -1
            self._taken.append(taken + new)
        return self._taken[epoch + 1] - self._taken[epoch]

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices `(size,)` of one epoch; every stretch of it has the shares asked for."""
        counts = self._counts(epoch)
        rng = np.random.default_rng((self.seed, epoch, _INTERLEAVE))
        drawn = [self._walk(group, int(self._taken[epoch][group]), int(n))
                 for group, n in enumerate(counts)]
        # Members of a group are spread over [0, 1) evenly, each at random inside its own slot.
        places = [(np.arange(n) + rng.random(n)) / max(n, 1) for n in counts]
        return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]

    def _walk(self, group: int, start: int, n: int) -> np.ndarray:
        """Steps `start` to `start + n` of a group's endless walk."""
        members = self.members[group]
        first, last = start // len(members), (start + max(n, 1) - 1) // len(members)
        # Seeded by name: a walk does not depend on which other corpora there are.
        name = zlib.crc32(self.names[group].encode())
        passes = [np.random.default_rng((self.seed, name, turn, _WALK)).permutation(members)
                  for turn in range(first, last + 1)]
        return np.concatenate(passes)[start - first * len(members):][:n]

    def arrange(self, batches: Sequence[np.ndarray], window: int,
                rng: np.random.Generator) -> list[np.ndarray]:
        """Shuffle batches inside windows of so many so that the shares hold at every step."""
        # Batches of like length are often of one corpus. The order is random as long as no corpus
        # is half a batch ahead or behind; then the batch comes that restores the balance best.
        counts = np.stack([np.bincount(self.groups[batch], minlength=len(self.names))
                           for batch in batches])
        # By how much each batch takes a corpus further than its share.
        excess = counts - counts.sum(1, keepdims=True) * self.shares
        bound = max(1.0, counts.sum() / len(batches) / 2)
        ahead = np.zeros(len(self.names))
        arranged: list[np.ndarray] = []
        for first in range(0, len(batches), window):
            left = rng.permutation(np.arange(first, min(first + window, len(batches)))).tolist()
            while left:
                after = np.abs(ahead + excess[left]).max(1)
                fitting = np.flatnonzero(after <= bound)
                pick = left.pop(int(fitting[0]) if len(fitting) else int(after.argmin()))
                ahead += excess[pick]
                arranged.append(batches[pick])
        return arranged


def build_mixture(data: DataConfig, examples: Sequence[Example], seed: int) -> Mixture | None:
    """How a run mixes its corpora, if it does; raises UserError: weights that do not fit them."""
    if not data.weights and data.temperature == 1 and not data.epoch_samples:
        return None
    # An example is called by its row's corpus, else its manifest; and by its manifest.
    pairs = [(e.utterance.corpus, manifest_name(e.utterance.source.rpartition(":")[0]))
             for e in examples]
    names = [(manifest,) if corpus == "default" and manifest else (corpus, manifest)
             for corpus, manifest in pairs]
    # It is drawn with its corpus, or with what the weights name.
    groups = [next((n for n in own if n in data.weights), own[0]) for own in names]
    known = list(dict.fromkeys(name for own in names for name in own if name))
    if unused := [name for name in data.weights if name not in groups]:
        near = hint(unused[0], [other for other in known if other != unused[0]])
        raise UserError(f"data.weights: '{unused[0]}' is no corpus or manifest, or all of its "
                        f"examples have another weight{near}; known: {', '.join(known)}")
    raw = data.weights or {n: c ** (1 / data.temperature) for n, c in Counter(groups).items()}
    # A corpus that was forgotten must not be left out in silence.
    if missing := [name for name in dict.fromkeys(groups) if name not in raw]:
        raise UserError(f"data.weights: no weight for {', '.join(missing)}; give every corpus one "
                        "(0 leaves it out)")
    shares = {name: value / sum(raw.values()) for name, value in raw.items()}
    return Mixture(groups, shares, data.epoch_samples, seed)
