"""With the grammar no output is malformed, whatever the model says; nothing else about decoding changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.decoding.automaton import END, Automaton
from unislu_llm.decoding.generate import DecodeOptions, decode_batch, predict, prediction_row, understand
from unislu_llm.decoding.grammar import Grammar, grammar_of
from unislu_llm.decoding.grounding import Grounding
from unislu_llm.decoding.loops import LoopTracker, has_loop
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import NER, SA, SEPARATOR, LabelTask, SpanTask, TaskRegistry
from unislu_llm.unified import parse
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]
EMOTION = LabelTask("emotion", "[EMO]", ("sad", "sad face", "happy", "sad face mask"), "[E]", "[/E]")
ACTS = LabelTask("acts", "[ACT]", ("question", "answer", "question mark", "thanks"), "[A]", "[/A]", multi=True)
TASKS = TaskRegistry([NER, SA, EMOTION, ACTS])
OPTIONS = DecodeOptions(force_task=True, grammar=True, tokens_per_second=20.0, extra_tokens=16)
BOTH = pytest.mark.parametrize("kind", ["llm", "whisper"])


@pytest.fixture(scope="module")
def tokenizer_of(tiny_tokenizer: Callable[..., Any]) -> Callable[[str | None], Any]:
    """A tokenizer of each kind, trained once; those that start texts with a blank decode as Llama 2 does."""

    @lru_cache
    def trained(metaspace: str | None) -> Any:
        tokenizer = tiny_tokenizer(metaspace=metaspace)
        if metaspace in ("always", "first"):
            tokenizer.backend_tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        return tokenizer

    return lambda metaspace: deepcopy(trained(metaspace))


@pytest.fixture
def build(tiny_speech_llm: Build, tiny_whisper_slu: Build) -> Build:
    """A model with five tasks; markers as likely as words, so that random answers have a task part too."""

    def made(kind: str, seed: int = 0, louder: float = 1.5, **more: Any) -> SLUModel:
        options: dict[str, Any] = {"tasks": TASKS.to_dict(), "seed": seed, "whisper_options": {"init_std": 0.3}} | more
        model = tiny_speech_llm(**options) if kind == "llm" else tiny_whisper_slu(**options)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".rows"):
                    parameter.normal_(std=louder * 0.3)
        return model

    return made


def waves(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(int(16_000 * (0.3 + 0.25 * (i % 5))), generator=generator) for i in range(n)]


def asked(tasks: Sequence[str | None]) -> list[Sample]:
    return [Sample(Utterance(str(i), None, "", {}), task) for i, task in enumerate(tasks)]


def problems(model: SLUModel, samples: Sequence[Sample], answers: Sequence[Sequence[int]]) -> list[str]:
    """Malformations of answers, repetition apart, which no grammar can tell from speech."""
    return [p for s, ids in zip(samples, answers, strict=True)
            for p in prediction_row(model.codec, s, ids, 1.0)["problems"]]


# Every output is well formed


@BOTH
@pytest.mark.parametrize("way", ["greedy", "beam", "sampling", "grounded", "grounded beam"])
def test_every_output_parses_without_problem(build: Build, kind: str, way: str, record_property: Any) -> None:
    names: list[str | None] = [*TASKS.names, None]
    free: Counter[str] = Counter()
    spoken = Counter[str]()
    for seed, extra in ((0, 0), (1, 8), (2, 40)):
        model = build(kind, seed)
        samples = asked(names * 2)
        options = replace(OPTIONS, extra_tokens=extra, num_beams=4 if "beam" in way else 1, grounded="grounded" in way)
        for force in (True, False):
            answers = decode(model, samples, replace(options, force_task=force), way=way, seed=seed)
            kinds = problems(model, samples, answers)
            assert [k for k in kinds if force or k != "wrong_task"] == []
            for ids in answers:
                parsed = parse(model.codec.decode(ids), TASKS)
                spoken[parsed.task or "asr"] += 1
                if "grounded" in way and parsed.task == "ner":
                    assert all(f" {p} " in f" {parsed.transcript} " for _, p in parsed.outputs or ()) or check_whole(model, ids)
                    spoken["phrases"] += len(parsed.outputs or ())
        off = decode(model, samples, replace(options, grammar=None, grounded=False), way=way, seed=seed)
        free.update(problems(model, samples, off))
    assert sum(free.values()) > 10, "without the grammar a random model does nearly everything wrong"
    assert all(spoken[name or "asr"] for name in names)
    assert "grounded" not in way or spoken["phrases"] > 0
    record_property("problems without grammar", dict(free))
    print(kind, way, "without grammar:", dict(free), "with:", dict(spoken))


def decode(model: SLUModel, samples: Sequence[Sample], options: DecodeOptions, *, way: str = "sampling",
           seed: int = 0) -> list[list[int]]:
    """Decode noise; with beams, grounded answers are steered to phrases: those of a random model have no room for them."""
    audio, codec, generate = waves(len(samples), seed), model.codec, model.generate
    torch.manual_seed(seed)

    def changed(*args: Any, **kwargs: Any) -> Tensor:
        if way == "sampling":
            return generate(*args, **kwargs, do_sample=True, temperature=1.5, top_k=0)
        if way == "grounded beam":
            more = {codec.marker_ids[m]: score for m, score in ((SEPARATOR, 5.0), ("[ORG]", 20.0), ("[LAW]", 20.0))}
            kwargs["logits_processor"].insert(0, Steer(more | {codec.eos_id: -20.0}))
        return generate(*args, **kwargs)

    model.generate = changed  # type: ignore[method-assign, assignment]
    try:
        return decode_batch(model, samples, audio, options)
    finally:
        model.generate = generate  # type: ignore[method-assign]


class Steer(LogitsProcessor):
    """Add to the scores of some tokens."""

    def __init__(self, more: dict[int, float]) -> None:
        self.more = more

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.clone()
        for token, more in self.more.items():
            scores[:, token] += more
        return scores


def check_whole(model: SLUModel, ids: Sequence[int]) -> bool:
    """Every phrase is a run of tokens of the transcript that no word sticks out of."""
    codec, vocabulary = model.codec, vocabulary_of(model.codec)
    cut = list(ids).index(codec.marker_ids[SEPARATOR])
    transcript, phrase = list(ids[:cut]), None
    markers = {*codec.marker_ids.values(), codec.eos_id}
    for i in ids[cut + 2:]:
        if i not in markers:
            phrase = [*(phrase or []), i]
        elif phrase:
            n, found = len(phrase), phrase
            assert any(transcript[k:k + n] == found
                       and (k == 0 or not vocabulary.joins(transcript[k - 1], transcript[k]))
                       and (k + n == cut or not vocabulary.joins(transcript[k + n - 1], transcript[k + n]))
                       for k in range(cut - n + 1))
            assert codec.decode(phrase) in codec.decode(transcript)
            phrase = None
    return True


@BOTH
def test_the_shortest_budget_gives_the_shortest_answer(build: Build, kind: str) -> None:
    model = build(kind)
    grammar = grammar_of(model.codec)
    lengths = {(name, force): grammar.need((name, force)) for name in (*TASKS.names, None) for force in (True, False)}
    assert lengths["ner", True] == lengths["acts", True] == 3, "[T/L], control token, end of text"
    assert lengths["sa", True] == min(len(model.codec.text_ids(label)) for label in SA.labels) + 5
    assert lengths[None, True] == lengths[None, False] == 1
    for (name, force), need in lengths.items():
        for budget in (need, need + 1):
            for beams in (1, 4):
                options = DecodeOptions(max_new_tokens=budget, extra_tokens=0, tokens_per_second=0, force_task=force,
                                        num_beams=beams, grammar=True)
                samples = asked([name] * 3)
                answers = decode_batch(model, samples, waves(3), options)
                assert all(len(ids) <= budget for ids in answers)
                assert [p for p in problems(model, samples, answers) if force or p != "wrong_task"] == []
        if need > 1:
            short = DecodeOptions(max_new_tokens=need - 1, force_task=force, grammar=True)
            with pytest.raises(UserError, match=rf"{need - 1} new tokens are too few.*{name}.*{need}"):
                decode_batch(model, asked([name]), waves(1), short)


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("grounded", [False, True])
def test_batched_equals_serial(build: Build, kind: str, beams: int, grounded: bool) -> None:
    model = build(kind, seed=3)
    samples = asked(["ner", "sa", None, "acts", "ner", "emotion"])
    options = replace(OPTIONS, num_beams=beams, grounded=grounded)
    audio = waves(len(samples))
    together = decode_batch(model, samples, audio, options)
    alone = [decode_batch(model, [s], [w], options)[0] for s, w in zip(samples, audio, strict=True)]
    assert together == alone
    assert len({tuple(ids) for ids in together}) == len(samples)


def test_what_is_well_formed_anyway_stays_as_it_is(build: Build) -> None:
    """Scores of allowed tokens are not touched, and every token of a training target is allowed."""
    codec = build("llm").codec
    text = "anna voted against the law, of [2004]."
    rows = [("ner", {"ner": (("PERSON", 0, 4), ("LAW", 19, 26))}), ("ner", {"ner": ()}),
            ("sa", {"sa": "Neutral"}), ("emotion", {"emotion": "sad face"}), ("acts", {"acts": ("thanks", "question")}),
            ("acts", {"acts": ()}), (None, {})]
    width = len(codec.tokenizer) + 5
    for task, labels in rows:
        target = codec.target(Sample(Utterance("u", None, text, labels), task))  # type: ignore[arg-type]
        processor = grammar_of(codec).processor([(task, task is not None)], [len(target)], grounded=task == "ner")
        for n, token in enumerate(target.ids):
            scores = torch.randn(1, width)
            masked = processor(torch.tensor([target.ids[:n]], dtype=torch.long), scores)
            allowed = masked.isfinite()
            assert allowed[0, token], f"token {n} of {task}: {codec.decode(target.ids[:n + 1])}"
            assert torch.equal(masked[allowed], scores[allowed])
            assert not allowed[0, len(codec.tokenizer):].any()


@BOTH
def test_sampled_markers_and_bounds_hold_for_many_decodes(build: Build, kind: str) -> None:
    """A hundred and sixty sampled answers a decoder, every task, from no room to plenty."""
    model = build(kind, seed=5, louder=2.0)
    samples = asked([*TASKS.names, None] * 8)
    for extra in (0, 3, 10, 30):
        answers = decode(model, samples, replace(OPTIONS, extra_tokens=extra, tokens_per_second=0), seed=extra)
        assert problems(model, samples, answers) == []
        for s, ids in zip(samples, answers, strict=True):
            assert len(ids) <= max(extra, grammar_of(model.codec).need((s.task, True)))
            if s.task is None:
                assert not set(model.codec.marker_ids.values()) & set(ids), "a transcript alone"


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
def test_reordered_rows_keep_their_own_state(build: Build, grounded: bool) -> None:
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
            parsed = parse(codec.decode(row), TASKS, "ner" if i < 4 else "acts")
            assert codec.eos_id in row
            assert parsed.problems == ()


@pytest.mark.parametrize("metaspace", [None, "always", "first", "never"])
def test_text_never_spells_a_marker(tokenizer_of: Callable[..., Any], metaspace: str | None) -> None:
    """`[`, `T`, `/`, `L`, `]` are plain tokens; together they would be read as a marker. Other brackets are text."""
    codec = TextCodec(tokenizer_of(metaspace), TASKS)
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
        assert parse(codec.decode(row), TASKS, "ner").problems == ()


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


def test_every_label_can_be_said_and_nothing_else(tiny_tokenizer: Callable[..., Any]) -> None:
    codec = TextCodec(tiny_tokenizer(), TASKS)
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

    for label in EMOTION.labels:
        assert read([SEPARATOR, "[EMO]", "[E]", label, "[/E]"])
    assert not read([SEPARATOR, "[EMO]"])
    assert not read([SEPARATOR, "[EMO]", "[E]", "sad face", "[/E]", "[E]", "sad", "[/E]"])
    assert not read([SEPARATOR, "[EMO]", "[E]", "sa", "[/E]"])
    for chosen in range(16):
        names = [label for k, label in enumerate(ACTS.labels) if chosen >> k & 1]
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


# Grounding


@pytest.mark.parametrize("metaspace", [None, "always", "never"])
def test_phrases_are_whole_words(tokenizer_of: Callable[..., Any], metaspace: str | None) -> None:
    codec = TextCodec(tokenizer_of(metaspace), TASKS)
    text = "the council's law (paris), on the monday"
    ids = codec.text_ids(text)

    def phrases() -> set[str]:
        """Every phrase that can be closed, from every allowed start."""
        found, grounding = set(), Grounding(codec, vocabulary_of(codec), 1, torch.device("cpu"))
        grounding.learn(0, ids)
        yes, no = torch.tensor([True]), torch.tensor([False])
        for start in grounding.starts[0].nonzero().flatten().tolist():
            grounding.step(torch.tensor([0]), yes, no)
            grounding.candidates[0, :start] = grounding.candidates[0, start + 1:] = False
            for end in range(start, len(ids)):
                grounding.step(torch.tensor([ids[end]]), no, yes)
                if bool(grounding.closable):
                    found.add(codec.decode(ids[start:end + 1]))
        return found

    found = phrases()
    assert {"council", "council's", "paris", "the monday", "law (paris), on", text} <= found
    assert not {"counc", "the coun", "aris", "monda"} & found
    assert all(phrase in text and phrase.strip() for phrase in found)


# Loops


def test_loops_are_cut_and_counted(build: Build) -> None:
    model = build("llm")
    codec = model.codec
    phrase = codec.text_ids("the council met in")
    separator, width = codec.marker_ids[SEPARATOR], len(codec.tokenizer)
    stuck = torch.full((1, width), -5.0)
    for task, cut in (("ner", True), (None, True), ("ner", False)):
        processor = grammar_of(codec).processor([(task, True)], [200], cut_loops=cut)
        ids = torch.zeros(1, 0, dtype=torch.long)
        while ids.shape[1] < 150 and not {separator, codec.eos_id} & set(ids[0].tolist()):
            scores = stuck.clone()
            scores[0, phrase[ids.shape[1] % len(phrase)]] = 5.0
            ids = torch.cat([ids, processor(ids, scores).argmax(-1, keepdim=True)], dim=1)
        if not cut:
            assert ids.shape[1] == 150
            continue
        assert ids.shape[1] - 1 == max(4, -(-16 // len(phrase))) * len(phrase)
        assert ids[0, -1] == (separator if task else codec.eos_id)
        ended = [*ids[0].tolist(), *([codec.marker_ids["[NER]"], codec.eos_id] if task else [])]
        row = prediction_row(codec, asked([task])[0], ended, 1.0, cut_loops=True)
        assert row["problems"] == ["loop"]
        assert prediction_row(codec, asked([task])[0], ended, 1.0)["problems"] == []


@given(st.lists(st.integers(0, 2), max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_loop_in_ids_is_one_that_the_grammar_would_cut(ids: list[int]) -> None:
    tracker = LoopTracker()
    counts, cut = tracker.start(1), False
    row = torch.tensor([ids], dtype=torch.long)
    for n in range(1, len(ids) + 1):
        counts = tracker.step(counts, row[:, :n])
        cut |= bool(tracker.looping(counts))
    repeated = any(ids[i:i + n] * times == ids[i:i + n * times]
                   for n in range(1, 16) for times in [max(4, -(-16 // n))] for i in range(len(ids) - n * times + 1))
    assert has_loop(ids) == cut
    assert has_loop(ids) or not repeated


def test_speech_that_repeats_itself_is_no_loop() -> None:
    assert not has_loop([7] * 15)
    assert has_loop([7] * 16)
    assert not has_loop([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4])
    assert has_loop([9, *([1, 2, 3, 4, 5] * 4), 9])
    assert not has_loop([])


# Options


def test_the_grammar_is_on_in_use_and_off_in_validation(build: Build, make_utterances: Callable[..., Any]) -> None:
    model = build("llm", seed=1)
    utterances = make_utterances(seconds=(0.5, 0.8))
    samples = [Sample(u, "ner") for u in utterances]
    assert any(row["problems"] for row in predict(model, samples))
    assert not any(row["problems"] for row in predict(model, samples, replace(OPTIONS, cut_loops=False)))
    files = [u.audio for u in utterances]
    for result in understand(model, files, tasks=["ner", "sa", "acts"], options=DecodeOptions(cut_loops=False)):
        assert result["problems"] == []
        assert result["sa"] in SA.labels
    for result in understand(model, files, tasks=["ner"], options=DecodeOptions(grounded=True)):
        assert all(phrase in result["text"] for _, phrase in result["ner"])
    assert any(r["problems"] for r in understand(model, files, ["sa"], DecodeOptions(grammar=False)))
    for bad in ({"num_beams": 0}, {"grounded": True, "grammar": False}):
        with pytest.raises(UserError):
            DecodeOptions(**bad)  # type: ignore[arg-type]


def test_whispers_positions_are_a_budget_too(build: Build) -> None:
    model = build("whisper", whisper_options={"init_std": 0.3, "max_target_positions": 24})
    samples = asked([*TASKS.names, None])
    answers = decode_batch(model, samples, waves(len(samples)), replace(OPTIONS, extra_tokens=200))
    assert problems(model, samples, answers) == []
    assert max(map(len, answers)) <= 24 - len(model.prompt)  # type: ignore[attr-defined]


def test_it_is_a_processor_of_transformers(build: Build) -> None:
    """It can be handed to `generate` as it is, beside others."""
    model = build("whisper")
    audio = model.collator()([(s, w) for s, w in zip(asked([None] * 2), waves(2), strict=True)])
    processor = grammar_of(model.codec).processor([("sa", True)] * 2, [30] * 2, len(model.prompt))  # type: ignore[attr-defined]
    out = model.generate(audio.mel, audio.mel_lengths, max_new_tokens=30, num_beams=2, do_sample=True,
                         logits_processor=LogitsProcessorList([processor]))
    assert all(parse(model.codec.decode(row), TASKS, "sa").problems == () for row in out.tolist())
