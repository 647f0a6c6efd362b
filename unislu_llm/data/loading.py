"""From the manifests of a run to its examples, with the hypotheses that the model reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from unislu_llm.config import ModelConfig
from unislu_llm.data.long_rows import handle_long
from unislu_llm.data.manifest import manifest_name, read_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example, make_examples

log = logging.getLogger(__name__)
_warn_once = cache(log.warning)  # of a manifest, however many runs are scored on it


def load_examples(manifests: Sequence[str], registry: TaskRegistry, *, limit: int = 0,
                  flag: str = "data.train", scored: bool = False) -> list[Example]:
    """Examples of some manifests.

    Args:
        limit: at most so many examples of each manifest, evenly spread; 0 takes all.
        flag: what names the manifests, for messages.
        scored: rows without audio are refused.

    Raises:
        UserError: no manifest is named, or one has problems or rows that cannot be used.
    """
    if not manifests:
        raise UserError(f"{flag} names no manifest; list JSON-lines files in the config or give "
                        f"--{flag} FILE...")
    examples: list[Example] = []
    for path in manifests:
        utterances = handle_long(read_manifest(path, registry, corpus=manifest_name(path),
                                               check_audio=True), registry)
        if scored and (mute := next((u for u in utterances if u.audio is None), None)):
            raise UserError(f"{mute.where}: field 'audio': the row has no audio, so nothing can be "
                            f"predicted for it; take it out of {flag}")
        pseudo = sum(u.text_source is not None for u in utterances)
        if pseudo and flag != "data.train":
            _warn_once("%s: the transcripts of %d of %d rows were written by a recogniser "
                       "(`text_source`); WER and the phrases of spans are measured against these "
                       "pseudo-labels, not against what was said", path, pseudo, len(utterances))
        found = make_examples(utterances, registry)
        # Manifests are often sorted by speaker or length: the first ones would be no sample.
        step = len(found) / limit if limit and len(found) > limit else 1.0
        examples += [found[int(i * step)] for i in range(int(len(found) / step))]
    return examples


def check_hypotheses(examples: Sequence[Example], model: ModelConfig) -> list[Example]:
    """Training examples with the hypotheses that a model reads: their rows', or the references.

    Raises:
        UserError: no example has one; or some have none, and the model does not listen.
    """
    if model.hypothesis == "reference":
        return [Example(replace(e.utterance, hypothesis=e.utterance.text), e.task)
                for e in examples]
    lacking = [e.utterance for e in examples if e.utterance.hypothesis is None]
    if lacking and model.hypothesis == "manifest":
        share = f"data.train: {len(lacking)} of {len(examples)} examples have no hypothesis"
        if len(lacking) == len(examples) or model.projector == "none":
            # Text has nothing to recognise.
            text = any(u.audio is None for u in lacking)
            raise UserError(f"{share}, the first {lacking[0].where}; add them with `unislu "
                            f"transcribe{' --copy-text' * text}`")
        log.warning("%s; they train without, as with train.hypothesis_dropout", share)
    return list(examples)
