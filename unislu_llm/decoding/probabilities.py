"""How likely a decoder finds every label of a task, from teacher-forced scores of the label strings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unislu_llm.data.collate import Batch
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.automaton import label_ids
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, NO_PART, TASK_PART
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SEPARATOR, LabelTask
from unislu_llm.utterance import Utterance


@torch.no_grad()
def label_probabilities(model: SLUModel, waves: Sequence[Tensor], transcripts: Sequence[str | Sequence[int]], task: str, *,
                        batch_size: int = 16) -> Tensor:
    """Probability of every label of a single-label task, given that the answer is one of them.

    Each label is scored whole, closing marker included, after `transcript[T/L][TASK][open]`: one row a label, all in one
    pass. Its likeliest label is the best of an exhaustive search. Greedy decoding with the grammar picks token by token:
    it finds the same label wherever the label's first tokens, which must differ, hold nearly all of its score, and can
    differ from it where labels begin alike or are spelled in several unlikely tokens; beam search as wide as the label
    set differs from it only by what beams are spent on transcripts.

    Args:
        model: either decoder, in eval mode.
        waves: audio of each utterance, `(S,)` at 16 kHz.
        transcripts: of each, as text or as the token ids that were decoded (these are scored as they are).
        task: name of a label task with one label an utterance.
        batch_size: rows, utterances times labels, at one time.

    Returns:
        `(utterances, labels)` fp32 on the CPU, labels in the task's order; rows sum to one.

    Raises:
        UserError: the task is unknown, labels spans, or has several labels an utterance.
    """
    codec, spec = model.codec, model.codec.registry[task]
    if not isinstance(spec, LabelTask) or spec.multi:
        raise UserError(f"task '{task}' has no probability of each label: it is not a task with one label an utterance")
    if len(waves) != len(transcripts):
        raise UserError(f"{len(waves)} recordings need as many transcripts, found {len(transcripts)}")
    opening = [codec.marker_ids[m] for m in (SEPARATOR, spec.marker, spec.open)]
    tails = [[*label_ids(codec, spec, label), codec.marker_ids[spec.close]] for label in spec.labels]
    rows: list[tuple[Tensor, list[int], int]] = []
    for wave, transcript in zip(waves, transcripts, strict=True):
        text = codec.text_ids(transcript) if isinstance(transcript, str) else list(transcript)
        head = (text if transcript else []) + opening
        rows += [(wave, head + tail, len(tail)) for tail in tails]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # similar lengths together
    scores = torch.zeros(len(rows))
    for first in range(0, len(rows), batch_size):
        some = order[first:first + batch_size]
        scores[some] = _tail_scores(model, [rows[i] for i in some])
    return scores.view(len(waves), len(spec.labels)).softmax(-1)


def _tail_scores(model: SLUModel, rows: Sequence[tuple[Tensor, list[int], int]]) -> Tensor:
    """Log-probability of the last tokens of each row, `(rows,)`."""
    blank = Sample(Utterance("", None, "", {}), None)
    batch = model.collator()([(blank, wave) for wave, _, _ in rows])
    length = max(len(ids) for _, ids, _ in rows)
    ids = torch.full((len(rows), length), model.codec.pad_id)
    parts = torch.full((len(rows), length), NO_PART)
    for i, (_, row, tail) in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        parts[i, :len(row)] = ASR_PART
        parts[i, len(row) - tail:len(row)] = TASK_PART
    full = Batch(batch.samples, batch.mel, batch.mel_lengths, ids, parts).to(model.device)
    losses = model.losses(full)
    return -losses.masked_fill(full.target_parts != TASK_PART, 0.0).sum(-1).float().cpu()
