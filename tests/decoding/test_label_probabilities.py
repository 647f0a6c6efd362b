"""Probabilities of labels: a distribution over the label set that is an exhaustive search's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.data.targets import Sample
from unislu_llm.decoding.generate import DecodeOptions, decode_batch
from unislu_llm.decoding.probabilities import label_probabilities
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SA, SEPARATOR, LabelTask, TaskRegistry
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]
EMOTION = LabelTask("emotion", "[EMO]", ("sad", "sad face", "happy"), "[E]", "[/E]")
ACTS = LabelTask("acts", "[ACT]", ("question", "answer"), "[A]", "[/A]", multi=True)
TOPIC = LabelTask("topic", "[TOPIC]", ("council", "paris", "wonderful"), "[O]", "[/O]")  # no two begin alike
TASKS = TaskRegistry([SA, EMOTION, ACTS, TOPIC])
TEXTS = ["the council met", "", "it was a bad and sad evening for us all", "yes"]
BOTH = pytest.mark.parametrize("kind", ["llm", "whisper"])


@pytest.fixture
def build(tiny_speech_llm: Build, tiny_whisper_slu: Build) -> Build:
    def made(kind: str, seed: int = 0) -> SLUModel:
        options: dict[str, Any] = {"tasks": TASKS.to_dict(), "seed": seed, "whisper_options": {"init_std": 0.3}}
        return (tiny_speech_llm if kind == "llm" else tiny_whisper_slu)(**options)

    return made


def waves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(int(16_000 * seconds), generator=generator) for seconds in (0.5, 1.7, 1.1, 0.3)]


@torch.no_grad()
def log_probability(model: SLUModel, wave: Tensor, text: str, task: LabelTask, label: str) -> float:
    """Of a label and its closing marker, from the loss of a whole training target of one utterance."""
    sample = Sample(Utterance("u", None, text, {task.name: label}), task.name)
    losses = model.losses(model.collator()([(sample, wave)]))[0]
    tail = len(model.codec.text_ids(label)) + 1
    return -float(losses[-1 - tail:-1].sum())


@BOTH
@pytest.mark.parametrize("task", [SA, EMOTION])
def test_they_are_those_of_exhaustive_scoring(build: Build, kind: str, task: LabelTask) -> None:
    model = build(kind)
    found = label_probabilities(model, waves(), TEXTS, task.name)
    assert found.shape == (len(TEXTS), len(task.labels))
    torch.testing.assert_close(found.sum(-1), torch.ones(len(TEXTS)))
    logs = torch.tensor([[log_probability(model, w, t, task, label) for label in task.labels]
                         for w, t in zip(waves(), TEXTS, strict=True)])
    torch.testing.assert_close(found, logs.softmax(-1), atol=1e-4, rtol=1e-3)
    assert (logs.amax(-1) - logs.amin(-1) > 0.1).all(), "labels of one score prove nothing"
    assert len({round(float(row[0]), 3) for row in logs}) == len(TEXTS), "speech and transcript count"
    small = label_probabilities(model, waves(), [model.codec.text_ids(t) if t else [] for t in TEXTS], task.name, batch_size=2)
    torch.testing.assert_close(small, found, atol=1e-4, rtol=1e-3)


@BOTH
def test_greedy_says_the_likeliest_unless_a_later_token_turns_it(build: Build, kind: str) -> None:
    """Greedy picks the label whose first token is the likeliest; a label is never likelier than its first token."""
    for seed in range(3):
        model = build(kind, seed)
        codec = model.codec
        assert len({codec.text_ids(label)[0] for label in TOPIC.labels}) == len(TOPIC.labels)
        samples = [Sample(Utterance(str(i), None, "", {}), "topic") for i in range(len(TEXTS))]
        answers = decode_batch(model, samples, waves(), DecodeOptions(grammar=True, force_task=True, max_new_tokens=24))
        for ids, wave in zip(answers, waves(), strict=True):
            cut, opening, closing = (ids.index(codec.marker_ids[m]) for m in (SEPARATOR, "[O]", "[/O]"))
            said = codec.decode(ids[opening + 1:closing])
            row = label_probabilities(model, [wave], [ids[:cut]], "topic")[0]
            firsts = first_token_scores(model, wave, ids[:opening + 1])
            assert said == max(TOPIC.labels, key=firsts.__getitem__)
            wholes = {label: log_score(model, wave, ids[:opening + 1], label) for label in TOPIC.labels}
            assert TOPIC.labels[int(row.argmax())] == max(TOPIC.labels, key=wholes.__getitem__)
            assert all(wholes[label] <= firsts[label] + 1e-4 for label in TOPIC.labels)


@torch.no_grad()
def token_scores(model: SLUModel, wave: Tensor, head: list[int], label: str) -> Tensor:
    """Log-probabilities of a label's tokens and its closing marker after `head`."""
    tail = [*model.codec.text_ids(label), model.codec.marker_ids["[/O]"]]
    batch = model.collator()([(Sample(Utterance("u", None, "", {}), None), wave)])
    ids = torch.tensor([[*head, *tail]])
    return -model(batch.mel, batch.mel_lengths, ids, torch.zeros_like(ids))[0, len(head):]


def log_score(model: SLUModel, wave: Tensor, head: list[int], label: str) -> float:
    return float(token_scores(model, wave, head, label).sum())


def first_token_scores(model: SLUModel, wave: Tensor, head: list[int]) -> dict[str, float]:
    return {label: float(token_scores(model, wave, head, label)[0]) for label in TOPIC.labels}


def test_what_has_no_such_distribution_is_refused(build: Build) -> None:
    model = build("llm")
    with pytest.raises(UserError, match="'acts' has no probability of each label"):
        label_probabilities(model, waves(), TEXTS, "acts")
    with pytest.raises(UserError, match="unknown task 'x'"):
        label_probabilities(model, waves(), TEXTS, "x")
    with pytest.raises(UserError, match="4 recordings need as many transcripts, found 1"):
        label_probabilities(model, waves(), TEXTS[:1], "sa")
