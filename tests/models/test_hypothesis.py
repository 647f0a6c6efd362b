"""A hypothesis in an LLM's prompt: it counts, whatever the batch; without speech it is all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.common import SPREAD, Row, greedy, make_batch, singles
from unislu_llm.errors import UserError
from unislu_llm.models.speech_llm import SpeechLLM

Build = Callable[..., SpeechLLM]
ROWS: list[Row] = [(0.9, "the council met in paris", {"sa": "Positive"}, "sa"),
                   (2.0, "we thank anna", {}, None),
                   (0.5, "it was a bad and sad evening for us all", {"sa": "Negative"}, "sa"),
                   (1.3, "a law", {}, None)]
# "" is not None: nothing was recognised.
HYPOTHESES = ("the counsel met in paris on monday", None, "it was a bad evening", "")
ALL = tuple(h or "we" for h in HYPOTHESES)


@pytest.fixture
def build(tiny_speech_llm: Build) -> Build:
    settings = {"whisper_options": SPREAD, "hypothesis": "manifest", "prompt_prefix": "listen: ",
                "prompt_suffix": "</s> what?"}
    return lambda **options: tiny_speech_llm(**settings | options)


def losses(model: SpeechLLM, hypotheses: Sequence[str | None] = HYPOTHESES,
           seed: int = 11) -> Tensor:
    with torch.no_grad():
        return model.losses(make_batch(model, ROWS, seed, hypotheses))


@pytest.mark.parametrize("projector", ["mlp", "none"])
def test_losses_do_not_depend_on_the_batch(build: Build, projector: str) -> None:
    model = build(projector=projector)
    together, batch = losses(model), make_batch(model, ROWS, hypotheses=HYPOTHESES)
    assert batch.kind == ("audio" if projector == "mlp" else "text")
    for i, single in enumerate(singles(model, ROWS, hypotheses=HYPOTHESES)):
        with torch.no_grad():
            alone = model.losses(single)[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-4)
        ids = model.tokenizer.text_ids(HYPOTHESES[i]) if HYPOTHESES[i] else []
        expected = 0 if HYPOTHESES[i] is None else len(model.hypothesis_prompt) + len(ids)
        assert batch.hypothesis_lengths[i] == expected


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@pytest.mark.parametrize("projector", ["mlp", "none"])
@torch.no_grad()
def test_answers_do_not_depend_on_the_batch(build: Build, arch: str, projector: str) -> None:
    model = build(arch=arch, projector=projector)
    batch = make_batch(model, ROWS, hypotheses=HYPOTHESES)
    together = greedy(model, batch, 16)
    assert together == [greedy(model, single, 16)[0]
                        for single in singles(model, ROWS, hypotheses=HYPOTHESES)]
    assert model.prefill(batch).hypothesis == [model.tokenizer.text_ids(h) if h else []
                                               for h in HYPOTHESES]


@torch.no_grad()
def test_decoding_reads_what_training_reads(build: Build) -> None:
    """What comes first after the prompt is foretold as training supervises it."""
    model = build()
    batch = make_batch(model, ROWS, hypotheses=HYPOTHESES)
    logits = model.logits(model.prefill(batch).hidden)
    first = F.cross_entropy(logits, batch.target_ids[:, 0], reduction="none")
    torch.testing.assert_close(first, losses(model)[:, 0], rtol=1e-4, atol=1e-4)


def test_a_hypothesis_counts_and_none_leaves_no_trace(build: Build) -> None:
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


def test_with_the_projector_none_there_is_no_speech(build: Build) -> None:
    model = build(projector="none", encoder_mode="full")
    assert (model.listens, model.reads_hypothesis) == (False, True)
    assert model.encoder is model.projector is None
    assert set(model.trainable_groups()) == {"lora", "markers"}
    assert torch.equal(losses(model, ALL, seed=3), losses(model, ALL, seed=4))
    hearing = build()
    assert not torch.allclose(losses(hearing, ALL, seed=3), losses(hearing, ALL, seed=4), atol=1e-3)


@pytest.mark.parametrize("projector", ["mlp", "none"])
def test_batches_are_planned_by_what_the_llm_reads(build: Build, projector: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build(projector=projector)
    single = singles(model, ROWS, hypotheses=HYPOTHESES)
    read: list[int] = []
    monkeypatch.setattr(model.llm.base_model, "forward", lambda inputs_embeds, **_: (
        read.append(inputs_embeds.shape[1]), pytest.skip)[1])
    planned = []
    for row, batch in zip(ROWS, single, strict=True):
        planned.append(sum(model.token_counts(int(row[0] * 16_000), batch.target_lengths[0],
                                              batch.hypothesis_lengths[0])))
        with pytest.raises(AttributeError):  # what stands for the LLM has read enough
            model.losses(batch)
    assert read == planned


def test_what_cannot_work_is_refused(tiny_speech_llm: Build) -> None:
    with pytest.raises(UserError, match=r"set model\.hypothesis too"):
        tiny_speech_llm(projector="none")
    with pytest.raises(UserError, match="hypothesis_prompt"):
        tiny_speech_llm(projector="none", hypothesis="manifest", hypothesis_prompt="")
