"""What to do when a micro-batch does not fit the memory."""

from __future__ import annotations

import gc

import torch

from unislu_llm.data.batch import Batch
from unislu_llm.errors import UserError


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    # The CPU's allocator has no class of error of its own, and oneDNN says no more than that.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in (
            "out of memory", "can't allocate memory", "not enough memory",
            "could not create a primitive")))


def halve(micro: list[Batch], place: int, split: bool, step: int, kept: str) -> list[Batch]:
    """The micro-batches of a step with the one that did not fit in halves.

    Args:
        micro: of the step.
        place: of the one that did not fit.
        split: whether `train.on_oom` allows it.
        step: number of the step, for the message.
        kept: end of the message: what can be resumed.

    Raises UserError: it is one sample, or must not be split.
    """
    batch = micro[place]
    tokens = sum(batch.speech_lengths) + sum(batch.target_lengths)
    what = (f"out of memory at step {step}: a micro-batch of {len(batch)} sample(s), {tokens} "
            f"speech frames and tokens, the longest clip {max(batch.durations):.1f} s")
    if len(batch) == 1:
        raise UserError(f"{what}; one sample alone does not fit: leave longer clips out, or set "
                        f"train.gradient_checkpointing, train.precision bf16{kept}")
    if not split:
        raise UserError(f"{what}; raise train.accumulation (smaller micro-batches, the same "
                        "batch), set train.gradient_checkpointing, or train.on_oom split"
                        f"{kept}")
    gc.collect()  # what the failed pass held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [*micro[:place], *batch.halves(), *micro[place + 1:]]
