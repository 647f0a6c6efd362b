"""The grammar itself: its state under any order of calls, and what it accepts for any registry and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from torch import Tensor

from unislu_llm.data.targets import TextCodec
from unislu_llm.decoding.automaton import END, Automaton
from unislu_llm.decoding.grammar import Grammar, grammar_of
from unislu_llm.decoding.vocabulary import Brackets, vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SEPARATOR, LabelTask, SpanTask, TaskRegistry
from unislu_llm.unified import parse

Build = Callable[..., SLUModel]


# State under any order of calls


def random_walk(processor: Any, rows: int, width: int, steps: int, seed: int, *, shuffle: bool) -> Tensor:
    """Decode random scores; with `shuffle`, rows continue a random row of their own group, as beams do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, 0, dtype=torch.long)
    for _ in range(steps):
        probabilities = processor(ids, torch.randn(rows, width, generator=generator)).softmax(-1)
        assert probabilities.isfinite().all()
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        if shuffle:
            ids = ids.view(2, rows // 2, -1)[:, torch.randint(rows // 2, (rows // 2,), generator=generator)].flatten(0, 1)
    return ids


@pytest.mark.parametrize("grounded", [False, True])
def test_reordered_rows_keep_their_own_state(build: Build, grounded: bool, registry: TaskRegistry) -> None:
    """The state carried through reordering is that of the ids read from the start."""
    codec = build("llm").codec
    grammar, width = grammar_of(codec), len(codec.tokenizer)

    class Checked:
        def __init__(self) -> None:
            self.carried = self.fresh()

        def fresh(self) -> Any:
            return grammar.processor([("ner", True), ("acts", True)], [40, 40], grounded=grounded)

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, list(codec.marker_ids.values())] += 3.0
            out: Tensor = self.carried(ids, scores)
            assert torch.equal(out, self.fresh()(ids, scores))
            return out

    for seed in range(4):
        ids = random_walk(Checked(), 8, width, 40, seed, shuffle=True)
        for i, row in enumerate(ids.tolist()):
            parsed = parse(codec.decode(row), registry, "ner" if i < 4 else "acts")
            assert codec.eos_id in row
            assert parsed.problems == ()


@pytest.mark.parametrize("metaspace", [None, "always", "first", "never"])
def test_text_never_spells_a_marker(tokenizer_of: Callable[..., Any], metaspace: str | None, registry: TaskRegistry) -> None:
    """`[`, `T`, `/`, `L`, `]` are plain tokens; together they would be read as a marker. Other brackets are text."""
    codec = TextCodec(tokenizer_of(metaspace), registry)
    single = {text: i for i, text in enumerate(vocabulary_of(codec).texts) if len(text) == 1}
    grammar, width = grammar_of(codec), len(codec.tokenizer)

    def allowed(text: str) -> list[bool]:
        ids = torch.tensor([[single[c] for c in text]])
        processor = grammar.processor([(None, False)], [50])
        return [bool(processor(ids[:, :n], torch.zeros(1, width))[0, ids[0, n]].isfinite()) for n in range(len(text))]

    for marker in codec.marker_ids:
        assert allowed(f"[x{marker}".replace("[x[", "[x [")) == [True] * (len(marker) + 2) + [False]
        assert allowed(f"[{marker}") == [True] * len(marker) + [False]
    for text in ("[x]", "[T]", "[T/L", "[ T/L]", "T/L]", "[[S", "[S]"[:2] + " ]"):
        assert all(allowed(text)), text
    generator = torch.Generator().manual_seed(0)
    favoured = torch.zeros(width)
    favoured[[single[c] for c in "[]TLS/NERA"]] = 8.0
    processor = grammar.processor([("ner", True)] * 16, [60] * 16, cut_loops=False)
    ids = torch.zeros(16, 0, dtype=torch.long)
    for _ in range(60):
        probabilities = processor(ids, favoured.expand(16, -1)).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    for row in ids.tolist():
        assert parse(codec.decode(row), registry, "ner").problems == ()


def test_a_step_asks_nothing_of_the_device(tiny_tokenizer: Callable[..., Any], registry: TaskRegistry) -> None:
    """Tensors without values: whatever would have to wait for a GPU's answer (`item`, `nonzero`, a mask as index) fails."""
    codec = TextCodec(tiny_tokenizer(), registry)
    processor = grammar_of(codec).processor([("ner", True), ("sa", False), (None, False)], [20] * 3)
    scores = torch.zeros(3, len(codec.tokenizer), device="meta")
    for length in range(4):
        assert processor(torch.zeros(3, length, dtype=torch.long, device="meta"), scores).shape == scores.shape


def test_brackets_follow_the_text(tokenizer_of: Callable[..., Any], registry: TaskRegistry) -> None:
    """The node after a token is the longest end of the text that begins a marker, whatever tokens spell it."""
    codec = TextCodec(tokenizer_of("never"), registry)
    vocabulary = vocabulary_of(codec)
    brackets = Brackets(vocabulary, list(codec.marker_ids))
    starts = sorted({m[:k] for m in codec.marker_ids for k in range(1, len(m))})
    generator = torch.Generator().manual_seed(0)
    pieces = [i for i, text in enumerate(vocabulary.texts) if text and (set(text) <= set("[]TLS/NERA") or i % 50 == 0)]
    seen = set()
    for _ in range(300):
        node, text = 0, ""
        for n in torch.randint(0, len(pieces), (12,), generator=generator).tolist():
            token = pieces[n]
            row = brackets.longer_ids[node].tolist()
            node = int(brackets.longer_nodes[node, row.index(token)]) if token in row else int(brackets.from_root[token])
            text += vocabulary.texts[token]
            tail = text[text.rfind("["):] if "[" in text else ""
            assert node == (starts.index(tail) + 1 if tail in starts else 0), text
            seen.add(node)
    assert len(seen) > 5


# Any registry


labels = st.lists(st.sampled_from(["a", "b", "sad", "sad face", "sad face mask", "sadness", "s", "face", "x-y", "zest", "12"]),
                  min_size=1, max_size=6, unique=True)
tasks = st.one_of(
    labels.map(lambda names: LabelTask("t", "[TT]", tuple(names), "[O]", "[/O]")),
    labels.map(lambda names: LabelTask("t", "[TT]", tuple(names), "[O]", "[/O]", multi=True)),
    labels.map(lambda names: SpanTask("t", "[TT]", tuple(f"L{i}" for i in range(len(names))))))


@given(tasks=st.lists(tasks, min_size=1, max_size=3), metaspace=st.sampled_from([None, "always", "first", "never"]),
       seed=st.integers(0, 1000), spare=st.integers(0, 25), data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_any_registry_gives_well_formed_answers(tokenizer_of: Callable[..., Any], tasks: list[Any], metaspace: str | None,
                                                seed: int, spare: int, data: Any) -> None:
    named = [replace(t, name=f"t{i}", marker=f"[T{i}]", **(
        {"labels": tuple(f"{name}-{i}" for name in t.labels)} if isinstance(t, SpanTask)
        else {"open": f"[O{i}]", "close": f"[/O{i}]"})) for i, t in enumerate(tasks)]
    registry = TaskRegistry(named)
    codec = TextCodec(tokenizer_of(metaspace), registry)
    grammar, width = Grammar(codec), len(codec.tokenizer)
    task = data.draw(st.sampled_from([*registry.names, None]))
    force = data.draw(st.booleans())
    request = task, force
    budget = grammar.need(request) + spare
    generator = torch.Generator().manual_seed(seed)
    processor = grammar.processor([request] * 3, [budget] * 3, grounded=data.draw(st.booleans()))
    ids = torch.zeros(3, 0, dtype=torch.long)
    for _ in range(budget):
        scores = torch.randn(3, width, generator=generator)
        scores[:, list(codec.marker_ids.values())] += 3.0
        ids = torch.cat([ids, torch.multinomial(processor(ids, scores).softmax(-1), 1, generator=generator)], dim=1)
    for row in ids.tolist():
        assert codec.eos_id in row
        parsed = parse(codec.decode(row), registry, task if force else None)
        assert parsed.problems == ()
        assert not force or parsed.task == task
        assert task is None or parsed.task is not None


def test_every_label_can_be_said_and_nothing_else(tiny_tokenizer: Callable[..., Any], registry: TaskRegistry) -> None:
    codec = TextCodec(tiny_tokenizer(), registry)
    automaton = Automaton(codec)

    def read(text_pieces: Sequence[str]) -> bool:
        """Whether the automaton accepts markers and texts, piece by piece, and the end of text after them."""
        state = automaton.start("emotion" if "[EMO]" in text_pieces else "acts", True)
        ids = [i for p in text_pieces for i in ([codec.marker_ids[p]] if p in codec.marker_ids else codec.text_ids(p))]
        for i in [*ids, codec.eos_id]:
            row = automaton.edge_ids[state].tolist()
            if i not in row:
                return False
            state = int(automaton.edge_next[state][row.index(i)])
        return state == END

    for label in registry["emotion"].labels:
        assert read([SEPARATOR, "[EMO]", "[E]", label, "[/E]"])
    assert not read([SEPARATOR, "[EMO]"])
    assert not read([SEPARATOR, "[EMO]", "[E]", "sad face", "[/E]", "[E]", "sad", "[/E]"])
    assert not read([SEPARATOR, "[EMO]", "[E]", "sa", "[/E]"])
    for chosen in range(16):
        names = [label for k, label in enumerate(registry["acts"].labels) if chosen >> k & 1]
        groups = [["[A]", name, "[/A]"] for name in names]
        assert read([SEPARATOR, "[ACT]", *(p for g in groups for p in g)])
        if len(names) > 1:
            assert not read([SEPARATOR, "[ACT]", *(p for g in reversed(groups) for p in g)]), "registry order alone"
        if names:
            assert not read([SEPARATOR, "[ACT]", *groups[0], *groups[0]]), "none twice"


def test_a_label_that_the_tokenizer_cannot_spell_is_named(tiny_tokenizer: Callable[..., Any]) -> None:
    registry = TaskRegistry([LabelTask("t", "[TT]", ("fine", "odd</s>"), "[O]", "[/O]")])
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("</s>", "")
    codec = TextCodec(tokenizer, registry)
    with pytest.raises(UserError, match=r"task 't': the tokenizer gives label 'odd</s>' back as 'odd'; rename it"):
        Automaton(codec)
