"""Both decoders behind one interface: losses and decoding that do not depend on the batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.models import common
from tests.models.common import LORA, ROWS, SHORT, SPREAD, greedy, make_batch, singles
from tests.tiny import make_speech_llm, make_whisper_slu
from unislu_llm.config import ModelConfig
from unislu_llm.data import audio
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART, weighted_loss
from unislu_llm.models.encoder import valid_mask
from unislu_llm.models.lora import leave_casts_to_autocast
from unislu_llm.models.whisper_slu import WhisperSLU
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {}, "llama untied": {"tied": False},
    "llama with a prompt": {"prompt_prefix": "listen: ", "prompt_suffix": "</s> what?"},
    "gemma3": {"arch": "gemma3_text"}, "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"}, "mistral": {"arch": "mistral"},
    "conv projector": {"projector": "conv", "projector_options": {"strides": [2, 2]}},
    "qformer projector": {"projector": "qformer", "projector_options": {"heads": 4, "layers": 1}},
    "whisper": {}, "whisper lora": {"decoder_mode": "lora", "lora": LORA},
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
BOTH = pytest.mark.parametrize("variant", ["llama with a prompt", "whisper"])


def build(variant: str, **more: Any) -> Any:
    """Build a variant; LoRA is moved from its start at zero, so that it counts."""
    factory: Any = make_whisper_slu if variant.startswith("whisper") else make_speech_llm
    model = factory(**{"whisper_options": SPREAD} | VARIANTS[variant] | more)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


# ---- losses


@EVERY
@pytest.mark.parametrize("garbage", [1e4, math.nan])
def test_batched_losses_equal_serial_whatever_is_in_the_padding(variant: str,
                                                                garbage: float) -> None:
    """Neither the mel's nor the targets' padding reaches losses or gradients."""
    model = build(variant, encoder_mode="full")
    batch = make_batch(model)
    losses, gradients = common.losses_and_gradients(model, batch)
    assert losses.shape == batch.target_ids.shape
    assert losses.dtype == torch.float32
    assert torch.equal(losses > 0, batch.target_parts != NO_PART), "zero at padding"
    assert batch.mel is not None
    outside = ~valid_mask(batch.speech_lengths, batch.mel.shape[-1])[:, None]
    junk = torch.randint(len(model.tokenizer.base), batch.target_ids.shape,
                         generator=torch.Generator().manual_seed(1))
    ids = torch.where(batch.target_parts == NO_PART, junk, batch.target_ids)
    dirty = replace(batch, mel=batch.mel.masked_fill(outside, garbage), target_ids=ids)
    same, same_gradients = common.losses_and_gradients(model, dirty)
    assert torch.equal(same, losses)
    for name, gradient in gradients.items():
        assert torch.equal(same_gradients[name], gradient), name
    for i, single in enumerate(singles(model)):
        with torch.no_grad():
            alone = model.losses(single)[0]
        torch.testing.assert_close(losses[i, :len(alone)], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "whisper" not in name])
@torch.no_grad()
def test_llm_losses_equal_its_own_logits(variant: str) -> None:
    """One example, put together by hand: `[prefix][speech][suffix][target]` through the LLM."""
    model = build(variant)
    for batch in singles(model):
        speech = model.speech(batch)
        assert speech.lengths == (speech.embeddings.shape[1],)
        prefix, suffix = (model.tokenizer.base(text, add_special_tokens=False)["input_ids"]
                          for text in (model.config.prompt_prefix, model.config.prompt_suffix))
        embed = model.llm.get_input_embeddings()
        before, after = (embed(torch.tensor([ids], dtype=torch.long)) for ids in (prefix, suffix))
        target = batch.target_ids[0]
        inputs = torch.cat([before, speech.embeddings, after, embed(target[None])], dim=1)
        logits = model.llm(inputs_embeds=inputs).logits[0]
        start = len(prefix) + speech.lengths[0] + len(suffix) - 1
        expected = F.cross_entropy(logits[start:start + len(target)], target, reduction="none")
        torch.testing.assert_close(model.losses(batch)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("silence", [30.0, 0.0])
@torch.no_grad()
def test_whisper_losses_equal_transformers_own(silence: float) -> None:
    """At 30 s of the mel as it is; at natural length one clip needs no mask either."""
    model = build("whisper", silence=silence)
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    prompt = model.tokenizer.base.convert_tokens_to_ids(names)
    assert model.prompt == prompt
    for batch in singles(model):
        target = batch.target_ids[0]
        inputs = torch.tensor([prompt + target.tolist()[:-1]])
        if silence:
            assert batch.mel.shape[-1] == 3000
            out = model.whisper(input_features=batch.mel, decoder_input_ids=inputs)
        else:
            frames, _ = model.encoder(batch.mel, batch.speech_lengths)
            out = model.whisper(encoder_outputs=(frames,), decoder_input_ids=inputs)
        expected = F.cross_entropy(out.logits[0, len(prompt) - 1:], target, reduction="none")
        torch.testing.assert_close(model.losses(batch)[0], expected)


@BOTH
@torch.no_grad()
def test_cached_frames_are_as_good_as_audio(variant: str) -> None:
    for silence in (0.0, 1.0, 30.0):
        model = build(variant, silence=silence, encoder_mode="frozen")
        batch = make_batch(model, SHORT)
        frames, lengths = model.encoder(batch.mel, batch.speech_lengths)
        cached = replace(batch, kind="frames", mel=None, frames=frames, speech_lengths=lengths)
        expected = model.losses(batch)
        torch.testing.assert_close(model.losses(cached), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.prefill(cached).hidden, model.prefill(batch).hidden,
                                   rtol=1e-4, atol=1e-4)


def test_a_target_beyond_whispers_positions_is_refused() -> None:
    model = make_whisper_slu(whisper_options={"max_target_positions": 20})
    long = [(1.0, "the council met in paris on monday " * 3, {}, None)]
    with pytest.raises(UserError, match=r"does not fit Whisper's 20 positions"):
        model.losses(make_batch(model, long))
    assert model.room == 20 - len(model.prompt)
    with pytest.raises(UserError, match="has none"):
        model(make_batch(model, SHORT), "ctc")


# What trains


ALL_LINEAR = LORA | {"target_modules": ["all-linear"]}
TOP = {"encoder_mode": "top", "encoder_top_layers": 1}


@pytest.mark.parametrize(("variant", "settings", "groups"), [
    ("llama", {"lora": None}, {"projector", "markers"}),
    ("llama untied", {}, {"projector", "markers", "lora"}),
    ("gemma3", {"lora": ALL_LINEAR}, {"projector", "markers", "lora"}),
    ("llama", {"encoder_mode": "lora"}, {"projector", "markers", "lora", "encoder"}),
    ("llama", {"lora": None} | TOP, {"projector", "markers", "encoder"}),
    ("qwen2", {"encoder_mode": "full"}, {"projector", "markers", "lora", "encoder"}),
    ("whisper", {"encoder_mode": "full"}, {"markers", "decoder", "encoder"}),
    ("whisper", {"encoder_mode": "frozen"}, {"markers", "decoder"}),
    ("whisper lora", {"encoder_mode": "lora"}, {"markers", "lora", "encoder"}),
    ("whisper", {"decoder_mode": "frozen", "encoder_mode": "frozen"}, {"markers"}),
])
def test_a_step_moves_what_trains_and_nothing_else(variant: str, settings: dict[str, Any],
                                                   groups: set[str]) -> None:
    model = build(variant, **settings).train()
    batch = make_batch(model, SHORT)
    trainable = model.trainable_groups()
    assert set(trainable) == groups
    names = {name for named in trainable.values() for name, _ in named}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for named in trainable.values() for _, p in named], lr=1e-2,
                                  weight_decay=0.1)
    _, gradients = common.losses_and_gradients(model, batch)
    assert {name for name, gradient in gradients.items() if gradient.any()} == names
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in names), f"step of {name}"


def test_groups_that_are_not_named_are_frozen() -> None:
    model = make_speech_llm()
    model.select_groups([])
    assert set(model.trainable_groups()) == {"projector", "lora", "markers"}
    with pytest.raises(UserError, match=r"'marker' does not train .* did you mean 'markers'"):
        model.select_groups(["marker"])
    saved = set(model.trained_state())
    model.select_groups(["projector"])
    assert set(model.trainable_groups()) == {"projector"}
    assert set(model.trained_state()) == saved, "what a stage has frozen was trained all the same"


def test_frozen_parts_stay_in_eval_mode() -> None:
    align: Any = make_speech_llm(lora=None).train()
    assert align.projector.training
    assert not any(m.training for m in [*align.encoder.modules(), *align.llm.modules()])
    align.enable_gradient_checkpointing()
    assert align.train().llm.training, "transformers checkpoints in train mode alone"
    adapt: Any = make_speech_llm().train()
    assert (adapt.llm.training, adapt.encoder.training) == (True, False)
    markers: Any = make_whisper_slu(decoder_mode="frozen", encoder_mode="frozen").train()
    whisper = markers.whisper.model
    assert not any(m.training for m in whisper.modules() if m is not whisper)
    full: Any = make_whisper_slu(decoder_mode="full", encoder_mode="frozen").train()
    assert full.whisper.model.decoder.training
    assert not any(m.training for m in full.whisper.model.encoder.modules())
    assert not any(m.training for m in full.eval().modules())


@pytest.mark.filterwarnings("error::FutureWarning")  # of names that transformers gives up
@BOTH
def test_gradient_checkpointing_changes_no_gradient(variant: str) -> None:
    """Whatever other batch goes through the model between a forward pass and its backward pass."""
    model = build(variant, encoder_mode="full").train()
    batch, other = make_batch(model, SHORT), make_batch(model, [ROWS[2], ROWS[0], ROWS[2]])
    losses, gradients = common.losses_and_gradients(model, batch)
    model.enable_gradient_checkpointing()
    model.train()
    model.zero_grad()
    again = model.losses(batch)
    model.losses(other)
    weighted_loss(again, batch.target_parts, "dynamic").backward()
    torch.testing.assert_close(again.detach(), losses, rtol=0, atol=1e-5)
    recomputed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(recomputed) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@BOTH
def test_bf16_is_close_to_fp32(variant: str) -> None:
    """Frozen weights in bf16, what trains in fp32 under autocast; decoding needs no autocast."""
    whisper = {"decoder_mode": "lora", "encoder_mode": "frozen"} if variant == "whisper" else {}
    model = build(variant, lora=LORA, **whisper)
    batch = make_batch(model, SHORT)
    expected, _ = common.losses_and_gradients(model, batch)
    if variant != "whisper":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        model.lm.set_attn_implementation("eager")  # as training on a CPU does
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = common.losses_and_gradients(model, batch)
    assert losses.dtype == torch.float32
    counts = batch.target_parts != NO_PART
    assert float(losses[counts].mean()) == pytest.approx(float(expected[counts].mean()), rel=0.05)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())
    assert all(greedy(model, batch, 3))
    leave_casts_to_autocast(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, others = common.losses_and_gradients(model, batch)
    assert torch.equal(again, losses)
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())


def test_eager_attention_changes_no_loss() -> None:
    model = build("gemma3")
    batch = make_batch(model, SHORT)
    losses = model.losses(batch)
    model.lm.set_attn_implementation("eager")
    torch.testing.assert_close(model.losses(batch), losses, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("variant", "settings", "message"), [
    ("llama", {"lora": {"target_modules": ["q_proj", "qkv"]}},
     r"\['qkv'\] match no .* of the LLM.*gate_proj"),
    ("llama", {"lora": {"target_modules": []}}, r"match no linear layer of the LLM"),
    ("whisper", {"decoder_mode": "lora", "lora": {"target_modules": ["q_proj", "o_proj"]}},
     r"\['o_proj'\] match no linear layer of the Whisper decoder.*out_proj"),
    ("whisper", {"decoder_mode": "lora", "lora": None}, r"model\.lora\.rank"),
    ("whisper", {"language": "xx"}, "language 'xx' is not one of Whisper's"),
    ("whisper", {"hypothesis": "manifest"}, r"model\.hypothesis"),
    ("whisper", {"quantization": "4bit"}, r"model\.quantization: is for an LLM"),
    ("whisper", {"transcript": "verbatim"}, r"model\.transcript: is for an LLM"),
    ("whisper", {"projector": "none"}, r"model\.projector none .* for an LLM \(kind speech_llm\)"),
    ("llama", {"projector": "mpl"}, "did you mean 'mlp'"),
    ("llama", {"projector": "none"}, r"set model\.hypothesis too"),
    ("llama", {"projector": "none", "hypothesis": "manifest", "hypothesis_prompt": ""},
     r"model\.hypothesis_prompt"),
])
def test_bad_settings_are_named(variant: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(variant, **settings)


# Decoding


@EVERY
@torch.no_grad()
def test_batched_answers_equal_serial_and_foretell_what_training_supervises(variant: str) -> None:
    model = build(variant)
    batch = make_batch(model)
    together = greedy(model, batch, 12)
    assert together == [greedy(model, single, 12)[0] for single in singles(model)]
    assert len(set(map(tuple, together))) > 1, "one answer to everything proves nothing"
    # The losses of a target are those of reading it token by token: same prompt and positions.
    expected, state = model.losses(batch), model.prefill(batch)
    hidden = state.hidden
    for t in range(batch.target_ids.shape[1]):
        losses = F.cross_entropy(model.logits(hidden).float(), batch.target_ids[:, t],
                                 reduction="none")
        counts = torch.tensor([t < n for n in batch.target_lengths])
        torch.testing.assert_close(losses[counts], expected[counts, t], rtol=1e-3, atol=1e-3)
        # Rows that have ended are fed on with tokens that do not count.
        hidden = model.step(state, batch.target_ids[:, t:t + 1], counts[:, None])[:, -1]


@pytest.mark.parametrize("variant", ["llama", "gemma3", "whisper"])
@torch.no_grad()
def test_copies_of_a_state_go_on_by_themselves(variant: str) -> None:
    """Rows taken several times and compacted foretell what the row alone would."""
    model = build(variant)
    draw = torch.Generator().manual_seed(0)
    said = torch.randint(10, 40, (4, 6), generator=draw)
    more = torch.randint(10, 40, (5, 3), generator=draw)
    lengths, rows = [6, 0, 3, 1], [2, 2, 0, 3, 1]
    state = model.prefill(make_batch(model))
    model.step(state, said, torch.arange(6) < torch.tensor(lengths)[:, None])
    state.compact()
    copies = state.take(rows)
    assert len(copies) == 5
    hidden = model.step(copies, more)
    assert torch.equal(model.step(state.take(rows), more), hidden), "it is as it was"
    for place, i in enumerate(rows):
        alone = model.prefill(singles(model)[i])
        if lengths[i]:
            model.step(alone, said[i:i + 1, :lengths[i]])
        torch.testing.assert_close(hidden[place], model.step(alone, more[place:place + 1])[0],
                                   rtol=1e-3, atol=1e-3)


@pytest.mark.weights
def test_whisper_base_still_transcribes_with_the_markers_installed() -> None:
    clip = Path(__file__).parents[1] / "data_files" / "librivox.flac"
    config = ModelConfig(encoder="openai/whisper-base", silence=30)
    model = WhisperSLU.build(config, TaskRegistry()).eval()
    batch = model.collator().from_waves([Example(Utterance("u", clip, ""), None)],
                                        [audio.load(clip)])
    [ids] = greedy(model, batch, 60)
    assert ids[-1] == model.tokenizer.eos_id
    assert model.tokenizer.decode(ids).endswith(
        "had then leisure to consider how much there might be prudently in his power to do for "
        "them.")
