"""What a run trains on, and how it is shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unislu_llm.config import Config
from unislu_llm.data.audio import ENCODER_RATE, SAMPLE_RATE
from unislu_llm.data.augment import Augmenter, build_dropout
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.frame_cache import FrameCache, encoder_settings
from unislu_llm.data.mixture import build_mixture
from unislu_llm.data.sampler import BatchPlan, TokenPlan
from unislu_llm.data.text_injection import SimulationRates, TextInjector
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tokenizer import Example


def build_dataset(config: Config, model: SLUModel, examples: Sequence[Example],
                  fitted: SimulationRates | None) -> SpeechDataset:
    """The training examples and what is done to them; `fitted` are known rates of text injection.

    Raises UserError: settings that do not fit each other, the model or the data.
    """
    cache = None
    if config.data.frame_cache and model.encoder is not None:
        cache = FrameCache(Path(config.data.frame_cache),
                           encoder_settings(model.encoder, config.train.precision))
    augmenter = (Augmenter(config.augment, cached=cache is not None)
                 if config.augment.active else None)
    return SpeechDataset(examples, listens=model.listens, frame_cache=cache, augmenter=augmenter,
                         injector=_build_injector(config, model, examples, fitted),
                         dropout=build_dropout(config, examples), seed=config.train.seed)


def _build_injector(config: Config, model: SLUModel, examples: Sequence[Example],
                    fitted: SimulationRates | None) -> TextInjector | None:
    """What stands for the audio of examples without; None where nothing has to."""
    silent = [e.utterance for e in examples if e.utterance.audio is None]
    if not silent or not model.listens:
        return None
    vocabulary = model.ctc_vocabulary if isinstance(model, SpeechLLM) else None
    if vocabulary is None:
        raise UserError(
            f"{silent[0].where}: field 'audio': the row has no audio ({len(silent)} examples have "
            "none); only an LLM with the projector ctc, or one that reads hypotheses without "
            "speech, trains on text: set model.projector ctc, or model.hypothesis manifest and "
            "model.projector none")
    projector: Any = model.projector
    return TextInjector(
        (fitted or SimulationRates()).override(config.data.text_injection),
        vocabulary.classes, len(vocabulary.token_ids), projector.stack / ENCODER_RATE)


def build_plan(config: Config, model: SLUModel, dataset: SpeechDataset, world: int) -> BatchPlan:
    """Batches of a run: by examples, or by tokens with `train.batch_tokens`.

    Raises UserError: sizes that do not fit each other, or weights that do not fit the corpora.
    """
    train, examples = config.train, dataset.examples
    mixture = build_mixture(config.data, examples, train.seed)
    kinds = [dataset.kind(example) for example in examples]
    seconds = [dataset.seconds(example) for example in examples]
    parts = world * train.accumulation
    if not train.batch_tokens:
        return BatchPlan(seconds, train.batch_size, parts, train.seed, mixture=mixture, kinds=kinds)
    # In tokens as this model reads them: projectors and tokenizers differ by factors.
    collator, tokenizer = model.collator(), model.tokenizer
    sizes = [model.token_counts(math.ceil(length * SAMPLE_RATE), len(tokenizer.target(example)),
                                len(collator.hypothesis_ids(example)))
             for length, example in zip(seconds, examples, strict=True)]
    return TokenPlan(np.array(sizes), train.batch_tokens, parts, train.seed, mixture=mixture,
                     kinds=kinds)


def deal(examples: Sequence[Example], rank: int, world: int) -> list[int]:
    """Places of a process's share of examples; those of one utterance stay together."""
    # Apart, two processes would each encode and transcribe the utterance.
    turns: dict[tuple[str, str], int] = {}
    return [i for i, e in enumerate(examples)
            if turns.setdefault((e.utterance.where, e.utterance.id), len(turns)) % world == rank]
