"""Phrases are whole words of the transcript; loops are cut and counted alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.decoding.generate import prediction_row
from unislu_llm.decoding.grammar import grammar_of
from unislu_llm.decoding.grounding import Grounding
from unislu_llm.decoding.loops import LoopTracker, has_loop
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SEPARATOR, TaskRegistry
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]


# Grounding


@pytest.mark.parametrize("metaspace", [None, "always", "never"])
def test_phrases_are_whole_words(tokenizer_of: Callable[..., Any], metaspace: str | None, registry: TaskRegistry) -> None:
    codec = TextCodec(tokenizer_of(metaspace), registry)
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
        sample = Sample(Utterance("0", None, "", {}), task)
        row = prediction_row(codec, sample, ended, 1.0, cut_loops=True)
        assert row["problems"] == ["loop"]
        assert prediction_row(codec, sample, ended, 1.0)["problems"] == []


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
