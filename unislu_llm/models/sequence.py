"""Embeddings of a prompt's parts, laid end to end in every row, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Part = tuple[Tensor, Sequence[int]]
"""Embeddings of one part, `(batch, n, dim)` or `(1, n, dim)` where all rows have the same, and how
many positions of each row count."""


def lay_out(parts: Sequence[Part], padding: Literal["left", "right"]) -> tuple[Tensor, list[int]]:
    """Join the parts of every row and pad the rows to one length with zeros.

    Returns:
        `(batch, length, dim)`, and how many positions of each row count.
    """
    # The positions of a batch are one gather from a table of all parts, whose index is made on the
    # CPU. Cutting and joining row by row would cost a kernel for each part of each row, and in the
    # backward pass a tensor of the whole part for each cut.
    rows = []
    for i in range(len(parts[0][1])):
        pieces, offset = [], 1
        for embeddings, lengths in parts:
            count, size = embeddings.shape[:2]
            begin = offset + (i * size if count > 1 else 0)
            pieces.append(torch.arange(begin, begin + lengths[i]))
            offset += count * size
        rows.append(torch.cat(pieces))
    # Padding points to the row of zeros that the table begins with.
    index = pad_sequence(rows, batch_first=True, padding_side=padding)
    zeros = parts[0][0].new_zeros(1, parts[0][0].shape[-1])
    table = torch.cat([zeros, *(embeddings.flatten(0, 1) for embeddings, _ in parts)])
    laid = table.index_select(0, index.flatten().to(table.device, non_blocking=True))
    return laid.view(*index.shape, -1), [len(row) for row in rows]


def places(lengths: Sequence[int], width: int, device: torch.device,
           starts: Sequence[int] | None = None) -> Tensor:
    """Flat indices of `lengths[i]` positions from `starts[i]` (0) on in rows of `width`."""
    begins = [i * width + (starts[i] if starts else 0) for i in range(len(lengths))]
    index = [torch.arange(begin, begin + n) for begin, n in zip(begins, lengths, strict=True)]
    return torch.cat(index).to(device, non_blocking=True)
