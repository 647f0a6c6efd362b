"""The unified format as a finite automaton over token ids, built from the task registry alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unislu_llm.data.targets import TextCodec
from unislu_llm.errors import UserError
from unislu_llm.tasks import SEPARATOR, LabelTask, SpanTask, Task

END = 0
"""State after the end of text; only the end-of-text token comes then (rows of a batch that are done)."""

Request = tuple[str | None, bool]
"""Task asked for (None: any, or none) and whether the answer is forced to be its answer."""
Role = Literal["", "groups", "empty", "inside"]


@dataclass
class _State:
    """Edges are single tokens; `blank` and `solid` are the states after plain text without and with visible characters."""

    edges: dict[int, int] = field(default_factory=dict)
    blank: int = -1
    solid: int = -1
    role: Role = ""


class Automaton:
    """States of an answer `transcript[T/L][task]outputs` and what may follow in each.

    Args:
        codec: tokenizer and registry.

    Attributes:
        edge_ids, edge_next: `(states, edges)` tokens and the states they lead to; the first one fills up, -1 if none.
        blank_next, solid_next: `(states,)` state after plain text that is blank or is not; -1 where none may stand.
        need: `(states,)` tokens of the shortest completion, the end-of-text token included.
        groups, empty, inside: `(states,)` bool: between phrases, in a phrase without and with visible text.

    Raises:
        UserError: the tokenizer does not give a label back as it is written.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._eos = codec.eos_id
        self._states = [_State({codec.eos_id: END})]
        self._finish = self._new({codec.eos_id: END})
        entry = {codec.marker_ids[task.marker]: self._task(task) for task in codec.registry}
        self._starts: dict[Request, int] = {}
        separator = codec.marker_ids[SEPARATOR]
        control = self._new(entry) if entry else None
        free = {} if control is None else {separator: control}
        self._starts[None, False] = self._text({**free, self._eos: END})
        self._starts[None, True] = self._text({self._eos: END})
        for task in codec.registry:
            marker = codec.marker_ids[task.marker]
            self._starts[task.name, False] = self._text(dict(free))
            self._starts[task.name, True] = self._text({separator: self._new({marker: entry[marker]})})
        self._tables()

    def start(self, task: str | None, forced: bool) -> int:
        """State before the first token.

        Args:
            task: asked for; a bare transcript is then no answer. None: a transcript with or without a task part.
            forced: the task is the one asked for; with None, the transcript alone.
        """
        return self._starts[task, forced]

    def __len__(self) -> int:
        return len(self._states)

    # ---- building --------------------------------------------------------------------------------------------------

    def _new(self, edges: Mapping[int, int] | None = None, role: Role = "") -> int:
        self._states.append(_State(dict(edges or {}), role=role))
        return len(self._states) - 1

    def _text(self, edges: Mapping[int, int]) -> int:
        state = self._new(edges)
        self._states[state].blank = self._states[state].solid = state
        return state

    def _task(self, task: Task) -> int:
        if isinstance(task, SpanTask):
            return self._spans(task)
        return self._label_set(task) if task.multi else self._one_label(task)

    def _spans(self, task: SpanTask) -> int:
        groups = self._new({self._eos: END}, "groups")
        for label in task.labels:
            inside = self._text({self._codec.marker_ids[task.close_of(label)]: groups})
            self._states[inside].role = "inside"
            empty = self._new(role="empty")
            self._states[empty].blank, self._states[empty].solid = empty, inside
            self._states[groups].edges[self._codec.marker_ids[task.open_of(label)]] = empty
        return groups

    def _one_label(self, task: LabelTask) -> int:
        return self._new({self._codec.marker_ids[task.open]: self._trie(task, dict.fromkeys(task.labels, self._finish))})

    def _label_set(self, task: LabelTask) -> int:
        """After a label only those behind it in the registry: their order is fixed, and none can come twice."""
        after: dict[str, int] = {}
        for label in reversed(task.labels):
            after[label] = self._more_labels(task, dict(after))
        return self._more_labels(task, after)

    def _more_labels(self, task: LabelTask, after: Mapping[str, int]) -> int:
        state = self._new({self._eos: END})
        if after:
            self._states[state].edges[self._codec.marker_ids[task.open]] = self._trie(task, after)
        return state

    def _trie(self, task: LabelTask, after: Mapping[str, int]) -> int:
        """Token trie of labels; the closing marker ends each in its own state."""
        root = self._new()
        for label, state in after.items():
            node = root
            for token in label_ids(self._codec, task, label):
                edges = self._states[node].edges
                if token not in edges:
                    edges[token] = self._new()
                node = edges[token]
            self._states[node].edges[self._codec.marker_ids[task.close]] = state
        return root

    def _tables(self) -> None:
        width = max(len(s.edges) for s in self._states)
        # Filled up with a state's first edge, so that scores written to all of a row's edges agree.
        full = [list(s.edges.items()) or [(-1, -1)] for s in self._states]
        rows = [edges + [edges[0]] * (width - len(edges)) for edges in full]
        table = torch.tensor(rows, dtype=torch.long)
        self.edge_ids, self.edge_next = table[..., 0].contiguous(), table[..., 1].contiguous()
        self.blank_next = torch.tensor([s.blank for s in self._states])
        self.solid_next = torch.tensor([s.solid for s in self._states])
        self.groups, self.empty, self.inside = (torch.tensor([s.role == role for s in self._states])
                                                for role in ("groups", "empty", "inside"))
        self.need = self._shortest()

    def _shortest(self) -> Tensor:
        far = torch.iinfo(torch.long).max // 2
        need = torch.full((len(self._states),), far)
        need[END] = 0
        while True:
            through = torch.cat([self.edge_next, self.blank_next[:, None], self.solid_next[:, None]], dim=1)
            costs = torch.where(through >= 0, need[through.clamp(min=0)] + 1, far)
            shorter = torch.minimum(need, costs.min(dim=1).values)
            if torch.equal(shorter, need):
                return need
            need = shorter


def label_ids(codec: TextCodec, task: LabelTask, label: str) -> list[int]:
    """Ids of a label as it stands between its markers.

    Raises:
        UserError: they decode to something else, so that no answer could ever be this label.
    """
    ids = codec.text_ids(label)
    if codec.decode(ids) != label:
        raise UserError(f"task '{task.name}': the tokenizer gives label '{label}' back as '{codec.decode(ids)}'; rename it")
    return ids
