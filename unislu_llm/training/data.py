"""What a run trains on, and how it is shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from unislu_llm.config import Config
from unislu_llm.data.audio import ENCODER_RATE, SAMPLE_RATE
from unislu_llm.data.augment import Augmenter, build_dropout
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.frame_cache import FrameCache, encoder_settings
from unislu_llm.data.mixture import build_mixture
from unislu_llm.data.sampler import BatchPlan, TokenPlan
from unislu_llm.data.text_injection import SimulationRates, TextInjector
from unislu_llm.decoding.hypotheses import load_recogniser, with_hypotheses
from unislu_llm.errors import UserError
from unislu_llm.io import read_json, write_json
from unislu_llm.models.base import SLUModel
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

_HYPOTHESES = "hypotheses.json"  # in a run folder: those that the run made, by place and id


def attach_hypotheses(config: Config, model: SLUModel, examples: Sequence[Example], rank: int,
                      world: int, device: torch.device, progress: str = ""
                      ) -> tuple[list[Example], dict[str, str]]:
    """Training examples with the hypotheses that the model reads and their rows lack.

    Each process makes its share; a run that is resumed takes those that it was begun with. Also
    returns what was made, for :func:`save_hypotheses`. `progress` is the title of a bar, empty
    shows none. Raises UserError: no recogniser, bad audio.
    """
    reads = model.reads_hypothesis and config.train.objective == "unified"
    lacking = {id(e.utterance): e.utterance for e in examples if e.utterance.hypothesis is None
               and e.utterance.audio is not None and reads and model.config.recogniser != "ctc"}
    file = Path(config.output) / _HYPOTHESES
    made: dict[str, str] = read_json(file) if config.resume and file.is_file() else {}
    todo = [u for u in lacking.values() if _place(u) not in made]
    if todo:  # in all processes or none
        if rank == 0:
            print(f"{len(todo)} training clips have no hypothesis; "
                  f"{model.config.recogniser or model.config.encoder} makes them", flush=True)
        found = with_hypotheses(model, todo[rank::world], progress, device)
        load_recogniser.cache_clear()  # its weights are not needed any more
        made |= gather_object([(_place(u), u.hypothesis) for u in found])
    # What was one object stays one.
    known = {key: replace(u, hypothesis=made[_place(u)]) for key, u in lacking.items()}
    return [Example(known.get(id(e.utterance), e.utterance), e.task) for e in examples], made


def save_hypotheses(run: Path, made: dict[str, str]) -> None:
    """Keep in a run folder what :func:`attach_hypotheses` made."""
    if made:
        write_json(run / _HYPOTHESES, made)


def _place(u: Utterance) -> str:
    return f"{u.where} {u.id}"  # an id alone may be in two manifests


def build_dataset(config: Config, model: SLUModel, examples: Sequence[Example],
                  fitted: SimulationRates | None) -> SpeechDataset:
    """The training examples and what is done to them; `fitted` are known rates of text injection.

    Raises UserError: settings that do not fit each other, the model or the data.
    """
    cache = None
    if config.data.frame_cache and model.encoder is not None:
        cache = FrameCache(Path(config.data.frame_cache),
                           encoder_settings(model.encoder, config.train.precision))
    augmenter = Augmenter(config.augment) if config.augment.active else None
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
    bound = (model.positions or 4096) < 4096  # into so many, all of 30 s of speech fits
    # In tokens as this model reads them: projectors and tokenizers differ by factors.
    collator, tokenizer = model.collator(), model.tokenizer
    sizes = [model.token_counts(math.ceil(length * SAMPLE_RATE), len(tokenizer.target(example)),
                                len(collator.hypothesis_ids(example)))
             for length, example in zip(seconds, examples, strict=True)
             if train.batch_tokens or bound]
    for example, size in zip(examples, sizes, strict=False):
        model.check_fit(sum(size) if bound else 0, f"target of {example.utterance.where}")
    if not train.batch_tokens:
        return BatchPlan(seconds, train.batch_size, parts, train.seed, mixture=mixture, kinds=kinds)
    return TokenPlan(np.array(sizes), train.batch_tokens, parts, train.seed, mixture=mixture,
                     kinds=kinds)


def deal(examples: Sequence[Example], rank: int, world: int) -> list[int]:
    """Places of a process's share of examples; those of one utterance stay together."""
    # Apart, two processes would each encode and transcribe the utterance.
    turns: dict[tuple[str, str], int] = {}
    return [i for i, e in enumerate(examples)
            if turns.setdefault((e.utterance.where, e.utterance.id), len(turns)) % world == rank]
