"""Batched decoding to prediction rows, bounded by audio length; the same for both decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from unislu_llm.data.batching import seconds, sorted_batches
from unislu_llm.data.collate import SpeechDataset
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.batch import ForcedControl, LengthBound, decode_batch
from unislu_llm.decoding.drafts import drafts_of
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.decoding.rows import prediction_row
from unislu_llm.decoding.understand import understand
from unislu_llm.models.base import SLUModel
from unislu_llm.models.ctc import CTCProjector


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
        One prediction row a sample; see `eval/README.md` for its fields. A model with a `ctc` projector adds `ctc_text`, the
        greedy CTC transcript, which the encoder's pass gives anyway; one that reads drafts adds `draft`.

    Raises:
        UserError: unreadable audio; the message names manifest line and file.
    """
    options = options or DecodeOptions()
    cut = options.cut_loops and bool(options.grammar or options.grounded)
    dataset = SpeechDataset(samples)
    collator = model.collator()
    by_ctc = isinstance(getattr(model, "projector", None), CTCProjector) and model.config.use_speech
    rows: list[dict[str, Any]] = [{} for _ in samples]
    was_training = model.training
    model.eval()
    try:
        batches = sorted_batches(samples, options.batch_size)
        for indices in tqdm(batches, desc=progress, disable=not progress, unit="batch", leave=False):
            items = [dataset[i] for i in indices]
            some, waves = [s for s, _ in items], [w for _, w in items]
            drafts = drafts_of(model, some, waves)
            ids = decode_batch(model, some, waves, options, collator, drafts)
            for i, answer, draft, (sample, wave) in zip(indices, ids, drafts, items, strict=True):
                rows[i] = prediction_row(model.codec, sample, answer, len(wave) / 16_000, cut_loops=cut)
                if draft is not None:
                    rows[i]["draft"] = draft
            if by_ctc:
                for i, heard in zip(indices, model.projector.heard, strict=True):  # type: ignore[union-attr, arg-type]
                    rows[i]["ctc_text"] = model.codec.decode(heard)
            if on_rows:
                on_rows([rows[i] for i in indices])
    finally:
        model.train(was_training)
    return rows


__all__ = ["DecodeOptions", "ForcedControl", "LengthBound", "decode_batch", "predict", "prediction_row", "seconds", "understand"]
