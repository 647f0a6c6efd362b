"""A hypothesis in an LLM's prompt: it counts, whatever the batch; without speech it is all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.common import SPREAD, Row, greedy, make_batch, singles
from tests.tiny import make_speech_llm
from unislu_llm.models.speech_llm import SpeechLLM

ROWS: list[Row] = [(0.9, "the council met in paris", {"sa": "Positive"}, "sa"),
                   (2.0, "we thank anna", {}, None),
                   (0.5, "it was a bad and sad evening for us all", {"sa": "Negative"}, "sa"),
                   (1.3, "a law", {}, None)]
# "" is not None: nothing was recognised.
HYPOTHESES = ("the counsel met in paris on monday", None, "it was a bad evening", "")
ALL = tuple(h or "we" for h in HYPOTHESES)


def build(**options: Any) -> SpeechLLM:
    return make_speech_llm(**{"whisper_options": SPREAD, "hypothesis": "manifest",
                              "prompt_prefix": "listen: ", "prompt_suffix": "</s> what?"} | options)


def losses(model: SpeechLLM, hypotheses: Sequence[str | None] = HYPOTHESES,
           seed: int = 11) -> Tensor:
    with torch.no_grad():
        return model.losses(make_batch(model, ROWS, seed=seed, hypotheses=hypotheses))


@pytest.mark.parametrize("projector", ["mlp", "none"])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@torch.no_grad()
def test_losses_and_answers_do_not_depend_on_the_batch(arch: str, projector: str) -> None:
    model = build(arch=arch, projector=projector)
    batch = make_batch(model, ROWS, hypotheses=HYPOTHESES)
    assert batch.kind == ("audio" if projector == "mlp" else "text")
    together, answers = model.losses(batch), greedy(model, batch, 16)
    for i, single in enumerate(singles(model, ROWS, hypotheses=HYPOTHESES)):
        alone = model.losses(single)[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-4)
        assert greedy(model, single, 16) == [answers[i]]
    # What comes first after the prompt is foretold as training supervises it.
    state = model.prefill(batch)
    first = F.cross_entropy(model.logits(state.hidden), batch.target_ids[:, 0], reduction="none")
    torch.testing.assert_close(first, together[:, 0], rtol=1e-4, atol=1e-4)
    ids = [model.tokenizer.text_ids(h) if h else [] for h in HYPOTHESES]
    assert state.hypothesis == ids
    prompt = len(model.hypothesis_prompt)
    assert batch.hypothesis_lengths == tuple(0 if h is None else prompt + len(row)
                                             for h, row in zip(HYPOTHESES, ids, strict=True))


def test_a_hypothesis_counts_and_none_leaves_no_trace() -> None:
    model, plain = build(), build(hypothesis="none")
    plain.load_state_dict(model.state_dict())
    with_some, without = losses(model), losses(model, (None,) * 4)
    torch.testing.assert_close(without, losses(plain), rtol=0, atol=1e-6)
    changed = (with_some - without).abs().sum(-1)
    assert [bool(c > 1e-3) for c in changed] == [h is not None for h in HYPOTHESES]
    batch = make_batch(plain, ROWS, hypotheses=HYPOTHESES)
    assert batch.hypothesis_ids is None
    with torch.no_grad():
        assert plain.prefill(batch).hypothesis is None


def test_with_the_projector_none_there_is_no_speech() -> None:
    model, hearing = build(projector="none", encoder_mode="full"), build()
    assert (model.listens, model.reads_hypothesis) == (False, True)
    assert model.encoder is model.projector is None
    assert set(model.trainable_groups()) == {"lora", "markers"}
    assert torch.equal(losses(model, ALL, seed=3), losses(model, ALL, seed=4))
    assert not torch.allclose(losses(hearing, ALL, seed=3), losses(hearing, ALL, seed=4), atol=1e-3)


@pytest.mark.parametrize("projector", ["mlp", "none"])
@torch.no_grad()
def test_batches_are_planned_by_what_the_llm_reads(projector: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build(projector=projector)
    read, forward = [], model.llm.base_model.forward

    def counting(inputs_embeds: Tensor, **options: Any) -> Any:
        read.append(inputs_embeds.shape[1])
        return forward(inputs_embeds=inputs_embeds, **options)

    monkeypatch.setattr(model.llm.base_model, "forward", counting)
    for row, batch in zip(ROWS, singles(model, ROWS, hypotheses=HYPOTHESES), strict=True):
        model.losses(batch)
        assert read[-1] == sum(model.token_counts(
            int(row[0] * 16_000), batch.target_lengths[0], batch.hypothesis_lengths[0]))
