"""Generated ids as plain data, beside their reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.decoding.loops import has_loop
from unislu_llm.tasks import SpanTask
from unislu_llm.unified import parse, reference_output


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
