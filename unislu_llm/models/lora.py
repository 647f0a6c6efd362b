"""LoRA by PEFT, and the 8 or 4 bits of the frozen weights under it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import BitsAndBytesConfig, DynamicCache
from transformers.pytorch_utils import Conv1D

from unislu_llm.config import LoraConfig
from unislu_llm.errors import UserError

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def inject_lora(module: Any, options: LoraConfig, what: str,
                owner: nn.Module | None = None) -> list[str]:
    """Add trainable adapters to `module`, a part of `owner`; everything else in it is frozen.

    Returns the targets: of `auto` Llama's where it has them all, else what PEFT knows for its
    architecture, else every linear layer. Raises UserError: a target matches no layer.
    """
    linear = {name: layer for name, layer in module.named_modules()
              if isinstance(layer, (nn.Linear, Conv1D))}  # GPT-2's name for a linear layer
    layers = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    targets = options.target_modules
    if targets in (["auto"], ["all-linear"]):
        # Mamba's kernels take two weights by themselves, past their layers.
        mamba = any(name.endswith("A_log") for name, _ in module.named_parameters())
        all_linear = [n for n in layers if not (mamba and n in ("out_proj", "dt_proj"))]
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(module.config.model_type)
        usual: list[Any] = [_LLAMA, known] if targets == ["auto"] else []
        leaves = list(next((n for n in usual if n and set(n) <= set(layers)), all_linear))
        whole, used = owner or module, _used(owner, module, linear) if owner else linear
        targets = _shortest(whole, module, sorted(
            (n for n in used if n.rpartition(".")[2] in leaves),
            key=lambda n: leaves.index(n.rpartition(".")[2])))
    # PEFT would pass over a name that matches nothing beside one that does.
    missing = [t for t in targets if not any(f".{n}".endswith(f".{t}") for n in linear)]
    if missing or not targets:
        raise UserError(f"model.lora.target_modules: {missing or targets} match no linear layer of "
                        f"the {what}; its linear layers are: {', '.join(layers)}")
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha,  # type: ignore[arg-type]
                             lora_dropout=0.0, target_modules=targets,
                             fan_in_fan_out=any(isinstance(x, Conv1D) for x in linear.values()))
    # A quantised LLM says so on its outermost module alone (`is_loaded_in_4bit`): shown its body,
    # PEFT would take packed 4-bit weights for plain ones.
    try:
        peft.inject_adapter_in_model(config, owner if owner is not None else module)
    except ValueError as error:  # Mamba's, named by a user
        raise UserError(f"model.lora.target_modules: {error}") from error
    return list(targets)


def _used(owner: Any, module: Any, linear: Mapping[str, nn.Module]) -> list[str]:
    """Names of the linear layers through whose outputs a gradient flows."""
    # Towers for images, layers that only choose where to attend, and weights that are read past
    # their layer would get adapters that never train. On the meta device nothing is computed, so
    # that it is quick, and every process finds the same.
    config, tags = deepcopy(owner.config), dict[str, torch.Tensor]()
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    try:
        with torch.device("meta"):
            body = type(owner)(config).eval().get_submodule(_path(owner, module))
            for name in linear:
                tags[name] = torch.zeros((), requires_grad=True)
                body.get_submodule(name).register_forward_hook(partial(_tagged, tag=tags[name]))
            embeds = torch.zeros(1, 3, owner.get_input_embeddings().weight.shape[1])
            out = body(inputs_embeds=embeds, past_key_values=DynamicCache(config=config))
            sums = out.last_hidden_state.sum()
            found = torch.autograd.grad(sums, list(tags.values()), allow_unused=True)
    except Exception:  # of any class: the code looks at values, say
        return [name for name, layer in linear.items()
                if not type(layer).__module__.startswith("transformers.models.")]
    # Which experts run depends on the token.
    used = [n for n, grad in zip(tags, found, strict=True) if grad is not None or "expert" in n]
    return used or list(linear)  # a gradient of its own


def _tagged(layer: Any, args: tuple[torch.Tensor], out: Any, tag: torch.Tensor) -> Any:
    # What an architecture derives from a linear layer, such as a router, may be none.
    plain = isinstance(out, torch.Tensor) and out.shape[:-1] == args[0].shape[:-1]
    return out + tag if plain and out.shape[-1] in layer.weight.shape else out


def _shortest(owner: Any, module: Any, layers: Iterable[str]) -> list[str]:
    """Ends of the names of layers of `module` that no other module of `owner` has: PEFT's way."""
    def ends(name: str) -> list[str]:
        return [name.split(".", i)[-1] for i in reversed(range(name.count(".") + 1))]

    path = _path(owner, module)
    full = dict.fromkeys(f"{path}.{name}".strip(".") for name in layers)
    others = {end for name, _ in owner.named_modules() if name not in full for end in ends(name)}
    return list(dict.fromkeys(next((e for e in ends(name) if e not in others), name)
                              for name in full))


def _path(owner: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in owner.named_modules() if found is module)


def quantization(kind: Literal["none", "8bit", "4bit"]) -> dict[str, Any]:
    """Arguments of `from_pretrained`; UserError where bitsandbytes is missing."""
    if kind == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"model.quantization '{kind}' needs bitsandbytes: pip install "
                        "'unislu_llm[quantize]'") from error
    # QLoRA's settings (arXiv 2305.14314): normal floats, whose scales are quantised as well.
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True) if kind == "8bit" else
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                               bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=torch.bfloat16)}
