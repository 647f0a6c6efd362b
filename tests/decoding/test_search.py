"""Beam search is transformers'; greedy is one beam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.decoding.common import Build, batch_of, noise
from unislu_llm.decoding.greedy import Greedy
from unislu_llm.decoding.search import beam_search
from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State

ROOM = 14


class _Louder(LogitsProcessor):
    """Adds to the scores of some tokens; for transformers, and for our own loop."""

    def __init__(self, more: Tensor) -> None:
        self.more = more

    def __call__(self, *given: Any) -> Tensor:
        return given[-1] + self.more

    def advance(self, tokens: Tensor) -> None:
        pass

    def reorder(self, rows: Tensor) -> None:
        pass


@pytest.fixture
def prompt(build: Build) -> Callable[[int], tuple[SLUModel, list[list[int]], _Louder]]:
    """A tiny LLM, prompts of one length, and what makes its answers end at times."""

    def made(seed: int) -> tuple[SLUModel, list[list[int]], _Louder]:
        model = build("llm", seed)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 300, (3, 6), generator=generator).tolist()
        more = torch.zeros(len(model.tokenizer.base))
        more[model.tokenizer.eos_id] = 4.0
        return model, ids, _Louder(more)

    return made


@torch.inference_mode()
def read(model: SLUModel, rows: list[list[int]]) -> State:
    state = model.prefill(batch_of(model, noise(len(rows))))
    state = State(type(state.cache)(), state.mask[:, :0], state.hidden)  # nothing but the prompt
    state.hidden = model.step(state, torch.tensor(rows))[:, -1]
    return state


@torch.inference_mode()
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beam_search_equals_transformers(prompt: Any, beams: int) -> None:
    lengths = set()
    for seed in range(4):
        model, rows, louder = prompt(seed)
        expected = model.lm.generate(
            torch.tensor(rows), attention_mask=torch.ones(len(rows), 6, dtype=torch.long),
            num_beams=beams, num_return_sequences=beams, max_new_tokens=ROOM, do_sample=False,
            eos_token_id=model.tokenizer.eos_id, pad_token_id=model.tokenizer.eos_id,
            length_penalty=1.0, early_stopping=False,
            logits_processor=LogitsProcessorList([louder]))[:, 6:].unflatten(0, (-1, beams))
        ends = [[model.tokenizer.eos_id]] * len(rows)
        found = beam_search(model, read(model, rows), [ROOM] * len(rows), ends, [louder], beams)
        for ranked, theirs in zip(found, expected.tolist(), strict=True):
            for decoded, row in zip(ranked, theirs, strict=True):
                ids, n = decoded.ids, len(decoded.ids)
                assert ids == row[:n]
                assert set(row[n:]) <= {model.tokenizer.eos_id}
                lengths.add(n)
            scores = [decoded.score for decoded in ranked]
            assert scores == sorted(scores, reverse=True)
    assert len(lengths) > 3, "answers that end and answers that run out"


@torch.inference_mode()
def test_one_beam_is_greedy_and_more_score_no_worse(prompt: Any) -> None:
    """And the log-probabilities kept are the model's own, whatever was added to its scores."""
    for seed in range(4):
        model, rows, louder = prompt(seed)
        ends, room = [[model.tokenizer.eos_id]] * len(rows), [ROOM, 5, ROOM]
        greedy = Greedy(model, read(model, rows), room, ends, partial(list, [louder])).run()[0]
        one = beam_search(model, read(model, rows), room, ends, [louder], 1)
        assert [d.ids for d in greedy] == [ranked[0].ids for ranked in one]
        assert all(len(d.ids) <= n for d, n in zip(greedy, room, strict=True))
        many = beam_search(model, read(model, rows), room, ends, [louder], 8)
        for best, first in zip(many, one, strict=True):
            assert best[0].score >= first[0].score - 1e-5
        for row, decoded in zip(rows, [*greedy, *(ranked[0] for ranked in many)], strict=False):
            ids = torch.tensor([row + decoded.ids])
            logits = model.logits(model.lm.base_model(input_ids=ids).last_hidden_state)
            logs = logits.log_softmax(-1)[0, len(row) - 1:-1]
            known = logs.gather(1, torch.tensor(decoded.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(decoded.log_probs), known, atol=1e-4, rtol=1e-4)
