"""LoRA by PEFT, the 8 or 4 bits of the frozen weights under it, and both merged to plain layers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig, DynamicCache
from transformers.pytorch_utils import Conv1D

from unislu_llm.config import LoraConfig
from unislu_llm.errors import UserError
from unislu_llm.weights import fast_type

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def inject_lora(module: Any, options: LoraConfig, what: str,
                owner: nn.Module | None = None) -> LoraConfig:
    """Add trainable adapters to `module`, a part of `owner`; everything else in it is frozen.

    Returns the options with the targets found: of `auto` Llama's where it has them all, else what
    PEFT knows for its architecture, else every linear layer. UserError: a target matches no layer.
    """
    root, inside = owner or module, set(module.modules())
    linear = {name: layer for name, layer in root.named_modules()  # Conv1D is GPT-2's name for one
              if isinstance(layer, (nn.Linear, Conv1D)) and layer in inside}
    ends = {name: name.rpartition(".")[2] for name, _ in root.named_modules()}
    targets = options.target_modules
    if targets in (["auto"], ["all-linear"]):
        # Mamba's kernels take two weights by themselves, past their layers.
        mamba = any(name.endswith("A_log") for name, _ in module.named_parameters())
        used = {name: ends[name] for name in _used(owner, linear)
                if not (mamba and ends[name] in ("out_proj", "dt_proj"))}
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(module.config.model_type)
        usual: list[Any] = [_LLAMA, known] if targets == ["auto"] else []
        targets = list(next((n for n in usual if n and set(n) <= set(used.values())),
                            dict.fromkeys(used.values())))
        # PEFT would take every module that is called so.
        if any(end in targets and name not in used for name, end in ends.items()):
            targets = [name for name, end in used.items() if end in targets]
    # PEFT would pass over a name that matches nothing beside one that does.
    missing = [t for t in targets if not any(f".{n}".endswith(f".{t}") for n in linear)]
    if missing or not targets:
        raise UserError(f"model.lora.target_modules: {missing or targets} match no linear layer of "
                        f"the {what}; its linear layers are: "
                        f"{', '.join(dict.fromkeys(ends[n] for n in linear))}")
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha,  # type: ignore[arg-type]
                             lora_dropout=0.0, target_modules=targets,
                             fan_in_fan_out=Conv1D in map(type, linear.values()))
    # A quantised LLM says so on its outermost module alone (`is_loaded_in_4bit`): shown its body,
    # PEFT would take packed 4-bit weights for plain ones.
    try:
        peft.inject_adapter_in_model(config, owner if owner is not None else module)
    except ValueError as error:  # Mamba's, named by a user
        raise UserError(f"model.lora.target_modules: {error}") from error
    return options.model_copy(update={"target_modules": targets})


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Keep adapters from casting their inputs to fp32, the type of their weights: autocast would
    cast them back. A training step in bf16 takes 3/4 of the time, and no bit changes."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False


def _used(owner: Any, linear: Mapping[str, nn.Module]) -> list[str]:
    """Names of the linear layers that a gradient reaches by their outputs."""
    # What is derived from a linear layer, such as a router, may be none.
    plain = [name for name, layer in linear.items()
             if not type(layer).__module__.startswith("transformers.models.")]
    try:
        # On the meta device nothing is computed, and every process finds the same.
        config, tags = deepcopy(owner.config), []
        config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
        with torch.device("meta"):
            twin = type(owner)(config).eval()
            for name in linear:
                tags.append(torch.zeros((), requires_grad=True))
                twin.get_submodule(name).register_forward_hook(lambda *a, tag=tags[-1]: a[2] + tag)
            embeds = torch.zeros(1, 3, owner.get_input_embeddings().weight.shape[1])
            logits = twin(inputs_embeds=embeds, past_key_values=DynamicCache(config=config)).logits
            found = torch.autograd.grad(logits.sum(), tags, allow_unused=True)
    except Exception:  # there is no owner, or its architecture looks at values, say
        return plain
    # None: towers for images, layers that only choose where to attend; and experts by chance.
    return [name for name, grad in zip(linear, found, strict=True)
            if grad is not None or "expert" in name] or plain


def quantization(kind: Literal["none", "8bit", "4bit"]) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    if kind == "none":
        return {}
    # QLoRA's settings (arXiv 2305.14314): normal floats, whose scales are quantised as well.
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True) if kind == "8bit" else
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                               bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=fast_type())}


@torch.no_grad()
def merge_lora(model: Any, dtype: torch.dtype) -> int:
    """Put plain fp32 layers in the place of adapted and quantised ones; returns how many adapters
    change a weight that is then rounded to `dtype`."""
    changed, modules = 0, list[tuple[str, Any]](model.named_modules())
    for name, layer in modules:
        base: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        quantised = type(base).__module__.startswith("bitsandbytes.nn")
        if name.endswith(".base_layer") or not (quantised or base is not layer):
            continue
        # PEFT's own merging would round the sum to 4 or 8 bits again, which loses most of LoRA.
        weight = merged = dequantize_module_weight(base).detach().float()
        if base is not layer:  # the delta lies as the weight does, also of a Conv1D
            merged = weight + layer.get_delta_weight(layer.active_adapters[0]).float()
            changed += not torch.equal(merged.to(dtype), weight.to(dtype))
        if quantised:
            bias, base = base.bias, nn.Linear(1, 1, bias=False)
            base.bias, (base.out_features, base.in_features) = bias, merged.shape
        base.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, base)
    # Else transformers would save it as a quantised model.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("quantization_method", None)
    model.hf_quantizer, model.is_quantized = None, False
    return changed
