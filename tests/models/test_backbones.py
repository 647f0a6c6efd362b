"""Every preset of `adapters/` on a tiny random model of the architecture that it is written for.

The tiny model has the layers, tying, vocabulary padding and tokenizer habits of the real one; what
holds here for layer names, masks, prompts and heads holds there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from tests.models.common import SHORT, losses_and_gradients, make_batch
from tests.tiny import make_llm, make_speech_llm, make_tokenizer
from unislu_llm import weights
from unislu_llm.config import ModelConfig
from unislu_llm.models.head import logits_of
from unislu_llm.models.speech_llm import SpeechLLM

ADAPTERS = Path(__file__).parents[2] / "adapters"
PRESETS = sorted(ADAPTERS.glob("*.yaml"))
each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)

CHATML = {"specials": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]}
IM_TOKENS = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}
SMOLLM2 = {"arch": "llama", "tied": True, "tokenizer": CHATML | IM_TOKENS}
QWEN_TOKENS = {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>"}
QWEN2 = {"arch": "qwen2", "tied": True, "extra": 32, "tokenizer": CHATML | QWEN_TOKENS}
GEMMA3 = {"arch": "gemma3_text", "tied": True, "extra": -1,
          "tokenizer": {"specials": ["<start_of_turn>", "<end_of_turn>"], "metaspace": "never",
                        "add_bos": True, "bos": "<bos>", "eos": "<eos>"}}
THINKING = {"specials": [*CHATML["specials"], "<think>", "</think>"]}
BACKBONES: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-360M-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2,
    "google/gemma-3-270m": GEMMA3,
    "google/gemma-3-1b-it": GEMMA3,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN2,
    "Qwen/Qwen2.5-7B-Instruct": QWEN2 | {"tied": False},
    "Qwen/Qwen3-0.6B": QWEN2 | {"arch": "qwen3", "tokenizer": THINKING | QWEN_TOKENS},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "arch": "llama", "tied": False,
        "tokenizer": {"metaspace": "always", "add_bos": True, "pad": "</s>"},
        "template": "<|user|>\n{{ messages[0].content }}</s>\n<|assistant|>\n"},
    "meta-llama/Llama-3.2-1B-Instruct": {
        "arch": "llama", "tied": True,
        "tokenizer": {"specials": ["<|start_header_id|>", "<|end_header_id|>"], "add_bos": True,
                      "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "pad": None}},
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "arch": "mistral", "tied": False, "llm_options": {"sliding_window": None},
        "tokenizer": {"specials": ["[INST]", "[/INST]"], "metaspace": "always", "add_bos": True,
                      "pad": None}},
}
"""What the real model and tokenizer look like, by name. `extra` is the rows of the embedding beyond
the tokenizer (Qwen pads its vocabulary; Gemma's tokenizer has one token, for images, that its text
models have no row for)."""


def read(preset: Path) -> dict[str, Any]:
    """Settings of the model in a preset."""
    found = yaml.safe_load(preset.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key in ModelConfig.model_fields}


def build(preset: Path) -> tuple[SpeechLLM, Any]:
    """A tiny model of a preset, and its LLM once more, untouched."""
    facts = BACKBONES[read(preset)["llm"]]
    tokenizer, plain = (make_tokenizer(**facts["tokenizer"]) for _ in range(2))
    tokenizer.chat_template = facts.get("template")  # turns that are no special tokens
    if facts.get("extra", 0) < 0:
        for own in (tokenizer, plain):
            own.add_tokens(["<image_soft_token>"], special_tokens=True)
    options = facts.get("llm_options", {}) | {"vocab_size": len(plain) + facts.get("extra", 0)}
    return (make_speech_llm(arch=facts["arch"], tied=facts["tied"], tokenizer=tokenizer,
                            llm_options=options, **read(preset)),
            make_llm(facts["arch"], plain, tied=facts["tied"], **options))


def test_every_backbone_has_one_preset() -> None:
    assert sorted(read(preset)["llm"] for preset in PRESETS) == sorted(BACKBONES)


@each_preset
def test_prompt_is_written_in_the_models_own_tokens(preset: Path) -> None:
    model, _ = build(preset)
    tokenizer, config = model.tokenizer.base, model.config
    facts, text = BACKBONES[config.llm]["tokenizer"], config.prompt_prefix + config.prompt_suffix
    for special in [s for s in facts.get("specials", []) if s in text]:
        written = (model.prefix + model.suffix).count(tokenizer.convert_tokens_to_ids(special))
        assert written == text.count(special)
    begins = model.prefix[:1] == [tokenizer.bos_token_id]
    bos = facts.get("bos") or "<s>"
    assert begins == bool(facts.get("add_bos") or config.prompt_prefix.startswith(bos))
    assert model.prefix.count(tokenizer.bos_token_id) <= 1
    suffix = tokenizer.decode(model.suffix, skip_special_tokens=False)
    assert suffix.strip() == config.prompt_suffix.strip()


@each_preset
def test_what_should_train_gets_a_gradient_and_nothing_else(preset: Path) -> None:
    model = build(preset)[0].train()
    groups = model.trainable_groups()
    assert set(groups) == {"projector", "lora", "markers"}
    targets, layers = model.config.lora.target_modules, model.llm.config.num_hidden_layers
    assert len(groups["lora"]) == 2 * len(targets) * layers
    assert all(name.startswith("llm.") for name, _ in groups["lora"])
    losses, gradients = losses_and_gradients(model, make_batch(model, SHORT))
    assert losses.isfinite().all()
    assert set(gradients) == {name for group in groups.values() for name, _ in group}
    # At first lora_A has none, behind a lora_B of zeros.
    assert all(g.any() != (".lora_A." in name) for name, g in gradients.items())


@each_preset
@torch.no_grad()
def test_logits_are_those_of_the_untouched_llm(preset: Path) -> None:
    model, plain = build(preset)
    ids = torch.arange(3, 43).reshape(2, 20)
    embeddings = plain.get_input_embeddings()(ids)
    torch.testing.assert_close(model.llm.get_input_embeddings()(ids), embeddings)
    hidden = model.llm.base_model(inputs_embeds=embeddings).last_hidden_state
    logits, markers = logits_of(model.llm, hidden), list(model.tokenizer.marker_ids.values())
    torch.testing.assert_close(logits, model.llm(inputs_embeds=embeddings).logits)
    others = [i for i in range(plain.config.vocab_size) if i not in markers]
    torch.testing.assert_close(logits[..., others],
                               plain(inputs_embeds=embeddings).logits[..., others])
    # Ids that belong to nobody (a tokenizer longer than the model) must never be chosen.
    assert torch.isin(logits.argmax(-1), torch.tensor(others + markers)).all()
    tied = BACKBONES[model.config.llm]["tied"]
    assert len(model.trainable_groups()["markers"]) == (1 if tied else 2)


@pytest.mark.weights
def test_smollm2_prompt_is_its_chat_template() -> None:
    preset = read(ADAPTERS / "smollm2-135m.yaml")
    tokenizer = AutoTokenizer.from_pretrained(weights.resolve(preset["llm"]).path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "SPEECH"}], tokenize=False,
                                         add_generation_prompt=True)
    assert text.endswith(f"{preset['prompt_prefix']}SPEECH{preset['prompt_suffix']}")
