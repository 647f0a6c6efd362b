"""LoRA by PEFT, and the 8 or 4 bits of the frozen weights under it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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

    Returns:
        The targets that `options` stand for: a saved model names what it was trained with.

    Raises:
        UserError: a target matches no layer; the message lists what is there.
    """
    found = {name: isinstance(layer, Conv1D) for name, layer in module.named_modules()
             if isinstance(layer, (nn.Linear, Conv1D))}  # GPT-2's name for a linear layer
    # A layer of an `nn.Sequential` has a number for a last name, as the blocks themselves have.
    layers = list(dict.fromkeys(name if last.isdigit() else last for name in found
                                for last in [name.rpartition(".")[2]]))
    targets, usable = options.target_modules, layers
    if any(name.endswith("A_log") for name, _ in module.named_parameters()):
        # Mamba's kernels take these weights by themselves, past their layers.
        usable = [name for name in layers if name not in ("out_proj", "dt_proj")]
    if targets == ["auto"]:
        targets = _usual(usable, getattr(module.config, "model_type", ""))
    elif targets == ["all-linear"]:
        targets = usable
    # PEFT would pass over a name that matches nothing beside one that does.
    missing = [name for name in targets if name not in layers]
    if missing or not targets:
        raise UserError(f"model.lora.target_modules: {missing or targets} match no linear layer of "
                        f"the {what}; its linear layers are: {', '.join(layers)}")
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha,  # type: ignore[arg-type]
                             lora_dropout=0.0, target_modules=targets,
                             fan_in_fan_out=any(found.values()))
    # A quantised LLM says so on its outermost module alone (`is_loaded_in_4bit`): shown its body,
    # PEFT would take packed 4-bit weights for plain ones.
    with warnings.catch_warnings():  # it sets `fan_in_fan_out` right by itself, layer by layer
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        try:
            peft.inject_adapter_in_model(config, owner if owner is not None else module)
        except ValueError as error:  # layers of some architectures are not for it
            raise UserError(f"model.lora.target_modules: {error}") from error
    return list(targets)


def _usual(layers: Sequence[str], model_type: str) -> list[str]:
    """What is adapted in an LLM of which nobody says it: Llama's seven linear layers where it has
    them all, else what PEFT knows for its architecture, else every linear layer."""
    if set(_LLAMA) <= set(layers):
        return list(_LLAMA)
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ())
    # Of some it knows a pattern; and of an architecture that has changed, names that are gone.
    return list(known) if known and set(known) <= set(layers) else list(layers)


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
