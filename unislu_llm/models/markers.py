"""Marker tokens beside a vocabulary that stays as it is.

The markers of the unified format are a handful of rows; the base embedding may have a quarter of a million, frozen and
tied to the output layer. Growing and training that matrix for 19 rows costs its full gradient. Here the rows are one
small parameter that the input embedding and the output layer consult for marker ids, so that they can train alone while
the base is frozen, tied bases stay tied (the same rows at both ends), and gradients have the size of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unislu_llm.data.targets import TextCodec


class MarkerEmbedding(nn.Module):
    """Input embedding with extra rows for ids `first .. first + n - 1`.

    Args:
        base: the model's own embedding; a scale it applies (Gemma) is measured and applied to the markers too.
        rows: `(n, dim)`, unscaled, trainable.
        first: id of the first marker.
    """

    def __init__(self, base: nn.Module, rows: nn.Parameter, first: int) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.first = first
        weight: Any = base.weight
        with torch.no_grad():
            # Over many rows: some are zero, such as that of a padding token.
            probe = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // 256), device=weight.device)
            self.scale = float(base(probe).float().norm() / weight[probe].float().norm().clamp(min=1e-12))

    @property
    def weight(self) -> Tensor:
        """The base's rows (what other code expects to find on an embedding)."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """`(batch, length)` ids to `(batch, length, dim)`."""
        slot = ids - self.first
        is_marker = (slot >= 0) & (slot < self.rows.shape[0])
        plain = self.base(ids.masked_fill(is_marker, 0))
        rows = self.rows[slot.clamp(0, self.rows.shape[0] - 1)] * self.scale
        return torch.where(is_marker[..., None], rows.to(plain.dtype), plain)


class MarkerHead(nn.Module):
    """Output layer with the logits of the markers put in their columns.

    Args:
        base: the model's own output layer, `(dim) -> (vocabulary)`.
        rows: `(n, dim)`, trainable; the embedding's own rows when the base is tied.
        first: id of the first marker.
    """

    def __init__(self, base: nn.Module, rows: nn.Parameter, first: int) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.first = first

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., dim)` to logits `(..., max(vocabulary, first + n))`."""
        # Of the last position alone, as decoding asks, `hidden` is a view with gaps: in bf16 a CPU multiplies that some 100
        # times as slowly.
        hidden = hidden.contiguous()
        plain = self.base(hidden)
        marks = nn.functional.linear(hidden, self.rows.to(hidden.dtype)).to(plain.dtype)
        last, size = self.first + self.rows.shape[0], plain.shape[-1]
        chunks = [plain[..., : self.first]]
        if self.first > size:  # ids between the base's last row and the first marker belong to nobody
            chunks.append(plain.new_full((*plain.shape[:-1], self.first - size), torch.finfo(plain.dtype).min))
        return torch.cat([*chunks, marks, plain[..., last:]], dim=-1)


def install_markers(model: Any, codec: TextCodec) -> None:
    """Wrap the input embedding and output layer of `model` so that they know the markers of `codec`, in place.

    Each row starts as the mean of the rows of the words that its marker stands for.

    Args:
        model: a causal LLM or Whisper, with `get_input_embeddings` and the like.
        codec: its ids are the tokenizer's.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first = min(codec.marker_ids.values())
    rows_in = nn.Parameter(_starting_rows(embedding.weight, codec))
    tied = head.weight is embedding.weight
    rows_out = rows_in if tied else nn.Parameter(_starting_rows(head.weight, codec))
    model.set_input_embeddings(MarkerEmbedding(embedding, rows_in, first))
    model.set_output_embeddings(MarkerHead(head, rows_out, first))
    model.config.vocab_size = max(int(model.config.vocab_size), first + len(codec.marker_ids))


@torch.no_grad()
def _starting_rows(weight: Tensor, codec: TextCodec) -> Tensor:
    means = [weight[codec.text_ids(codec.registry.meaning(marker))].float().mean(0) for marker in codec.marker_ids]
    return torch.stack(means)
