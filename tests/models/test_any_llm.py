"""LLMs of many architectures: right, or one clear refusal when the model is put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from tests.models.common import SHORT, losses_and_gradients, make_batch, singles
from tests.tiny import make_llm, make_speech_llm, make_tokenizer, model_config
from unislu_llm.config import DecodeConfig
from unislu_llm.config_file import find_preset
from unislu_llm.decoding.engine import Engine
from unislu_llm.errors import UserError
from unislu_llm.models.head import logits_of
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tasks import TaskRegistry
from unislu_llm.weights import from_pretrained

ADAPTERS = Path(__file__).parents[2] / "adapters"
AUTO = {"lora": {"rank": 2, "target_modules": ["auto"]}}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WINDOW = {"sliding_window": 8, "query_pre_attn_scalar": 8}
NEO = {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "block_ff_dim": 64}
ARCHITECTURES: dict[str, tuple[dict[str, Any], bool, list[str]]] = {
    "llama": ({}, True, LLAMA),
    "gemma2": (WINDOW, True, LLAMA),
    "gpt2": ({}, True, ["c_attn"]),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, True, ["q_proj", "v_proj"]),
    "gpt_neo": (NEO, True, ["q_proj", "v_proj"]),
    "bloom": ({}, True, ["query_key_value"]),
    "phi3": ({}, True, ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]),
    "lfm2": (LFM2, False, ["in_proj", "out_proj", "w1", "w3", "w2", "q_proj", "k_proj", "v_proj"]),
    "mamba": ({}, False, ["in_proj", "x_proj"]),
}
"""Options of its configuration, whether its cache can be cut, and what LoRA adapts by itself."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_trains_and_decodes_in_a_batch_as_alone(arch: str) -> None:
    options, rewinds, targets = ARCHITECTURES[arch]
    model = make_speech_llm(arch=arch, llm_options=options, **AUTO)
    assert model.rewinds == rewinds
    assert model.config.lora.target_modules == targets
    batch, alone = make_batch(model, SHORT), singles(model, SHORT)
    losses, gradients = losses_and_gradients(model, batch)
    assert set(gradients) == {n for group in model.trainable_groups().values() for n, _ in group}
    for row, one in zip(losses, alone, strict=True):
        own = model.losses(one)[0].detach()
        torch.testing.assert_close(row[: len(own)], own, rtol=0, atol=1e-4)
    engine = Engine(model, DecodeConfig(max_new_tokens=20, force_task=True, grammar=True))
    together = engine.answer(batch, [["ner", "sa"]] * len(SHORT))
    for answer, one in zip(together, alone, strict=True):
        own = engine.answer(one, [["ner", "sa"]])[0]
        assert (own.transcript, own.outputs) == (answer.transcript, answer.outputs)
        # Each task is what it is when asked alone, and its labels are as probable.
        task = engine.answer(one, [["sa"]])[0]
        assert task.outputs["sa"] == answer.outputs["sa"]


TROCR = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
ROUTERS = {"num_local_experts": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize(("arch", "options", "adapted", "left_out"), [
    ("trocr", TROCR, "self_attn", "encoder_attn"),  # its cross-attention has nothing to read
    ("phimoe", ROUTERS, "self_attn", "router"),  # which derives from a linear layer
    ("ctrl", {"dff": 64}, "ffn.0", "layernorm")])  # the first of its layers is called 0 as well
def test_auto_adapts_what_a_gradient_reaches(arch: str, options: dict[str, Any], adapted: str,
                                             left_out: str) -> None:
    model = make_speech_llm(arch=arch, llm_options=options, **AUTO)
    names = [name for name, _ in model.trainable_groups()["lora"]]
    assert any(f".{adapted}." in n for n in names)
    assert not any(f".{left_out}" in n for n in names)
    gradients = losses_and_gradients(model, make_batch(model, SHORT))[1]
    assert all(gradients[name].any() for name in names if ".lora_B." in name)
    again = make_speech_llm(arch=arch, llm_options=options, lora=model.config.lora.model_dump())
    assert [name for name, _ in again.trainable_groups()["lora"]] == names, "as it is saved"


def test_hidden_states_and_output_layer_may_be_of_different_dtypes() -> None:
    llm = make_llm("mamba").bfloat16()  # with a residual stream in fp32
    config = model_config(projector="none", hypothesis="manifest", prompt_prefix="a", **AUTO)
    model = SpeechLLM(config, TaskRegistry(), None, llm, make_tokenizer())
    hidden = model.body(input_ids=torch.arange(4)[None]).last_hidden_state
    assert hidden.dtype == torch.float32
    assert model.logits(hidden).isfinite().all()


def test_no_layer_is_lost_to_the_probe() -> None:
    assert len(make_speech_llm(llm_options={"num_hidden_layers": 4}).llm.model.layers) == 4


def test_gradient_checkpointing_that_an_llm_cannot_do_is_refused() -> None:
    model = make_speech_llm(arch="ctrl", llm_options={"dff": 64}, **AUTO)
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing: CTRLLMHeadModel cannot"):
        model.enable_gradient_checkpointing()


@torch.no_grad()
def test_reading_again_equals_the_cache() -> None:
    """Steps with gaps, a copy with rows exchanged, and tokens that are taken back."""
    model, found = make_speech_llm(), []
    for model.rewinds in (True, False):
        state = model.prefill(make_batch(model, SHORT))
        ids = torch.arange(20, 29).view(3, 3)
        model.step(state, ids, torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool())
        state.drop(torch.tensor([1, 0, 2]))
        found.append(model.step(state.take([2, 0, 0, 1]), ids[:1].expand(4, -1)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arch", "options"), [
    ("hyperclovax", {"logits_scaling": 4.0}), ("granite", {"logits_scaling": 4.0}),
    ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 2.0})])
@torch.no_grad()
def test_logits_are_the_models_own(arch: str, options: dict[str, Any]) -> None:
    model, ids = make_llm(arch, **options), torch.arange(9)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(logits_of(model, hidden), model(input_ids=ids).logits)


@pytest.mark.parametrize(("arch", "message"), [
    ("roberta", "RobertaForCausalLM is no causal LM"), ("bert", "is no causal LM"),
    ("modernbert-decoder", "computes logits that are not those of its output layer")])
def test_what_is_no_causal_lm_is_refused(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.llm tiny-llm: .*{message}"):
        make_speech_llm(arch=arch, **AUTO)


def test_an_llm_that_reads_ids_beside_embeddings_is_refused() -> None:
    llm = make_llm("gemma3n_text", hidden_size_per_layer_input=8, num_kv_shared_layers=0,
                   layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0])
    for layer in llm.model.layers:  # at zero, which hides what the ids add
        layer.altup.correct_output_scale.data += 1.0
    config = model_config(projector="none", hypothesis="manifest", **AUTO)
    with pytest.raises(UserError, match="reads token ids beside their embeddings"):
        SpeechLLM(config, TaskRegistry(), None, llm, make_tokenizer())


def test_positions_bound_training_and_answers() -> None:
    model = make_speech_llm(arch="gpt2", llm_options={"max_position_embeddings": 30}, **AUTO)
    with pytest.raises(UserError, match=r"speech and target need .* the LLM has 30"):
        model.losses(make_batch(model))
    short = singles(model, SHORT)[0]  # 5 positions of speech
    engine = Engine(model, DecodeConfig(max_new_tokens=200, tokens_per_second=400.0))
    assert max(engine.answer(short, [["sa"]])[0].n_tokens.values()) <= 25
    with pytest.raises(UserError, match=r"prompt, speech and answer need .* the LLM has 30"):
        engine.answer(make_batch(model), [["sa"]] * 4)


def test_a_prompt_with_tokens_of_another_llm_is_refused() -> None:
    with pytest.raises(UserError, match=r"has no token '<\|im_start\|>'"):
        make_speech_llm(prompt_prefix="<|im_start|>user\n")


# Checkpoints


def save(folder: Path, arch: str, kind: Any = AutoModelForCausalLM, **options: Any) -> Path:
    config = AutoConfig.for_model(arch, **options)
    kind.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64,
                         "num_hidden_layers": 2, "num_attention_heads": 4}


def test_the_text_model_of_a_multimodal_checkpoint_is_taken(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = SMALL | WINDOW | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
    whole = save(tmp_path / "llm", "gemma3", text_config=text, vision_config=vision,
                 mm_tokens_per_image=4)
    llm = from_pretrained(AutoModelForCausalLM, whole)
    assert type(llm).__name__ == "Gemma3ForCausalLM"
    ids = torch.arange(7)[None]
    both = AutoModelForCausalLM.from_pretrained(whole)
    torch.testing.assert_close(llm(input_ids=ids).logits, both(input_ids=ids).logits)
    SpeechLLM(model_config(projector="none", hypothesis="manifest"), TaskRegistry(), None, llm,
              make_tokenizer())


BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32}


@pytest.mark.parametrize(("arch", "kind", "options"), [
    ("bart", AutoModel, BART), ("bart", AutoModelForCausalLM, BART),
    ("t5", AutoModel, {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8})])
def test_encoder_decoders_are_refused(arch: str, kind: Any, options: dict[str, Any],
                                      tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"config\.json: a {arch} is an encoder-decoder model"):
        from_pretrained(AutoModelForCausalLM, save(tmp_path, arch, kind, vocab_size=400, **options))


def test_per_layer_embeddings_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma4_text").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: a gemma4_text reads token ids beside"):
        from_pretrained(AutoModelForCausalLM, tmp_path)


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    from transformers import WhisperModel

    folder = save(tmp_path, "roberta", AutoModelForMaskedLM, **SMALL)
    with pytest.raises(UserError, match=r"config\.json: model_type is roberta, and a whisper is"):
        from_pretrained(WhisperModel, folder)


def test_a_folder_is_known_by_its_config(tmp_path: Path) -> None:
    facts = {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
             "vocab_size": 151936, "eos_token_id": 151645}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert find_preset(ADAPTERS, str(tmp_path)) == ADAPTERS / "qwen3-0.6b.yaml"
    assert find_preset(ADAPTERS, "qwen/qwen3-0.6B@main") == ADAPTERS / "qwen3-0.6b.yaml"
    (tmp_path / "config.json").write_text(json.dumps(facts | {"hidden_size": 2048}))
    assert find_preset(ADAPTERS, str(tmp_path)) is None
