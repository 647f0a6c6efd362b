"""Tiny random checkpoints of every causal-LM architecture that transformers knows.

Sizes are shrunk by the names of a configuration's numbers, which most architectures share. Layers
are as many as there are kinds of them, so that a hybrid keeps its attention.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CLASSES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # by architecture
MOST = 5_000_000  # parameters of a tiny model; a larger one was not shrunk
POSITIONS = 1024
_SIZES = [(re.compile(rf"(?:{names})\Z"), size) for names, size in (
    (r"hidden_size|attention_hidden_size|embedding_size|embed_dim|word_embed_proj_dim|d_model|dim|"
     r"n_embd|hidden_dim|emb_dim|lru_width|pronunciation_embed_dim|shape_embed_dim", 32),
    (r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|n_inner|d_inner|dff|d_ff|ffn_size|"
     r"\w*feed_forward_size|block_ff_dim|inner_dim", 64),
    (r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|num_blocks|(de|en)coder_layers", 2),
    (r"num_(de|en)?(coder_)?attention_heads|(de|en)coder_attention_heads|n_heads?|num_heads|"
     r"index_n_heads|swa_num_attention_heads", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|n_kv_heads?|kv_n_heads|multi_query_group_num", 2),
    (r"qk_(nope|rope)_head_dim|rotary_dim", 4),
    (r"(\w+_)?head_dim|attention_head_size|kv_channels", 8),
    (r"\w*lora_rank", 16),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts", 4),
    (r"num_experts_per_(tok|token)|moe_top_?k|top_k_experts|moe_k|n_group|topk_group|"
     r"num_selected_experts", 2),
    # Shorter than what the checks read, so that windows slide.
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size|attention_window",
     8),
    (r"(mamba_)?(d_)?state(_size)?|mamba_d_state|ssm_state_size", 8),
    (r"(mamba_)?chunk_size", 16))]
_POSITIONS = re.compile(r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|"
                        r"max_sequence_length|max_target_positions)\Z")
# Larger than usual, so that a random model's next-token choices are far from ties.
_SPREAD = {"initializer_range": 0.1, "init_std": 0.1}
# What the names of the numbers do not say.
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
_GEMMA3N = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [
    "sliding_attention", "full_attention"] * 2}
# Attention reads the embeddings beside the hidden states; its weights are shared by its layers.
_ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "mamba_expand": 2,
          "attention_hidden_size": 64, "attention_head_dim": 16}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    # Its logits are a sixteenth, which a few steps hardly change.
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64},
    "gemma3n_text": _GEMMA3N | {"intermediate_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "granitemoehybrid": _MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA | {"n_mamba_heads": 2},
    "zamba2": _ZAMBA | {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1},
}


def tiny_config(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The configuration of an architecture, of two layers (or more kinds of them), 32 wide."""
    plain = AutoConfig.for_model(kind).to_dict()
    return AutoConfig.for_model(kind, **_shrunk(plain, tokenizer) | EXCEPTIONS.get(kind, {}))


def _shrunk(plain: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The values of a configuration, or of one inside it, that have to change."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and "model_type" in value:
            found[key] = _shrunk(value, tokenizer) | {"model_type": value["model_type"]}
        elif key in ("vocab_size", "n_words", "vocab_size_per_layer_input"):
            found[key] = len(tokenizer)
        elif key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found[key] = getattr(tokenizer, key)
        elif key in _SPREAD:
            found[key] = _SPREAD[key]
        elif _POSITIONS.match(key):
            found[key] = POSITIONS
        elif type(value) is int and value > 0:
            size = next((size for names, size in _SIZES if names.match(key)), None)
            found |= {} if size is None else {key: min(value, size)}
    if plain.get("num_key_value_heads") == plain.get("num_attention_heads"):
        found |= {"num_key_value_heads": 4} if "num_key_value_heads" in found else {}
    if "qk_rope_head_dim" in found and "head_dim" in found:  # of latent attention, it is the same
        found["head_dim"] = found["qk_rope_head_dim"]
    for key in ("layer_types", "layers_block_type"):
        if kinds := list(dict.fromkeys(plain.get(key) or ())):
            found[key] = kinds if len(kinds) > 1 else kinds * 2
            found["num_hidden_layers"] = len(found[key])
    return found


def save_tiny(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    """Write a random checkpoint and its tokenizer into a folder; returns its parameters.

    Raises what transformers raises, and ValueError for one of over `MOST` parameters.
    """
    config = tiny_config(kind, tokenizer)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters, which the shrinker does not know how to make fewer")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates and biases that begin at zero would hide what they do
                parameter.normal_(0.0, 0.1)
        # Raises where sizes do not fit each other.
        model(input_ids=torch.arange(3, 23).view(2, 10))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return size
