"""What an LLM must be, tried on a few tokens when a model is put together.

Training takes for granted that no token sees later ones and that :func:`.head.logits_of` gives the
LLM's own logits; decoding, that a cache can be padded, shared, cut and joined. An LLM for which
that is not so would train and decode without a word, and be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from unislu_llm.errors import UserError, shorten
from unislu_llm.models.head import logits_of
from unislu_llm.models.kv_cache import State

if TYPE_CHECKING:
    from unislu_llm.models.speech_llm import SpeechLLM

_LENGTH, _SHARED = 8, 6  # of the rows, and of the beginning that they have in common


def check_parts(llm: Any, name: str) -> None:
    """Raises UserError: an LLM without a body, embeddings or an output layer of its own."""
    parts = {"body": None if llm.base_model is llm else llm.base_model,
             "input embedding": llm.get_input_embeddings(),
             "output layer": llm.get_output_embeddings()}
    for part, module in parts.items():
        if getattr(module, "weight", module) is None:
            raise UserError(f"model.llm {name}: {type(llm).__name__} has no {part} that can be told"
                            " from the rest; take another causal LM")


@torch.no_grad()
def probe(model: SpeechLLM) -> bool:
    """Whether the LLM's cache is keys and values of every token, which can be cut and shared.

    Raises:
        UserError: a property that every causal LM has and this one lacks.
    """
    llm, weight = model.llm, model.llm.get_output_embeddings().weight
    # Sharded weights are not here yet, and fused attention runs on the device alone: what is left
    # is what the configuration says.
    if (weight.is_meta or hasattr(weight, "ds_id")
            or llm.config._attn_implementation not in ("eager", "sdpa")):
        layers = DynamicCache(config=llm.config).layers
        return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)
    quantised = getattr(llm, "is_quantized", False)
    # By norm, since what rounding does to the smallest numbers says nothing.
    limit = 0.25 if quantised else 1e-3 if weight.dtype == torch.float32 else 0.05

    def differ(a: Tensor, b: Tensor) -> bool:
        return not bool((a.float() - b.float()).norm() <= limit * b.float().norm())

    training = llm.training
    llm.eval()
    try:
        ids = 7919 * torch.arange(2 * _LENGTH, device=weight.device).view(2, -1)
        ids = (ids + 11) % min(len(llm.get_input_embeddings().weight), *model.tokenizer.marker_ids
                               .values())
        ids[1, :_SHARED] = ids[0, :_SHARED]
        states, own = _own_forward(model, ids)
        _refuse(model, differ(states[1, :_SHARED], states[0, :_SHARED]), "is no causal LM: what it "
                "makes of a token depends on later ones")
        ours = logits_of(llm, states)
        _refuse(model, ours.shape != own.shape or differ(ours, own), "computes its logits in a way "
                "that is not known here: they are not those of its output layer")
        return _shares_cache(model, ids, states, differ)
    finally:
        llm.train(training)


def _refuse(model: SpeechLLM, fault: bool, why: str) -> None:
    if fault:
        raise UserError(f"model.llm {model.config.llm}: {type(model.llm).__name__} {why}; take "
                        "another LLM")


def _own_forward(model: SpeechLLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of ids `(rows, n)` by the LLM's own forward."""
    found: list[Tensor] = []
    hook = model.llm.base_model.register_forward_hook(
        lambda _, __, output: found.append(output.last_hidden_state))
    try:
        embeds = model.llm.get_input_embeddings()(ids)
        logits = model.llm(inputs_embeds=embeds, use_cache=False).logits
        if not found:  # OPT calls a part of its body
            model.llm.base_model(inputs_embeds=embeds, use_cache=False)
        return found[0], logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any class: it is the code of some architecture
        said = shorten(" ".join(str(error).split()), 160)
        _refuse(model, True, f"does not read embeddings ({type(error).__name__}: {said})")
        raise
    finally:
        hook.remove()


def _shares_cache(model: SpeechLLM, ids: Tensor, states: Tensor, differ: Any) -> bool:
    """Whether rows that were padded on the left, cut and exchanged go on as `states` say."""
    embeds = model.llm.get_input_embeddings()(ids[:1].expand(2, -1))
    cut = _SHARED - 2
    mask = torch.ones(2, _SHARED, dtype=torch.bool, device=ids.device)
    mask[1, :2] = False
    begin = torch.stack([embeds[0, :_SHARED], torch.cat([embeds[0, :2], embeds[0, :cut]])])
    state = State(DynamicCache(), mask[:, :0], begin[:, -1])
    try:
        model.read_cached(state, mask, inputs_embeds=begin)
        layers: list[Any] = state.cache.layers
        if not layers or any(type(layer) is not DynamicLayer or not layer.is_initialized
                             or layer.keys.shape[2] != _SHARED for layer in layers):
            return False
        state.drop(torch.tensor([1, 1], device=ids.device))
        state = state.take([1, 0])
        # Each reads the token that was taken back, and one more.
        more = torch.stack([ids[0, cut - 1:cut + 1], ids[0, _SHARED - 1:_SHARED + 1]])
        found = model.read_cached(state, torch.ones_like(more, dtype=torch.bool), input_ids=more)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # any class, as above
        return False
    expected = torch.stack([states[0, cut - 1:cut + 1], states[0, _SHARED - 1:_SHARED + 1]])
    return not differ(found, expected)
