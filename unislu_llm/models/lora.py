"""LoRA by PEFT, scoped to one module and checked to have matched something."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from unislu_llm.errors import UserError


@dataclass
class LoraOptions:
    """Low-rank adapters (arXiv 2106.09685).

    Args:
        rank: 0 switches LoRA off.
        alpha: scale; the update is `alpha / rank * B A`.
        dropout: on the adapter's input.
        target_modules: suffixes of the linear layers to adapt; a single `all-linear` adapts all of them.
        use_rslora: scale by `alpha / sqrt(rank)` instead.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    use_rslora: bool = False


def linear_suffixes(module: nn.Module) -> list[str]:
    """Distinct last names of the linear layers in `module`, most frequent first."""
    names = (name.rpartition(".")[2] for name, m in module.named_modules() if isinstance(m, nn.Linear))
    return [name for name, _ in Counter(names).most_common()]


def inject_lora(module: nn.Module, options: LoraOptions, what: str) -> None:
    """Add trainable adapters to `module` in place; everything else in it is frozen.

    Args:
        module: Whisper encoder or causal LLM.
        options: rank, scale, target layers.
        what: name of the part, for the message.

    Raises:
        UserError: a target matches no layer; the message lists what is there.
    """
    targets = options.target_modules
    suffixes = linear_suffixes(module)
    missing = [t for t in targets if t != "all-linear" and t not in suffixes]
    if missing or not targets:
        raise UserError(f"LoRA target_modules {missing or targets} match no linear layer of the {what}; "
                        f"its linear layers are: {', '.join(suffixes)}")
    layers = [s for s in suffixes if s != "base"] if targets == ["all-linear"] else targets
    inject_adapter_in_model(LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
                                       target_modules=layers, use_rslora=options.use_rslora), module)
