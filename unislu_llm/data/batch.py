"""A micro-batch: what one forward pass of a model takes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from unislu_llm.tokenizer import Example

InputKind = Literal["audio", "frames", "posteriors", "text"]
"""What a micro-batch holds of speech: log-mel, cached encoder frames, posteriors simulated for
text without audio, or nothing."""


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some examples, all of one kind of input. Lengths are plain integers, known
    on the CPU: no forward pass asks the device for them."""

    examples: tuple[Example, ...]  # what the tensors were made of, in order
    kind: InputKind  # which of mel, frames and posteriors is there
    speech_lengths: tuple[int, ...]  # valid mel, encoder or posterior frames; 0 with `text`
    target_ids: Tensor  # (batch, L), filled with the pad id
    target_parts: Tensor  # (batch, L), see unislu_llm.loss
    target_lengths: tuple[int, ...]  # supervised tokens, the end of text included
    durations: tuple[float, ...]  # seconds of audio
    mel: Tensor | None = None  # (batch, n_mels, T_mel) log-mel at 100 Hz
    frames: Tensor | None = None  # (batch, T_enc, D) encoder frames at 50 Hz
    posterior_classes: Tensor | None = None  # (batch, T_ctc, 3) int64: of a simulated ctc
    posterior_shares: Tensor | None = None  # (batch, T_ctc, 3) fp32; a class may come twice
    hypothesis_ids: Tensor | None = None  # (batch, L_hyp) with their prompt, pad id; None: unread
    hypothesis_lengths: tuple[int, ...] = ()  # 0 for an example without a hypothesis
    ctc_targets: tuple[tuple[int, ...], ...] = ()  # classes of transcripts, for objective `ctc`
    counted: bool = True  # False: only keeps a process company; targets belong to no part

    def __len__(self) -> int:
        return len(self.examples)

    def to(self, device: torch.device | str) -> Batch:
        """A copy with every tensor on `device`."""
        # From pinned memory the copy runs while the device still computes.
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A copy in pinned memory; torch's DataLoader asks for it."""
        return self._map(lambda t: t.pin_memory())

    def halves(self) -> tuple[Batch, Batch]:
        """The first and the second half of at least two examples, padded as they are."""
        middle, size = len(self) // 2, len(self)

        def part(rows: slice) -> Batch:
            # Every field but the kind has one entry an example, or none at all.
            cut = {f.name: value[rows] for f in fields(self) if f.name != "kind"
                   and isinstance(value := getattr(self, f.name), (Tensor, tuple)) and len(value)}
            return replace(self, **cut)  # type: ignore[arg-type]

        return part(slice(middle)), part(slice(middle, size))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        moved = {f.name: change(value) for f in fields(self)
                 if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]
