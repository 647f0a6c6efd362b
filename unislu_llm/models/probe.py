"""What an LLM must be, tried on a few tokens when a model is put together.

Training takes for granted that no token sees later ones and that :func:`.head.logits_of` gives the
LLM's own logits; decoding, that a cache can be padded, shared, cut and joined. An LLM for which
that is not so would train and decode without a word, and be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
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

_LENGTH, _SHARED = 5, 4  # of the rows, and of the beginning that they have in common
Differ = Callable[[Tensor, Tensor], bool]


def body_of(llm: Any) -> Any:
    """The LLM without its output layer; None where it has none."""
    # Llama 4 and some others call it by another name than they say.
    return getattr(llm, "model", None) if llm.base_model is llm else llm.base_model


def check_parts(llm: Any, name: str) -> None:
    """Raises UserError: an LLM without a body, embeddings or an output layer of its own."""
    parts = {"body": body_of(llm), "input embedding": llm.get_input_embeddings(),
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
        a, b = a.float(), b.float()
        return a.shape != b.shape or not bool((a - b).norm() <= limit * b.norm())

    training = llm.training
    llm.eval()
    try:
        ids = 7919 * torch.arange(2 * _LENGTH, device=weight.device).view(2, -1)
        ids = (ids + 11) % min(len(llm.get_input_embeddings().weight), *model.tokenizer.marker_ids
                               .values())
        if _shares_cache(model, ids[0], differ):
            return True
        # By itself, as in training; two rows begin alike.
        ids[1, :_SHARED] = ids[0, :_SHARED]
        try:
            states, own = _own_forward(llm, llm.get_input_embeddings()(ids), use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any class: it is the code of some architecture
            said = shorten(" ".join(str(error).split()), 160)
            raise _refusal(model, "does not read embeddings "
                           f"({type(error).__name__}: {said})") from error
        if differ(states[1, :_SHARED], states[0, :_SHARED]):
            raise _refusal(model, "is no causal LM: what it makes of a token depends on later ones")
        if differ(logits_of(llm, states), own):
            raise _refusal(model, "computes its logits in a way that is not known here: they are "
                           "not those of its output layer")
        return False
    finally:
        llm.train(training)


def _refusal(model: SpeechLLM, why: str) -> UserError:
    return UserError(f"model.llm {model.config.llm}: {type(model.llm).__name__} {why}; take "
                     "another LLM")


def _own_forward(llm: Any, embeds: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of embeddings `(rows, n, dim)` by the LLM's own forward."""
    found: list[Tensor] = []
    body = body_of(llm)
    hook = getattr(body, "decoder", body).register_forward_hook(  # OPT calls that part of its body
        lambda _, __, output: found.append(output.last_hidden_state))
    try:
        logits = llm(inputs_embeds=embeds, **options).logits
        return found[0], logits
    finally:
        hook.remove()


def _shares_cache(model: SpeechLLM, ids: Tensor, differ: Differ) -> bool:
    """Whether all is as it must be with a cache, of which rows are padded, cut and exchanged."""
    # The first row reads the ids; the second, padded on the left, those but for the last one, and
    # another for the one before. Two passes of the LLM: it may be large.
    llm, n = model.llm, len(ids)
    mask = torch.ones(2, n, dtype=torch.bool, device=ids.device)
    mask[1, 0] = False
    rows = torch.stack([ids, torch.cat([ids[:1], ids[:-2], ids[:1]])])
    embeds = llm.get_input_embeddings()(rows)
    state = State(DynamicCache(), mask[:, :0], embeds[:, -1])
    options: dict[str, Any] = {"past_key_values": state.cache, "use_cache": True}
    positions = state.append(mask)
    if "position_ids" in signature(body_of(llm).forward).parameters:
        options["position_ids"] = positions
    try:
        states, own = _own_forward(llm, embeds, attention_mask=mask.long(), **options)
        layers: list[Any] = state.cache.layers
        if {type(layer) for layer in layers} != {DynamicLayer} or any(
                layer.keys is None or layer.keys.shape[2] != n for layer in layers):
            return False
        if differ(states[1, 1:-1], states[0, :-2]) or differ(logits_of(llm, states), own):
            return False
        # Both go back to before the last two of the ids; the second row now reads them as well.
        state.drop(torch.tensor([2, 1], device=ids.device))
        state = state.take([1, 0])
        more = ids[-2:].expand(2, -1)
        found = model.read_cached(state, torch.ones_like(more, dtype=torch.bool), input_ids=more)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # any class, as above
        return False
    return not differ(found, states[:1, -2:].expand(2, -1, -1))
