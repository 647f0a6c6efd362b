"""The one way to decode: several tasks of several utterances, from one pass of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unislu_llm.config import DecodeConfig
from unislu_llm.data.batch import Batch
from unislu_llm.decoding.answer import Answer, fill
from unislu_llm.decoding.grammar import GrammarProcessor, Request, grammar_of, label_ids
from unislu_llm.decoding.hypothesis_bias import HypothesisBias
from unislu_llm.decoding.search import (
    Decoded,
    Processor,
    beam_search,
    one_by_one,
    padded,
    score_labels,
)
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State
from unislu_llm.tasks import ASR, SEPARATOR, LabelTask

_MOST_LABELS = 64  # tasks with more are decoded token by token: each label costs memory

# Row of an utterance in the batch, and a task asked of it (`asr`: its transcript alone).
Pair = tuple[int, str]
Found = dict[Pair, list[Decoded]]  # answers, best first
Shares = dict[Pair, Tensor]  # probabilities `(labels,)` of answers that are labels


class _Plan(NamedTuple):
    need: int = 0  # tokens of its shortest answer
    spare: int = 0  # by which its longest label is longer than the shortest
    scored: bool = False  # whether its labels are scored


class Engine:
    """Answers of a model.

    With `force_task`, an utterance is transcribed once and each of its tasks continues a copy of
    the cache behind a forced control token. Each answer is then, token for token, that of the task
    asked alone, but that a transcript which the budget cuts is cut where every one of the tasks
    still has room. With the grammar, a task with one label is answered by scoring all of its
    labels. With beams, the best transcript is continued by beams of each task.

    Without `force_task` (the paper's protocol) the model chooses its control token; one
    continuation serves all tasks asked. The model is in eval mode while it decodes.

    Raises:
        UserError: options that do not go together, or a label that the tokenizer cannot spell.
    """

    def __init__(self, model: SLUModel, options: DecodeConfig | None = None) -> None:
        self.model, self.options = model, options or DecodeConfig()
        if self.options.temperature and self.options.num_beams > 1:
            raise UserError("decode.temperature samples one answer; it takes num_beams 1")
        self._ids = model.tokenizer.marker_ids
        constrained = self.options.grammar or self.options.grounded
        self._grammar = grammar_of(model.tokenizer, model.device) if constrained else None
        most = self.options.max_new_tokens
        self._most = most if model.room is None else min(most, model.room)
        self._plans = {name: self._plan(name) for name in (ASR, *model.registry.names)}

    def _plan(self, name: str) -> _Plan:
        task = None if name == ASR else self.model.registry[name]
        need = self._grammar.need((name, True)) if self._grammar else 0
        if not (self._grammar and isinstance(task, LabelTask) and not task.multi
                and len(task.labels) <= _MOST_LABELS):
            return _Plan(need)
        lengths = [len(label_ids(self.model.tokenizer, task, label)) for label in task.labels]
        spare = max(lengths) - min(lengths)
        return _Plan(need, spare, need + spare <= self._most)

    @torch.inference_mode()
    def answer(self, batch: Batch, tasks: Sequence[Sequence[str]], *,
               n_best: int = 1) -> list[Answer]:
        """What each utterance of a batch says.

        Args:
            batch: without regard to its targets.
            tasks: of each utterance; none for its transcript alone.
            n_best: answers to each task, from the beams.

        Raises:
            UserError: an unknown task, more answers than beams, or a `max_new_tokens` below the
                shortest answer.
        """
        if not 1 <= n_best <= self.options.num_beams:
            raise UserError(f"n_best={n_best} must be 1 to num_beams={self.options.num_beams}")
        tokenizer, names = self.model.tokenizer, [list(dict.fromkeys(t)) or [ASR] for t in tasks]
        for name in {name for some in names for name in some} - set(self._plans):
            self.model.registry[name]  # raises, and names what it knows
        training = self.model.training
        self.model.eval()
        try:
            state = self.model.prefill(batch.to(self.model.device))
            read, by_ctc = state.hypothesis, state.ctc_hypothesis
            way = self._by_task if self.options.force_task else self._free
            found, shares = way(state, batch.durations, names)
        finally:
            self.model.train(training)
        answers = []
        for i, some in enumerate(names):
            hypothesis = batch.examples[i].utterance.hypothesis if read is not None else None
            of_ctc = tokenizer.decode(by_ctc[i]) if by_ctc is not None else None
            answers.append(fill(
                Answer("", batch.durations[i], hypothesis=hypothesis, ctc_hypothesis=of_ctc),
                tokenizer, {name: found[i, name][:n_best] for name in some},
                {name: shares[i, name] for name in some if (i, name) in shares},
                forced=self.options.force_task, cut_loops=self._grammar is not None,
                several=n_best > 1))
        return answers

    def _free(self, state: State, seconds: Sequence[float],
              names: Sequence[list[str]]) -> tuple[Found, Shares]:
        """One answer for all tasks: whatever the model chooses to say."""
        # Any of the tasks stands for all: free, their grammar is the same.
        requests = [(some[0], False) for some in names]
        need = [self._grammar.need(r) if self._grammar else 0 for r in requests]
        room = [self._budget(s, n) for s, n in zip(seconds, need, strict=True)]
        ranked = self._search(state, room, [[self.model.tokenizer.eos_id]] * len(names),
                              self._processors(requests, room, state))
        return {(i, name): ranked[i] for i, some in enumerate(names) for name in some}, {}

    def _by_task(self, state: State, seconds: Sequence[float],
                 names: Sequence[list[str]]) -> tuple[Found, Shares]:
        """Transcripts once, then each task from a copy of the cache."""
        requests: list[Request] = []
        room = []
        for some, length in zip(names, seconds, strict=True):
            # A transcript is closed in time for the task with the longest shortest answer, and
            # for the longest of the labels that are scored: what is left to it depends on the
            # tasks asked and not on what they will answer.
            plans = {name: self._plans[name] for name in some}
            longest = max(some, key=lambda name: plans[name].need)
            need = plans[longest].need
            reserve = max([p.need + p.spare - need for p in plans.values() if p.scored] + [0])
            requests.append((longest, True))
            room.append(min(self._most, max(need, self._budget(length, need) - reserve)))
        eos, separator = self.model.tokenizer.eos_id, self._ids[SEPARATOR]
        stops = [[eos if some == [ASR] else separator, eos] for some in names]
        ranked = self._search(state, room, stops, self._processors(requests, room, state))
        if self.options.num_beams > 1:
            # The beams' own states are gone; the best transcripts are read again, in one step.
            ids = padded([answers[0].ids[:-1] for answers in ranked], state.mask.device)
            if ids.shape[1]:
                self.model.step(state, ids.clamp(min=0), ids >= 0)
        # Rows are of different length: without gaps, sliding windows see what they would alone.
        state = state.compact()
        pairs = [(i, name) for i, some in enumerate(names) for name in some]
        found: Found = {pair: ranked[pair[0]] for pair in pairs}
        pairs = [(i, name) for i, name in pairs
                 if name != ASR and ranked[i][0].ids[-1:] == [separator]]
        shares = self._score(state, [p for p in pairs if self._plans[p[1]].scored], found)
        self._continue(state, [p for p in pairs if not self._plans[p[1]].scored], seconds, found)
        return found, shares

    def _score(self, state: State, pairs: Sequence[Pair], found: Found) -> Shares:
        """Answer tasks with one label by their labels, the likeliest first."""
        shares: Shares = {}
        for name in dict.fromkeys(name for _, name in pairs):
            task, some = self.model.registry[name], [pair for pair in pairs if pair[1] == name]
            assert isinstance(task, LabelTask)
            rows, answers = score_labels(self.model, state.take([i for i, _ in some]), task)
            for pair, row, labels in zip(some, rows, answers, strict=True):
                order = row.argsort(descending=True, stable=True).tolist()
                found[pair] = [found[pair][0] + labels[label] for label in order]
                shares[pair] = row
        return shares

    def _continue(self, state: State, pairs: Sequence[Pair], seconds: Sequence[float],
                  found: Found) -> None:
        """Decode tasks behind their transcripts, all of them in one batch."""
        budgets = {(i, name): self._budget(seconds[i], self._plans[name].need)
                   for i, name in pairs}
        # Without the grammar, a transcript may have used all of its budget.
        pairs = [p for p in pairs if len(found[p][0].ids) + 1 < budgets[p]]
        if not pairs:
            return
        state = state.take([i for i, _ in pairs])
        controls = [self._ids[self.model.registry[name].marker] for _, name in pairs]
        opening = torch.tensor([[self._ids[SEPARATOR], control] for control in controls],
                               device=state.mask.device)
        hidden = self.model.step(state, opening)
        state.hidden = hidden[:, 1]
        # The control token is forced, and still has the probability that the model gave it.
        log_probs = self.model.logits(hidden[:, 0]).float().log_softmax(-1)
        heads = [found[pair][0] + Decoded([control], known) for pair, control, known
                 in zip(pairs, controls, log_probs.gather(1, opening[:, 1:]).tolist(), strict=True)]
        # The grammar starts anew and reads the transcripts: each task has a budget of its own.
        processors = self._processors([(name, True) for _, name in pairs],
                                      [budgets[pair] for pair in pairs])
        for processor in processors:
            processor.advance(padded([h.ids for h in heads], state.mask.device, "left"))
        room = [budgets[pair] - len(h.ids) for pair, h in zip(pairs, heads, strict=True)]
        ranked = self._search(state, room, [[self.model.tokenizer.eos_id]] * len(pairs), processors)
        found |= {pair: [head + tail for tail in tails]
                  for pair, head, tails in zip(pairs, heads, ranked, strict=True)}

    def _search(self, state: State, room: Sequence[int], stops: Sequence[Sequence[int]],
                processors: Sequence[Processor]) -> list[list[Decoded]]:
        if self.options.num_beams > 1:
            return beam_search(self.model, state, room, stops, processors, self.options.num_beams)
        return [[answer] for answer in one_by_one(self.model, state, room, stops, processors,
                                                  self.options.temperature)]

    def _budget(self, seconds: float, need: int) -> int:
        """New tokens of an answer: by audio length, but with room for the shortest."""
        return min(self._most, max(self.options.bound(seconds), need))

    def _processors(self, requests: Sequence[Request], budgets: Sequence[int],
                    state: State | None = None) -> list[Processor]:
        """The grammar, and for transcripts from a state the hypothesis bias before it."""
        found: list[Processor] = []
        bonus = self.options.hypothesis_bias
        if bonus is None:
            bonus = self.model.config.hypothesis_bias
        if state is not None and bonus:
            # A model that reads no hypothesis is drawn to the one of its `ctc` projector.
            read = state.ctc_hypothesis if state.hypothesis is None else state.hypothesis
            if read is not None:
                found.append(HypothesisBias(self.model.tokenizer, read, bonus, self.model.device))
        if self._grammar is not None:
            found.append(GrammarProcessor(self._grammar, requests, budgets, self.options.grounded))
        return found
