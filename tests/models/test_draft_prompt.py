"""A draft in the prompt of an LLM: it counts, and does not depend on the batch; without speech it is all that counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.data.batching import TokenPlan
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.batch import decode_batch, encode_waves
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.decoding.probabilities import label_probabilities
from unislu_llm.decoding.shared import decode_tasks
from unislu_llm.errors import UserError
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.utterance import Utterance

Build = Callable[..., SpeechLLM]
TEXTS = ("the council met in paris", "we thank anna", "it was a bad and sad evening for us all", "a law")
DRAFTS = ("the counsel met in paris on monday", None, "it was a bad evening", "")  # "" is not None: nothing was heard
PROMPT = {"prompt_prefix": "listen: ", "prompt_suffix": "</s> what?"}
SPREAD = {"init_std": 0.3}  # frames that differ, or a random model hears the same in everything


@pytest.fixture
def build(tiny_speech_llm: Build) -> Build:
    return lambda **options: tiny_speech_llm(**{"whisper_options": SPREAD, "draft": "manifest"} | PROMPT | options)


def items(drafts: Sequence[str | None] = DRAFTS, seed: int = 3) -> list[tuple[Sample, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    tasks = ("sa", None, "sa", None)
    return [(Sample(Utterance(str(i), None, text, {"sa": "Positive"} if task else {}, draft=draft), task),
             0.2 * torch.randn(int(n * 16_000), generator=draw))
            for i, (text, draft, task, n) in enumerate(zip(TEXTS, drafts, tasks, (0.9, 2.0, 0.5, 1.3), strict=True))]


def losses(model: SpeechLLM, some: list[tuple[Sample, Tensor]]) -> Tensor:
    with torch.no_grad():
        return model.losses(model.collator()(some))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("use_speech", [True, False])
def test_losses_do_not_depend_on_the_batch(build: Build, packing: bool, use_speech: bool) -> None:
    model = build(use_speech=use_speech)
    together, batch = losses(model, items()), model.collator()(items())
    model.packing = packing
    torch.testing.assert_close(losses(model, items()), together, rtol=1e-4, atol=1e-4)
    for i, item in enumerate(items()):
        alone = losses(model, [item])[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-4)
        prompt = len(model.draft_prompt) + len(model.codec.text_ids(DRAFTS[i])) if DRAFTS[i] else len(model.draft_prompt)
        assert int(batch.draft_lengths[i]) == (0 if DRAFTS[i] is None else prompt)  # type: ignore[index]


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_answers_do_not_depend_on_the_batch(build: Build, arch: str) -> None:
    model = build(arch=arch)
    options = DecodeOptions(max_new_tokens=16)
    waves = [wave for _, wave in items()]
    drafts = ("the counsel met in paris on monday", "we", "it was a bad evening", "")
    samples = [sample for sample, _ in items(drafts)]
    together = decode_batch(model, samples, waves, options)
    assert together == [decode_batch(model, [s], [w], options)[0] for s, w in zip(samples, waves, strict=True)]
    # The shared transcript and label probabilities start from the same prompt.
    encoded = encode_waves(model, waves, drafts=drafts)
    answers = decode_tasks(model, encoded, [len(w) / 16_000 for w in waves], ["sa"], dataclasses.replace(options, grammar=False))
    asked = [Sample(s.utterance, "sa") for s in samples]
    forced = decode_batch(model, asked, waves, dataclasses.replace(options, force_task=True))
    assert [ids[0] for ids in answers.ids["sa"]] == forced
    rows = label_probabilities(model, waves, TEXTS, "sa", drafts=drafts)
    one = label_probabilities(model, waves[2:3], TEXTS[2:3], "sa", drafts=drafts[2:3])[0]
    torch.testing.assert_close(rows[2].log(), one.log(), rtol=1e-3, atol=1e-3)
    other = label_probabilities(model, waves[2:3], TEXTS[2:3], "sa", drafts=["we thank anna"])[0]
    assert not torch.allclose(other.log(), one.log(), atol=0.1)


def test_generation_reads_what_training_reads(build: Build) -> None:
    """The next token's distribution after the prompt is the one that training supervises."""
    model = build()
    some = items()
    batch = model.collator()(some)
    with torch.no_grad():
        _, hidden = model.begin(model.encode(batch.mel, batch.mel_lengths, **batch.drafts()))
        logits = model.llm.get_output_embeddings()(hidden)
        first = torch.nn.functional.cross_entropy(logits, batch.target_ids[:, 0], reduction="none")
    torch.testing.assert_close(first, losses(model, some)[:, 0], rtol=1e-4, atol=1e-4)


def test_a_draft_counts_and_none_leaves_no_trace(build: Build) -> None:
    model, plain = build(), build(draft="none")
    plain.load_state_dict(model.state_dict())
    with_drafts, without = losses(model, items()), losses(model, items((None,) * 4))
    torch.testing.assert_close(without, losses(plain, items()), rtol=0, atol=0)
    changed = (with_drafts - without).abs().sum(-1)
    assert [bool(c > 1e-3) for c in changed] == [draft is not None for draft in DRAFTS]
    assert plain.collator()(items()).draft_ids is None


def test_without_speech_the_audio_is_not_listened_to(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(use_speech=False, encoder_mode="full")
    assert set(model.trainable_groups()) == {"lora", "markers"}
    monkeypatch.setattr(model.encoder, "forward", lambda *_: pytest.fail("the encoder ran"))
    drafts = tuple(d or "we" for d in DRAFTS)
    torch.testing.assert_close(losses(model, items(drafts, seed=3)), losses(model, items(drafts, seed=4)), rtol=0, atol=0)
    hearing = build()
    assert not torch.allclose(losses(hearing, items(drafts, seed=3)), losses(hearing, items(drafts, seed=4)), atol=1e-3)


@pytest.mark.parametrize("use_speech", [True, False])
def test_batches_are_planned_by_what_the_llm_reads(build: Build, use_speech: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build(use_speech=use_speech), []
    collator = model.collator()
    sizes = [model.token_counts(len(wave), len(model.codec.target(s)), len(collator.draft(s))) for s, wave in items()]
    real = model._read_rows
    monkeypatch.setattr(model, "_read_rows", lambda rows: (seen.extend(map(len, rows)), real(rows))[1])
    losses(model, items())
    assert seen == [sum(size) for size in sizes]
    assert TokenPlan(torch.tensor(sizes).numpy(), 1000).rows.tolist() == seen


def test_what_cannot_work_is_refused(tiny_whisper_slu: Callable[..., Any], tiny_speech_llm: Build) -> None:
    with pytest.raises(UserError, match="takes no draft"):
        tiny_whisper_slu(draft="manifest")
    with pytest.raises(UserError, match=r"set model\.draft too"):
        tiny_speech_llm(use_speech=False)
    with pytest.raises(UserError, match="draft_prompt"):
        tiny_speech_llm(use_speech=False, draft="manifest", draft_prompt="")
