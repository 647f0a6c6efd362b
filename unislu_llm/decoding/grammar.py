"""Decoding that cannot go wrong: every answer is well formed, complete, and within its budget.

A finite automaton over token ids (:mod:`unislu_llm.decoding.automaton`) says what may follow: transcript, `[T/L]`, control
token, then only what the task allows. The shortest completion of every state is known, so that an answer whose budget
runs out is closed in time. The scores of what may follow are left as the model gives them: greedy, beam search and
sampling choose among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LogitsProcessor

from unislu_llm.data.targets import TextCodec
from unislu_llm.decoding.automaton import END, Automaton, Request
from unislu_llm.decoding.grounding import Grounding
from unislu_llm.decoding.loops import LoopTracker
from unislu_llm.decoding.vocabulary import Brackets, vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.tasks import SEPARATOR


class Grammar:
    """What the tasks of a codec allow; made once for each codec.

    Args:
        codec: tokenizer and task registry of a model.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.vocabulary = vocabulary_of(codec)
        self.automaton = Automaton(codec)
        self.brackets = Brackets(self.vocabulary, list(codec.marker_ids))
        self._moved: dict[tuple[torch.device, int], _Tables] = {}

    def need(self, request: Request) -> int:
        """Tokens of the shortest answer, the end-of-text token included."""
        return int(self.automaton.need[self.automaton.start(*request)])

    def processor(self, requests: Sequence[Request], budgets: Sequence[int], start: int = 0, *, grounded: bool = False,
                  cut_loops: bool = True) -> GrammarProcessor:
        """A logits processor for one call of `generate`.

        Args:
            requests: of each row, see :meth:`Automaton.start`.
            budgets: new tokens that each row may have.
            start: tokens in the ids before the first new one (the prompt; 0 where `generate` starts from embeddings).
            grounded: phrases of span tasks are whole words of the row's transcript.
            cut_loops: leave a transcript or phrase that repeats itself, see :mod:`unislu_llm.decoding.loops`.

        Raises:
            UserError: a budget is below the shortest answer.
        """
        for request, budget in zip(requests, budgets, strict=True):
            if budget < self.need(request):
                raise UserError(f"{budget} new tokens are too few: the shortest answer for {request[0] or 'a transcript'} "
                                f"has {self.need(request)}; raise max_new_tokens")
        return GrammarProcessor(self, requests, budgets, start, grounded, cut_loops)

    def tables(self, device: torch.device, width: int) -> _Tables:
        """The automaton on a device, for scores of `width` columns."""
        key = device, width
        if key not in self._moved:
            self._moved[key] = _tables(self, device, width)
        return self._moved[key]


@dataclass(frozen=True)
class _Tables:
    """Tensors of the automaton on one device.

    `text` `(3,)`, `odd` `(3, n)`: added to all scores and to those of the tokens `odd_ids` (the few that are no visible text),
    0 or minus infinity, where there is no text, visible text alone, or any. `solid`, `plain` `(width,)`: see `Vocabulary`.
    """

    edge_ids: Tensor
    edge_next: Tensor
    blank_next: Tensor
    solid_next: Tensor
    need: Tensor
    groups: Tensor
    empty: Tensor
    phrase: Tensor
    solid: Tensor
    plain: Tensor
    text: Tensor
    odd_ids: Tensor
    odd: Tensor
    from_root: Tensor
    longer_ids: Tensor
    longer_nodes: Tensor
    forbidden: Tensor


def _tables(grammar: Grammar, device: torch.device, width: int) -> _Tables:
    a, v = grammar.automaton, grammar.vocabulary
    kinds = torch.zeros(3, width, dtype=torch.bool)
    size = min(width, len(v.plain))
    kinds[1, :size], kinds[2, :size] = v.solid[:size], v.plain[:size]
    odd = (~kinds[1]).nonzero().flatten()
    from_root = torch.zeros(max(width, size), dtype=torch.long)
    b = grammar.brackets
    from_root[:size] = b.from_root[:size]
    moved = (t.to(device) for t in (a.edge_ids, a.edge_next, a.blank_next, a.solid_next, a.need, a.groups, a.empty,
                                    a.empty | a.inside, kinds[1], kinds[2], _closed(~kinds.any(-1)), odd, _closed(~kinds[:, odd]),
                                    from_root, b.longer_ids, b.longer_nodes, b.forbidden))
    return _Tables(*moved)


def _closed(where: Tensor) -> Tensor:
    return torch.zeros(where.shape).masked_fill(where, float("-inf"))


class GrammarProcessor(LogitsProcessor):
    """Set the score of everything that the grammar forbids to minus infinity. For one call of `generate`.

    A row's state is a function of its ids. It is carried from step to step; under beam search each row finds the row of
    the step before that it continues by comparing their ids, and ids that continue nothing are read from the start.
    Negative ids are nothing: rows of different length stand in one batch with them. Build it by :meth:`Grammar.processor`.
    """

    def __init__(self, grammar: Grammar, requests: Sequence[Request], budgets: Sequence[int], start: int, grounded: bool,
                 cut_loops: bool) -> None:
        self.grammar = grammar
        self.start = start
        self.grounded = grounded
        self.cut_loops = cut_loops
        self._starts = torch.tensor([grammar.automaton.start(*request) for request in requests])
        self._budgets = torch.tensor(list(budgets))
        self._seen: Tensor | None = None
        self._state = self._node = self._counts = torch.zeros(0, dtype=torch.long)
        self._ground: Grounding | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores `(rows, vocabulary)` after `input_ids` `(rows, length)`; rows are beams of one utterance after another."""
        answer = input_ids[:, self.start:]
        self._t = self.grammar.tables(scores.device, scores.shape[1])
        self._follow(answer)
        return self._mask(scores, self._budget - (answer >= 0).sum(-1))

    # ---- state -----------------------------------------------------------------------------------------------------

    def _follow(self, answer: Tensor) -> None:
        """Bring the state of every row to the end of its ids."""
        parents = self._parents(answer)
        if parents is None:
            self._reset(answer)
            for length in range(1, answer.shape[1] + 1):
                self._step(answer[:, :length])
        else:
            if len(self._budgets) < len(parents):  # beams
                self._state, self._node, self._counts = self._state[parents], self._node[parents], self._counts[parents]
                if self._ground is not None:
                    self._ground.reorder(parents)
            self._step(answer)
        self._seen = answer.clone()

    def _parents(self, answer: Tensor) -> Tensor | None:
        """Row of the step before that each row continues; None when one continues none."""
        seen, groups = self._seen, len(self._budgets)
        if seen is None or seen.shape[0] != answer.shape[0] or answer.shape[1] != seen.shape[1] + 1:
            return None
        if groups == len(answer):  # without beams rows stay in place, and nothing is asked of the device
            return torch.arange(groups, device=answer.device)
        new = answer[:, :-1].unflatten(0, (groups, -1))
        equal = (new[:, :, None] == seen.unflatten(0, (groups, -1))[:, None]).all(-1)
        if not bool(equal.any(-1).all()):
            return None
        first = torch.arange(groups, device=answer.device)[:, None] * equal.shape[1]
        return (equal.int().argmax(-1) + first).flatten()

    def _reset(self, answer: Tensor) -> None:
        rows, device = answer.shape[0], answer.device
        beams = rows // len(self._budgets)
        self._budget = self._budgets.to(device).repeat_interleave(beams)
        self._state = self._starts.to(device).repeat_interleave(beams)
        self._node = torch.zeros(rows, dtype=torch.long, device=device)
        self._loops = LoopTracker(device)
        self._counts = self._loops.start(rows)
        self._ground = Grounding(self.grammar.codec, self.grammar.vocabulary, rows, device) if self.grounded else None

    def _step(self, answer: Tensor) -> None:
        """Move every row over its last token."""
        t, old, live = self._t, self._state, answer[:, -1] >= 0
        tokens = answer[:, -1].clamp(min=0)
        edge = t.edge_ids[old] == tokens[:, None]
        by_edge = torch.where(edge, t.edge_next[old], 0).amax(-1)  # at most one matches
        text = torch.where(t.solid[tokens], t.solid_next[old], t.blank_next[old])
        text = torch.where(t.plain[tokens], text, END).clamp(min=END)
        new = torch.where(live, torch.where(edge.any(-1), by_edge, text), old)
        if self._ground is not None:
            by_byte = t.empty[old] & live  # its tokens are of a word, byte by byte
            new = torch.where(by_byte, t.solid_next[old].clamp(min=END), new)
            entered = t.groups[new] & ~t.groups[old] & ~t.phrase[old]
            separator = self.grammar.codec.marker_ids[SEPARATOR]
            for row in entered.nonzero().flatten().tolist():
                ids = answer[row][answer[row] >= 0].tolist()
                self._ground.learn(row, ids[:ids.index(separator)])
            self._ground.step(tokens, t.groups[old] & t.empty[new], t.phrase[old] & t.phrase[new] & live)
        self._state = new
        self._node = torch.where(live, self._brackets(tokens), self._node)
        if self.cut_loops:
            self._counts = torch.where(live[:, None], self._loops.step(self._counts, answer), self._counts)

    def _brackets(self, tokens: Tensor) -> Tensor:
        t = self._t
        on = t.longer_ids[self._node] == tokens[:, None]
        return torch.where(on.any(-1), torch.where(on, t.longer_nodes[self._node], 0).amax(-1), t.from_root[tokens])

    # ---- scores ----------------------------------------------------------------------------------------------------

    def _mask(self, scores: Tensor, remaining: Tensor) -> Tensor:
        t, state = self._t, self._state
        grounded = t.phrase[state] if self._ground is not None else torch.zeros_like(state, dtype=torch.bool)
        if self.cut_loops:
            shortest = self._loops.looping(self._counts) & ~grounded  # a grounded phrase ends with the transcript
            remaining = remaining.masked_fill(shortest, 0)
        remaining = remaining.maximum(t.need[state]).clamp(min=1)  # rows that are done go on with end-of-text tokens
        edges = _fits(t, t.edge_next[state], remaining[:, None])
        kind = _fits(t, t.solid_next[state], remaining).long() + _fits(t, t.blank_next[state], remaining).long()
        if self._ground is not None:
            kind = kind.masked_fill(grounded, 0)
            room = self._ground.shortest() + 3 <= remaining  # the opening and closing markers and the end of text
            opens = t.groups[state][:, None] & t.empty[t.edge_next[state].clamp(min=0)]
            edges &= ~opens | room[:, None]
            edges &= ~grounded[:, None] | self._ground.closable[:, None]
        out = scores + t.text[kind].to(scores.dtype)[:, None]
        out.index_add_(1, t.odd_ids, t.odd[kind].to(scores.dtype))
        ids = t.edge_ids[state].clamp(min=0)
        _write(out, ids, scores.gather(1, ids), edges)
        if self._ground is not None:
            rows, ids = self._ground.allowed(remaining)
            keep = grounded[rows]
            out[rows[keep], ids[keep]] = scores[rows[keep], ids[keep]]
        spelled = t.forbidden[self._node]
        _write(out, spelled.clamp(min=0), float("-inf"), spelled >= 0)
        return out


def _fits(t: _Tables, following: Tensor, remaining: Tensor) -> Tensor:
    """Whether there is such a state and its shortest completion fits behind one token."""
    return (following >= 0) & (t.need[following.clamp(min=0)] < remaining)


def _write(out: Tensor, ids: Tensor, values: Tensor | float, where: Tensor) -> None:
    """Write `values` to `out` `(rows, vocabulary)` at the `ids` `(rows, n)` that are meant; an id that comes twice agrees."""
    out.scatter_(1, ids, torch.where(where, values, out.gather(1, ids)))


@lru_cache(maxsize=4)
def grammar_of(codec: TextCodec) -> Grammar:
    """The grammar of a codec, made once.

    Raises:
        UserError: the tokenizer cannot spell a label.
    """
    return Grammar(codec)
