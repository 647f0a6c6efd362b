"""Several tasks share encoder, transcript and cache, and nothing of any answer changes by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.common import EMOTION, REGISTRY, Build, batch_of, decode, decode_ids, noise
from unislu_llm.config import DecodeConfig
from unislu_llm.decoding import search
from unislu_llm.decoding.vocabulary import BROKEN
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import ASR, SA, SEPARATOR
from unislu_llm.unified import parse

MODELS = pytest.mark.parametrize("kind", ["llama", "gemma3_text", "whisper"])
RESERVE = 14
"""Tokens that the longest label may take from a transcript."""


@torch.no_grad()
def losses(model: SLUModel, wave: Tensor, ids: Sequence[int]) -> Tensor:
    """Of every token of an answer, from training's forward pass."""
    batch = batch_of(model, [wave])
    target = torch.tensor([list(ids)])
    return model.losses(replace(batch, target_ids=target, target_parts=torch.zeros_like(target),
                                target_lengths=(len(ids),)))[0]


def transcript(model: SLUModel, ids: Sequence[int]) -> list[int]:
    """Ids before `[T/L]`."""
    separator = model.tokenizer.marker_ids[SEPARATOR]
    return list(ids[:ids.index(separator)] if separator in ids else ids)


@MODELS
@pytest.mark.parametrize("way", ["grammar", "grounded", "free", "beams"])
def test_each_answer_is_that_of_the_task_alone(build: Build, kind: str, way: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token, but for transcripts that the budget cuts."""
    # With beams, no running one may be near the budget either.
    separator = 3.0 if way == "beams" else 2.0
    model, waves = build(kind, int(kind == "gemma3_text"), separator=separator), noise(5)
    options: dict[str, Any] = {"grammar": way != "free", "grounded": way == "grounded",
                               "num_beams": 3 if way == "beams" else 1, "tokens_per_second": 25.0}
    bound = DecodeConfig(tokens_per_second=25.0).bound
    alone = {name: decode_ids(monkeypatch, model, waves, [[name] if name != ASR else []] * 5,
                              **options) for name in (*REGISTRY.names, ASR)}
    lengths = set()
    for tasks in (["ner", "sa", "acts"], ["emotion", "acts", "ner"], []):
        found = decode_ids(monkeypatch, model, waves, [tasks] * 5, **options)
        for i, (answer, ids) in enumerate(found):
            for name in tasks or [ASR]:
                other, same = alone[name][i][0], alone[name][i][1][name].ids
                cut = transcript(model, ids[name].ids)
                if way != "free" and len(cut) + RESERVE >= bound(answer.seconds):
                    assert cut == same[:len(cut)]
                    continue
                lengths.add(len(cut))
                assert ids[name].ids == same
                assert answer.problems[name] == other.problems[name]
                assert ids[name].log_probs == pytest.approx(alone[name][i][1][name].log_probs,
                                                            abs=1e-3)
    assert len(lengths) > 1, "transcripts of different lengths in a batch"


@MODELS
def test_a_free_model_chooses_one_task_for_all(build: Build, kind: str) -> None:
    model, waves = build(kind, separator=2.0), noise(5)
    chosen = set()
    for answer in decode(model, waves, [["ner", "sa"]] * 5, force_task=False):
        assert answer.raw["ner"] == answer.raw["sa"]
        task = parse(answer.raw["ner"], REGISTRY).task
        chosen.add(task)
        for name in ("ner", "sa"):
            assert ("wrong_task" in answer.problems[name]) == (name != task)
            assert name == task or answer.outputs[name] is None
    assert chosen <= set(REGISTRY.names)
    with pytest.raises(UserError, match="unknown task 'x'"):
        decode(model, waves[:1], [["x"]])


@MODELS
@pytest.mark.parametrize("beams", [1, 3])
def test_labels_and_log_probabilities_are_trainings(build: Build, kind: str, beams: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the cache of a transcript as by training's forward of every label's whole answer."""
    monkeypatch.setattr(search, "_ROWS", 5)  # labels come in many passes
    monkeypatch.setattr(search, "_POSITIONS", 3)
    model, waves = build(kind, 1, separator=2.0), noise(4)
    markers, text_ids = model.tokenizer.marker_ids, model.tokenizer.text_ids
    firsts, tasks = set(), ["ner", "sa", "emotion"]
    found = decode_ids(monkeypatch, model, waves, [tasks] * 4, num_beams=beams)
    for wave, (answer, decoded) in zip(waves, found, strict=True):
        assert list(answer.probabilities) == ["sa", "emotion"]
        for name in tasks:  # kept while decoding, before grammar and bias
            known = torch.tensor(decoded[name].log_probs)
            torch.testing.assert_close(-known, losses(model, wave, decoded[name].ids), atol=1e-3,
                                       rtol=1e-3)
        for task in (SA, EMOTION):
            shares = answer.probabilities[task.name]
            assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
            assert answer.outputs[task.name] == max(shares, key=shares.__getitem__)
            assert answer.confidence[task.name] == max(shares.values())
            head = [*transcript(model, decoded[task.name].ids),
                    *(markers[m] for m in (SEPARATOR, task.marker, task.open))]
            scores = [-losses(model, wave, [*head, *text_ids(label), markers[task.close]])
                      [len(head):].sum() for label in task.labels]
            assert max(scores) - min(scores) > 0.1, "labels of one score prove nothing"
            expected = torch.stack(scores).softmax(0)
            torch.testing.assert_close(torch.tensor(list(shares.values())), expected, atol=1e-4,
                                       rtol=1e-3)
            firsts.add(round(float(scores[0]), 2))
    assert len(firsts) > 5, "speech and transcript count"


@MODELS
@pytest.mark.parametrize("beams", [1, 3])
def test_the_encoder_runs_once_and_training_goes_on(build: Build, kind: str, beams: int) -> None:
    model, waves = build(kind).train(), noise(3)
    calls: list[int] = []
    model.prefill = lambda batch, prefill=model.prefill: (  # type: ignore[method-assign]
        calls.append(len(batch)), prefill(batch))[1]
    decode(model, waves, [["ner", "sa", "acts", "emotion"]] * 3, num_beams=beams)
    assert calls == [3]
    assert model.training


@MODELS
@pytest.mark.parametrize("beams", [1, 3])
def test_confidences_and_alternatives(build: Build, kind: str, beams: int) -> None:
    model, tasks = build(kind, 2, separator=2.0), ["ner", "sa", "acts"]
    answers = decode(model, noise(3), [tasks] * 3, num_beams=beams, n_best=beams)
    for answer in answers:
        assert answer.transcript == parse(answer.raw["ner"], REGISTRY).transcript
        sure = answer.confidence
        assert [len(sure[n]) for n in ("ner", "acts")] == [len(answer.outputs[n] or ())
                                                           for n in ("ner", "acts")]
        # A character in several tokens is broken in each of them.
        spelled = "".join(text for text, _ in sure["tokens"]).strip().replace(BROKEN, "")
        assert spelled == answer.transcript.replace(BROKEN, "")
        numbers = [sure["text"], sure["sa"], *sure["ner"], *(p for _, p in sure["tokens"])]
        assert all(0 <= p <= 1 for p in numbers)
        plain = answer.to_dict()
        assert (plain["text"], plain["sa"]) == (answer.transcript, answer.outputs["sa"])
        assert list(plain)[:5] == ["text", *tasks, "problems"]
        if beams == 1:
            assert answer.alternatives == {}
            for bad in (0, 2):
                with pytest.raises(UserError, match="n_best"):
                    decode(model, noise(1), [tasks], n_best=bad)
            continue
        for name in tasks:
            ranked = answer.alternatives[name]
            assert 1 < len(ranked) <= beams
            assert ranked[0]["outputs"] == answer.outputs[name]
            assert all(a["outputs"] is not None for a in ranked)
            assert all(set(a["problems"]) <= {"loop"} and 0 <= a["score"] < 1 for a in ranked)


def test_a_model_that_does_not_listen_reads(build: Build) -> None:
    model = build("llama", projector="none", hypothesis="manifest")
    texts = ["the council met", "anna", ""]
    assert batch_of(model, noise(3), texts).kind == "text"
    answers = decode(model, noise(3), [["ner"]] * 3, texts)
    assert [a.hypothesis for a in answers] == texts
    assert len({a.raw["ner"] for a in answers}) == 3
