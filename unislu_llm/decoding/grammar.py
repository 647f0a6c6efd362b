"""Decoding that cannot go wrong: every answer is well formed, complete, and within its budget.

A finite automaton over token ids, built from the task registry alone, says what may follow:
transcript, `[T/L]`, control token, then only what the task allows. The shortest completion of
every state is known, so that an answer whose budget runs out is closed in time. The scores of what
may follow stay as the model gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.decoding.grounding import Grounding
from unislu_llm.decoding.loops import LoopTracker
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.tasks import ASR, SEPARATOR, LabelTask, SpanTask, Task
from unislu_llm.tokenizer import UnifiedTokenizer

END = 0  # state after the end of text; only the end-of-text token comes then

Request = tuple[str, bool]
"""Task asked for and whether the answer is forced to be its answer. Free, a bare transcript is no
answer, but for `asr`: a transcript with or without a task part. `asr` forced: without one."""


@dataclass
class _State:
    edges: dict[int, int] = field(default_factory=dict)  # states after single tokens
    blank: int = -1  # state after text without characters that can be seen; -1: none may stand
    solid: int = -1  # after text with such
    role: str = ""  # groups, empty, inside


class Grammar:
    """States of an answer `transcript[T/L][task]outputs` and what may follow in each.

    Attributes:
        starts: state before the first token, by request.
        left: `(states,)` tokens of the shortest completion, the end of text included.
        edge_ids: `(states, edges)` tokens that lead out; the first one fills up, -1 if none.
        edge_next: `(states, edges)` states that they lead to.
        blank_next: `(states,)` state after text that is blank; -1 where none may stand.
        solid_next: `(states,)` state after text that is not.
        groups: `(states,)` bool, between phrases.
        empty: `(states,)` bool, in a phrase without visible text so far.
        phrase: `(states,)` bool, in a phrase.
        kinds: `(3, tokens + 1)` bool, ids of no token, of visible text, and of all text.

    Raises UserError: the tokenizer does not give a label back as it is written.
    """

    def __init__(self, tokenizer: UnifiedTokenizer, device: torch.device | str = "cpu") -> None:
        self.tokenizer, self.device, self._ids = tokenizer, device, tokenizer.marker_ids
        plain, solid = vocabulary_of(tokenizer).plain, vocabulary_of(tokenizer).solid
        # One more entry than there are tokens: False, for ids beyond them.
        self.kinds = F.pad(torch.stack([torch.zeros_like(plain), solid, plain]), (0, 1)).to(device)
        self._stop, separator = {tokenizer.eos_id: END}, self._ids[SEPARATOR]
        self._states = [_State(dict(self._stop))]
        entry = {self._ids[task.marker]: self._task(task) for task in tokenizer.registry}
        free = {separator: self._new(entry)} if entry else {}
        self.starts: dict[Request, int] = {(ASR, False): self._text({**free, **self._stop}),
                                           (ASR, True): self._text(self._stop)}
        for task in tokenizer.registry:
            own = self._ids[task.marker]
            self.starts[task.name, False] = self._text(free)
            self.starts[task.name, True] = self._text({separator: self._new({own: entry[own]})})
        self._tables()

    def need(self, request: Request) -> int:
        """Tokens of the shortest answer, the end of text included."""
        return self._shortest[self.starts[request]]

    def _new(self, edges: Mapping[int, int] | None = None, role: str = "") -> int:
        self._states.append(_State(dict(edges or {}), role=role))
        return len(self._states) - 1

    def _text(self, edges: Mapping[int, int], role: str = "") -> int:
        """A state in which text goes on."""
        state = self._new(edges, role)
        self._states[state].blank = self._states[state].solid = state
        return state

    def _task(self, task: Task) -> int:
        """State behind a task's control token."""
        if isinstance(task, SpanTask):
            groups = self._new(self._stop, "groups")
            for label in task.labels:
                # Two states a phrase, so that none is closed before it holds something visible.
                inside = self._text({self._ids[task.close_of(label)]: groups}, "inside")
                empty = self._new(role="empty")
                self._states[empty].blank, self._states[empty].solid = empty, inside
                self._states[groups].edges[self._ids[task.open_of(label)]] = empty
            return groups
        if not task.multi:
            return self._labels(task, dict.fromkeys(task.labels, self._new(self._stop)), {})
        # After a label only later ones: the order is the registry's, and none comes twice.
        after: dict[str, int] = {}
        for label in reversed(task.labels):
            after[label] = self._labels(task, after, self._stop)
        return self._labels(task, after, self._stop)

    def _labels(self, task: LabelTask, after: Mapping[str, int], edges: Mapping[int, int]) -> int:
        """A state with some edges and a trie of labels, each of which leads to a state."""
        state = self._new(edges)
        if not after:
            return state
        root = self._states[state].edges[self._ids[task.open]] = self._new()
        for label, following in after.items():
            node = root
            for token in self.tokenizer.label_ids(task, label):
                if token not in self._states[node].edges:
                    self._states[node].edges[token] = self._new()
                node = self._states[node].edges[token]
            self._states[node].edges[self._ids[task.close]] = following
        return state

    def _tables(self) -> None:
        states, width = self._states, max(len(s.edges) for s in self._states)
        # Filled up with a state's first edge, so that what is written to all of them agrees.
        full = [list(s.edges.items()) or [(-1, -1)] for s in states]
        table = torch.tensor([edges + [edges[0]] * (width - len(edges)) for edges in full])
        blank, solid = (torch.tensor([getattr(s, kind) for s in states])
                        for kind in ("blank", "solid"))
        groups, empty, inside = (torch.tensor([s.role == role for s in states])
                                 for role in ("groups", "empty", "inside"))
        # Shortest paths to the end, by relaxing all edges until nothing changes.
        through = torch.cat([table[..., 1], blank[:, None], solid[:, None]], dim=1)
        far = torch.iinfo(torch.long).max // 2
        need, shorter = None, torch.full((len(states),), far)
        shorter[END] = 0
        while need is None or not torch.equal(need, shorter):
            need = shorter
            costs = torch.where(through >= 0, need[through.clamp(min=0)] + 1, far)
            shorter = torch.minimum(need, costs.amin(1))
        self._shortest: list[int] = need.tolist()
        (self.edge_ids, self.edge_next, self.blank_next, self.solid_next, self.left, self.groups,
         self.empty, self.phrase) = (t.to(self.device) for t in (
             table[..., 0].contiguous(), table[..., 1].contiguous(), blank, solid, need, groups,
             empty, empty | inside))


class GrammarProcessor:
    """Processor that sets the score of everything that the grammar forbids to minus infinity.

    A transcript or phrase that repeats itself (:mod:`unislu_llm.decoding.loops`) may only be
    ended. With `grounded`, phrases of span tasks are whole words of the row's transcript; without,
    nothing in it waits for the device.

    Raises UserError: a budget is below the shortest answer.
    """

    def __init__(self, grammar: Grammar, requests: Sequence[Request], budgets: Sequence[int],
                 grounded: bool = False) -> None:
        for request, budget in zip(requests, budgets, strict=True):
            if budget < grammar.need(request):
                raise UserError(f"{budget} new tokens are too few: the shortest answer for task "
                                f"'{request[0]}' has {grammar.need(request)}; raise max_new_tokens")
        self._grammar, device = grammar, grammar.device
        starts = [grammar.starts[request] for request in requests]
        self._state = torch.tensor(starts, device=device)
        self._remaining = torch.tensor(list(budgets), device=device)
        self._loops = LoopTracker(len(starts), device)
        self._read = torch.zeros(len(starts), 0, dtype=torch.long, device=device)
        self._ground = Grounding(grammar.tokenizer, len(starts), device) if grounded else None

    def reorder(self, rows: Tensor) -> None:
        self._state, self._remaining = self._state[rows], self._remaining[rows]
        self._loops.reorder(rows)
        if self._ground is not None:
            self._read = self._read[rows]
            self._ground.reorder(rows)

    def advance(self, tokens: Tensor) -> None:
        for column in tokens.unbind(1):
            self._step(column)

    def _step(self, column: Tensor) -> None:
        g, old, live = self._grammar, self._state, column >= 0
        _, solid, plain = g.kinds[:, column.clamp(0, g.kinds.shape[1] - 1)]
        edge = g.edge_ids[old] == column[:, None]
        by_edge = torch.where(edge, g.edge_next[old], 0).amax(-1)  # several only as fillers
        text = torch.where(solid, g.solid_next[old], g.blank_next[old])
        text = torch.where(plain, text, END).clamp(min=END)
        new = torch.where(live, torch.where(edge.any(-1), by_edge, text), old)
        if self._ground is not None:
            new = self._follow(self._ground, column, new)
        self._state, self._remaining = new, self._remaining - live.long()
        self._loops.step(column)

    def _follow(self, ground: Grounding, column: Tensor, new: Tensor) -> Tensor:
        """Let a grounding follow the phrases; the new states, corrected."""
        g, old, live = self._grammar, self._state, column >= 0
        self._read = torch.cat([self._read, column[:, None]], dim=1)
        # A grounded token is of a word even where it is a single byte and not visible by itself.
        new = torch.where(g.empty[old] & live, g.solid_next[old].clamp(min=END), new)
        entered = g.groups[new] & ~g.groups[old] & ~g.phrase[old]
        for row in entered.nonzero().flatten().tolist():
            ids = self._read[row][self._read[row] >= 0].tolist()
            ground.learn(row, ids[:ids.index(g.tokenizer.marker_ids[SEPARATOR])])
        ground.step(column, g.groups[old] & g.empty[new], g.phrase[old] & g.phrase[new] & live)
        return new

    def __call__(self, scores: Tensor) -> Tensor:
        g, state, ground = self._grammar, self._state, self._ground
        grounded = g.phrase[state] & (ground is not None)
        # A loop leaves room for nothing but the end; a grounded phrase ends with the transcript.
        remaining = self._remaining.masked_fill(self._loops.looping() & ~grounded, 0)
        # Whatever the budget, the shortest completion fits; rows that are done go on with ends.
        remaining = remaining.maximum(g.left[state]).clamp(min=1)
        edges = self._fits(g.edge_next[state], remaining[:, None])
        kind = (self._fits(g.solid_next[state], remaining).long()
                + self._fits(g.blank_next[state], remaining).long()).masked_fill(grounded, 0)
        if ground is not None:
            room = ground.shortest() + 3 <= remaining  # opening, closing and the end of text
            opens = g.groups[state][:, None] & g.empty[g.edge_next[state].clamp(min=0)]
            edges &= (~opens | room[:, None]) & (~grounded | ground.closable)[:, None]
        allowed = F.pad(g.kinds, (0, scores.shape[1] - g.kinds.shape[1]))[kind]
        ids = g.edge_ids[state].clamp(min=0)
        allowed.scatter_(1, ids, allowed.gather(1, ids) | edges)
        if ground is not None:
            rows, ids = ground.allowed(remaining)
            keep = grounded[rows]
            allowed[rows[keep], ids[keep]] = True
        return scores.masked_fill(~allowed, float("-inf"))

    def _fits(self, following: Tensor, remaining: Tensor) -> Tensor:
        """Whether there is such a state and its shortest completion fits behind one token."""
        return (following >= 0) & (self._grammar.left[following.clamp(min=0)] < remaining)


grammar_of = lru_cache(maxsize=4)(Grammar)
"""The grammar of a tokenizer on a device, made once."""
