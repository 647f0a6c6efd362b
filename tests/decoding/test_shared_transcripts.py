"""Several tasks share encoder, transcript and cache, and nothing of any answer changes by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.data.targets import Sample
from unislu_llm.decoding.batch import decode_batch, encode_waves
from unislu_llm.decoding.confidence import token_probabilities
from unislu_llm.decoding.generate import understand
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.decoding.probabilities import label_probabilities, label_scores, read
from unislu_llm.decoding.shared import decode_tasks
from unislu_llm.decoding.vocabulary import BROKEN
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import NER, SA, SEPARATOR, LabelTask, TaskRegistry
from unislu_llm.unified import parse
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]
EMOTION = LabelTask("emotion", "[EMO]", ("sad", "sad face", "happy", "sad face mask"), "[E]", "[/E]")
ACTS = LabelTask("acts", "[ACT]", ("question", "answer", "question mark", "thanks"), "[A]", "[/A]", multi=True)
TASKS = TaskRegistry([NER, SA, EMOTION, ACTS])
OPTIONS = DecodeOptions(force_task=True, grammar=True, tokens_per_second=20.0, extra_tokens=30)
RESERVE = 14
"""Tokens that the longest label may take from a transcript."""
KINDS = ["llama", "gemma3_text", "whisper"]
MODELS = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def build(tiny_speech_llm: Build, tiny_whisper_slu: Build) -> Build:
    """A model whose markers are as likely as words; Gemma's window (8) is shorter than any input."""

    def made(kind: str, seed: int = 0, separator: float = 2.0) -> SLUModel:
        options: dict[str, Any] = {"tasks": TASKS.to_dict(), "seed": seed, "whisper_options": {"init_std": 0.3}}
        model = tiny_whisper_slu(**options) if kind == "whisper" else tiny_speech_llm(arch=kind, **options)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".rows"):
                    parameter.normal_(std=0.4 if kind != "gemma3_text" else 0.15)
        sooner = torch.zeros(len(model.codec.tokenizer))
        sooner[model.codec.marker_ids[SEPARATOR]] = separator  # random models end few transcripts themselves
        model.lm.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + sooner.to(logits))
        return model

    return made


def waves(n: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(int(16_000 * (0.3 + 0.25 * (i % 5))), generator=generator) for i in range(n)]


def shared(model: SLUModel, tasks: list[str], options: DecodeOptions) -> Any:
    audio = waves()
    return decode_tasks(model, encode_waves(model, audio), [len(w) / 16_000 for w in audio], tasks, options)


def alone(model: SLUModel, task: str | None, options: DecodeOptions) -> list[list[int]]:
    samples = [Sample(Utterance(str(i), None, "", {}), task) for i in range(len(waves()))]
    return decode_batch(model, samples, waves(), options)


@MODELS
@pytest.mark.parametrize("way", ["grammar", "grounded", "free"])
def test_each_answer_is_that_of_the_task_alone(build: Build, kind: str, way: str) -> None:
    """Token for token; with the grammar, labels excepted, which are the likeliest, and transcripts that the budget cuts."""
    options = replace(OPTIONS, grammar=way != "free", grounded=way == "grounded")
    model = build(kind, seed=int(kind == "gemma3_text"))
    separator = model.codec.marker_ids[SEPARATOR]
    lengths = set()
    answers = {task: alone(model, task, options) for task in (*TASKS.names, None)}
    for tasks in (["ner", "sa", "acts"], ["emotion", "acts", "ner"]):
        found = shared(model, tasks, options).ids
        for task in tasks:
            for i, ([ids], other) in enumerate(zip(found[task], answers[task], strict=True)):
                cut = ids.index(separator) if separator in ids else len(ids)
                if way != "free" and cut + RESERVE >= options.bound(len(waves()[i]) / 16_000):
                    assert ids[:cut] == other[:cut]
                elif way == "free" or task in ("ner", "acts"):
                    lengths.add(cut)
                    assert ids == other
                else:
                    assert ids[:cut + 3] == other[:cut + 3]
                    assert parse(model.codec.decode(ids), TASKS, task).problems == ()
    assert [ids for [ids] in shared(model, [], options).ids[None]] == answers[None]
    assert len(lengths) > 2, "transcripts of different lengths in a batch"


@MODELS
def test_probabilities_are_those_of_every_label_read_in_full(build: Build, kind: str) -> None:
    """Through the cache of a decoded transcript as by teacher forcing of whole answers; the answer is the likeliest."""
    model = build(kind, seed=1)
    codec, audio = model.codec, waves()
    found = shared(model, ["ner", "sa", "emotion"], OPTIONS)
    for task in (SA, EMOTION):
        opening = [codec.marker_ids[m] for m in (SEPARATOR, task.marker, task.open)]
        for i, [ids] in enumerate(found.ids[task.name]):
            head = [*ids[:ids.index(opening[0])], *opening]
            scores = []
            for label in task.labels:
                whole = torch.tensor([[*head, *codec.text_ids(label), codec.marker_ids[task.close]]])
                mel = model.collator()([(Sample(Utterance("", None, "", {}), None), audio[i])])
                with torch.no_grad():
                    losses = model(mel.mel, mel.mel_lengths, whole, torch.zeros_like(whole))
                scores.append(-losses[0, len(head):].sum())
            row = found.probabilities[task.name][i]
            torch.testing.assert_close(row, torch.stack(scores).softmax(-1), atol=1e-4, rtol=1e-3)
            assert parse(codec.decode(ids), TASKS).outputs == task.labels[int(row.argmax())]
        texts = [ids[:ids.index(opening[0])] for [ids] in found.ids[task.name]]
        torch.testing.assert_close(torch.stack(found.probabilities[task.name]),
                                   label_probabilities(model, audio, texts, task.name), atol=1e-4, rtol=1e-3)


@MODELS
def test_labels_in_many_passes_have_the_scores_of_one(build: Build, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    state = read(model, encode_waves(model, waves()), [[7, 8, 9], [], [5], [6, 6], [9]])
    before = state.mask.clone()
    scores = label_scores(model, state, EMOTION)
    monkeypatch.setattr("unislu_llm.decoding.probabilities._ROWS", 5)
    torch.testing.assert_close(label_scores(model, state, EMOTION), scores, atol=1e-4, rtol=1e-3)
    assert torch.equal(state.mask, before), "the state can be continued by another task"


@MODELS
def test_the_encoder_runs_once_a_batch(build: Build, kind: str, make_utterances: Callable[..., Any]) -> None:
    model = build(kind)
    calls: list[int] = []
    encode = model.encode
    model.encode = lambda mel, lengths: calls.append(len(mel)) or encode(mel, lengths)  # type: ignore[method-assign, func-returns-value]
    files = [u.audio for u in make_utterances(seconds=(0.5, 0.8, 0.4))]
    understand(model, files, ["ner", "sa", "acts", "emotion"], replace(OPTIONS, batch_size=2), confidences=True)
    assert sorted(calls) == [1, 2]
    calls.clear()
    understand(model, files, ["ner", "sa"], replace(OPTIONS, batch_size=2, num_beams=2), n_best=2)
    assert sorted(calls) == [1, 2]


@MODELS
@pytest.mark.parametrize("beams", [1, 3])
def test_what_understand_says_of_certainty(build: Build, kind: str, beams: int, make_utterances: Callable[..., Any]) -> None:
    model = build(kind, seed=2)
    files: list[Path] = [u.audio for u in make_utterances(seconds=(0.5, 0.8))]
    options = replace(OPTIONS, num_beams=beams)
    plain = understand(model, files, ["ner", "sa", "acts"], options)
    results = understand(model, files, ["ner", "sa", "acts"], options, confidences=True, n_best=beams)
    for result, same in zip(results, plain, strict=True):
        assert {k: result[k] for k in same} == same, "more is said, nothing else"
        values = result["probabilities"]["sa"]
        assert list(result["probabilities"]) == ["sa"], "label sets have no distribution over labels"
        assert sum(values.values()) == pytest.approx(1, abs=1e-5)
        assert result["sa"] == max(values, key=values.__getitem__)
        sure = result["confidence"]
        assert sure["sa"] == values[result["sa"]]
        assert len(sure["ner"]) == len(result["ner"])
        assert len(sure["acts"]) == len(result["acts"])
        spelled = "".join(text for text, _ in sure["tokens"]).strip()  # a character in several tokens is broken in each
        assert spelled.replace(BROKEN, "") == result["text"].replace(BROKEN, "")
        assert all(0 <= p <= 1 for p in [sure["text"], *sure["ner"], *(p for _, p in sure["tokens"])])
        if beams == 1:
            assert "alternatives" not in result
            continue
        for name in ("ner", "sa", "acts"):
            ranked = result["alternatives"][name]
            assert 1 < len(ranked) <= beams
            assert ranked[0]["outputs"] == result[name]
            assert all(a["outputs"] is not None for a in ranked)
            assert all(set(a["problems"]) <= {"loop"} and 0 <= a["score"] < 1 for a in ranked)


@MODELS
def test_token_probabilities_are_those_of_teacher_forcing(build: Build, kind: str) -> None:
    model = build(kind)
    audio = waves(2)
    answers = [[7, 8, 9, 10, 11], [5], [9, 9, 9]]
    found = token_probabilities(model, encode_waves(model, audio), answers, [0, 1, 1])
    for ids, row, values in zip(answers, (0, 1, 1), found, strict=True):
        mel = model.collator()([(Sample(Utterance("", None, "", {}), None), audio[row])])
        whole = torch.tensor([ids])
        with torch.no_grad():
            expected = (-model(mel.mel, mel.mel_lengths, whole, torch.zeros_like(whole))[0]).exp()
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=1e-3)


def test_alternatives_need_beams(build: Build) -> None:
    for n_best, options in ((2, OPTIONS), (0, OPTIONS), (4, replace(OPTIONS, num_beams=3))):
        with pytest.raises(UserError, match="n_best"):
            understand(build("llama"), [], ["sa"], options, n_best=n_best)
