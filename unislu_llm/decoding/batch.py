"""Decoding of one batch by transformers' `generate`: each sample alone, bounded by its own audio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from unislu_llm.data.collate import Batch, Collator
from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.decoding.copying import draft_bias
from unislu_llm.decoding.drafts import complete_drafts, drafts_of
from unislu_llm.decoding.grammar import grammar_of
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.models.base import SLUModel
from unislu_llm.models.state import Encoded
from unislu_llm.tasks import SEPARATOR
from unislu_llm.utterance import Utterance

_ENCODED_TOGETHER = 4
"""Clips that a CPU encodes at one time."""


class LengthBound(StoppingCriteria):
    """Stop each row at its own number of new tokens.

    Args:
        bounds: `(batch,)`. start: tokens in the ids before the first new one.
    """

    def __init__(self, bounds: Tensor, start: int) -> None:
        self.bounds = bounds
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        beams = input_ids.shape[0] // self.bounds.shape[0]
        return (input_ids.shape[1] - self.start) >= self.bounds.repeat_interleave(beams)


class ForcedControl(LogitsProcessor):
    """After `[T/L]`, only the control token of the row's own task is allowed.

    Args:
        separator: id of `[T/L]`. controls: `(batch,)` id of each row's control token, -1 to leave it free.
    """

    def __init__(self, separator: int, controls: Tensor) -> None:
        self.separator = separator
        self.controls = controls

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if input_ids.shape[1] == 0:
            return scores
        controls = self.controls.repeat_interleave(input_ids.shape[0] // self.controls.shape[0])
        rows = (input_ids[:, -1] == self.separator) & (controls >= 0)
        forced = torch.full_like(scores, float("-inf")).scatter(1, controls.clamp(min=0)[:, None], 0.0)
        return torch.where(rows[:, None], forced, scores)


def encode_waves(model: SLUModel, waves: Sequence[Tensor], collator: Collator | None = None,
                 drafts: Sequence[str | None] | None = None) -> Encoded:
    """Audio `(S,)` each, at 16 kHz, as the decoder takes it in.

    Args:
        drafts: of each clip, for a model that reads drafts; those that lack are made (:mod:`unislu_llm.decoding.drafts`).
    """
    blanks = [Sample(Utterance("", None, "", draft=d), None) for d in complete_drafts(model, waves, drafts)]
    batch = (collator or model.collator())(list(zip(blanks, waves, strict=True))).to(model.device)
    with torch.inference_mode():
        if model.device.type != "cpu" or len(batch) <= _ENCODED_TOGETHER:
            return model.encode(batch.mel, batch.mel_lengths, **batch.drafts())
        return _encode_by_length(model, batch)


def _encode_by_length(model: SLUModel, batch: Batch) -> Encoded:
    """Encode a few clips of like length at one time: a CPU gains nothing from more, and would pay for their padding."""
    order = batch.mel_lengths.argsort(descending=True)
    parts = []
    for rows in order.split(_ENCODED_TOGETHER):
        mel, drafts = batch.mel[rows], {name: value[rows] for name, value in batch.drafts().items()}
        width = mel.shape[-1] if model.config.pad_to_30s else int(batch.mel_lengths[rows].max())
        parts.append(model.encode(mel[..., :width], batch.mel_lengths[rows], **drafts))
    back = order.argsort()
    found = [ids for part in parts for ids in part.heard or ()]
    heard = [found[i] for i in back.tolist()] if found else None
    if heard is not None:
        model.projector.heard = heard  # type: ignore[union-attr, assignment]
    frames = pad_sequence([row for part in parts for row in part.frames], batch_first=True)[back]
    lengths = torch.cat([part.lengths for part in parts])[back]
    return Encoded(frames, lengths, batch.draft_ids, batch.draft_lengths, heard)


def decode_batch(model: SLUModel, samples: Sequence[Sample], waves: Sequence[Tensor], options: DecodeOptions,
                 collator: Collator | None = None, drafts: Sequence[str | None] | None = None) -> list[list[int]]:
    """Ids of each sample, up to and including its end-of-text token, if it came.

    Args:
        model: either decoder, in eval mode.
        samples: what is decoded; transcripts and labels are not looked at (transcripts are, where they are the draft).
        waves: audio of each, `(S,)` at 16 kHz.
        drafts: of each, from :func:`drafts_of` where they are known already.

    Raises:
        UserError: with the grammar, `max_new_tokens` is below the shortest answer.
    """
    durations = [len(w) / 16_000 for w in waves]
    encoded = encode_waves(model, waves, collator, drafts_of(model, samples, waves) if drafts is None else drafts)
    found = decode_encoded(model, encoded, durations, [s.task for s in samples], options)
    return [answers[0] for answers in found]


def decode_encoded(model: SLUModel, encoded: Encoded, durations: Sequence[float], tasks: Sequence[str | None],
                   options: DecodeOptions, n_best: int = 1) -> list[list[list[int]]]:
    """The best answers of each row, best first, as in :func:`decode_batch`.

    Args:
        encoded: see :func:`encode_waves`. durations: seconds of each. tasks: of each.
        n_best: answers a row, not more than `num_beams`.
    """
    # With input embeddings `generate` starts from no ids; with a decoder prompt, from the prompt's.
    start = len(getattr(model, "prompt", ()))
    processor, bounds = constraint(model, tasks, [options.bound(d) for d in durations], options, start)
    processor = keep_to_draft(model, encoded, options, start, processor)
    limits = torch.tensor(bounds, device=model.device)
    static: dict[str, Any] = {"cache_implementation": "static", "disable_compile": not options.compile}
    out = model.generate(encoded, max_new_tokens=max(bounds), num_beams=options.num_beams, num_return_sequences=n_best,
                         logits_processor=LogitsProcessorList([processor] if processor else []),
                         stopping_criteria=StoppingCriteriaList([LengthBound(limits, start)]),
                         **(static if options.static_cache else {}))
    rows = out.unflatten(0, (-1, n_best)).tolist()
    return [[_cut(ids, model.codec.eos_id, bound) for ids in row] for row, bound in zip(rows, bounds, strict=True)]


def constraint(model: SLUModel, tasks: Sequence[str | None], bounds: Sequence[int], options: DecodeOptions,
               start: int = 0) -> tuple[LogitsProcessor | None, list[int]]:
    """What keeps each row to its task, and how many new tokens it may have.

    With the grammar, these leave room for the shortest answer, whatever the audio's length.

    Args:
        bounds: by audio length. start: tokens in the ids before the first new one.
    """
    most = min(options.max_new_tokens, getattr(model, "room", options.max_new_tokens))
    if options.grammar or options.grounded:
        grammar = grammar_of(model.codec)
        requests = [(task, options.force_task) for task in tasks]
        room = [min(most, max(bound, grammar.need(request))) for bound, request in zip(bounds, requests, strict=True)]
        return grammar.processor(requests, room, start, grounded=options.grounded, cut_loops=options.cut_loops), room
    return (_forced_control(model.codec, tasks, model.device) if options.force_task else None), [min(most, b) for b in bounds]


def keep_to_draft(model: SLUModel, encoded: Encoded, options: DecodeOptions, start: int,
                  then: LogitsProcessor | None) -> LogitsProcessor | None:
    """What draws transcripts to their drafts, before `then`; see :class:`~unislu_llm.decoding.copying.DraftBias`."""
    bonus = model.config.draft_bias if options.draft_bias is None else options.draft_bias
    return draft_bias(model, encoded, bonus, start, then)


def _forced_control(codec: TextCodec, tasks: Sequence[str | None], device: torch.device) -> ForcedControl:
    ids = [-1 if task is None else codec.marker_ids[codec.registry[task].marker] for task in tasks]
    return ForcedControl(codec.marker_ids[SEPARATOR], torch.tensor(ids, device=device))


def _cut(ids: list[int], eos: int, bound: int) -> list[int]:
    ids = ids[:bound]
    return ids[: ids.index(eos) + 1] if eos in ids else ids
