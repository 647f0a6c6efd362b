"""The grammar itself: its state under any order of calls, what it accepts for any registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from torch import Tensor

from tests.decoding.common import REGISTRY
from unislu_llm.decoding.grammar import END, Grammar, GrammarProcessor, grammar_of
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.tasks import ASR, SEPARATOR, LabelTask, Span, SpanTask, TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer
from unislu_llm.unified import parse
from unislu_llm.utterance import Utterance


def draw(processor: Any, scores: Tensor, generator: torch.Generator) -> Tensor:
    """A token a row, drawn from what the processor leaves of the scores."""
    shares = processor(scores).softmax(-1)
    assert shares.isfinite().all()
    return torch.multinomial(shares, 1, generator=generator)


@pytest.mark.parametrize("grounded", [False, True])
def test_reordered_rows_keep_their_own_state(tokenizer: UnifiedTokenizer, grounded: bool) -> None:
    """The state that is carried through reordering is that of the ids read at once."""
    grammar, width = grammar_of(tokenizer), len(tokenizer.base)
    markers = list(tokenizer.marker_ids.values())
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        requests = [("ner", True), ("acts", True)]
        carried = GrammarProcessor(grammar, requests, [40, 40], grounded)
        carried.reorder(torch.arange(2).repeat_interleave(4))
        ids = torch.zeros(8, 0, dtype=torch.long)
        for _ in range(40):
            scores = torch.randn(8, width, generator=generator)
            scores[:, markers] += 3.0
            fresh = GrammarProcessor(grammar, [r for r in requests for _ in range(4)], [40] * 8,
                                     grounded)
            fresh.advance(ids)
            assert torch.equal(carried(scores), fresh(scores))
            tokens = draw(carried, scores, generator)
            # As beams do: rows continue a random row of their own utterance.
            rows = torch.randint(4, (2, 4), generator=generator) + torch.tensor([[0], [4]])
            rows = rows.flatten()
            carried.reorder(rows)
            carried.advance(tokens[rows])
            ids = torch.cat([ids, tokens], dim=1)[rows]
        for i, row in enumerate(ids.tolist()):
            assert tokenizer.eos_id in row
            task = "ner" if i < 4 else "acts"
            assert parse(tokenizer.decode(row), REGISTRY, task).problems == ()


def test_a_step_asks_nothing_of_the_device(tokenizer: UnifiedTokenizer) -> None:
    """Tensors without values: whatever would have to wait for a GPU's answer fails."""
    requests = [("ner", True), ("sa", False), (ASR, False)]
    processor = GrammarProcessor(Grammar(tokenizer, "meta"), requests, [20] * 3, False)
    scores = torch.zeros(3, len(tokenizer.base), device="meta")
    for _ in range(4):
        assert processor(scores).shape == scores.shape
        processor.advance(torch.zeros(3, 2, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("metaspace", [None, "always", "first", "never"])
def test_text_never_spells_a_marker(tokenizer_of: Callable[..., Any],
                                    metaspace: str | None) -> None:
    """`T`, `/`, `L` and `]` are text; behind a `[` they would be read as a marker."""
    tokenizer = UnifiedTokenizer(tokenizer_of(metaspace), REGISTRY)
    vocabulary, width = vocabulary_of(tokenizer), len(tokenizer.base)
    favoured = torch.zeros(16, width)
    favoured[:, [i for i, t in enumerate(vocabulary.texts) if t and t in "[]TLS/NERA"]] = 8.0
    generator = torch.Generator().manual_seed(0)
    processor = GrammarProcessor(grammar_of(tokenizer), [("ner", True)] * 16, [60] * 16)
    ids = torch.zeros(16, 0, dtype=torch.long)
    for _ in range(60):
        ids = torch.cat([ids, draw(processor, favoured, generator)], dim=1)
        processor.advance(ids[:, -1:])
    texts = [tokenizer.decode(row) for row in ids.tolist()]
    assert all(parse(text, REGISTRY, "ner").problems == () for text in texts)
    single = {text: i for i, text in enumerate(vocabulary.texts) if len(text) == 1}
    free = GrammarProcessor(grammar_of(tokenizer), [(ASR, False)], [9])
    allowed = free(torch.zeros(1, width)).isfinite()
    assert [bool(allowed[0, single[c]]) for c in "T/L][("] == [True, True, True, True, False, True]


def test_what_is_well_formed_anyway_stays_as_it_is(tokenizer: UnifiedTokenizer) -> None:
    """Scores of what is allowed are not touched, and every token of a target is allowed."""
    text = "anna voted against the law, of (2004)."
    rows: list[tuple[str | None, dict[str, Any]]] = [
        ("ner", {"ner": (Span("PERSON", 0, 4), Span("LAW", 19, 26))}), ("ner", {"ner": ()}),
        ("sa", {"sa": "Neutral"}), ("emotion", {"emotion": "sad face"}),
        ("acts", {"acts": ("thanks", "question")}), ("acts", {"acts": ()}), (None, {})]
    width = len(tokenizer.base) + 5
    for task, labels in rows:
        target = tokenizer.target(Example(Utterance("u", None, text, labels), task))
        request = (task or ASR, task is not None)
        processor = GrammarProcessor(grammar_of(tokenizer), [request], [len(target)], task == "ner")
        for n, token in enumerate(target.ids):
            scores = torch.randn(1, width)
            masked = processor(scores)
            allowed = masked.isfinite()
            assert allowed[0, token], f"token {n} of {task}: {tokenizer.decode(target.ids[:n + 1])}"
            assert torch.equal(masked[allowed], scores[allowed])
            assert not allowed[0, len(tokenizer.base):].any()
            processor.advance(torch.tensor([[token]]))


labels = st.lists(st.sampled_from(["a", "b", "sad", "sad face", "sad face mask", "sadness", "s",
                                   "face", "x-y", "zest", "12"]), min_size=1, max_size=6,
                  unique=True)
tasks = st.one_of(
    labels.map(lambda names: LabelTask("t", "[TT]", tuple(names), "[O]", "[/O]")),
    labels.map(lambda names: LabelTask("t", "[TT]", tuple(names), "[O]", "[/O]", multi=True)),
    labels.map(lambda names: SpanTask("t", "[TT]", tuple(f"L{i}" for i in range(len(names))))))


@given(tasks=st.lists(tasks, min_size=1, max_size=3),
       metaspace=st.sampled_from([None, "always", "first", "never"]),
       seed=st.integers(0, 1000), spare=st.integers(0, 25), data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))
def test_any_registry_gives_well_formed_answers(
        tokenizer_of: Callable[..., Any], tasks: list[Any], metaspace: str | None, seed: int,
        spare: int, data: Any) -> None:
    named = [replace(t, name=f"t{i}", marker=f"[T{i}]", **(
        {"labels": tuple(f"{name}-{i}" for name in t.labels)} if isinstance(t, SpanTask)
        else {"open": f"[O{i}]", "close": f"[/O{i}]"})) for i, t in enumerate(tasks)]
    registry = TaskRegistry(named)
    tokenizer = UnifiedTokenizer(tokenizer_of(metaspace), registry)
    grammar, width = Grammar(tokenizer), len(tokenizer.base)
    task = data.draw(st.sampled_from([*registry.names, ASR]))
    force = data.draw(st.booleans())
    budget = grammar.need((task, force)) + spare
    generator = torch.Generator().manual_seed(seed)
    processor = GrammarProcessor(grammar, [(task, force)] * 3, [budget] * 3,
                                 data.draw(st.booleans()))
    ids = torch.zeros(3, 0, dtype=torch.long)
    for _ in range(budget):
        scores = torch.randn(3, width, generator=generator)
        scores[:, list(tokenizer.marker_ids.values())] += 3.0
        ids = torch.cat([ids, draw(processor, scores, generator)], dim=1)
        processor.advance(ids[:, -1:])
    for row in ids.tolist():
        assert tokenizer.eos_id in row
        parsed = parse(tokenizer.decode(row), registry, task if force else None)
        assert parsed.problems == ()
        assert not force or parsed.task == (None if task == ASR else task)
        assert task == ASR or parsed.task is not None


def test_every_label_can_be_said_and_nothing_else(tokenizer: UnifiedTokenizer) -> None:
    grammar, markers = grammar_of(tokenizer), tokenizer.marker_ids

    def read(pieces: Sequence[str]) -> bool:
        """Whether markers and texts, and the end of text behind them, are accepted."""
        state = grammar.starts["emotion" if "[EMO]" in pieces else "acts", True]
        ids = [i for p in pieces for i in ([markers[p]] if p in markers else tokenizer.text_ids(p))]
        for i in [*ids, tokenizer.eos_id]:
            row = grammar.edge_ids[state].tolist()
            if i not in row:
                return False
            state = int(grammar.edge_next[state][row.index(i)])
        return state == END

    head = [SEPARATOR, "[EMO]"]
    assert all(read([*head, "[E]", label, "[/E]"]) for label in REGISTRY["emotion"].labels)
    assert not read(head)
    assert not read([*head, "[E]", "sad face", "[/E]", "[E]", "sad", "[/E]"])
    assert not read([*head, "[E]", "sa", "[/E]"])
    for chosen in range(16):
        names = [label for k, label in enumerate(REGISTRY["acts"].labels) if chosen >> k & 1]
        groups = [["[A]", name, "[/A]"] for name in names]
        head = [SEPARATOR, "[ACT]"]
        assert read([*head, *chain(*groups)])
        if len(names) > 1:  # in the registry's order alone
            assert not read([*head, *chain(*reversed(groups))])
        if names:  # none twice
            assert not read([*head, *groups[0], *groups[0]])


def test_a_label_that_cannot_be_spelt_is_named(tiny_tokenizer: Callable[..., Any]) -> None:
    registry = TaskRegistry([LabelTask("t", "[TT]", ("fine", "odd</s>"), "[O]", "[/O]")])
    base = tiny_tokenizer()
    base.backend_tokenizer.normalizer = normalizers.Replace("</s>", "")
    with pytest.raises(UserError, match=r"task 't': the tokenizer gives label 'odd</s>' back as "
                                        "'odd'; rename it"):
        Grammar(UnifiedTokenizer(base, registry))
