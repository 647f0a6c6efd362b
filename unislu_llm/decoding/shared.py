"""Several tasks of one utterance: the encoder runs once, the transcript is decoded once, each task continues a copy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import LogitsProcessor

from unislu_llm.data.targets import TextCodec
from unislu_llm.decoding.automaton import label_ids
from unislu_llm.decoding.batch import constraint, decode_encoded, keep_to_draft
from unislu_llm.decoding.grammar import grammar_of
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.decoding.probabilities import label_scores, read
from unislu_llm.models.base import SLUModel
from unislu_llm.models.head import logits_of
from unislu_llm.models.state import DecoderState, Encoded
from unislu_llm.tasks import SEPARATOR, LabelTask

MOST_LABELS = 64
"""Label tasks with more labels are decoded token by token."""


@dataclass
class Answers:
    """What was decoded for some utterances.

    Args:
        ids: by task (None: the transcript alone), the answers of each utterance, best first.
        probabilities: by single-label task, `(labels,)` of each utterance; None where it has no usable transcript.
    """

    ids: dict[str | None, list[list[list[int]]]] = field(default_factory=dict)
    probabilities: dict[str, list[Tensor | None]] = field(default_factory=dict)


@torch.inference_mode()
def decode_tasks(model: SLUModel, encoded: Encoded, durations: Sequence[float], tasks: Sequence[str],
                 options: DecodeOptions, n_best: int = 1) -> Answers:
    """Answers to every task for every utterance, each task's control token forced.

    Greedy, every answer is, token for token, the one of the task decoded alone (:func:`~unislu_llm.decoding.batch.decode_batch`
    with `force_task`), with two exceptions. With the grammar, a single-label task is answered by scoring all of its
    labels: the answer is the likeliest one, where greedy decoding takes the likeliest token at a time. And a transcript
    that the budget cuts is cut where every one of the tasks still has room. With beams, the best transcript may differ by
    task, so that each task is decoded alone; they share the encoder.

    Args:
        encoded: speech of each utterance. durations: seconds of each.
        tasks: names; none gives transcripts alone.
        options: `force_task` is taken as set.
        n_best: answers to each task, from the beams.
    """
    options = replace(options, force_task=True)
    scored = [name for name in tasks if _is_scored(model, name, options)]
    if options.num_beams > 1:
        return _by_beams(model, encoded, durations, tasks, scored, options, n_best)
    transcripts, state = _transcripts(model, encoded, durations, tasks, scored, options)
    if not tasks:
        return Answers({None: [[ids] for ids in transcripts]})
    found = Answers()
    separator = model.codec.marker_ids[SEPARATOR]
    open_rows = [i for i, ids in enumerate(transcripts) if ids and ids[-1] == separator]
    for name in tasks:
        found.ids[name] = [[ids] for ids in transcripts]
        if name in scored:
            _add_label(model, state, transcripts, open_rows, name, found)
    _continue(model, state, durations, open_rows, [name for name in tasks if name not in scored], options, found)
    return found


def _is_scored(model: SLUModel, name: str, options: DecodeOptions) -> bool:
    """Whether a task is answered by scoring its whole label set."""
    task = model.codec.registry[name]
    if not (options.grammar or options.grounded) or not isinstance(task, LabelTask) or task.multi:
        return False
    most = min(options.max_new_tokens, getattr(model, "room", options.max_new_tokens))
    return len(task.labels) <= MOST_LABELS and grammar_of(model.codec).need((name, True)) + _slack(model.codec, task) <= most


def _slack(codec: TextCodec, task: LabelTask) -> int:
    """Tokens by which the longest label is longer than the shortest."""
    lengths = [len(label_ids(codec, task, label)) for label in task.labels]
    return max(lengths) - min(lengths)


def _transcripts(model: SLUModel, encoded: Encoded, durations: Sequence[float], tasks: Sequence[str], scored: Sequence[str],
                 options: DecodeOptions) -> tuple[list[list[int]], DecoderState]:
    """Ids up to `[T/L]` (or the end of text), and the state before it."""
    codec, registry = model.codec, model.codec.registry
    room = {}
    if options.grammar or options.grounded:
        room = {name: grammar_of(codec).need((name, True)) for name in tasks}
    longest = max(tasks, key=lambda name: room.get(name, 0)) if tasks else None
    slack = max((room[name] + _slack(codec, registry[name]) for name in scored), default=0)  # type: ignore[arg-type]
    slack = max(0, slack - room[longest]) if longest and scored else 0
    processor, bounds = constraint(model, [longest] * len(durations), [options.bound(d) for d in durations], options)
    if slack:
        bounds = [max(room[str(longest)], bound - slack) for bound in bounds]
        processor, bounds = constraint(model, [longest] * len(durations), bounds, options)
    processor = keep_to_draft(model, encoded, options, 0, processor)
    state, hidden = model.begin(encoded)
    stops = [codec.eos_id, *([codec.marker_ids[SEPARATOR]] if tasks else [])]
    transcripts = greedy(model, state, hidden, [[] for _ in durations], bounds, stops, processor)
    return transcripts, state.compact()


def _add_label(model: SLUModel, state: DecoderState, transcripts: Sequence[list[int]], rows: Sequence[int], name: str,
               found: Answers) -> None:
    """Answer a single-label task with its likeliest label."""
    codec, task = model.codec, model.codec.registry[name]
    assert isinstance(task, LabelTask)
    found.probabilities[name] = [None] * len(transcripts)
    if not rows:
        return
    probabilities = label_scores(model, state.take(torch.tensor(rows, device=state.mask.device)), task).softmax(-1).cpu()
    for i, row in zip(rows, probabilities, strict=True):
        label = label_ids(codec, task, task.labels[int(row.argmax())])
        markers = [codec.marker_ids[m] for m in (task.marker, task.open, task.close)]
        found.probabilities[name][i] = row
        best = [*transcripts[i], *markers[:2], *label, markers[2], codec.eos_id]
        found.ids[name][i] = [best, *(other for other in found.ids[name][i][1:] if other != best)]


def _continue(model: SLUModel, state: DecoderState, durations: Sequence[float], rows: Sequence[int], names: Sequence[str],
              options: DecodeOptions, found: Answers) -> None:
    """Decode the other tasks after the transcripts, all of them in one batch."""
    codec = model.codec
    pairs = [(i, name) for name in names for i in rows]
    if not pairs:
        return
    processor, bounds = constraint(model, [name for _, name in pairs], [options.bound(durations[i]) for i, _ in pairs], options)
    heads = [found.ids[name][i][0] for i, name in pairs]
    controls = [codec.marker_ids[codec.registry[name].marker] for _, name in pairs]
    opening = torch.tensor([[head[-1], control] for head, control in zip(heads, controls, strict=True)], device=state.mask.device)
    copies = state.take(torch.tensor([i for i, _ in pairs], device=state.mask.device))
    hidden = model.extend(copies, opening, torch.ones_like(opening, dtype=torch.bool))[:, -1]
    # Without the grammar, a transcript may have used all of its budget.
    heads = [[*head, control][:bound] for head, control, bound in zip(heads, controls, bounds, strict=True)]
    answers = greedy(model, copies, hidden, heads, bounds, [codec.eos_id], processor)
    for (i, name), ids in zip(pairs, answers, strict=True):
        found.ids[name][i][0] = ids


def _by_beams(model: SLUModel, encoded: Encoded, durations: Sequence[float], tasks: Sequence[str], scored: Sequence[str],
              options: DecodeOptions, n_best: int) -> Answers:
    found = Answers()
    separator = model.codec.marker_ids[SEPARATOR]
    for name in tasks or [None]:  # type: ignore[list-item]
        found.ids[name] = decode_encoded(model, encoded, durations, [name] * len(durations), options, n_best)
        if name in scored:
            transcripts = [ids[0][:ids[0].index(separator) + 1] for ids in found.ids[name]]
            state = read(model, encoded, [ids[:-1] for ids in transcripts])
            _add_label(model, state, transcripts, range(len(transcripts)), name, found)
    return found


def greedy(model: SLUModel, state: DecoderState, hidden: Tensor, answers: Sequence[Sequence[int]], bounds: Sequence[int],
           stops: Collection[int], processor: LogitsProcessor | None) -> list[list[int]]:
    """Continue answers by the likeliest tokens.

    Args:
        state: after `answers`; every token but each row's last one is added to it.
        hidden: `(rows, dim)` that foretell the next token.
        bounds: tokens that each answer may have. stops: ids after which a row is done.
        processor: gets ids padded on the left with -1.
    """
    device = hidden.device
    width = max(map(len, answers))
    ids = torch.tensor([[-1] * (width - len(a)) + list(a) for a in answers], dtype=torch.long,
                       device=device).view(len(answers), width)
    limits, ends = torch.tensor(list(bounds), device=device), torch.tensor(list(stops), device=device)
    count = (ids >= 0).sum(-1)
    live = count < limits
    while bool(live.any()):
        scores = logits_of(model.lm, hidden).float()
        token = (processor(ids, scores) if processor else scores).argmax(-1)  # type: ignore[arg-type]
        ids = torch.cat([ids, torch.where(live, token, -1)[:, None]], dim=1)
        count = count + live
        live = live & (count < limits) & ~torch.isin(token, ends)
        if bool(live.any()):
            fed = token.masked_fill(~live, model.codec.pad_id)
            hidden = model.extend(state, fed[:, None], live[:, None])[:, -1]
    return [[i for i in row if i >= 0] for row in ids.tolist()]
