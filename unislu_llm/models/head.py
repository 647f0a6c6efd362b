"""Cross-entropy of supervised positions alone, in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits that exist at one time, 64 MiB and 1 GiB in fp32. A GPU reads the whole output layer for
# each chunk, and is faster with fewer.
LOGITS_ON_CPU, LOGITS_ON_GPU = 1 << 24, 1 << 28

# What models do to the logits of their output layer, by names of configurations: Granite, Inkling,
# Cohere, Falcon-H1; Gemma 2, RecurrentGemma, xLSTM. The probe of a new one refuses all others.
_FACTORS = ("logits_scaling", "logits_mup_width_multiplier", "logit_scale", "lm_head_multiplier",
            "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states `(..., dim)` as the model's own forward gives them."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden)
    for name in _FACTORS:
        if (factor := getattr(config, name, None) or 1.0) != 1.0:
            # HyperCLOVA multiplies by what Granite divides by, under one name.
            divides = name.startswith("logits_") and config.model_type != "hyperclovax"
            logits = logits / factor if divides else logits * factor
    cap = next(filter(None, (getattr(config, name, None) for name in _CAPS)), None)
    return torch.tanh(logits / cap) * cap if cap else logits


def token_losses(model: Any, hidden: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """Cross-entropy `(positions,)`, in nats and fp32, of targets `(positions,)`.

    By hidden states `(positions, dim)`, `chunk` at a time (0: what fits); logits are never kept.
    """

    # The logits of a batch would be the largest tensor of a step: positions times a vocabulary of
    # up to a quarter of a million. They exist for a few positions at a time, and are computed again
    # in the backward pass, so that memory does not grow with vocabulary times sequence.
    def losses(h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model, h).float(), t, reduction="none")

    most = LOGITS_ON_CPU if hidden.device.type == "cpu" else LOGITS_ON_GPU
    # By the configuration: a sharded output layer does not know its own size.
    chunk = chunk or max(16, most // int(model.config.get_text_config().vocab_size))
    keep = len(hidden) <= chunk or not torch.is_grad_enabled()
    return torch.cat([losses(h, t) if keep else checkpoint(losses, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)])


def places(lengths: Sequence[int], width: int, device: torch.device,
           starts: Sequence[int] | None = None) -> Tensor:
    """Flat indices of `lengths[i]` positions from `starts[i]` (0) on in rows of `width`."""
    begins = [i * width + (starts[i] if starts else 0) for i in range(len(lengths))]
    index = [torch.arange(begin, begin + n) for begin, n in zip(begins, lengths, strict=True)]
    return torch.cat(index).to(device, non_blocking=True)
