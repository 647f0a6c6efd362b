"""Both decoders behind one protocol: losses, gradients and decoding that do not depend on the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unislu_llm.data.collate import Batch
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART, weighted_loss
from unislu_llm.models.base import SLUModel
from unislu_llm.models.encoder import valid_mask
from unislu_llm.models.speech_llm import SpeechLLM, SpeechLLMConfig
from unislu_llm.models.whisper_slu import WhisperSLU, WhisperSLUConfig
from unislu_llm.tasks import Span
from unislu_llm.utterance import Utterance

LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
SPREAD = {"init_std": 0.3}  # Whisper's usual 0.02 makes a random model say one thing to everything
Build = Callable[..., SLUModel]

# Variants of both decoders: keyword arguments of the factories.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llm", {}),
    "llama untied": ("llm", {"tied": False}),
    "llama with a prompt": ("llm", {"prompt_prefix": "listen: ", "prompt_suffix": "</s> what?"}),
    "gemma3": ("llm", {"arch": "gemma3_text"}),
    "qwen2": ("llm", {"arch": "qwen2"}),
    "qwen3": ("llm", {"arch": "qwen3"}),
    "mistral": ("llm", {"arch": "mistral"}),
    "conv projector": ("llm", {"projector": "conv", "projector_options": {"strides": [2, 2]}}),
    "qformer projector": ("llm", {"projector": "qformer", "projector_options": {"heads": 4, "layers": 1}}),
    "whisper": ("whisper", {}),
    "whisper lora": ("whisper", {"decoder_mode": "lora", "lora": LORA}),
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
BOTH = pytest.mark.parametrize("variant", ["llama with a prompt", "whisper"])


@pytest.fixture
def build(tiny_speech_llm: Build, tiny_whisper_slu: Build) -> Build:
    """Build a variant; LoRA is moved from its start at zero, so that it counts."""

    def made(variant: str, **more: Any) -> SLUModel:
        kind, options = VARIANTS[variant]
        factory = tiny_speech_llm if kind == "llm" else tiny_whisper_slu
        model = factory(**{"whisper_options": SPREAD} | options | more)
        torch.manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1)
        return model

    return made


ROWS: list[tuple[float, str, dict[str, Any], str | None]] = [
    (0.5, "yes", {"sa": "Positive"}, "sa"),
    (20.0, "anna voted against the law of two thousand and four in paris and we thank the council for its work",
     {"ner": (Span("PERSON", 0, 4), Span("WHEN", 30, 51), Span("PLACE", 55, 60))}, "ner"),
    (3.37, "it was a bad evening", {"ner": ()}, "ner"),
    (0.83, "the council met", {}, None),
]


def items(rows: list[tuple[float, str, dict[str, Any], str | None]] = ROWS) -> list[tuple[Sample, Tensor]]:
    """Samples with noise of their own as audio."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for i, (seconds, text, labels, task) in enumerate(rows):
        n = int(seconds * 16_000)
        wave = 0.2 * torch.randn(n, generator=generator) * torch.linspace(0.1, 1, n)
        made.append((Sample(Utterance(str(i), None, text, labels), task), wave))
    return made


# Losses


@EVERY
@torch.no_grad()
def test_batched_losses_equal_serial_at_very_unequal_lengths(build: Build, variant: str) -> None:
    model = build(variant)
    collate = model.collator()
    batch = collate(items())
    losses = model.losses(batch)
    assert losses.shape == batch.target_ids.shape
    assert losses.dtype == torch.float32
    assert not losses[batch.target_parts == NO_PART].any(), "zero at padding"
    assert (losses[batch.target_parts != NO_PART] > 0).all()
    for i, item in enumerate(items()):
        alone = model.losses(collate([item]))[0]
        torch.testing.assert_close(losses[i, :len(alone)], alone, rtol=0, atol=1e-4)


@EVERY
@pytest.mark.parametrize("garbage", [1e4, math.nan])
def test_garbage_in_padding_changes_nothing(build: Build, variant: str, garbage: float) -> None:
    """Neither the mel's nor the targets' padding reaches losses or gradients."""
    model = build(variant, encoder_mode="full")
    batch = model.collator()(items())
    padded = batch.target_parts == NO_PART
    mel = batch.mel.masked_fill(~valid_mask(batch.mel_lengths, batch.mel.shape[-1])[:, None], garbage)
    junk = torch.randint(len(model.codec.tokenizer), batch.target_ids.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.where(padded, junk, batch.target_ids)
    ids[1:, -1][padded[1:, -1]] = -100  # what other libraries put there
    dirty = Batch(batch.samples, mel, batch.mel_lengths, ids, batch.target_parts)
    expected, gradients = losses_and_gradients(model, batch)
    losses, dirty_gradients = losses_and_gradients(model, dirty)
    assert torch.equal(losses, expected)
    for name, gradient in gradients.items():
        assert torch.equal(dirty_gradients[name], gradient), name


def losses_and_gradients(model: SLUModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = model.losses(batch)
    weighted_loss(losses, batch.target_parts, "dynamic").backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", [name for name, (kind, _) in VARIANTS.items() if kind == "llm"])
@torch.no_grad()
def test_llm_losses_equal_its_own_logits(build: Build, variant: str) -> None:
    """One sample, put together by hand: `[prefix][speech][suffix][target]` through the whole LLM."""
    model: Any = build(variant)
    for item in items():
        batch = model.collator()([item])
        speech, n = model.speech(batch.mel, batch.mel_lengths)
        assert n.tolist() == [speech.shape[1]]
        prefix, suffix = (model.codec.tokenizer(text, add_special_tokens=False)["input_ids"]
                          for text in (model.config.prompt_prefix, model.config.prompt_suffix))
        embed = model.llm.get_input_embeddings()
        before, after = (embed(torch.tensor([ids], dtype=torch.long)) for ids in (prefix, suffix))
        inputs = torch.cat([before, speech, after, embed(batch.target_ids)], dim=1)
        logits = model.llm(inputs_embeds=inputs).logits[0]
        start = len(prefix) + speech.shape[1] + len(suffix) - 1
        target = batch.target_ids[0]
        expected = F.cross_entropy(logits[start:start + len(target)], target, reduction="none")
        torch.testing.assert_close(model.losses(batch)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad_to_30s", [True, False])
@torch.no_grad()
def test_whisper_losses_equal_transformers_own(tiny_whisper_slu: Build, pad_to_30s: bool) -> None:
    """At 30 s by feeding the mel to Whisper as it is; at natural length one clip needs no mask either."""
    model: Any = tiny_whisper_slu(pad_to_30s=pad_to_30s, whisper_options=SPREAD)
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    prompt = model.codec.tokenizer.convert_tokens_to_ids(names)
    assert model.prompt == prompt
    for item in items():
        batch = model.collator()([item])
        target = batch.target_ids[0].tolist()
        inputs = torch.tensor([prompt + target[:-1]])
        labels = torch.tensor([[-100] * (len(prompt) - 1) + target])
        if pad_to_30s:
            assert batch.mel.shape[-1] == 3000
            out = model.whisper(input_features=batch.mel, decoder_input_ids=inputs, labels=labels)
        else:
            frames, _ = model.encoder(batch.mel, batch.mel_lengths)
            out = model.whisper(encoder_outputs=(frames,), decoder_input_ids=inputs, labels=labels)
        losses = model.losses(batch)[0]
        assert float(losses.mean()) == pytest.approx(float(out.loss), rel=1e-5)
        logits = out.logits[0, len(prompt) - 1:]
        torch.testing.assert_close(losses, F.cross_entropy(logits, batch.target_ids[0], reduction="none"))


def test_a_target_beyond_whispers_positions_is_refused(tiny_whisper_slu: Build) -> None:
    model = tiny_whisper_slu(whisper_options={"max_target_positions": 20})
    long = [(1.0, "the council met in paris on monday " * 3, {}, None)]
    with pytest.raises(UserError, match=r"does not fit Whisper's 20 positions"):
        model.losses(model.collator()(items(long)))


# What trains


TRAINED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    # variant, options, groups that train
    "llm: projector and markers": ("llama", {"lora": None}, {"projector", "markers"}),
    "llm: with lora": ("llama untied", {"lora": LORA}, {"projector", "markers", "lora"}),
    "llm: all linear": ("gemma3", {"lora": LORA | {"target_modules": ["all-linear"]}},
                        {"projector", "markers", "lora"}),
    "llm: encoder lora": ("llama", {"lora": LORA, "encoder_mode": "lora", "encoder_lora": LORA},
                          {"projector", "markers", "lora", "encoder"}),
    "llm: encoder top": ("llama", {"lora": None, "encoder_mode": "top", "encoder_top_layers": 1},
                         {"projector", "markers", "encoder"}),
    "llm: encoder full": ("qwen2", {"lora": LORA, "encoder_mode": "full"}, {"projector", "markers", "lora", "encoder"}),
    "whisper: full": ("whisper", {"encoder_mode": "full"}, {"markers", "decoder", "encoder"}),
    "whisper: decoder": ("whisper", {"encoder_mode": "frozen"}, {"markers", "decoder"}),
    "whisper: lora": ("whisper lora", {"encoder_mode": "lora", "encoder_lora": LORA}, {"markers", "lora", "encoder"}),
    "whisper: markers": ("whisper", {"decoder_mode": "frozen", "encoder_mode": "frozen"}, {"markers"}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_step_moves_what_trains_and_nothing_else(build: Build, case: str) -> None:
    variant, options, groups = TRAINED[case]
    model = build(variant, **options).train()
    batch = model.collator()(items(ROWS[:1] + ROWS[2:]))
    trainable = model.trainable_groups()
    assert set(trainable) == groups
    names = {name for named in trainable.values() for name, _ in named}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for named in trainable.values() for _, p in named], lr=1e-2, weight_decay=0.1)
    first = weighted_loss(model.losses(batch), batch.target_parts, "dynamic")
    first.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        got = parameter.grad is not None and bool(parameter.grad.any())
        assert got == (name in names), f"gradient of {name}"
        assert torch.equal(parameter, before[name]) != (name in names), f"step of {name}"
    for _ in range(4):
        optimizer.zero_grad()
        loss = weighted_loss(model.losses(batch), batch.target_parts, "dynamic")
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < float(first.detach()), "training lowers the loss"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames its checkpointing
def test_frozen_parts_stay_in_eval_mode(tiny_speech_llm: Build, tiny_whisper_slu: Build) -> None:
    align: Any = tiny_speech_llm(lora=None).train()
    assert align.projector.training
    assert not any(m.training for m in [*align.encoder.modules(), *align.llm.modules()])
    adapt: Any = tiny_speech_llm().train()
    assert adapt.llm.training
    assert not adapt.encoder.training
    align.llm.gradient_checkpointing_enable()
    assert align.train().llm.training, "transformers checkpoints in train mode alone"
    markers: Any = tiny_whisper_slu(decoder_mode="frozen", encoder_mode="frozen").train()
    assert not any(m.training for m in markers.whisper.model.modules() if m is not markers.whisper.model)
    full: Any = tiny_whisper_slu(decoder_mode="full", encoder_mode="frozen").train()
    assert full.whisper.model.decoder.training
    assert not any(m.training for m in full.whisper.model.encoder.modules())
    assert not any(m.training for m in full.eval().modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@BOTH
def test_gradient_checkpointing_changes_no_gradient(build: Build, variant: str) -> None:
    model: Any = build(variant, encoder_mode="full").train()
    batch = model.collator()(items(ROWS[:1] + ROWS[2:]))
    losses, gradients = losses_and_gradients(model, batch)
    decoder = model.llm if variant.startswith("llama") else model.whisper
    decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = losses_and_gradients(model.train(), batch)
    torch.testing.assert_close(again, losses, rtol=0, atol=1e-5)
    assert set(recomputed) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@BOTH
def test_bf16_is_close_to_fp32(build: Build, variant: str) -> None:
    """Frozen weights in bf16, what trains in fp32 under autocast, as a run does; decoding needs no autocast."""
    model = build(variant, lora=LORA, **{"decoder_mode": "lora", "encoder_mode": "frozen"} if variant == "whisper" else {})
    batch = model.collator()(items())
    expected, _ = losses_and_gradients(model, batch)
    if variant != "whisper":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = losses_and_gradients(model, batch)
    assert losses.dtype == torch.float32
    supervised = batch.target_parts != NO_PART
    assert float(losses[supervised].mean()) == pytest.approx(float(expected[supervised].mean()), rel=0.05)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())
    assert model.generate(batch.mel, batch.mel_lengths, max_new_tokens=3).shape == (len(batch), 3)


@pytest.mark.parametrize(("variant", "options", "message"), [
    ("llama", {"lora": LORA | {"target_modules": ["q_proj", "qkv"]}}, r"\['qkv'\] match no .* of the LLM.*gate_proj"),
    ("llama", {"lora": LORA | {"target_modules": []}}, r"match no linear layer of the LLM"),
    ("whisper", {"decoder_mode": "lora", "lora": LORA | {"target_modules": ["o_proj"]}},
     r"\['o_proj'\] match no linear layer of the Whisper decoder.*out_proj"),
    ("whisper", {"decoder_mode": "lora"}, "needs `lora` options"),
    ("whisper", {"decoder_mode": "top"}, "unknown decoder_mode 'top'; known: full, lora, frozen"),
    ("whisper", {"language": "xx"}, "language 'xx' is not one of Whisper's"),
    ("whisper", {"encoder_mode": "none"}, "unknown encoder_mode 'none'"),
    ("llama", {"projector": "mpl"}, "did you mean 'mlp'"),
])
def test_bad_options_are_named(build: Build, variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(variant, **options)


# Decoding


def answer(row: Tensor, eos: int) -> list[int]:
    """Ids of a row up to its end of text."""
    ids: list[int] = row.tolist()
    return ids[:ids.index(eos) + 1] if eos in ids else ids


@EVERY
@pytest.mark.parametrize("beams", [1, 3])
def test_batched_generation_equals_serial_token_for_token(build: Build, variant: str, beams: int) -> None:
    model = build(variant)
    collate = model.collator()
    batch = collate(items())
    forced = model.codec.text_ids("the")
    said = []
    for start in (None, forced):
        options = {"forced": start, "max_new_tokens": 12, "num_beams": beams}
        together = model.generate(batch.mel, batch.mel_lengths, **options)
        assert together.shape[0] == len(batch)
        assert together.shape[1] <= 12, "the prompt is not part of the result"
        for row, item in zip(together, items(), strict=True):
            one = collate([item])
            alone = model.generate(one.mel, one.mel_lengths, **options)[0]
            assert answer(row, model.codec.eos_id) == answer(alone, model.codec.eos_id)
            said.append(tuple(answer(row, model.codec.eos_id)))
    assert len(set(said)) > 2, "a model that says one thing to everything proves nothing"


@EVERY
@torch.no_grad()
def test_generation_picks_what_teacher_forcing_finds_likeliest(build: Build, variant: str) -> None:
    """Prompt and positions are the same in training and in use: greedy ids are the argmax of teacher-forced logits."""
    model = build(variant)
    batch = model.collator()(items())
    ids = model.generate(batch.mel, batch.mel_lengths, max_new_tokens=8)
    others = torch.tensor([model.codec.eos_id, *list(model.codec.marker_ids.values())[:3], *range(40, 44)])
    for i, row in enumerate(ids):
        n = int(batch.mel_lengths[i])
        if n > 1000:
            continue  # decoded beside the others, and too slow to try all alternatives
        greedy = torch.tensor(answer(row, model.codec.eos_id))
        swaps = greedy.repeat(len(others), len(greedy), 1)  # (other, position, ids)
        swaps.diagonal(dim1=1, dim2=2)[:] = others[:, None]
        tried = torch.cat([greedy[None], swaps.flatten(0, 1)])
        mel, lengths = batch.mel[i:i + 1, :, :n].expand(len(tried), -1, -1), batch.mel_lengths[i:i + 1].expand(len(tried))
        losses = model(mel, lengths, tried, torch.zeros_like(tried))
        of_others = losses[1:].view(swaps.shape).diagonal(dim1=1, dim2=2)
        assert (of_others >= losses[0] - 1e-4).all()
        assert (of_others > losses[0]).any()


@BOTH
def test_a_checkpoints_own_decoding_settings_do_not_count(
        build: Build, variant: str, tiny_llm: Callable[..., Any], tiny_whisper: Callable[..., Any],
        tiny_tokenizer: Callable[..., Any]) -> None:
    """Qwen ships a repetition penalty and sampling, Whisper a list of suppressed symbols that transcripts need."""
    llm, (whisper, whisper_tokenizer), tokenizer = tiny_llm(), tiny_whisper(**SPREAD), tiny_tokenizer()
    plain = build("llama", lora=None) if variant.startswith("llama") else build("whisper")
    batch = plain.collator()(items())
    expected = plain.generate(batch.mel, batch.mel_lengths, max_new_tokens=12)
    for config in (llm.generation_config, whisper.generation_config):
        config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=2.0, max_length=5,
                      suppress_tokens=sorted(set(expected.flatten().tolist())), begin_suppress_tokens=[40, 41])
    model: Any
    if variant.startswith("llama"):
        settings = {name: getattr(plain.config, name) for name in ("projector", "projector_options")}
        model = SpeechLLM(SpeechLLMConfig(**settings), whisper.model.encoder, llm, tokenizer)
        model.load_state_dict(plain.state_dict())
    else:
        model = WhisperSLU(WhisperSLUConfig(), whisper, whisper_tokenizer)
    assert torch.equal(model.eval().generate(batch.mel, batch.mel_lengths, max_new_tokens=12), expected)


def test_whisper_never_writes_beyond_its_positions(tiny_whisper_slu: Build) -> None:
    model: Any = tiny_whisper_slu(whisper_options={"max_target_positions": 20})
    batch = model.collator()(items(ROWS[:1]))
    assert model.generate(batch.mel, batch.mel_lengths, max_new_tokens=200).shape[1] <= 20 - len(model.prompt)
    assert model.generate(batch.mel, batch.mel_lengths).shape[1] <= 20 - len(model.prompt)


@torch.no_grad()
def test_a_beginning_of_text_comes_first_where_the_tokenizer_wants_one(
        tiny_speech_llm: Build, tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    bos = tokenizer.bos_token_id
    assert tiny_speech_llm(tokenizer=tokenizer).prefix == [bos]  # type: ignore[attr-defined]
    model: Any = tiny_speech_llm(tokenizer=tiny_tokenizer(add_bos=True), prompt_prefix="<s>hear", prompt_suffix="say")
    assert model.prefix[0] == bos
    assert model.prefix.count(bos) == 1
    assert bos not in model.suffix
    plain: Any = tiny_speech_llm(prompt_prefix="hear")
    assert bos not in plain.prefix
