"""Greedy decoding and sampling, in as few passes of the LLM as a known hypothesis allows; and what
is read and not decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.decoding.hypothesis_bias import HypothesisBias
from unislu_llm.decoding.search import Decoded, Processor, padded
from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State

_POSITIONS = 64  # whose logits exist at one time

Make = Callable[[], Sequence[Processor]]


class Greedy:
    """Continues each row by its likeliest token, or with a temperature by a drawn one.

    Where a processor knows a hypothesis (:class:`HypothesisBias`), the LLM reads what comes next in
    it in one pass, and every place is judged: its tokens stand up to the first one that would not
    have been written without it. The answer is that of one token at a time, in fewer passes. This
    is speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with a given text as the draft
    (Yang et al. 2023, arXiv 2304.04487).

    Args:
        model: in eval mode.
        state: what was read; changed, and of no use afterwards.
        room: new tokens that each row may have.
        stops: ids behind which each row is done, equally many.
        make: makes the processors, which change the scores one after the other.
        temperature: 0 for the likeliest.
    """

    def __init__(self, model: SLUModel, state: State, room: Sequence[int],
                 stops: Sequence[Sequence[int]], make: Make = tuple,
                 temperature: float = 0.0) -> None:
        self.model, self.state, self.temperature = model, state, temperature
        self.processors = list(make())
        self.answers = [Decoded() for _ in room]
        # Of the rows that are not parked: their numbers, and tensors `(rows, ...)`.
        self.rows, device = list(range(len(room))), state.mask.device
        self.left, self.ends = torch.tensor(list(room)).to(device), torch.tensor(stops).to(device)
        self.live = self.left > 0
        self.last = self.ends[:, :0]  # token that is written and not read yet
        self._parked: list[tuple[State, list[int]]] = []

    def run(self, goes_on: bool = True) -> tuple[list[Decoded], State]:
        """The answers, and the state in which all of their tokens but for the last ones are read;
        where nothing goes on from there, some state."""
        while self._park(goes_on):
            ahead = self.ahead()
            tokens, known = self._judge(self._read(ahead), ahead)
            self.keep(tokens, known, ahead)
        return self.answers, State.join(*zip(*self._parked, strict=True)) if goes_on else self.state

    def ahead(self) -> Tensor:
        """What comes next in the hypotheses, `(rows, n)`, filled up with -1."""
        guide = next((p for p in self.processors if isinstance(p, HypothesisBias)), None)
        if guide is None:
            return self.last[:, :0]
        ids = padded([some or [] for some in guide.ahead()], self.last.device)
        # What lies behind the room is never written, and there may be no positions for it.
        beyond = torch.arange(ids.shape[1], device=ids.device) >= self.left[:, None]
        return ids.masked_fill(~self.live[:, None] | beyond, -1)

    def keep(self, tokens: Tensor, known: Tensor, ahead: Tensor) -> None:
        """Add tokens `(rows, n)` to the answers, and take back what was read and not written."""
        said = (tokens >= 0).sum(-1)
        last = tokens.gather(1, (said - 1).clamp(min=0)[:, None])
        self.last = last.masked_fill(~self.live[:, None], -1)
        if ahead.shape[1]:
            self.state.drop((ahead >= 0).sum(-1) - (said - 1).clamp(min=0))
        for row, n, ids, values in zip(self.rows, said.tolist(), tokens.tolist(), known.tolist(),
                                       strict=True):
            self.answers[row] += Decoded(ids[:n], values[:n])

    def _park(self, goes_on: bool) -> bool:
        """Lay aside the rows that are done, or let them go; False where none is left."""
        going = self.live.tolist()
        if 2 * sum(going) > len(going):  # a pass over a few rows too many costs less than a copy
            return True
        done = [i for i, goes in enumerate(going) if not goes]
        kept = [i for i, goes in enumerate(going) if goes]
        if goes_on:
            self._parked.append((self.state.take(done), [self.rows[i] for i in done]))
        if not kept:
            return False
        self.state, self.rows = self.state.take(kept), [self.rows[i] for i in kept]
        index = torch.tensor(kept).to(self.live.device)
        self.left, self.ends, self.live = self.left[index], self.ends[index], self.live[index]
        self.last = self.last[index]
        for processor in self.processors:
            processor.reorder(index)
        return True

    def _read(self, ahead: Tensor) -> Tensor:
        """Hidden states `(rows, 1 + n, dim)` after the last token and each of those ahead."""
        fed = torch.cat([self.last, ahead], 1)
        # In the first round, the prompt's last state foretells what comes.
        found = [] if self.last.shape[1] else [self.state.hidden[:, None]]
        if fed.shape[1]:
            valid = fed >= 0
            ids = fed.masked_fill(~valid, self.model.tokenizer.pad_id)
            found.append(self.model.step(self.state, ids, valid))
        return torch.cat(found, 1)

    def _judge(self, hidden: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens `(rows, n)`, -1 where a row has no more, and their log-probabilities."""
        offers = F.pad(ahead, (0, 1), value=-1)  # behind its hypothesis a row goes on by itself
        going, start, tokens, known = self.live, 0, [], []
        pieces = hidden[:, :0]
        for j, offer in enumerate(offers.unbind(1)):
            if j == start + pieces.shape[1]:
                some, start = going.nonzero()[:, 0], j
                here = hidden[some, j:j + max(1, _POSITIONS // len(some))]
                pieces = self.model.logits(here).float()
            logits = pieces[:, j - start]
            if len(some) < len(going):
                blank = logits.new_zeros(len(going), logits.shape[1])
                logits = blank.index_copy_(0, some, logits)
            scores = logits
            for processor in self.processors:
                scores = processor(scores)
            token = (torch.multinomial((scores / self.temperature).softmax(-1), 1)[:, 0]
                     if self.temperature else scores.argmax(-1))
            known.append(logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1))
            token = token.masked_fill(~going, -1)
            tokens.append(token)
            self.left = self.left - going.long()
            over = going & ((self.left <= 0) | (token[:, None] == self.ends).any(-1))
            self.live, going = self.live & ~over, going & ~over & (token == offer)
            for processor in self.processors:
                processor.advance(token[:, None])
            if not bool(going.any()):
                break
        return torch.stack(tokens, 1), torch.stack(known, 1)


def feed(model: SLUModel, state: State, texts: Sequence[Sequence[int]]) -> Tensor:
    """Read ids of each row; hidden states `(rows, n, dim)` after them."""
    ids = padded(texts, state.mask.device)
    if not ids.shape[1]:
        return state.hidden[:, None][:, :0]
    valid = ids >= 0
    hidden = model.step(state, ids.masked_fill(~valid, model.tokenizer.pad_id), valid)
    last = valid.sum(-1)[:, None, None] - 1
    behind = hidden.gather(1, last.clamp(min=0).expand(-1, 1, hidden.shape[2]))[:, 0]
    state.hidden = torch.where(last[:, 0] < 0, state.hidden, behind)
    return hidden
