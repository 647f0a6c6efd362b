"""Hypotheses: who makes them, and who gets them.

They are attached to utterances before anything is decoded; decoding itself runs no second model. A
recogniser is plain Whisper, one of our models, the greedy text of a `ctc` projector, or what
:mod:`unislu_llm.decoding.other_recognisers` has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from unislu_llm import models, weights
from unislu_llm.config import DecodeConfig
from unislu_llm.data.frame_cache import load_clip
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.no_speech import Evidence, silent
from unislu_llm.decoding.other_recognisers import (
    CTRANSLATE2,
    URLS,
    CTranslate2Recogniser,
    RemoteRecogniser,
)
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.recogniser import Recogniser, Transcript, WhisperRecogniser, cut
from unislu_llm.errors import UserError
from unislu_llm.io import find_model, is_saved_model, is_shown
from unislu_llm.models.base import SLUModel
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.scoring.text import language_code
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

log = logging.getLogger(__name__)


class ModelRecogniser:
    """One of our models, whose prompt says the language: what its decoder says, or by source `ctc`
    the greedy text of its projector, in which no phrase is raised. One that reads hypotheses has
    its own recogniser make them.

    Raises:
        UserError: by `ctc`, the model has another projector.
    """

    def __init__(self, model: SLUModel, source: str = "decoder") -> None:
        if source == "ctc" and not isinstance(getattr(model, "projector", None), CTCProjector):
            raise UserError("hypotheses by `ctc` need a model with the projector 'ctc'")
        self._model: Any = model
        self.language = model.config.language
        self._ctc = source == "ctc"

    @torch.inference_mode()
    def __call__(self, waves: Sequence[Tensor], language: str, phrases: Phrases | None = None,
                 num_beams: int = 1) -> list[Transcript]:
        model = self._model
        engine = None if self._ctc else Engine(
            model, DecodeConfig(grammar=True, force_task=True, num_beams=num_beams), phrases)
        blanks = [Example(Utterance("", None, ""), None)] * len(waves)
        if engine is not None and model.reads_hypothesis:
            blanks = [Example(Utterance("", None, "", hypothesis=clean(t.text, model.registry),
                                        evidence=t.evidence), None)
                      for t in recogniser_of(model)(waves, language, phrases, num_beams)]
        batch = model.collator().from_waves(blanks, waves)
        if engine is None:  # no decoder runs
            said = [(ids, None if ids else Evidence(1.0))
                    for ids in model.ctc_transcripts(batch.to(model.device))]
        else:
            said = [(model.tokenizer.text_ids(a.transcript), a.evidence)
                    for a in engine.answer(batch, [()] * len(waves))]
        return [cut(ids, model.tokenizer.base, evidence) for ids, evidence in said]


@lru_cache(maxsize=1)
def load_recogniser(name: str, source: str = "decoder", revision: str | None = None,
                    device: torch.device | str = "cpu",
                    dtype: torch.dtype | None = None) -> Recogniser:
    """The recogniser that a saved model or a run's best is (see :class:`ModelRecogniser` for
    `source`), or a plain Whisper, by folder or name on the hub (of some `revision`); the last one
    is kept.

    A saved model has `dtype` for its frozen weights, and needs autocast around its calls then; by
    default it is fp32, and a plain Whisper of the type that the device is fast at.
    `ctranslate2:NAME` and the URL of a server are recognisers too
    (:mod:`unislu_llm.decoding.other_recognisers`).

    Raises:
        UserError: there is none.
    """
    disable_progress_bar()  # of the base checkpoints' tensors
    other = name.startswith((*URLS, CTRANSLATE2))
    if not other and is_saved_model(
            found := find_model(name) or weights.resolve(name, revision).path):
        return ModelRecogniser(models.load(found, dtype=dtype or torch.float32).to(device), source)
    if source == "ctc":
        raise UserError(f"{name}: hypotheses by `ctc` need a saved model with the projector 'ctc'")
    if name.startswith(URLS):
        return RemoteRecogniser(name)
    if other:
        return CTranslate2Recogniser(name.removeprefix(CTRANSLATE2), revision, device)
    dtype = dtype or weights.fast_type(torch.device(device))
    return WhisperRecogniser(name, revision, device, dtype)


def recogniser_of(model: SLUModel, device: torch.device | None = None,
                  name: str = "") -> Recogniser:
    """The recogniser of a `name`, default: that of the model's configuration, on `device` or the
    model's; raises as :func:`load_recogniser`, and for a server that nobody but the model names."""
    config = model.config if not name else model.config.model_copy(update={"recogniser": name})
    if config.recogniser.startswith(URLS) and not name:  # a model may be anybody's
        raise UserError(f"the model has its hypotheses made by {config.recogniser}, where your "
                        "audio would go: give that address by --recogniser if you trust it, "
                        "or write hypotheses by `unislu transcribe`")
    if config.recogniser == "ctc":
        return ModelRecogniser(model, "ctc")
    base = None if config.recogniser else model.bases.get("encoder")
    device = device or model.device
    return load_recogniser(config.recogniser or config.encoder, "decoder",
                           base.revision if base else None, device)


def recognise(recogniser: Recogniser, utterances: Sequence[Utterance], registry: TaskRegistry, *,
              language: str = "en", batch_size: int = 8, progress: str = "",
              phrases: Phrases | None = None,
              num_beams: int = 1) -> Iterator[tuple[int, Transcript]]:
    """Index of each utterance and what is said in it, in lower case and on one line.

    Args:
        recogniser: that is asked.
        utterances: with audio of up to 30 s.
        registry: tasks whose markers a transcript must not hold.
        language: of utterances that name none.
        batch_size: clips at one time, of one language.
        progress: label of a progress bar; empty shows none.
        phrases: that are raised.
        num_beams: of the recogniser; 1 is greedy.

    Raises:
        UserError: unreadable audio.
    """
    asked: dict[str, Any] = {"phrases": phrases} if phrases else {}
    asked |= {"num_beams": num_beams} if num_beams > 1 else {}
    codes = [language_code(u.language or language) for u in utterances]
    if isinstance(recogniser, ModelRecogniser) and (others := {*codes} - {recogniser.language}):
        log.warning("clips of language %s are taken for %s, on which the recogniser was trained",
                    ", ".join(sorted(others)), recogniser.language)
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(codes)), key=lambda i: (codes[i], -utterances[i].seconds))
    with tqdm(total=len(order), desc=progress, unit="clip", disable=not progress) as bar:
        while order:
            some = [i for i in order[:batch_size] if codes[i] == codes[order[0]]]
            order = order[len(some):]
            waves = [load_clip(utterances[i]) for i in some]
            made = recogniser(waves, codes[some[0]], **asked)
            for i, wave, t in zip(some, waves, made, strict=True):
                evidence = Evidence(1.0) if silent(wave) else t.evidence
                yield i, t._replace(text=clean(t.text, registry), evidence=evidence)
            bar.update(len(some))


def clean(text: str, registry: TaskRegistry) -> str:
    """A transcript as a manifest may hold it: no marker, no control character, lower case."""
    for marker in registry.markers:
        text = text.replace(marker, " ")
    return " ".join("".join(c if is_shown(c) else " " for c in text).split()).lower()


def with_hypotheses(model: SLUModel, utterances: Sequence[Utterance], progress: str = "",
                    device: torch.device | None = None,
                    phrases: Phrases | None = None, recogniser: str = "",
                    num_beams: int = 1) -> list[Utterance]:
    """Attach to utterances what a model needs before it decodes: hypotheses, where it reads them.

    Those of `model.hypothesis manifest` that are there stay; the model's recogniser makes the
    others. What comes twice stays one object. `progress` is the label of a progress bar, `device`
    and `recogniser` are in place of the model's; `phrases` are raised in what is made, by
    `num_beams` of the recogniser.

    Raises:
        UserError: a reference transcript or the recogniser is lacking.
    """
    if not model.reads_hypothesis:
        return list(utterances)
    # By identity, so that the examples of one utterance still share it afterwards.
    found = {id(u): u for u in utterances}
    reference = model.config.hypothesis == "reference"
    if reference:
        found = {key: replace(u, hypothesis=u.text or None) for key, u in found.items()}
    lacking = {key: u for key, u in found.items() if u.hypothesis is None}
    if lacking and reference:
        raise UserError("this model reads reference transcripts (model.hypothesis reference), to "
                        "measure an upper bound: it can be scored on manifests with transcripts, "
                        "but not used on files; train one with model.hypothesis manifest")
    if lacking:
        made = dict(recognise(recogniser_of(model, device, recogniser), list(lacking.values()),
                              model.registry, language=model.config.language,
                              progress=progress, phrases=phrases, num_beams=num_beams))
        found |= {key: replace(u, hypothesis=made[i].text, evidence=made[i].evidence)
                  for i, (key, u) in enumerate(lacking.items())}
        if looped := sum(t.loop for t in made.values()):
            log.warning("%d of %d hypotheses repeated themselves and were cut", looped, len(made))
    if phrases and (given := len(found) - len(lacking)):
        log.warning("phrases change no given hypothesis: %d of %d are given", given, len(found))
    return [found[id(u)] for u in utterances]
