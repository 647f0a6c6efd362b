"""Cross-entropy of supervised positions alone, in chunks: memory does not grow with vocabulary times sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_LOGITS = {"cpu": 1 << 24}
"""Logits that exist at one time, by device: 64 MiB in fp32. A GPU reads the whole vocabulary for each chunk, and takes more."""
_MANY_LOGITS = 1 << 28


def chunk_size(model: Any, device: torch.device) -> int:
    """Positions whose logits are computed at one time: fewer with a large vocabulary."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    return max(16, _LOGITS.get(device.type, _MANY_LOGITS) // vocabulary)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states `(..., dim)` as the model's own forward gives them, scaling and soft-capping included."""
    config = model.config
    logits: Tensor = model.get_output_embeddings()(hidden)
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return torch.tanh(logits / cap) * cap if cap else logits


def token_losses(model: Any, hidden: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """Cross-entropy of each position in fp32; logits are recomputed in the backward pass, never kept.

    Args:
        model: with `get_output_embeddings`.
        hidden: `(positions, dim)`. targets: `(positions,)`.
        chunk: positions at a time; 0: :func:`chunk_size`.

    Returns:
        `(positions,)` in nats.
    """

    def losses(h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model, h).float(), t, reduction="none")

    chunk = chunk or chunk_size(model, hidden.device)
    pieces = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        keep = hidden.shape[0] <= chunk or not torch.is_grad_enabled()
        pieces.append(losses(h, t) if keep else checkpoint(losses, h, t, use_reentrant=False))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0)
