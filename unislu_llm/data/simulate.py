"""Posteriors of a CTC projector, simulated from text, so that text without audio trains a speech model.

What CTC makes of speech is near-text: each token holds a frame or two, blanks lie between, some tokens are replaced by confusable
ones, lost or invented, and each frame has some mass beside its best token. A simulation draws all of that at chosen rates; rates
are fitted on what a projector makes of real speech (TASU, arXiv 2511.03310; TASU2, arXiv 2604.08384).

Everything here is in classes of the CTC vocabulary: 0 is blank, token i of the vocabulary is i + 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from unislu_llm.errors import UserError

BLANK = 0
_FLOOR = 1e-8  # posterior of a class that nothing speaks for


@dataclass(frozen=True)
class SimulationOptions:
    """Rates of a simulation; :func:`fit_simulation` measures them.

    Args:
        substitutions, deletions: share of the text's tokens replaced or lost. insertions: tokens invented, per token of the text.
        burst: chance that the token after a lost one is lost too (words go as a whole); below `deletions` it is that.
        repeat: chance that a token holds one frame more, again and again.
        blanks: mean number of blank frames between tokens.
        peak, peak_spread: mean and standard deviation of the logit of a frame's best posterior (2.2 is 0.9).
        confusions: for a class, the classes heard in its place with their counts. Classes without any use all tokens alike.

    Raises:
        UserError: a rate out of range.
    """

    substitutions: float = 0.1
    deletions: float = 0.05
    insertions: float = 0.03
    burst: float = 0.0
    repeat: float = 0.2
    blanks: float = 3.0
    peak: float = 2.2
    peak_spread: float = 1.5
    confusions: Mapping[int, Mapping[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("substitutions", "deletions", "insertions", "burst", "repeat"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"simulation: {name}={getattr(self, name)} must be in [0, 1)")
        if self.substitutions + self.deletions > 1 or self.blanks < 0 or self.peak_spread < 0:
            raise UserError("simulation: substitutions and deletions must not exceed 1 together, and blanks and peak_spread "
                            "not be negative")

    def at_error_rate(self, rate: float) -> SimulationOptions:
        """The same mix of errors, confusions and frames at another token error rate.

        Raises:
            UserError: not in [0, 1), or these options have no errors to scale.
        """
        total = self.substitutions + self.deletions + self.insertions
        if not 0 <= rate < 1 or (rate and not total):
            raise UserError(f"simulation: cannot scale an error rate of {total:g} to {rate:g}")
        scale = rate / total if total else 0.0
        return replace(self, substitutions=self.substitutions * scale, deletions=self.deletions * scale,
                       insertions=self.insertions * scale)

    def expected_frames(self, tokens: int) -> float:
        """Mean number of frames of a text of so many tokens."""
        heard = tokens * (1 - self.deletions + self.insertions)
        return heard / (1 - self.repeat) + (heard + 1) * self.blanks


@dataclass(frozen=True)
class SparsePosteriors:
    """Posteriors of which each frame has but a few, `(T, 3)` each: a class may come twice, its shares add up.

    Args:
        classes: int64. shares: fp32.
    """

    classes: Tensor
    shares: Tensor

    def __len__(self) -> int:
        return len(self.shares)

    def log_posteriors(self, size: int) -> Tensor:
        """Dense and normalised, `(T, 1 + size)`."""
        return densify(self.classes, self.shares, size)


def densify(classes: Tensor, shares: Tensor, size: int) -> Tensor:
    """Log-posteriors `(..., T, 1 + size)` of sparse ones `(..., T, n)`; what nothing speaks for has a floor."""
    posterior = shares.new_full((*shares.shape[:-1], size + 1), _FLOOR).scatter_add(-1, classes, shares)
    return (posterior / posterior.sum(-1, keepdim=True)).log()


def simulate(classes: Sequence[int], size: int, options: SimulationOptions, generator: torch.Generator) -> Tensor:
    """:func:`simulate_sparse` as log-posteriors `(T, 1 + size)`."""
    return simulate_sparse(classes, size, options, generator).log_posteriors(size)


def simulate_sparse(classes: Sequence[int], size: int, options: SimulationOptions,
                    generator: torch.Generator) -> SparsePosteriors:
    """Posteriors, at least one frame, of a text as a CTC projector might hear it.

    Args:
        classes: the text, 1 .. size. size: of the vocabulary, without blank. generator: on the CPU; the result follows from it.
    """
    frames: list[tuple[int, int]] = []  # best class, and its closest rival
    before = BLANK
    for heard, meant in _errors(classes, size, options, generator):
        gap = _geometric(options.blanks / (1 + options.blanks), generator)
        frames += [(BLANK, heard)] * max(gap, int(heard == before))  # equal neighbours need one
        rival = meant if meant != heard else _confused(heard, size, options, generator)
        frames += [(heard, rival)] * (1 + _geometric(options.repeat, generator))
        before = heard
    frames += [(BLANK, before)] * max(_geometric(options.blanks / (1 + options.blanks), generator), int(not frames))
    best = torch.tensor([top for top, _ in frames])
    other = torch.tensor([second for _, second in frames])
    peak = (options.peak + options.peak_spread * torch.randn(len(frames), generator=generator)).sigmoid()
    peak = peak.clamp(0.5 + 1e-3, 1 - 1e-6)  # the best class stays the best
    rest = (1 - peak) * torch.rand(len(frames), generator=generator)
    # What is left is blank's beside a token: doubt between tokens and doubt whether there is one.
    blank = torch.full_like(best, BLANK)
    return SparsePosteriors(torch.stack([best, other, blank], -1), torch.stack([peak, rest, 1 - peak - rest], -1))


def _errors(classes: Sequence[int], size: int, options: SimulationOptions, generator: torch.Generator) -> list[tuple[int, int]]:
    """Pairs (class heard, class meant; the same for an invented one)."""
    heard: list[tuple[int, int]] = []
    again = max(options.burst, options.deletions)
    start = options.deletions * (1 - again) / (1 - options.deletions)  # so that the share of lost tokens stays `deletions`
    replaced = options.substitutions / (1 - options.deletions)
    lost = False
    drawn = torch.rand(len(classes), 3, generator=generator).tolist()
    for i, (c, (gone, fate, extra)) in enumerate(zip(classes, drawn, strict=True)):
        lost = gone < (options.deletions if not i else again if lost else start)
        if not lost:
            heard.append((_confused(c, size, options, generator) if fate < replaced else c, c))
        if extra < options.insertions:
            invented = _confused(BLANK, size, options, generator)
            heard.append((invented, invented))
    return heard


def _confused(c: int, size: int, options: SimulationOptions, generator: torch.Generator) -> int:
    """A class heard in the place of `c` (of nothing, for blank); never `c` itself unless there is no other."""
    table = options.confusions.get(c)
    if table:
        weights = torch.tensor(list(table.values()), dtype=torch.float)
        return list(table)[int(torch.multinomial(weights, 1, generator=generator))]
    if size == 1:
        return 1
    drawn = 1 + int(torch.randint(size if c == BLANK else size - 1, (), generator=generator))
    return drawn if c == BLANK or drawn < c else drawn + 1


def _geometric(chance: float, generator: torch.Generator) -> int:
    """How often a chance comes true before it does not."""
    if chance <= 0:
        return 0
    return int(math.log(max(1e-12, 1 - float(torch.rand((), generator=generator)))) / math.log(chance))


class Edit(NamedTuple):
    """One step of an alignment: a class of the reference, or blank for an insertion, and of the hypothesis, or blank."""

    ref: int
    hyp: int


def align(ref: Sequence[int], hyp: Sequence[int]) -> list[Edit]:
    """Cheapest alignment (Levenshtein) of two label sequences; substitutions are preferred where costs are equal."""
    cost = [[i + j if not i or not j else 0 for j in range(len(hyp) + 1)] for i in range(len(ref) + 1)]
    for i, r in enumerate(ref, 1):
        for j, h in enumerate(hyp, 1):
            cost[i][j] = min(cost[i - 1][j - 1] + (r != h), cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    i, j, edits = len(ref), len(hyp), []
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (ref[i - 1] != hyp[j - 1]):
            i, j = i - 1, j - 1
            edits.append(Edit(ref[i], hyp[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            edits.append(Edit(ref[i], BLANK))
        else:
            j -= 1
            edits.append(Edit(BLANK, hyp[j]))
    return edits[::-1]


def fit_simulation(references: Sequence[Sequence[int]], log_posteriors: Sequence[Tensor]) -> SimulationOptions:
    """Rates that make simulated posteriors like real ones, measured on clips that the projector was not trained on.

    Args:
        references: classes of each transcript. log_posteriors: `(T, 1 + V)` of each clip.

    Raises:
        UserError: no clips, or no tokens in them.
    """
    n_ref = sum(map(len, references))
    if not n_ref:
        raise UserError("no reference tokens to fit a simulation on")
    kinds: Counter[str] = Counter()
    confusions: dict[int, Counter[int]] = {}
    peaks: list[Tensor] = []
    frames = labels = blanks = lost = lost_again = 0
    for ref, log_posterior in zip(references, log_posteriors, strict=True):
        top, best = log_posterior.max(-1)
        path = torch.unique_consecutive(best)
        hyp = [int(c) for c in path if c != BLANK]
        frames, labels, blanks = frames + int((best != BLANK).sum()), labels + len(hyp), blanks + int((best == BLANK).sum())
        peaks.append(top[best != BLANK].exp().clamp(1e-6, 1 - 1e-6).logit())
        edits = align(ref, hyp)
        gone = [e.hyp == BLANK for e in edits if e.ref != BLANK]
        lost, lost_again = lost + sum(gone[:-1]), lost_again + sum(a and b for a, b in pairwise(gone))
        for edit in edits:
            if edit.ref != edit.hyp:
                kinds["insertions" if edit.ref == BLANK else "deletions" if edit.hyp == BLANK else "substitutions"] += 1
                if edit.hyp != BLANK:
                    confusions.setdefault(edit.ref, Counter())[edit.hyp] += 1
    peak = torch.cat(peaks) if peaks else torch.zeros(0)
    substitutions, deletions = kinds["substitutions"] / n_ref, kinds["deletions"] / n_ref
    return SimulationOptions(
        substitutions=min(substitutions, 0.99), deletions=min(deletions, 1 - substitutions, 0.99),
        insertions=min(kinds["insertions"] / n_ref, 0.99),
        burst=min(lost_again / max(lost, 1), 0.99), repeat=1 - labels / frames if frames else 0.0,
        blanks=blanks / max(labels + len(references), 1),
        peak=float(peak.mean()) if len(peak) else 0.0, peak_spread=float(peak.std()) if len(peak) > 1 else 0.0,
        confusions={c: dict(table) for c, table in confusions.items()})
