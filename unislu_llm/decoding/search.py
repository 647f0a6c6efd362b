"""Beam search, the search over all labels of a task, and what all ways to decode share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State
from unislu_llm.tasks import SEPARATOR, LabelTask

_OUT = -1e9  # score of a beam that fills a place and never wins, as in transformers
_DEAD = _OUT / 2
_ROWS = 32  # utterances times labels that are read at one time: each has a copy of the cache
_POSITIONS = 128  # of labels whose logits exist at one time


@dataclass(frozen=True)
class Decoded:
    """New token ids of an answer, the end of text included if it came."""

    ids: list[int] = field(default_factory=list)
    # Of each token, what the model itself gave it, before grammar and bias.
    log_probs: list[float] = field(default_factory=list)
    score: float = 0.0  # by which beams are ranked: mean of the scores after grammar and bias

    def __add__(self, other: Decoded) -> Decoded:
        return Decoded(self.ids + other.ids, self.log_probs + other.log_probs, other.score)


class Processor(Protocol):
    """Changes the scores of next tokens by what was written so far, which it follows by itself."""

    def __call__(self, scores: Tensor) -> Tensor:
        """New scores `(rows, vocabulary)` of the next token."""

    def advance(self, tokens: Tensor) -> None:
        """Read more tokens of every row, `(rows, n)`; negative ones are none."""

    def reorder(self, rows: Tensor) -> None:
        """Take over these rows, `(n,)`; one may come several times."""


class Ends:
    """Processor under which the next token is one of these ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] | None = list(ids)

    def __call__(self, scores: Tensor) -> Tensor:
        if self._ids is None:
            return scores
        out = torch.full_like(scores, float("-inf"))
        out[:, self._ids] = scores[:, self._ids]
        return out

    def advance(self, tokens: Tensor) -> None:
        self._ids = None

    def reorder(self, rows: Tensor) -> None:
        """All rows have the same ids."""


# A running answer: the sum of its tokens' scores, the beam that it continues, and the answer.
Beam = tuple[float, int, Decoded]


def beam_search(model: SLUModel, state: State, room: Sequence[int], stops: Sequence[Sequence[int]],
                processors: Sequence[Processor], beams: int) -> list[list[Decoded]]:
    """The best continuations of each row, as many as beams, best first.

    As in transformers' beam search with `length_penalty` 1 and `early_stopping` False: an answer
    ranks by its mean score; a row is done when its best running beam, at its present length, is
    no better than the worst of `beams` finished ones. The state stays; arguments as of
    :class:`~unislu_llm.decoding.greedy.Greedy`.
    """
    device = state.hidden.device
    chosen = [row for row in range(len(room)) for _ in range(beams)]
    state = state.take(chosen)
    hidden, order = state.hidden, torch.tensor(chosen, device=device)
    for processor in processors:
        processor.reorder(order)
    finished: list[list[Decoded]] = [[] for _ in room]
    # Beams start equal: all but the first of a row are out, so that no continuation comes twice.
    running: dict[int, list[Beam]] = {
        row: [(_OUT if i else 0.0, i, Decoded()) for i in range(beams)] for row in range(len(room))}
    # The lists are small, and what a step costs is the model: they are kept in Python.
    for length in count(1):
        best = _best(*_scores(model, hidden, processors), list(running.values()))
        chosen, old, running = [], running, {}
        for slot, (row, answers) in enumerate(old.items()):
            found = [(score, beam, answers[beam][2] + Decoded([token], [known]))
                     for score, beam, token, known in best[slot]]
            over = [d.ids[-1] in stops[row] or length >= room[row] for _, _, d in found]
            if going := _sort_out(found, over, finished[row], length):
                chosen += [slot * beams + beam for _, beam, _ in going]
                running[row] = going
        if not running:
            break
        tokens = [[d.ids[-1]] for answers in running.values() for _, _, d in answers]
        ids, order = torch.tensor(tokens, device=device), torch.tensor(chosen, device=device)
        for processor in processors:
            processor.reorder(order)
            processor.advance(ids)
        # Keys and values follow their beams; rows that are done leave the batch.
        state = state.take(chosen, beams)
        hidden = model.step(state, ids)[:, -1]
    return finished


def _scores(model: SLUModel, hidden: Tensor,
            processors: Sequence[Processor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities by the model, and what processors make of them."""
    scores = log_probs = model.logits(hidden).float().log_softmax(-1)
    for processor in processors:
        scores = processor(scores)
    return log_probs, scores


def _best(log_probs: Tensor, scores: Tensor,
          running: Sequence[Sequence[Beam]]) -> list[list[tuple[float, int, int, float]]]:
    """Of each row the best continuations: score, beam, token and the model's log-probability.

    Twice as many as beams, so that enough go on where as many as can be end.
    """
    so_far = torch.tensor([[s for s, _, _ in beams] for beams in running], device=scores.device)
    beams, width = so_far.shape[1], scores.shape[1]
    total = (scores.view(-1, beams, width) + so_far[:, :, None]).flatten(1)
    values, index = total.topk(2 * beams)
    known = log_probs.view(-1, beams * width).gather(1, index)
    return [[(score, i // width, i % width, p) for score, i, p in zip(*row, strict=True)]
            for row in zip(values.tolist(), index.tolist(), known.tolist(), strict=True)]


def _sort_out(found: Sequence[Beam], over: Sequence[bool], finished: list[Decoded],
              length: int) -> list[Beam]:
    """Move continuations that are over to the `finished` ones of their row; return those that go
    on, best first, or none where none of them can win any more."""
    beams = len(found) // 2
    # Only as many as there are beams may finish; the others are reserves.
    finished += [replace(d, score=score / length) for (score, _, d), end
                 in zip(found[:beams], over, strict=False) if end and score > _DEAD]
    finished.sort(key=lambda d: -d.score)
    del finished[beams:]
    going = [beam for beam, end in zip(found, over, strict=True) if not end]
    going += [(_OUT, *beam[1:]) for beam, end in zip(found, over, strict=True) if end]
    ahead = going[0][0]
    beaten = len(finished) == beams and ahead / length <= finished[-1].score
    return [] if beaten or ahead < _DEAD else going[:beams]


def score_labels(model: SLUModel, state: State, chosen: Sequence[int], hidden: Tensor,
                 task: LabelTask) -> tuple[Tensor, list[list[Decoded]]]:
    """Probability of each label after a transcript, given that the answer is one of them.

    Each label is scored with its closing marker after `transcript[T/L][TASK][open]`: the likeliest
    is the best of an exhaustive search, where greedy decoding takes the likeliest first token.

    Args:
        model: in eval mode.
        state: after the transcripts and `[T/L][TASK][open]`; stays as it is.
        chosen: its rows that are scored.
        hidden: `(rows, 3, dim)` after each of these three.
        task: with one label.

    Returns:
        `(rows, labels)` fp32 on the CPU, and of each row every label's answer, from the control
        token to the end of text.
    """
    tokenizer, rows, device = model.tokenizer, len(chosen), state.mask.device
    ids = tokenizer.marker_ids
    head = [ids[m] for m in (SEPARATOR, task.marker, task.open)]
    tails = [[*tokenizer.label_ids(task, label), ids[task.close]] for label in task.labels]
    opening = model.logits(hidden).float().log_softmax(-1)
    # The first token of a label follows the opening marker. The others, and the end of text
    # behind the closing marker, follow tokens of the label itself.
    markers = opening[:, [0, 1], head[1:]].tolist()
    firsts = opening[:, 2, [tail[0] for tail in tails]].tolist()
    known = [[[*before, first] for first in of_row]
             for before, of_row in zip(markers, firsts, strict=True)]
    # Copies of a cache for all labels of all rows at once would not fit into memory.
    step = max(1, _ROWS // rows)
    for at in range(0, len(tails), step):
        some = tails[at:at + step]
        several = state.take([row for row in chosen for _ in some])
        read = padded(some, device).repeat(rows, 1)
        wanted = padded([[*tail[1:], tokenizer.eos_id] for tail in some], device).repeat(rows, 1)
        valid = read >= 0
        hidden = model.step(several, read.masked_fill(~valid, tokenizer.pad_id), valid)
        pieces = [model.logits(h).float().log_softmax(-1).gather(1, i[:, None])
                  for h, i in zip(hidden[valid].split(_POSITIONS),
                                  wanted[valid].split(_POSITIONS), strict=True)]
        found = iter(torch.cat(pieces)[:, 0].tolist())
        for row in range(rows):
            for label, tail in enumerate(some, at):
                known[row][label] += [next(found) for _ in tail]
    answers = [[Decoded([*head[1:], *tail, tokenizer.eos_id], values)
                for tail, values in zip(tails, of_row, strict=True)] for of_row in known]
    # Only what tells labels apart: neither the markers before a label nor the end of text.
    scores = torch.tensor([[sum(d.log_probs[2:-1]) for d in of_row] for of_row in answers])
    return scores.softmax(-1), answers


def padded(rows: Sequence[Sequence[int]], device: torch.device, side: str = "right") -> Tensor:
    """Ids `(rows, longest)`, filled up with -1."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side=side).to(device)
