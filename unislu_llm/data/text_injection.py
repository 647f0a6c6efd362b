"""Text injection: posteriors of a CTC projector, simulated from text, so that text without audio
trains a speech model (TASU, arXiv 2511.03310; TASU2, arXiv 2604.08384).

Each token holds a frame or two, blanks lie between, some tokens are replaced by confusable ones,
lost or invented, and each frame has some mass beside its best token, at rates fitted on what a
projector makes of real speech. All is in classes of the CTC vocabulary: 0 is blank, token i is
class i + 1.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rapidfuzz.distance import Levenshtein
from torch import Generator, Tensor

from unislu_llm.data.augment import Key
from unislu_llm.errors import UserError, dotted, explain
from unislu_llm.io import RATES_FILE, write_saved
from unislu_llm.tokenizer import Example

BLANK = 0
_FLOOR = 1e-8  # posterior of a class that nothing speaks for
_INJECT = 208  # last number of a seed, beside those of augment.py

Chance = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SimulationRates(BaseModel):
    """Rates of a simulation; :meth:`fit` measures them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    substitutions: Chance = 0.1  # share of the text's tokens
    deletions: Chance = 0.05  # share of the text's tokens
    insertions: Chance = 0.03  # tokens invented per token
    burst: Chance = 0.0  # that the token after a lost one is lost too: words go as a whole
    repeat: Chance = 0.2  # that a token holds one frame more, again and again
    blanks: Amount = 3.0  # mean number of blank frames between tokens
    # Mean and standard deviation of the logit of a token frame's best posterior.
    peak: Annotated[float, Field(allow_inf_nan=False)] = 2.2
    peak_spread: Amount = 1.5
    # For a class, the classes found in its place with their counts; without any, all alike.
    confusions: dict[int, dict[int, int]] = {}

    def override(self, options: Mapping[str, Any]) -> SimulationRates:
        """These rates with `data.text_injection` laid over; raises UserError: a wrong option."""
        try:
            rates = _Options.model_validate(self.model_dump() | dict(options)).model_dump()
        except ValidationError as error:
            raise explain(error, _Options,
                          lambda place: dotted(("data.text_injection", *place))) from None
        if (rate := rates.pop("error_rate")) is not None:
            errors = {kind: rates[kind] for kind in ("substitutions", "deletions", "insertions")}
            scale = rate / (sum(errors.values()) or 1.0)
            rates |= {kind: value * scale for kind, value in errors.items()}
        return SimulationRates.model_validate(rates)

    def save(self, folder: Path) -> None:
        write_saved(folder / RATES_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> SimulationRates:
        """What :meth:`save` wrote; raises UserError: it is damaged."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as rates of a simulation: {error}; run the "
                            "ctc stage again") from error

    @classmethod
    def fit(cls, references: Sequence[Sequence[int]],
            log_posteriors: Sequence[Tensor]) -> SimulationRates:
        """Rates that make simulated posteriors like those `(T_ctc, 1 + V)` of real clips.
        `references` are classes of their transcripts; the projector must not have trained on
        them."""
        n_ref = sum(map(len, references))
        if not n_ref:
            raise UserError("no reference tokens to fit a simulation on")
        kinds, peaks = Counter[str](), list[Tensor]()
        confusions: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for ref, log_posterior in zip(references, log_posteriors, strict=True):
            top, best = log_posterior.max(-1)
            hyp = [int(c) for c in torch.unique_consecutive(best) if c != BLANK]
            # Of token frames alone: blanks are surer than any token.
            peaks.append(top[best != BLANK].exp().clamp(1e-6, 1 - 1e-6).logit())
            kinds.update(frames=len(peaks[-1]), labels=len(hyp), blanks=len(best) - len(peaks[-1]))
            lost = set()
            for edit in Levenshtein.editops(ref, hyp):
                kinds[edit.tag] += 1
                if edit.tag == "delete":
                    lost.add(edit.src_pos)
                else:  # something was found: in the place of a token, or of none
                    meant = ref[edit.src_pos] if edit.tag == "replace" else BLANK
                    confusions[meant][hyp[edit.dest_pos]] += 1
            # The last token has none after it that could be lost too.
            kinds.update(lost=len(lost - {len(ref) - 1}), again=sum(i + 1 in lost for i in lost))
        peak, replaced = torch.cat(peaks), kinds["replace"] / n_ref
        # A chance of 1 would never end, hence the 0.99.
        return cls(
            substitutions=min(replaced, 0.99),
            deletions=min(kinds["delete"] / n_ref, 1 - replaced, 0.99),
            insertions=min(kinds["insert"] / n_ref, 0.99),
            burst=min(kinds["again"] / max(kinds["lost"], 1), 0.99),
            repeat=1 - kinds["labels"] / kinds["frames"] if kinds["frames"] else 0.0,
            blanks=kinds["blanks"] / max(kinds["labels"] + len(references), 1),
            peak=float(peak.mean()) if len(peak) else 0.0,
            peak_spread=float(peak.std()) if len(peak) > 1 else 0.0,
            confusions={c: dict(table) for c, table in confusions.items()})


class _Options(SimulationRates):  # what `data.text_injection` may set
    error_rate: Chance | None = None  # of tokens; the three kinds of errors are scaled to it


class SparsePosteriors(NamedTuple):
    """Posteriors of which each frame has but a few: a class may come twice, its shares add up."""

    classes: Tensor  # (T_ctc, 3) int64
    shares: Tensor  # (T_ctc, 3) fp32


def densify(classes: Tensor, shares: Tensor, size: int) -> Tensor:
    """Log-posteriors `(..., T, 1 + size)` of sparse ones `(..., T, n)`; they have a floor."""
    posterior = shares.new_full((*shares.shape[:-1], size + 1), _FLOOR)
    posterior = posterior.scatter_add(-1, classes, shares)
    return (posterior / posterior.sum(-1, keepdim=True)).log()


def simulate(classes: Sequence[int], size: int, rates: SimulationRates,
             generator: Generator) -> SparsePosteriors:
    """Posteriors, at least one frame, of a text as a CTC projector might recognise it."""
    # The mean of a geometric number with chance p is p / (1 - p); blanks are to have theirs.
    blank_again = rates.blanks / (1 + rates.blanks)
    frames: list[tuple[int, int]] = []  # best class, and its closest rival
    before = BLANK
    for found, meant in _errors(classes, size, rates, generator):
        gap = _geometric(blank_again, generator)
        frames += [(BLANK, found)] * max(gap, int(found == before))  # equal neighbours need one
        rival = meant if meant != found else _confused(found, size, rates, generator)
        frames += [(found, rival)] * (1 + _geometric(rates.repeat, generator))
        before = found
    # At the end as between tokens; an empty text is one blank frame at least.
    tail = _geometric(blank_again, generator)
    frames += [(BLANK, before)] * max(tail, int(not frames))
    best, other = torch.tensor(frames).unbind(-1)
    noise = torch.randn(len(frames), generator=generator)
    # Above one half, so that the best class stays the best.
    peak = (rates.peak + rates.peak_spread * noise).sigmoid().clamp(0.5 + 1e-3, 1 - 1e-6)
    rest = (1 - peak) * torch.rand(len(frames), generator=generator)
    # What is left is blank's beside a token: doubt between tokens, and whether there is one.
    return SparsePosteriors(torch.stack([best, other, torch.full_like(best, BLANK)], -1),
                            torch.stack([peak, rest, 1 - peak - rest], -1))


def _errors(classes: Sequence[int], size: int, rates: SimulationRates,
            generator: Generator) -> list[tuple[int, int]]:
    """Pairs (class found, class meant; the same for an invented one)."""
    found: list[tuple[int, int]] = []
    # Deletions are a chain of two states: in a burst the next token is lost with chance `again`,
    # outside with `start`. The share d of lost tokens stays as it is where d (1 - again), those
    # that leave the burst, equals (1 - d) start, those that enter it.
    again = max(rates.burst, rates.deletions)
    start = rates.deletions * (1 - again) / (1 - rates.deletions)
    replaced = rates.substitutions / (1 - rates.deletions)
    lost = False
    drawn = torch.rand(len(classes), 3, generator=generator).tolist()
    for i, (c, (gone, fate, extra)) in enumerate(zip(classes, drawn, strict=True)):
        lost = gone < (rates.deletions if not i else again if lost else start)
        if not lost:
            found.append((_confused(c, size, rates, generator) if fate < replaced else c, c))
        if extra < rates.insertions:
            invented = _confused(BLANK, size, rates, generator)
            found.append((invented, invented))
    return found


def _confused(c: int, size: int, rates: SimulationRates, generator: Generator) -> int:
    """A class found in the place of `c`, or of nothing; never `c` unless there is no other."""
    if table := rates.confusions.get(c):
        weights = torch.tensor(list(table.values()), dtype=torch.float)
        return list(table)[int(torch.multinomial(weights, 1, generator=generator))]
    if size == 1:
        return 1
    drawn = 1 + int(torch.randint(size if c == BLANK else size - 1, (), generator=generator))
    return drawn if c == BLANK or drawn < c else drawn + 1


def _geometric(chance: float, generator: Generator) -> int:
    """How often a chance comes true before it does not."""
    if chance <= 0:
        return 0
    drawn = 1 - float(torch.rand((), generator=generator))
    return int(math.log(max(1e-12, drawn)) / math.log(chance))


@dataclass(frozen=True)
class TextInjector:
    """Posteriors of examples without audio."""

    rates: SimulationRates
    classes: Callable[[str], Sequence[int]]  # of a transcript, in the vocabulary of a projector
    size: int  # of that vocabulary, without blank
    frame_seconds: float  # length of a CTC frame

    def __call__(self, example: Example, key: Key) -> SparsePosteriors:
        """Drawn anew for each key."""
        generator = Generator().manual_seed(int(key.rng(_INJECT).integers(2**63)))
        return simulate(self.classes(example.utterance.text), self.size, self.rates, generator)

    def seconds(self, example: Example) -> float:
        """Audio that an example stands for: its expected number of frames."""
        rates = self.rates
        n = len(self.classes(example.utterance.text)) * (1 - rates.deletions + rates.insertions)
        return self.frame_seconds * (n / (1 - rates.repeat) + (n + 1) * rates.blanks)
