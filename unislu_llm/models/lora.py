"""LoRA by PEFT, and the 8 or 4 bits of the frozen weights under it."""

from __future__ import annotations

from typing import Any, Literal

import peft
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from unislu_llm.config import LoraConfig
from unislu_llm.errors import UserError


def inject_lora(module: nn.Module, options: LoraConfig, what: str,
                owner: nn.Module | None = None) -> None:
    """Add trainable adapters to `module`, a part of `owner`; everything else in it is frozen.

    Raises:
        UserError: a target matches no layer; the message lists what is there.
    """
    layers = list(dict.fromkeys(name.rpartition(".")[2] for name, layer in module.named_modules()
                                if isinstance(layer, nn.Linear)))
    targets = layers if options.target_modules == ["all-linear"] else options.target_modules
    # PEFT would pass over a name that matches nothing beside one that does.
    missing = [name for name in targets if name not in layers]
    if missing or not targets:
        raise UserError(f"model.lora.target_modules: {missing or targets} match no linear layer of "
                        f"the {what}; its linear layers are: {', '.join(layers)}")
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha,  # type: ignore[arg-type]
                             lora_dropout=0.0, target_modules=targets)
    # A quantised LLM says so on its outermost module alone (`is_loaded_in_4bit`): shown its body,
    # PEFT would take packed 4-bit weights for plain ones.
    peft.inject_adapter_in_model(config, owner if owner is not None else module)


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
