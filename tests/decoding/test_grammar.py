"""With the grammar no output is malformed, whatever the model says; nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.decoding.common import REGISTRY, Build, decode, decode_ids, noise
from unislu_llm.decoding.answer import Answer
from unislu_llm.decoding.grammar import grammar_of
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import ASR, SA, SEPARATOR
from unislu_llm.unified import parse

BOTH = pytest.mark.parametrize("kind", ["llm", "whisper"])
ASKED = [[name] for name in REGISTRY.names] + [[]]


def problems(answers: Sequence[Answer], *, forced: bool = True) -> list[str]:
    """Malformations, repetition apart, which no grammar can tell from speech."""
    kinds = [p for a in answers for some in a.problems.values() for p in some if p != "loop"]
    return [k for k in kinds if forced or k != "wrong_task"]


@BOTH
@pytest.mark.parametrize("way", ["greedy", "beam", "sampling", "grounded", "grounded beam"])
def test_every_output_parses_without_problem(build: Build, kind: str, way: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    free: Counter[str] = Counter()
    spoken: Counter[str] = Counter()
    tasks = ASKED * 2
    options: dict[str, Any] = {"tokens_per_second": 20.0, "grounded": "grounded" in way,
                               "num_beams": 4 if "beam" in way else 1,
                               "temperature": 1.5 if way == "sampling" else 0.0}
    for seed in (0, 1, 2):
        model = build(kind, seed)
        if way == "grounded beam":
            steer(model)
        waves = noise(len(tasks), seed)
        torch.manual_seed(seed)
        for force in (True, False):
            found = decode_ids(monkeypatch, model, waves, tasks, force_task=force, **options)
            assert problems([answer for answer, _ in found], forced=force) == []
            for answer, decoded in found:
                for name, raw in answer.raw.items():
                    said = parse(raw, REGISTRY).task
                    spoken[said or ASR] += 1
                    if "grounded" in way and said == "ner":
                        spoken["phrases"] += check_whole(model, decoded[name].ids)
        free.update(problems(decode(model, waves, tasks, **options | {
            "grammar": False, "grounded": False})))
    assert sum(free.values()) > 10, "without the grammar a random model does all wrong"
    assert all(spoken[name] for name in (*REGISTRY.names, ASR))
    assert "grounded" not in way or spoken["phrases"] > 0


def steer(model: SLUModel) -> None:
    """Make a model say phrases: grounded beams of a random one avoid them."""
    more = torch.zeros(len(model.tokenizer.base))
    for marker, score in ((SEPARATOR, 5.0), ("[ORG]", 20.0), ("[LAW]", 20.0)):
        more[model.tokenizer.marker_ids[marker]] = score
    more[model.tokenizer.eos_id] = -20.0
    model.lm.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + more)


def check_whole(model: SLUModel, ids: Sequence[int]) -> int:
    """Every phrase is a run of tokens of the transcript that no word sticks out of."""
    joins, markers = vocabulary_of(model.tokenizer).joins, set(model.tokenizer.marker_ids.values())
    cut = list(ids).index(model.tokenizer.marker_ids[SEPARATOR])
    said, phrases = list(ids[:cut]), [list[int]()]
    for i in ids[cut + 2:-1]:
        phrases += [[]] if i in markers else []
        phrases[-1] += [] if i in markers else [i]
    phrases = [phrase for phrase in phrases if phrase]
    for phrase in phrases:
        n = len(phrase)
        assert any(said[k:k + n] == phrase and (k == 0 or not joins(said[k - 1], said[k]))
                   and (k + n == cut or not joins(said[k + n - 1], said[k + n]))
                   for k in range(cut - n + 1))
    return len(phrases)


@BOTH
def test_the_shortest_budget_gives_the_shortest_answer(build: Build, kind: str) -> None:
    model = build(kind)
    grammar = grammar_of(model.tokenizer)
    lengths = {(name, force): grammar.need((name, force))
               for name in (*REGISTRY.names, ASR) for force in (True, False)}
    assert lengths["ner", True] == lengths["acts", True] == 3, "[T/L], control token, end"
    shortest = min(len(model.tokenizer.text_ids(label)) for label in SA.labels)
    assert lengths["sa", True] == shortest + 5
    assert lengths[ASR, True] == lengths[ASR, False] == 1
    for (name, force), need in lengths.items():
        asked = [[] if name == ASR else [name]] * 3
        for budget in (need, need + 1):
            for beams in (1, 4):
                answers = decode(model, noise(3), asked, max_new_tokens=budget, force_task=force,
                                 num_beams=beams)
                assert all(n <= budget for a in answers for n in a.n_tokens.values())
                assert problems(answers, forced=force) == []
        if need > 1:
            with pytest.raises(UserError, match=rf"{need - 1} new tokens are too few.*{name}.*"
                                                f"{need}"):
                decode(model, noise(1), [[name]], max_new_tokens=need - 1, force_task=force)


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("grounded", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_batched_equals_single(build: Build, kind: str, beams: int, grounded: bool,
                               forced: bool) -> None:
    model, waves = build(kind, seed=3), noise(6)
    tasks = [["ner"], ["sa", "acts"], [], ["acts"], ["ner", "emotion"], ["emotion"]]
    options: dict[str, Any] = {"num_beams": beams, "grounded": grounded, "force_task": forced}
    together = decode(model, waves, tasks, **options)
    alone = [decode(model, [w], [t], **options)[0] for w, t in zip(waves, tasks, strict=True)]
    assert [a.raw for a in together] == [a.raw for a in alone]
    assert [a.problems for a in together] == [a.problems for a in alone]
    for some, single in zip(together, alone, strict=True):
        assert some.confidence["text"] == pytest.approx(single.confidence["text"], abs=1e-4)
    assert len({tuple(a.raw.values()) for a in together}) == len(waves)


def test_whispers_positions_are_a_budget_too(build: Build) -> None:
    model = build("whisper", whisper_options={"init_std": 0.3, "max_target_positions": 24})
    assert model.room is not None
    answers = decode(model, noise(len(ASKED)), ASKED)
    assert problems(answers) == []
    assert max(n for a in answers for n in a.n_tokens.values()) <= model.room < 24


def test_sampling_follows_the_seed(build: Build) -> None:
    model, waves = build("llm"), noise(3)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append([a.raw for a in decode(model, waves, [["ner"]] * 3, temperature=1.5)])
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match="num_beams 1"):
        decode(model, waves, [["ner"]] * 3, temperature=1.0, num_beams=2)
