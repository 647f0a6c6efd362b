"""With the grammar no output is malformed, whatever the model says; nothing else about decoding changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from unislu_llm.data.targets import Sample
from unislu_llm.decoding.generate import DecodeOptions, decode_batch, predict, prediction_row, understand
from unislu_llm.decoding.grammar import grammar_of
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SA, SEPARATOR, TaskRegistry
from unislu_llm.unified import parse
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]
OPTIONS = DecodeOptions(force_task=True, grammar=True, tokens_per_second=20.0, extra_tokens=16)
BOTH = pytest.mark.parametrize("kind", ["llm", "whisper"])


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
def test_every_output_parses_without_problem(build: Build, registry: TaskRegistry, kind: str, way: str,
                                             record_property: Any) -> None:
    names: list[str | None] = [*registry.names, None]
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
                parsed = parse(model.codec.decode(ids), registry)
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
def test_the_shortest_budget_gives_the_shortest_answer(build: Build, kind: str, registry: TaskRegistry) -> None:
    model = build(kind)
    grammar = grammar_of(model.codec)
    lengths = {(name, force): grammar.need((name, force)) for name in (*registry.names, None) for force in (True, False)}
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
def test_sampled_markers_and_bounds_hold_for_many_decodes(build: Build, kind: str, registry: TaskRegistry) -> None:
    """A hundred and sixty sampled answers a decoder, every task, from no room to plenty."""
    model = build(kind, seed=5, louder=2.0)
    samples = asked([*registry.names, None] * 8)
    for extra in (0, 3, 10, 30):
        answers = decode(model, samples, replace(OPTIONS, extra_tokens=extra, tokens_per_second=0), seed=extra)
        assert problems(model, samples, answers) == []
        for s, ids in zip(samples, answers, strict=True):
            assert len(ids) <= max(extra, grammar_of(model.codec).need((s.task, True)))
            if s.task is None:
                assert not set(model.codec.marker_ids.values()) & set(ids), "a transcript alone"


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


def test_whispers_positions_are_a_budget_too(build: Build, registry: TaskRegistry) -> None:
    model = build("whisper", whisper_options={"init_std": 0.3, "max_target_positions": 24})
    samples = asked([*registry.names, None])
    answers = decode_batch(model, samples, waves(len(samples)), replace(OPTIONS, extra_tokens=200))
    assert problems(model, samples, answers) == []
    assert max(map(len, answers)) <= 24 - len(model.prompt)  # type: ignore[attr-defined]


def test_it_is_a_processor_of_transformers(build: Build, registry: TaskRegistry) -> None:
    """It can be handed to `generate` as it is, beside others."""
    model = build("whisper")
    audio = model.collator()([(s, w) for s, w in zip(asked([None] * 2), waves(2), strict=True)])
    processor = grammar_of(model.codec).processor([("sa", True)] * 2, [30] * 2, len(model.prompt))  # type: ignore[attr-defined]
    out = model.generate(audio.mel, audio.mel_lengths, max_new_tokens=30, num_beams=2, do_sample=True,
                         logits_processor=LogitsProcessorList([processor]))
    assert all(parse(model.codec.decode(row), registry, "sa").problems == () for row in out.tolist())
