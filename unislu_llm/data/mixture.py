"""Corpora mixed by weight or by temperature: which samples an epoch draws, in what order, and in what shares.

Natural mixing draws every sample once an epoch, so that a large corpus drowns a small one. Weights say the share of each
corpus; a temperature T draws a corpus of n samples in proportion to `n ** (1 / T)` (as multilingual BERT and mT5 mix
languages): 1 is natural, larger ones raise small corpora, infinity makes all equal. The unit is the sample: an utterance
with two annotated tasks is two.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.tasks import ASR

_WALK, _INTERLEAVE = 101, 102  # last word of a seed, so that no two kinds of draw share one
_SPLITS = ("train", "dev", "devel", "test", "valid", "validation", "fine-tune", "all")


def manifest_name(path: str | Path) -> str:
    """Name of a corpus whose rows name none: the stem of its manifest, or, where that only names a split, its folder's."""
    path = Path(path)
    return path.resolve().parent.name if path.stem in _SPLITS else path.stem


def corpus_of(sample: Sample) -> str:
    """Name of a sample's corpus: what its row says, else what its manifest is called."""
    name = sample.utterance.corpus
    return name if name != "default" else _stem(sample) or name


def _stem(sample: Sample) -> str:
    return manifest_name(sample.utterance.source.rpartition(":")[0])


def group_samples(samples: Sequence[Sample], weights: Mapping[str, float] | None = None) -> list[str]:
    """Name of the group in which each sample is drawn: its corpus, or the key of `weights` that it falls under.

    Args:
        samples: training samples.
        weights: by corpus or by manifest (:func:`manifest_name`).

    Raises:
        UserError: a name that no corpus and no manifest has (the nearest known one is named), a corpus without weight, or
            samples that fall under two names.
    """
    if not weights:
        return [corpus_of(sample) for sample in samples]
    known = {name: None for sample in samples for name in (corpus_of(sample), _stem(sample)) if name}
    for name in weights:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"data.weights: no corpus or manifest is called '{name}'{hint or ';'} known: {', '.join(known)}")
    groups = []
    for sample in samples:
        found = [name for name in dict.fromkeys((corpus_of(sample), _stem(sample))) if name in weights]
        if len(found) > 1:
            raise UserError(f"data.weights: '{found[0]}' and '{found[1]}' both name samples of {sample.utterance.source}; "
                            "name the corpus or the manifest, not both")
        groups += found or [corpus_of(sample)]
    missing = [name for name in dict.fromkeys(groups) if name not in weights]
    if missing:
        raise UserError(f"data.weights: no weight for {', '.join(missing)}; give every corpus one (0 leaves it out)")
    return groups


def target_shares(sizes: Mapping[str, int], weights: Mapping[str, float] | None = None,
                  temperature: float = 1.0) -> dict[str, float]:
    """Share of the drawn samples that each group is to have; they add up to 1.

    Args:
        sizes: samples of each group. weights: relative, of every group; they override the temperature.
        temperature: groups are drawn in proportion to size ** (1 / temperature).

    Raises:
        UserError: a weight or the temperature is not a usable number.
    """
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise UserError(f"data.temperature: must be more than 0, found {temperature!r}; 1 is natural mixing")
    for name, weight in (weights or {}).items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise UserError(f"data.weights.{name}: must be a number from 0 up, found {weight!r}")
    raw = {name: float(weights[name]) if weights else n ** (1 / temperature) for name, n in sizes.items()}
    total = sum(raw.values())
    if total <= 0:
        raise UserError("data.weights: all weights are 0; give at least one corpus a share")
    return {name: value / total for name, value in raw.items()}


class Mixture:
    """Which samples each epoch draws.

    Every corpus is walked along permutations of its own, one after another: no sample comes again before all the others of
    its corpus have come, and the next epoch goes on where this one stopped. Where the walk stands follows from the epoch's
    number, so that there is no state to save.

    Args:
        groups: group of each sample, by name.
        shares: of each group, adding up to 1; default: natural.
        epoch_samples: samples an epoch draws; 0: as many as the groups with a share have.
        seed: of the permutations.

    Raises:
        UserError: `epoch_samples` is negative.
    """

    def __init__(self, groups: Sequence[str], shares: Mapping[str, float] | None = None, epoch_samples: int = 0,
                 seed: int = 0) -> None:
        sizes = Counter(groups)
        self.names = list(sizes)
        asked = shares if shares is not None else target_shares(sizes)
        if epoch_samples < 0:
            raise UserError(f"data.epoch_samples: must be 0 (natural) or more, found {epoch_samples}")
        code = {name: i for i, name in enumerate(self.names)}
        self.groups = np.array([code[name] for name in groups], dtype=np.int64)
        self.shares = np.array([asked[name] for name in self.names], dtype=np.float64)
        self.members = [np.flatnonzero(self.groups == i) for i in range(len(self.names))]
        self.epoch_samples = epoch_samples or sum(n for name, n in sizes.items() if asked[name] > 0)
        self.seed = seed
        self._taken = [np.zeros(len(self.names), dtype=np.int64)]  # before each epoch; a cache, grown on demand

    def __len__(self) -> int:
        """Samples an epoch."""
        return self.epoch_samples

    def counts(self, epoch: int) -> np.ndarray:
        """Samples of each group in one epoch, `(groups,)`; what rounding leaves out, later epochs make good."""
        self._grow(epoch + 1)
        return self._taken[epoch + 1] - self._taken[epoch]

    def _grow(self, epochs: int) -> None:
        while len(self._taken) <= epochs:
            taken = self._taken[-1]
            due = self.shares * (len(self._taken) * self.epoch_samples) - taken
            new = np.floor(np.maximum(due, 0.0) + 1e-9).astype(np.int64)
            while (rest := self.epoch_samples - int(new.sum())) != 0:
                behind = np.where(self.shares > 0, due - new, -np.inf) if rest > 0 else np.where(new > 0, new - due, -np.inf)
                new[int(behind.argmax())] += 1 if rest > 0 else -1
            self._taken.append(taken + new)

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample indices of one epoch, `(epoch_samples,)`; every stretch of it has the shares asked for, to a sample or two."""
        counts = self.counts(epoch)
        rng = np.random.default_rng((self.seed, epoch, _INTERLEAVE))
        drawn = [self._walk(group, int(self._taken[epoch][group]), int(n)) for group, n in enumerate(counts)]
        places = [(np.arange(n) + rng.random(n)) / max(n, 1) for n in counts]
        return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]

    def _walk(self, group: int, start: int, n: int) -> np.ndarray:
        """Steps `start` to `start + n` of a group's endless walk."""
        members = self.members[group]
        if not n:
            return members[:0]
        first, last = start // len(members), (start + n - 1) // len(members)
        name = zlib.crc32(self.names[group].encode())  # a walk does not depend on which other corpora there are
        passes = [np.random.default_rng((self.seed, name, turn, _WALK)).permutation(members) for turn in range(first, last + 1)]
        skip = start - first * len(members)
        return np.concatenate(passes)[skip: skip + n]

    def arrange(self, batches: Sequence[np.ndarray], window: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Shuffle batches inside windows so that the shares hold at every step, not only at the end.

        Batches of like length are often of one corpus. The order is random as long as no corpus is half a batch ahead or
        behind; then the batch comes that restores the balance best.

        Args:
            batches: of sample indices. window: batches that are shuffled among themselves.
        """
        counts = np.stack([np.bincount(self.groups[batch], minlength=len(self.names)) for batch in batches])
        excess = counts - counts.sum(1, keepdims=True) * self.shares
        bound = max(1.0, counts.sum() / len(batches) / 2)
        ahead = np.zeros(len(self.names))
        arranged: list[np.ndarray] = []
        for first in range(0, len(batches), max(1, window)):
            left = rng.permutation(np.arange(first, min(first + max(1, window), len(batches)))).tolist()
            while left:
                after = np.abs(ahead + excess[left]).max(1)
                fitting = np.flatnonzero(after <= bound)
                pick = left.pop(int(fitting[0]) if len(fitting) else int(after.argmin()))
                ahead += excess[pick]
                arranged.append(batches[pick])
        return arranged


class Tally:
    """Shares of what a run has drawn so far, by corpus and by task.

    Args:
        mixture: names the corpus of each sample. samples: what its indices mean.
    """

    def __init__(self, mixture: Mixture, samples: Sequence[Sample]) -> None:
        self.mixture = mixture
        names = [sample.task or ASR for sample in samples]
        self.tasks = list(dict.fromkeys(names))
        self._task = np.array([self.tasks.index(name) for name in names], dtype=np.int64)
        self._drawn = np.zeros((len(mixture.names), len(self.tasks)), dtype=np.int64)

    def add(self, indices: Iterable[int]) -> None:
        """Count samples as drawn."""
        self._drawn += self._count(indices)

    def shares(self, indices: Iterable[int] | None = None) -> dict[str, float]:
        """`share_corpus_<name>` and `share_task_<name>`, each kind adding up to 1.

        Args:
            indices: of these samples; default: of all that were counted so far.
        """
        drawn = self._drawn if indices is None else self._count(indices)
        total = max(1, int(drawn.sum()))
        by_corpus = zip(self.mixture.names, drawn.sum(1).tolist(), strict=True)
        by_task = zip(self.tasks, drawn.sum(0).tolist(), strict=True)
        return {**{f"share_corpus_{name}": n / total for name, n in by_corpus},
                **{f"share_task_{name}": n / total for name, n in by_task}}

    def _count(self, indices: Iterable[int]) -> np.ndarray:
        drawn = np.fromiter(indices, dtype=np.int64)
        counts = np.zeros_like(self._drawn)
        np.add.at(counts, (self.mixture.groups[drawn], self._task[drawn]), 1)
        return counts


def describe_mixture(mixture: Mixture, samples: Sequence[Sample]) -> str:
    """What an epoch will hold: samples, share and passes of each corpus, and the share of each task."""
    tasks = np.array([sample.task or ASR for sample in samples])
    width = max(12, *(len(name) for name in mixture.names))
    lines = [f"mixture: {len(mixture.names)} corpora, {len(mixture)} samples an epoch",
             f"  {'corpus':<{width}} {'samples':>9} {'share':>8} {'passes an epoch':>16}  tasks"]
    by_task = dict.fromkeys(tasks.tolist(), 0.0)
    for name, members, share in zip(mixture.names, mixture.members, mixture.shares.tolist(), strict=True):
        inside = Counter(tasks[members].tolist())
        for task, n in inside.items():
            by_task[task] += share * n / len(members)
        listed = ", ".join(f"{n} {task}" for task, n in inside.items())
        passes = share * len(mixture) / len(members)
        lines.append(f"  {name:<{width}} {len(members):>9} {100 * share:>6.1f} % {passes:>16.2f}  {listed}")
    lines.append("  by task: " + ", ".join(f"{task} {100 * share:.1f} %" for task, share in by_task.items()))
    return "\n".join(lines)
