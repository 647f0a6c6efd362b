"""The one way to decode: several tasks of several utterances, from one pass of the encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unislu_llm.config import DecodeConfig
from unislu_llm.data.batch import Batch
from unislu_llm.decoding.answer import Answer, fill
from unislu_llm.decoding.grammar import GrammarProcessor, Request, grammar_of
from unislu_llm.decoding.greedy import Greedy, Make, feed
from unislu_llm.decoding.hypothesis_bias import HypothesisBias
from unislu_llm.decoding.loops import loop_start
from unislu_llm.decoding.no_speech import evidence_of
from unislu_llm.decoding.phrases import PhraseBias, Phrases
from unislu_llm.decoding.search import Decoded, Ends, Processor, beam_search, padded, score_labels
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State
from unislu_llm.tasks import ASR, SEPARATOR, LabelTask

_MOST_LABELS = 64  # tasks with more are decoded token by token: each label costs memory

# Row of an utterance in the batch, and a task asked of it (`asr`: its transcript alone).
Pair = tuple[int, str]
Found = dict[Pair, list[Decoded]]  # answers, best first
Shares = dict[Pair, Tensor]  # probabilities `(labels,)` of answers that are labels
# What a batch says: these, and of each row of the prompt's state `ctc_hypothesis` and `start`.
Read = tuple[Found, Shares, list[list[int]] | None, Tensor | None]


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
    labels. With beams, the best transcript is continued by beams of each task. Without `force_task`
    (the paper's protocol) the model chooses its control token; one continuation serves all tasks.

    Raises UserError: options that do not go together, or a label that the tokenizer cannot spell.
    """

    def __init__(self, model: SLUModel, options: DecodeConfig | None = None,
                 phrases: Phrases | None = None) -> None:
        self.model, self.options, self.phrases = model, options or DecodeConfig(), phrases
        if self.options.temperature and self.options.num_beams > 1:
            raise UserError("decode.temperature samples one answer; it takes num_beams 1")
        self._ids = model.tokenizer.marker_ids
        constrained = self.options.grammar or self.options.grounded
        self._grammar = grammar_of(model.tokenizer, model.device) if constrained else None
        most = self.options.max_new_tokens
        self._transcript = self.options.transcript or model.config.transcript
        self._most = most if model.room is None else min(most, model.room)
        self._plans = {name: self._plan(name) for name in (ASR, *model.registry.names)}

    def _plan(self, name: str) -> _Plan:
        task = None if name == ASR else self.model.registry[name]
        need = self._grammar.need((name, True)) if self._grammar else 0
        if not (self._grammar and isinstance(task, LabelTask) and not task.multi
                and len(task.labels) <= _MOST_LABELS):
            return _Plan(need)
        lengths = [len(self.model.tokenizer.label_ids(task, label)) for label in task.labels]
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

        Raises UserError: an unknown task, more answers than beams, or a `max_new_tokens` or a
        decoder too small for the shortest answer.
        """
        if not 1 <= n_best <= self.options.num_beams:
            raise UserError(f"n_best={n_best} must be 1 to num_beams={self.options.num_beams}")
        tokenizer, names = self.model.tokenizer, [list(dict.fromkeys(t)) or [ASR] for t in tasks]
        for name in {name for some in names for name in some} - set(self._plans):
            self.model.registry[name]  # raises, and names what it knows
        training = self.model.training
        self.model.eval()
        try:
            read, by_ctc, start = self.model.hypotheses(batch), None, None
            if (read is not None and self._transcript == "verbatim" and self.options.force_task
                    and all(some == [ASR] for some in names)):  # there is nothing to ask the LLM
                end = Decoded([tokenizer.eos_id], [math.nan])
                found: Found = {(i, ASR): [self._kept(ids) + end] for i, ids in enumerate(read)}
                shares: Shares = {}
            else:
                way = self._by_task if self.options.force_task else self._free
                found, shares, by_ctc, start = way(batch.to(self.model.device), names)
        finally:
            self.model.train(training)
            evidence = ([e.utterance.evidence for e in batch.examples] if start is None else
                        evidence_of(tokenizer.base, self.model.lm, self.model.logits(start)))
        answers = []
        for i, some in enumerate(names):
            hypothesis = batch.examples[i].utterance.hypothesis if read is not None else None
            of_ctc = tokenizer.decode(by_ctc[i]) if by_ctc is not None else None
            answers.append(fill(
                Answer("", batch.durations[i], hypothesis=hypothesis, ctc_hypothesis=of_ctc,
                       evidence=evidence[i]),
                tokenizer, {name: found[i, name][:n_best] for name in some},
                {name: shares[i, name] for name in some if (i, name) in shares},
                forced=self.options.force_task, cut_loops=self._grammar is not None,
                several=n_best > 1))
        return answers

    def _raised(self, batch: Batch, state: State) -> list[tuple[str, ...]]:
        """Phrases like what each row's hypothesis says, or else what the model does without any."""
        assert self.phrases is not None
        if self.model.reads_hypothesis:
            return [self.phrases.like(e.utterance.hypothesis or "") for e in batch.examples]
        own, first = self.model.tokenizer, Engine(self.model, self.options)
        said = [a.transcript for a in first.answer(batch, [()] * len(batch))]
        state = state.take(range(len(said)))
        # Its text may have more tokens than an answer had.
        ids = [own.text_ids(text)[:min(fit, self._most) - 1] for text, fit in zip(
            said, self.model.fits(state, [1] * len(said)), strict=True)]
        hidden = [state.hidden, *feed(self.model, state, ids).unbind(1)]
        return self.phrases.maybe_said(own.base, said, [*map(len, ids)],
                                       map(self.model.logits, hidden))

    def _free(self, batch: Batch, names: Sequence[list[str]]) -> Read:
        """One answer for all tasks: whatever the model chooses to say."""
        state, seconds = self.model.prefill(batch), batch.durations
        by_ctc, start = state.ctc_hypothesis, state.start
        # Any of the tasks stands for all: free, their grammar is the same.
        requests = [(some[0], False) for some in names]
        need = [self._grammar.need(r) if self._grammar else 0 for r in requests]
        fits = self.model.fits(state, need)
        room = [*map(self._budget, seconds, need, fits)]
        eos, heads = self.model.tokenizer.eos_id, [Decoded()] * len(names)
        if self._way(state) == "verbatim":
            heads = self._verbatim(state, need)
            lengths = [len(head.ids) for head in heads]
            limits = [*map(self._budget, seconds, need, fits, lengths)]
            room = [limit - n for limit, n in zip(limits, lengths, strict=True)]
            make = self._behind(requests, limits, heads, Ends([self._ids[SEPARATOR], eos]))
        else:
            make = self._maker(requests, room, state, batch)
        ends = [[eos]] * len(names)
        ranked, _ = self._search(state, room, ends, make)
        return {(i, name): [heads[i] + tail for tail in ranked[i]]
                for i, some in enumerate(names) for name in some}, {}, by_ctc, start

    def _by_task(self, batch: Batch, names: Sequence[list[str]]) -> Read:
        """Transcripts once, then each task from a copy of the cache."""
        state, seconds = self.model.prefill(batch), batch.durations
        by_ctc, start = state.ctc_hypothesis, state.start
        requests: list[Request] = []
        room = []
        most = [max(self._plans[n].need + self._plans[n].spare for n in some) for some in names]
        fits = self.model.fits(state, most)
        for some, length, fit in zip(names, seconds, fits, strict=True):
            # A transcript is closed in time for the task with the longest shortest answer, and
            # for the longest of the labels that are scored: what is left to it depends on the
            # tasks asked and not on what they will answer.
            plans = {name: self._plans[name] for name in some}
            longest = max(some, key=lambda name: plans[name].need)
            need = plans[longest].need
            reserve = max([p.need + p.spare - need for p in plans.values() if p.scored] + [0])
            requests.append((longest, True))
            room.append(min(self._most, max(need, self._budget(length, need, fit) - reserve)))
        eos, separator = self.model.tokenizer.eos_id, self._ids[SEPARATOR]
        stops = [[eos if some == [ASR] else separator, eos] for some in names]
        verbatim = self._way(state) == "verbatim"
        if verbatim:
            ranked = [[head + Decoded([stop], [math.nan])] for head, (stop, *_) in
                      zip(self._verbatim(state, most), stops, strict=True)]
        else:
            make = self._maker(requests, room, state, batch)
            ranked, state = self._search(state, room, stops, make, goes_on=True)
            if self.options.num_beams > 1:
                # The beams' own states are gone; the best transcripts are read again, in one step.
                feed(self.model, state, [answers[0].ids[:-1] for answers in ranked])
        # Rows are of different length: without gaps, sliding windows see what they would alone.
        state.compact()
        pairs = [(i, name) for i, some in enumerate(names) for name in some]
        found: Found = {pair: ranked[pair[0]] for pair in pairs}
        pairs = [(i, name) for i, name in pairs
                 if name != ASR and ranked[i][0].ids[-1:] == [separator]]
        budgets = {(i, name): self._budget(seconds[i], self._plans[name].need, fits[i],
                                           len(ranked[i][0].ids) if verbatim else 0)
                   for i, name in pairs}
        # Without the grammar, a transcript may have used all of its budget.
        others = [pair for pair in pairs if not self._plans[pair[1]].scored
                  and len(ranked[pair[0]][0].ids) + 1 < budgets[pair]]
        pairs = [*(pair for pair in pairs if self._plans[pair[1]].scored), *others]
        if not pairs:
            return found, {}, by_ctc, start
        # From here on copies go on by themselves, which need the memory of what they are copies of.
        state = state.take([i for i, _ in pairs])
        return found, self._answer_tasks(state, pairs, budgets, found), by_ctc, start

    def _answer_tasks(self, state: State, pairs: Sequence[Pair], budgets: Mapping[Pair, int],
                      found: Found) -> Shares:
        """Answer tasks behind their transcripts, all of them in one batch; `state` is theirs."""
        n = sum(self._plans[name].scored for _, name in pairs)
        scored, others = pairs[:n], pairs[n:]
        tasks, separator = [self.model.registry[name] for _, name in pairs], self._ids[SEPARATOR]
        heads = [[separator, self._ids[task.marker]] for task in tasks]
        for head, task in zip(heads[:n], tasks, strict=False):
            assert isinstance(task, LabelTask)
            head.append(self._ids[task.open])
        hidden = feed(self.model, state, heads)
        shares = self._score(state, scored, hidden[:n], found)
        if others:
            state = state.take(range(n, len(pairs)))
            state.compact()
            self._continue(state, others, hidden[n:], budgets, found)
        return shares

    def _score(self, state: State, pairs: Sequence[Pair], hidden: Tensor, found: Found) -> Shares:
        """Answer tasks with one label by their labels, the likeliest first."""
        shares: Shares = {}
        for name in dict.fromkeys(name for _, name in pairs):
            task, some = self.model.registry[name], [n for n, p in enumerate(pairs) if p[1] == name]
            assert isinstance(task, LabelTask)
            rows, answers = score_labels(self.model, state, some, hidden[some], task)
            for pair, row, labels in zip([pairs[n] for n in some], rows, answers, strict=True):
                order = row.argsort(descending=True, stable=True).tolist()
                found[pair] = [found[pair][0] + labels[label] for label in order]
                shares[pair] = row
        return shares

    def _continue(self, state: State, pairs: Sequence[Pair], hidden: Tensor,
                  budgets: Mapping[Pair, int], found: Found) -> None:
        """Decode tasks behind their control tokens; `hidden` `(pairs, 2, dim)` of `[T/L]` and
        these."""
        state.hidden = hidden[:, 1]
        # The control token is forced, and still has the probability that the model gave it.
        controls = [self._ids[self.model.registry[name].marker] for _, name in pairs]
        index = torch.tensor(controls).to(hidden.device)[:, None]
        log_probs = self.model.logits(hidden[:, 0]).float().log_softmax(-1).gather(1, index)
        heads = [found[pair][0] + Decoded([control], known) for pair, control, known
                 in zip(pairs, controls, log_probs.tolist(), strict=True)]
        limits = [budgets[pair] for pair in pairs]
        make = self._behind([(name, True) for _, name in pairs], limits, heads)
        room = [limit - len(h.ids) for limit, h in zip(limits, heads, strict=True)]
        ends = [[self.model.tokenizer.eos_id]] * len(pairs)
        ranked, _ = self._search(state, room, ends, make)
        found |= {pair: [head + tail for tail in tails]
                  for pair, head, tails in zip(pairs, heads, ranked, strict=True)}

    def _search(self, state: State, room: Sequence[int], stops: Sequence[Sequence[int]],
                make: Make, goes_on: bool = False) -> tuple[list[list[Decoded]], State]:
        """Answers, best first, and a state: of beams the given one, else, where tasks go on from
        there, that in which all tokens but the last ones are read."""
        beams = self.options.num_beams
        if beams > 1:
            return beam_search(self.model, state, room, stops, make(), beams), state
        search = Greedy(self.model, state, room, stops, make, self.options.temperature)
        answers, state = search.run(goes_on=goes_on)
        return [[answer] for answer in answers], state

    def _verbatim(self, state: State, need: Sequence[int]) -> list[Decoded]:
        """Read the hypotheses as transcripts, behind which each row needs some tokens."""
        kept = [self._kept(ids) for ids in self._hypotheses(state) or ()]
        self.model.fits(state, [n + len(text.ids) for n, text in zip(need, kept, strict=True)])
        feed(self.model, state, [transcript.ids for transcript in kept])
        return kept

    def _kept(self, hypothesis: Sequence[int], loops: bool = False) -> Decoded:
        """A hypothesis as a transcript may have it, of which nothing is known but what it says."""
        ids = list(hypothesis[:None if loops else loop_start(hypothesis)])  # a copied loop is ours
        tokenizer, plain = self.model.tokenizer, vocabulary_of(self.model.tokenizer).plain
        if not plain[ids].all():  # tokens may have letters beside the bracket
            text = " ".join(tokenizer.decode(ids).replace("[", "").split())
            ids = [i for i in tokenizer.text_ids(text) if plain[i]]
        return Decoded(ids, [math.nan] * len(ids))

    def _budget(self, seconds: float, need: int, fit: int, verbatim: int = 0) -> int:
        """New tokens of an answer: by audio length, but with room for the shortest, and behind
        `verbatim` tokens of a hypothesis for as much as there is behind any; `fit` at most."""
        budget = min(self._most, max(self.options.bound(seconds), need))
        behind = verbatim + need + self.options.bound(0) if verbatim else 0
        return min(max(budget, behind), fit)

    @property
    def _bias(self) -> float:
        bonus = self.options.hypothesis_bias
        return self.model.config.hypothesis_bias if bonus is None else bonus

    def _hypotheses(self, state: State) -> list[list[int]] | None:
        """Ids of what transcripts go by: what the model reads, else its `ctc` projector's text."""
        return state.ctc_hypothesis if state.hypothesis is None else state.hypothesis

    def _way(self, state: State) -> str:
        """How transcripts are made: without a hypothesis `rewrite`."""
        return "rewrite" if self._hypotheses(state) is None else self._transcript

    def _maker(self, requests: Sequence[Request], budgets: Sequence[int], state: State,
               batch: Batch) -> Make:
        """What makes the processors of transcripts: what they are drawn to, then the grammar."""
        read = self._hypotheses(state)
        boost = self.phrases.boost if self.phrases else 0.0
        raised = self._raised(batch, state) if boost else []
        if read is not None:
            read = [self._kept(ids, loops=True).ids for ids in read]

        def make() -> list[Processor]:
            made, own = self._processors(requests, budgets), self.model.tokenizer
            if boost:
                ends = [*self._ids.values(), own.eos_id]
                made.insert(0, PhraseBias(own.base, raised, boost, ends))
            if read is not None:
                made.insert(0, HypothesisBias(own, read, self._bias, self.model.device))
            return made

        return make

    def _behind(self, requests: Sequence[Request], budgets: Sequence[int],
                heads: Sequence[Decoded], *more: Processor) -> Make:
        """What makes the processors of tasks: a grammar that starts anew and reads what stands, so
        that each task has a budget of its own."""
        read = padded([head.ids for head in heads], self.model.device, "left")

        def make() -> list[Processor]:
            processors = self._processors(requests, budgets)
            for processor in processors:
                processor.advance(read)
            return [*processors, *more]

        return make

    def _processors(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Processor]:
        """The grammar alone, or nothing."""
        return [] if self._grammar is None else [
            GrammarProcessor(self._grammar, requests, budgets, self.options.grounded)]
