"""Marker tokens beside a vocabulary that stays as it is.

The base embedding may have a quarter of a million rows, frozen and tied to the output layer; to
train it for 19 markers costs its full gradient. Here their rows are one small parameter that the
input embedding and the output layer consult for marker ids: they train alone while the base is
frozen, and tied bases stay tied (the same rows at both ends).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unislu_llm.errors import UserError
from unislu_llm.tokenizer import UnifiedTokenizer


class _Marked(nn.Module):
    """A layer of a model with trainable rows `(n, dim)` for ids `first .. first + n - 1`."""

    def __init__(self, base: nn.Module, rows: nn.Parameter, first: int) -> None:
        super().__init__()
        self.base, self.rows, self.first = base, rows, first

    @property
    def weight(self) -> Tensor:
        """The base's rows, for code that expects them on such a layer."""
        return self.base.weight  # type: ignore[return-value]

    bias = property(lambda self: getattr(self.base, "bias", None))


class MarkerEmbedding(_Marked):
    """Input embedding; its marker rows are unscaled."""

    def __init__(self, base: nn.Module, rows: nn.Parameter, first: int) -> None:
        super().__init__(base, rows, first)
        weight = self.weight
        with torch.no_grad():
            # Some models (Gemma) scale embeddings inside the module: the markers need the same.
            # Measured over many rows: some are zero, such as that of a padding token.
            probe = torch.arange(0, len(weight), max(1, len(weight) // 256), device=weight.device)
            size = weight[probe].float().norm().clamp(min=1e-12)
            self.scale = float(base(probe).float().norm() / size)

    def forward(self, ids: Tensor) -> Tensor:
        """`(batch, length)` ids to `(batch, length, dim)`."""
        slot = ids - self.first
        is_marker = (slot >= 0) & (slot < len(self.rows))
        plain = self.base(ids.masked_fill(is_marker, 0))
        rows = self.rows[slot.clamp(0, len(self.rows) - 1)] * self.scale
        return torch.where(is_marker[..., None], rows.to(plain.dtype), plain)


class MarkerHead(_Marked):
    """Output layer; its rows are the embedding's own where the base is tied."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., dim)` to logits `(..., max(vocabulary, first + n))`."""
        # In decoding `hidden` is the last position alone, a view with gaps, which a CPU multiplies
        # some 100 times as slowly in bf16. Some LLMs keep it, or this layer, in fp32.
        hidden = hidden.contiguous().to(self.weight.dtype)
        plain = self.base(hidden)
        marks = nn.functional.linear(hidden, self.rows.to(hidden.dtype)).to(plain.dtype)
        gap, last = self.first - plain.shape[-1], self.first + len(self.rows)
        if gap > 0:  # ids between the base's last row and the first marker are nobody's
            plain = nn.functional.pad(plain, (0, gap), value=torch.finfo(plain.dtype).min)
        return torch.cat([plain[..., : self.first], marks, plain[..., last:]], dim=-1)


def install_markers(model: Any, tokenizer: UnifiedTokenizer) -> None:
    """Wrap input embedding and output layer of a causal LLM or Whisper, in place.

    Each row starts as the mean of the rows of the words that its marker stands for.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first = min(tokenizer.marker_ids.values())
    rows_in = nn.Parameter(_starting_rows(embedding.weight, tokenizer))
    tied = head.weight is embedding.weight
    rows_out = rows_in if tied else nn.Parameter(_starting_rows(head.weight, tokenizer))
    model.set_input_embeddings(MarkerEmbedding(embedding, rows_in, first))
    model.set_output_embeddings(MarkerHead(head, rows_out, first))
    config = model.config.get_text_config()
    config.vocab_size = max(int(config.vocab_size), first + len(tokenizer.marker_ids))


@torch.no_grad()
def write_markers(model: Any) -> None:
    """Undo :func:`install_markers`, but with their rows in a vocabulary that grows to hold them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    old, first, last = len(embedding.weight), head.first, head.first + len(head.rows)
    model.set_input_embeddings(embedding.base)
    model.set_output_embeddings(head.base)
    model.resize_token_embeddings(max(old, last), mean_resizing=False)
    for part, own in ((embedding, model.get_input_embeddings()),
                      (head, model.get_output_embeddings())):
        # Ids between the base's last row and the first marker are nobody's, and a plain model has
        # no minus infinity for them. The mean row's logit is the mean of all logits: never the
        # largest, and (Jensen) its probability is at most the mean one.
        own.weight[old:] = own.weight[:old].float().mean(0)
        # Unscaled at both ends: where the embedding scales (Gemma), it scales these rows as well.
        own.weight[first:last] = part.rows.to(own.weight.dtype)
        if (bias := getattr(own, "bias", None)) is not None:
            bias[old:], bias[first:last] = bias[:old].mean(), 0


@torch.no_grad()
def _starting_rows(weight: Tensor, tokenizer: UnifiedTokenizer) -> Tensor:
    meanings = [tokenizer.text_ids(tokenizer.registry.meaning(m)) for m in tokenizer.marker_ids]
    if (largest := max((i for ids in meanings for i in ids), default=0)) >= len(weight):
        raise UserError(f"the tokenizer has a token {largest}, and the model {len(weight)} rows: "
                        "they do not belong together; fetch the checkpoint again")
    return torch.stack([weight[ids].float().mean(0) for ids in meanings])
