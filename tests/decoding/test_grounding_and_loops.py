"""Phrases are whole words of the transcript; loops are cut and counted alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.common import REGISTRY, Build, decode, noise
from unislu_llm.decoding.grounding import Grounding
from unislu_llm.decoding.loops import LoopTracker, loop_start
from unislu_llm.tasks import SEPARATOR
from unislu_llm.tokenizer import UnifiedTokenizer


@pytest.mark.parametrize("metaspace", [None, "always", "never"])
def test_phrases_are_whole_words(tokenizer_of: Callable[..., Any], metaspace: str | None) -> None:
    tokenizer = UnifiedTokenizer(tokenizer_of(metaspace), REGISTRY)
    text = "the council's law (paris), on the monday"
    ids = tokenizer.text_ids(text)
    found, grounding = set(), Grounding(tokenizer, 1, "cpu")
    grounding.learn(0, ids)
    yes, no = torch.tensor([True]), torch.tensor([False])
    for start in grounding.starts[0].nonzero().flatten().tolist():
        grounding.step(torch.tensor([0]), yes, no)
        grounding.candidates[0, :start] = grounding.candidates[0, start + 1:] = False
        for end in range(start, len(ids)):
            grounding.step(torch.tensor([ids[end]]), no, yes)
            if bool(grounding.closable):
                found.add(tokenizer.decode(ids[start:end + 1]))
    assert {"council", "council's", "paris", "the monday", "law (paris), on", text} <= found
    assert not {"counc", "the coun", "aris", "monda"} & found
    assert all(phrase in text and phrase.strip() for phrase in found)


@pytest.mark.parametrize("kind", ["llm", "whisper"])
def test_loops_are_cut_and_counted(build: Build, kind: str) -> None:
    """A decoder that is made to repeat words is stopped long before its bound."""
    model = build(kind)
    phrase = model.tokenizer.text_ids("the council met in")
    said: list[torch.Tensor] = []

    def stuck(hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.full((*hidden.shape[:-1], len(model.tokenizer.base)), -5.0)
        said.append(scores)
        scores[..., phrase[(len(said) - 1) % len(phrase)]] = 5.0
        return scores

    model.logits = stuck  # type: ignore[method-assign, assignment]
    for grammar, problems in ((True, ("loop",)), (False, ("missing_separator", "no_end"))):
        said.clear()
        answer, = decode(model, noise(1), [["ner"]], grammar=grammar, max_new_tokens=150,
                         tokens_per_second=1000.0)
        assert answer.problems["ner"] == problems
        if grammar:  # the n-gram four times, [T/L], [NER], the end
            assert answer.n_tokens["ner"] == max(4, -(-16 // len(phrase))) * len(phrase) + 3
            assert answer.raw["ner"].endswith(f"{SEPARATOR}[NER]")
        else:
            assert answer.n_tokens["ner"] == 150


@given(st.lists(st.integers(0, 2), max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_loop_in_ids_is_one_that_the_grammar_would_cut(ids: list[int]) -> None:
    tracker, cut = LoopTracker(1), False
    for i in ids:
        tracker.step(torch.tensor([i]))
        tracker.step(torch.tensor([-1]))  # no token: nothing changes
        cut |= bool(tracker.looping())
    repeated = any(ids[i:i + n] * times == ids[i:i + n * times]
                   for n in range(1, 16) for times in [max(4, -(-16 // n))]
                   for i in range(len(ids) - n * times + 1))
    start = loop_start(ids)
    assert (start is not None) == cut
    assert start is not None or not repeated
    assert start is None or loop_start(ids[:start]) is None


def test_a_loop_starts_where_the_first_repetition_does() -> None:
    assert loop_start([7] * 16) == 1
    assert loop_start([9, 8, *([1, 2, 3, 4, 5] * 4), 9]) == 7
    # Speech that repeats itself is no loop.
    assert loop_start([7] * 15) is None
    assert loop_start([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4]) is None
    assert loop_start([]) is None
