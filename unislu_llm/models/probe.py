"""What training and decoding take for granted of an LLM, tried when a model is put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
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
    training, fault = llm.training, ""
    ids = 11 + 7919 * torch.arange(5, device=weight.device)
    ids %= min(len(llm.get_input_embeddings().weight), *model.tokenizer.marker_ids.values())
    rows = torch.stack([ids, torch.cat([ids[:4], ids[:1]])])  # which begin alike
    llm.eval()
    try:
        with _few_layers(model):
            quick = _shares_cache(model, ids)
        if quick or _shares_cache(model, ids):
            return True
        states, own = _own_forward(model, rows, use_cache=False)
        if _differ(model, states[1, :4], states[0, :4]):
            fault = "is no causal LM: what it makes of a token depends on later ones"
        elif _differ(model, model.body(input_ids=ids[None], use_cache=False).last_hidden_state,
                     states[:1]):
            fault = "reads token ids beside their embeddings, so that speech cannot be put in"
        elif _differ(model, logits_of(llm, states[:, -1:]), own):
            fault = "computes logits that are not those of its output layer, in an unknown way"
    except Exception as error:  # any class: it is the code of some architecture
        fault = (f"does not read embeddings ({type(error).__name__}: "
                 f"{shorten(' '.join(str(error).split()), 160)})")
    finally:
        llm.train(training)
    if fault:
        other = " or model.quantization none" if getattr(llm, "is_quantized", False) else ""
        raise UserError(f"model.llm {model.config.llm}: {type(llm).__name__} {fault}; take another"
                        f"{other}")
    return False


def _differ(model: Any, a: Tensor, b: Tensor) -> bool:
    # By norm, since what rounding does to the smallest numbers says nothing.
    quantised = getattr(model.llm, "is_quantized", False)
    limit = 0.25 if quantised else 1e-3 if b.dtype == torch.float32 else 0.05
    return a.shape != b.shape or not bool((a.float() - b).norm() <= limit * b.float().norm())


def _own_forward(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Hidden states of ids `(2, n)`, the very last one no token's, and the last logits of each row,
    by the LLM's own forward."""
    found: list[Tensor] = []
    body = getattr(model.body, "decoder", model.body)  # OPT calls that part of its body
    hook = body.register_forward_hook(lambda _, __, out: found.append(out.last_hidden_state))
    try:
        embeds = model.llm.get_input_embeddings()(ids).clone()
        embeds[1, -1] = embeds[0].mean(0)  # as speech is
        if "logits_to_keep" in signature(model.llm.forward).parameters:
            options["logits_to_keep"] = 1  # the output layer may be the largest
        logits = model.llm(inputs_embeds=embeds, **options).logits
        return found[0], logits[:, -1:]
    finally:
        hook.remove()


@contextmanager
def _few_layers(model: Any) -> Iterator[None]:
    """The LLM without its layers behind two and the first of every kind, which are much alike."""
    config = model.llm.config.get_text_config()
    layers: Any = next((m for m in model.body.modules() if isinstance(m, ModuleList)
                        and len(m) == getattr(config, "num_hidden_layers", 0)), [])
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    kinds = [(kind, *((name, type(part)) for name, part in layer.named_modules()))
             for kind, layer in zip(types, layers, strict=False)]
    kept = max(map(kinds.index, kinds), default=0) + 1
    cut = dict(list(enumerate(layers))[max(kept, 2):])
    for i in cut:
        delattr(layers, str(i))
    try:
        yield
    finally:
        for i, layer in cut.items():
            layers.insert(i, layer)


def _shares_cache(model: Any, ids: Tensor) -> bool:
    """Whether all is as it must be with a cache, of which rows are padded, cut and exchanged."""
    # In two passes of the LLM, which may be large: of three ids, for a CPU multiplies a few rows in
    # half the time of ten. The second row reads, behind padding, the first of them and another.
    ids = ids[:3]
    mask = torch.ones(2, len(ids), dtype=torch.bool, device=ids.device)
    mask[1, 0] = False
    rows = torch.stack([ids, torch.cat([ids[:1], ids[:-2], ids[:1]])])
    state = State(DynamicCache(), mask[:, :0], mask)
    try:
        states, own = _own_forward(model, rows, **model.cached(state, mask))
        if ({type(layer) for layer in state.cache.layers} != {DynamicLayer}
                or _differ(model, states[1, 1:-1], states[0, :-2])
                or _differ(model, logits_of(model.llm, states[:, -1:]), own)):
            return False
        # Both go back by one, exchange their places, and read what follows in the first.
        state.drop(torch.tensor([1, 1], device=ids.device))
        state, more = state.take([1, 0]), ids[1:, None]
        found = model.body(input_ids=more, **model.cached(state, more >= 0)).last_hidden_state
        return not _differ(model, found[:, 0], states[0, 1:])
    except Exception:  # any class, as above
        return False
