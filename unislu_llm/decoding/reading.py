"""What a decoder is given to read beside what it writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unislu_llm.decoding.search import padded
from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State


def feed(model: SLUModel, state: State, texts: Sequence[Sequence[int]]) -> Tensor:
    """Read ids of each row; hidden states `(rows, n, dim)` after them."""
    ids = padded(texts, state.mask.device)
    if not ids.shape[1]:
        return state.hidden[:, None][:, :0]
    valid = ids >= 0
    hidden = model.step(state, ids.masked_fill(~valid, model.tokenizer.pad_id), valid)
    last = valid.sum(-1)[:, None, None] - 1
    behind = hidden.gather(1, last.clamp(min=0).expand(-1, 1, hidden.shape[2]))[:, 0]
    state.hidden = torch.where(last[:, 0] < 0, state.hidden, behind)
    return hidden
