"""LoRA by PEFT, and the 8 or 4 bits of the frozen weights under it."""

from __future__ import annotations

from typing import Any, Literal

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import BitsAndBytesConfig
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
    found = {name.rpartition(".")[2]: type(layer) for name, layer in module.named_modules()
             if isinstance(layer, (nn.Linear, Conv1D))}  # GPT-2's name for a linear layer
    layers, targets = list(found), options.target_modules
    if targets in (["auto"], ["all-linear"]):
        # Mamba's kernels take two weights by themselves, past their layers.
        mamba = any(name.endswith("A_log") for name, _ in module.named_parameters())
        all_linear = [n for n in layers if not (mamba and n in ("out_proj", "dt_proj"))]
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(module.config.model_type)
        usual: list[Any] = [_LLAMA, known] if targets == ["auto"] else []
        targets = list(next((n for n in usual if n and set(n) <= set(layers)), all_linear))
    # PEFT would pass over a name that matches nothing beside one that does.
    missing = [name for name in targets if name not in layers]
    if missing or not targets:
        raise UserError(f"model.lora.target_modules: {missing or targets} match no linear layer of "
                        f"the {what}; its linear layers are: {', '.join(layers)}")
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha,  # type: ignore[arg-type]
                             lora_dropout=0.0, target_modules=targets,
                             fan_in_fan_out=Conv1D in found.values())
    # A quantised LLM says so on its outermost module alone (`is_loaded_in_4bit`): shown its body,
    # PEFT would take packed 4-bit weights for plain ones.
    try:
        peft.inject_adapter_in_model(config, owner if owner is not None else module)
    except ValueError as error:  # Mamba's, named by a user
        raise UserError(f"model.lora.target_modules: {error}") from error
    return list(targets)


def keep_gradients(llm: nn.Module) -> None:
    """Let 4-bit layers on a CPU be trained through, also once they have decoded."""
    # In eval mode bitsandbytes packs weights anew for a CPU kernel (AVX512-BF16), and never back:
    # in later training steps that kernel lets no gradient through.
    layers: list[Any] = list(llm.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def quantization(kind: Literal["none", "8bit", "4bit"]) -> dict[str, Any]:
    """Arguments of `from_pretrained`; UserError where bitsandbytes is missing."""
    if kind == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"model.quantization '{kind}' needs bitsandbytes: pip install "
                        "bitsandbytes") from error
    # QLoRA's settings (arXiv 2305.14314): normal floats, whose scales are quantised as well.
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True) if kind == "8bit" else
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                               bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=torch.bfloat16)}
