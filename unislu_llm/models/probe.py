"""What training and decoding take for granted of an LLM, tried when a model is put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleList
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from unislu_llm.errors import UserError, shorten
from unislu_llm.models.head import logits_of
from unislu_llm.models.kv_cache import State


@torch.no_grad()
def probe(model: Any) -> bool:
    """Whether the cache of a `SpeechLLM` is keys and values of all tokens, to be cut and shared;
    raises UserError: a property that every causal LM has and this one lacks."""
    llm, weight = model.llm, model.llm.get_output_embeddings().weight
    # Sharded weights are not here yet, and fused attention runs on the device alone: what is left
    # is what the configuration says.
    if (weight.is_meta or hasattr(weight, "ds_id")
            or llm.config._attn_implementation not in ("eager", "sdpa")):
        return {DynamicLayer} >= {type(x) for x in DynamicCache(config=llm.config).layers} > set()
    training, size = llm.training, getattr(llm.config.get_text_config(), "num_hidden_layers", 0)
    layers: Any = next((m for m in model.body.modules() if isinstance(m, ModuleList)
                        and len(m) == size), ModuleList())
    whole, kinds = layers._modules, [[type(m) for m in layer.modules()] for layer in layers]
    # Two layers, and more up to the first of every kind, tell of all in milliseconds.
    few = dict(list(whole.items())[:max([1, *map(kinds.index, kinds)]) + 1])
    llm.eval()
    try:
        for layers._modules in (few, whole):
            shares, fault = _tried(model)
            if shares:
                return True
    finally:
        layers._modules = whole
        llm.train(training)
    if fault:
        raise UserError(f"model.llm {model.config.llm}: {type(llm).__name__} {fault}; take another")
    return False


def _differ(model: Any, a: Tensor, b: Tensor) -> bool:
    # By norm, since what rounding does to the smallest numbers says nothing.
    quantised = getattr(model.llm, "is_quantized", False)
    limit = 0.25 if quantised else 1e-3 if b.dtype == torch.float32 else 0.05
    return a.shape != b.shape or not bool((a.float() - b).norm() <= limit * b.float().norm())


def _tried(model: Any) -> tuple[bool, str]:
    """Whether the cache may be shared, and what is wrong with the LLM if it may not."""
    llm, body = model.llm, model.body
    embed = llm.get_input_embeddings()
    ids = 11 + 7919 * torch.arange(3, device=embed.weight.device)
    ids %= min(len(embed.weight), *model.tokenizer.marker_ids.values())
    try:
        # Rows that begin alike; the second ends in what is no token's, as speech is.
        embeds = torch.stack([embed(ids), torch.cat([embed(ids[:2]), embed(ids).mean(0)[None]])])
        states = body(inputs_embeds=embeds.clone(), use_cache=False).last_hidden_state
        if _differ(model, states[1, :2], states[0, :2]):
            return False, "is no causal LM: what it makes of a token depends on later ones"
        by_ids = body(input_ids=ids[None], use_cache=False).last_hidden_state
        if _differ(model, by_ids, states[:1]):
            return False, "reads token ids beside their embeddings: speech cannot be put in"
        own = llm(inputs_embeds=embeds, use_cache=False).logits
        if _differ(model, logits_of(llm, states), own):
            return False, "computes logits that are not those of its output layer"
    except Exception as error:  # any class: it is the code of some architecture
        return False, (f"does not read embeddings, quantization {model.config.quantization} "
                       f"({type(error).__name__}: {shorten(' '.join(str(error).split()), 160)})")
    # With a cache, of which rows are padded, cut and exchanged. The second is a place behind.
    mask = torch.ones(2, 3, dtype=torch.bool, device=ids.device)
    mask[1, 0] = False
    state = State(DynamicCache(), mask[:, :0], mask)
    try:
        rows = torch.stack([ids, ids[[0, 0, 1]]])
        found = body(input_ids=rows, **model.cached(state, mask)).last_hidden_state
        if ({type(layer) for layer in state.cache.layers} != {DynamicLayer}
                or _differ(model, found[1, 1:], states[0, :2])):
            return False, ""
        state.drop(torch.tensor([1, 1], device=ids.device))
        state, more = state.take([1, 0]), ids[1:, None]
        found = body(input_ids=more, **model.cached(state, more >= 0)).last_hidden_state
        return not _differ(model, found[:, 0], states[0, 1:]), ""
    except Exception:  # any class, as above
        return False, ""
