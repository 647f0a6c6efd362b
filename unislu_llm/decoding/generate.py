"""Batched decoding to prediction rows, bounded by audio length; the same for both decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from unislu_llm.data.batching import seconds, sorted_batches
from unislu_llm.data.collate import Collator, SpeechDataset
from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.decoding.grammar import GrammarProcessor, grammar_of
from unislu_llm.decoding.loops import has_loop
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SEPARATOR, SpanTask
from unislu_llm.unified import parse, reference_output
from unislu_llm.utterance import Utterance


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Args:
        batch_size: utterances at one time.
        max_new_tokens: bound for any answer.
        tokens_per_second, extra_tokens: bound by audio length, `extra + rate * seconds`.
        force_task: after `[T/L]`, force the control token of the sample's task.
        num_beams: 1 is greedy.
        grammar: only well-formed answers can be decoded (:mod:`unislu_llm.decoding.grammar`). None: on in
            :func:`understand`, off in :func:`predict` and so in validation and scoring, where the paper's protocol
            counts what a model does on its own. With `force_task`, a sample without task is its transcript alone.
        grounded: with the grammar, phrases of span tasks are whole words of the transcript just decoded.
        cut_loops: with the grammar, leave a transcript or phrase that repeats itself, and count it as `loop`.
    """

    batch_size: int = 16
    max_new_tokens: int = 256
    tokens_per_second: float = 12.0
    extra_tokens: int = 24
    force_task: bool = False
    num_beams: int = 1
    grammar: bool | None = None
    grounded: bool = False
    cut_loops: bool = True

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"num_beams must be 1 or more, found {self.num_beams}")
        if self.grounded and self.grammar is False:
            raise UserError("grounded needs the grammar; do not turn it off")

    def bound(self, duration: float) -> int:
        """New tokens allowed for `duration` seconds of audio."""
        return min(self.max_new_tokens, self.extra_tokens + int(self.tokens_per_second * duration))


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


def decode_batch(model: SLUModel, samples: Sequence[Sample], waves: Sequence[Tensor], options: DecodeOptions,
                 collator: Collator | None = None) -> list[list[int]]:
    """Ids of each sample, up to and including its end-of-text token, if it came.

    Args:
        model: either decoder, in eval mode.
        samples: what is decoded; transcripts and labels are not looked at.
        waves: audio of each, `(S,)` at 16 kHz.

    Raises:
        UserError: with the grammar, `max_new_tokens` is below the shortest answer.
    """
    blind = [Sample(Utterance(s.utterance.id, None, "", {}), None) for s in samples]
    batch = (collator or model.collator())(list(zip(blind, waves, strict=True))).to(model.device)
    bounds = [options.bound(len(w) / 16_000) for w in waves]
    processors = LogitsProcessorList()
    # With input embeddings `generate` starts from no ids; with a decoder prompt, from the prompt's.
    start = len(getattr(model, "prompt", ()))
    if options.grammar or options.grounded:
        processor, bounds = _grammar(model, samples, bounds, options, start)
        processors.append(processor)
    elif options.force_task:
        processors.append(_forced_control(model.codec, samples, model.device))
    limits = torch.tensor(bounds, device=model.device)
    out = model.generate(batch.mel, batch.mel_lengths, max_new_tokens=max(bounds), logits_processor=processors,
                         num_beams=options.num_beams, stopping_criteria=StoppingCriteriaList([LengthBound(limits, start)]))
    return [_cut(row, model.codec.eos_id, bound) for row, bound in zip(out.tolist(), bounds, strict=True)]


def _grammar(model: SLUModel, samples: Sequence[Sample], bounds: Sequence[int], options: DecodeOptions,
             start: int) -> tuple[GrammarProcessor, list[int]]:
    """The grammar's processor, and bounds that leave room for the shortest answer, whatever the audio's length."""
    grammar = grammar_of(model.codec)
    requests = [(s.task, options.force_task) for s in samples]
    most = min(options.max_new_tokens, getattr(model, "room", options.max_new_tokens))
    bounds = [min(most, max(bound, grammar.need(request))) for bound, request in zip(bounds, requests, strict=True)]
    return grammar.processor(requests, bounds, start, grounded=options.grounded, cut_loops=options.cut_loops), bounds


def _forced_control(codec: TextCodec, samples: Sequence[Sample], device: torch.device) -> ForcedControl:
    ids = [-1 if s.task is None else codec.marker_ids[codec.registry[s.task].marker] for s in samples]
    return ForcedControl(codec.marker_ids[SEPARATOR], torch.tensor(ids, device=device))


def _cut(ids: list[int], eos: int, bound: int) -> list[int]:
    ids = ids[:bound]
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def predict(model: SLUModel, samples: Sequence[Sample], options: DecodeOptions | None = None, *, progress: str = "",
            on_rows: Callable[[list[dict[str, Any]]], None] | None = None) -> list[dict[str, Any]]:
    """Decode samples and lay each answer beside its reference.

    Args:
        model: either decoder; put in eval mode while it decodes.
        samples: in any order; decoded in batches of similar length, returned in their order.
        options: how to decode.
        progress: label of a progress bar; empty shows none.
        on_rows: called with the finished rows of every batch.

    Returns:
        One prediction row a sample; see `eval/README.md` for its fields.

    Raises:
        UserError: unreadable audio; the message names manifest line and file.
    """
    options = options or DecodeOptions()
    cut = options.cut_loops and bool(options.grammar or options.grounded)
    dataset = SpeechDataset(samples)
    collator = model.collator()
    rows: list[dict[str, Any]] = [{} for _ in samples]
    was_training = model.training
    model.eval()
    try:
        batches = sorted_batches(samples, options.batch_size)
        for indices in tqdm(batches, desc=progress, disable=not progress, unit="batch", leave=False):
            items = [dataset[i] for i in indices]
            ids = decode_batch(model, [s for s, _ in items], [w for _, w in items], options, collator)
            for i, answer, (sample, wave) in zip(indices, ids, items, strict=True):
                rows[i] = prediction_row(model.codec, sample, answer, len(wave) / 16_000, cut_loops=cut)
            if on_rows:
                on_rows([rows[i] for i in indices])
    finally:
        model.train(was_training)
    return rows


def prediction_row(codec: TextCodec, sample: Sample, ids: Sequence[int], duration: float, *,
                   cut_loops: bool = False) -> dict[str, Any]:
    """Reference, hypothesis and problems of one sample as plain data.

    Args:
        codec: of the model. sample: with its reference.
        ids: generated ids. duration: seconds of audio.
        cut_loops: whether loops were cut while decoding: they are counted then.
    """
    u = sample.utterance
    raw = codec.decode(ids)
    parsed = parse(raw, codec.registry, sample.task)
    problems = list(parsed.problems)
    if not ids or ids[-1] != codec.eos_id:
        problems.append("no_end")
    if cut_loops and has_loop(ids):
        problems.append("loop")
    task = codec.registry[sample.task] if sample.task else None
    usable = parsed.task == sample.task and task is not None
    reference: Any = None
    if task is not None and task.name in u.labels:
        if isinstance(task, SpanTask):
            spans = sorted(u.labels[task.name], key=lambda s: (s[1], s[2]))  # type: ignore[index]
            reference = [[label, u.text[a:b], a, b] for label, a, b in spans]  # type: ignore[misc, index, str-unpack]
        else:
            reference = reference_output(u, task)
    return {"id": u.id, "corpus": u.corpus, "task": sample.task or "asr", "duration": round(duration, 3),
            "ref_text": u.text, "ref": _plain(reference), "hyp_text": parsed.transcript,
            "hyp": _plain(parsed.outputs) if usable else None, "raw": raw, "problems": problems, "n_tokens": len(ids)}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def understand(model: SLUModel, files: Sequence[str | Path], tasks: Sequence[str] = ("ner", "sa"),
               options: DecodeOptions | None = None) -> list[dict[str, Any]]:
    """Transcript and annotations of audio files.

    Args:
        model: either decoder. files: any soundfile format, up to 30 s each.
        tasks: names of the tasks to answer, each with its control token forced; none gives transcripts alone.
        options: how to decode; `force_task` is set here, and the grammar is on unless it is turned off.

    Returns:
        For each file `{"file", "text", <task>: outputs, "problems"}`.
    """
    for name in tasks:
        model.codec.registry[name]  # an unknown task is named before anything is decoded
    base = options or DecodeOptions()
    forced = replace(base, force_task=True, grammar=base.grammar is not False)
    utterances = [Utterance(str(i), Path(f), "", source=str(f)) for i, f in enumerate(files)]
    names: Sequence[str | None] = tasks or [None]
    samples = [Sample(u, name) for u in utterances for name in names]
    results: list[dict[str, Any]] = [{"file": str(f), "text": "", "problems": []} for f in files]
    for sample, row in zip(samples, predict(model, samples, forced), strict=True):
        result = results[int(sample.utterance.id)]
        result["text"] = result["text"] or row["hyp_text"]
        result["problems"] += [p for p in row["problems"] if p not in result["problems"]]
        if sample.task:
            result[sample.task] = row["hyp"]
    return results


__all__ = ["DecodeOptions", "decode_batch", "predict", "prediction_row", "seconds", "understand"]
