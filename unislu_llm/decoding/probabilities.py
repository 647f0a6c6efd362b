"""How likely a decoder finds every label of a task, from teacher-forced scores of the label strings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.decoding.automaton import label_ids
from unislu_llm.decoding.batch import encode_waves
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.models.head import logits_of, token_losses
from unislu_llm.models.state import DecoderState, Encoded
from unislu_llm.tasks import SEPARATOR, LabelTask

_ROWS = 128
"""Utterances times labels at one time."""


def label_probabilities(model: SLUModel, waves: Sequence[Tensor], transcripts: Sequence[str | Sequence[int]], task: str, *,
                        batch_size: int = 16, drafts: Sequence[str | None] | None = None) -> Tensor:
    """Probability of every label of a single-label task, given that the answer is one of them.

    Each label is scored whole, closing marker included, after `transcript[T/L][TASK][open]`: its likeliest label is the
    best of an exhaustive search. Encoder and transcript are read once an utterance, whatever the number of labels.
    A task with several labels an utterance has no such distribution: its answers are label *sets*, 2^n of them, and
    what the decoder says of one label depends on those said before it.

    Args:
        model: either decoder, in eval mode.
        waves: audio of each utterance, `(S,)` at 16 kHz.
        transcripts: of each, as text or as the token ids that were decoded (these are scored as they are).
        task: name of a label task with one label an utterance.
        batch_size: utterances at one time. drafts: see :func:`~unislu_llm.decoding.batch.encode_waves`.

    Returns:
        `(utterances, labels)` fp32 on the CPU, labels in the task's order; rows sum to one.

    Raises:
        UserError: the task is unknown, labels spans, or has several labels an utterance.
    """
    spec = model.codec.registry[task]
    if not isinstance(spec, LabelTask) or spec.multi:
        raise UserError(f"task '{task}' has no probability of each label: it is not a task with one label an utterance")
    if len(waves) != len(transcripts):
        raise UserError(f"{len(waves)} recordings need as many transcripts, found {len(transcripts)}")
    ids = [(model.codec.text_ids(t) if t else []) if isinstance(t, str) else list(t) for t in transcripts]
    order = sorted(range(len(waves)), key=lambda i: -len(waves[i]))  # similar lengths together
    out = torch.zeros(len(waves), len(spec.labels))
    for first in range(0, len(order), batch_size):
        some = order[first:first + batch_size]
        given = None if drafts is None else [drafts[i] for i in some]
        state = read(model, encode_waves(model, [waves[i] for i in some], drafts=given), [ids[i] for i in some])
        out[some] = label_scores(model, state, spec).softmax(-1).cpu()
    return out


@torch.inference_mode()
def read(model: SLUModel, encoded: Encoded, transcripts: Sequence[Sequence[int]]) -> DecoderState:
    """State after speech, prompt and the ids of a transcript each."""
    state, _ = model.begin(encoded)
    if any(transcripts):
        model.extend(state, *padded(transcripts, model.codec.pad_id, state.mask.device))
    return state.compact()


@torch.inference_mode()
def label_scores(model: SLUModel, state: DecoderState, task: LabelTask) -> Tensor:
    """Log-probability of each label and its closing marker after a transcript, `(rows, labels)`, fp32.

    Args:
        state: after the transcripts; it stays as it is.
        task: with one label an utterance.
    """
    codec, rows, device = model.codec, len(state.mask), state.mask.device
    tails = [label_ids(codec, task, label) for label in task.labels]
    opening = torch.tensor([codec.marker_ids[m] for m in (SEPARATOR, task.marker, task.open)], device=device).expand(rows, -1)
    state = state.take(torch.arange(rows, device=device))
    hidden = model.extend(state, opening, torch.ones_like(opening, dtype=torch.bool))[:, -1]
    firsts = logits_of(model.lm, hidden).float().log_softmax(-1)[:, [tail[0] for tail in tails]]
    rest = []
    step = max(1, _ROWS // rows)
    for at in range(0, len(tails), step):
        some = tails[at:at + step]
        ids, valid = padded(some, codec.pad_id, device)
        targets, _ = padded([[*tail[1:], codec.marker_ids[task.close]] for tail in some], codec.pad_id, device)
        ids, valid, targets = (t.repeat(rows, 1) for t in (ids, valid, targets))
        several = state.take(torch.arange(rows, device=device).repeat_interleave(len(some)))
        losses = token_losses(model.lm, model.extend(several, ids, valid)[valid], targets[valid])
        rest.append(-losses.new_zeros(ids.shape).masked_scatter(valid, losses).sum(-1).view(rows, len(some)))
    return firsts + torch.cat(rest, dim=1)


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids `(rows, longest)`, padded on the right, and which of them count."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=fill)
    valid = pad_sequence([torch.ones_like(t, dtype=torch.bool) for t in tensors], batch_first=True)
    return ids.to(device), valid.to(device)
