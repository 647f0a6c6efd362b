"""From a run's configuration to its parts: task registry, samples, model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unislu_llm.data.audio import SAMPLE_RATE
from unislu_llm.data.batching import BatchPlan, TokenPlan, seconds
from unislu_llm.data.cache import FrameCache
from unislu_llm.data.draft_dropout import DraftDropout
from unislu_llm.data.long_audio import LongAudio, handle_long
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.mixture import Mixture, group_samples, manifest_name, target_shares
from unislu_llm.data.targets import Sample, make_samples
from unislu_llm.data.text_rows import DraftsAlone, TextSimulator
from unislu_llm.errors import UserError, hint
from unislu_llm.models.base import SLUModel
from unislu_llm.models.frames import open_cache
from unislu_llm.models.speech_llm import SpeechLLM, SpeechLLMConfig
from unislu_llm.models.whisper_slu import WhisperSLU, WhisperSLUConfig
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.config import Config, ModelConfig
from unislu_llm.training.vocabulary import check_tokens, find_model, inherited_tokens, learn_tokens

log = logging.getLogger(__name__)

KINDS = ("speech_llm", "whisper_slu")


def build_registry(config: Config) -> TaskRegistry:
    """The tasks that the run's `data.tasks` file names; by default entities and sentiment."""
    return TaskRegistry.from_yaml(config.data.tasks) if config.data.tasks else TaskRegistry()


def load_samples(manifests: list[str], registry: TaskRegistry, limit: int = 0, flag: str = "data.train",
                 max_seconds: float | None = None, long_audio: LongAudio = "refuse", scored: bool = False) -> list[Sample]:
    """Samples of some manifests.

    Args:
        manifests: paths. registry: tasks. limit: at most this many samples of each manifest, evenly spread; 0 takes all.
        flag: config key they come from, for messages.
        max_seconds: length of a row at most; None leaves that to whoever reads the audio.
        long_audio: what becomes of longer rows.
        scored: rows without audio are refused.

    Raises:
        UserError: no manifest is named, or one has problems, rows that are too long, or rows that cannot be scored.
    """
    if not manifests:
        raise UserError(f"{flag} names no manifest; list JSON-lines files in the config or give --{flag} FILE...")
    samples: list[Sample] = []
    for path in manifests:
        utterances = read_manifest(path, registry, corpus=manifest_name(path), check_audio=True)
        if max_seconds is not None:
            utterances = handle_long(utterances, registry, max_seconds, long_audio)
        mute = next((u for u in utterances if u.audio is None), None) if scored else None
        if mute is not None:
            raise UserError(f"{mute.source}: field 'audio': the row has no audio, so nothing can be predicted for it; take it "
                            f"out of {flag}")
        found = make_samples(utterances, registry)
        pseudo = sum(u.text_source is not None for u in utterances)
        if pseudo and flag != "data.train":
            _warn_of_pseudo_text(path, pseudo, len(utterances))
        step = len(found) / limit if limit and len(found) > limit else 1.0
        samples += [found[int(i * step)] for i in range(int(len(found) / step))]
    return samples


@lru_cache  # once a manifest, however many runs are scored on it
def _warn_of_pseudo_text(path: str, pseudo: int, rows: int) -> None:
    log.warning("%s: the transcripts of %d of %d rows were written by a recogniser (`text_source`); WER and the phrases of "
                "spans are measured against these pseudo-transcripts, not against what was said", path, pseudo, rows)


def add_drafts(samples: list[Sample], m: ModelConfig, flag: str = "data.train") -> list[Sample]:
    """Training samples with the drafts that a run asks for: those of their rows, or the references.

    Args:
        flag: config key they come from, for messages.

    Raises:
        UserError: the model reads drafts and no row has one, or it does not hear speech and a row has none.
    """
    if m.draft == "none":
        return samples
    if m.draft == "gold":
        return [Sample(dataclasses.replace(s.utterance, draft=s.utterance.text), s.task) for s in samples]
    lacking = [s.utterance for s in samples if s.utterance.draft is None]
    if lacking and (len(lacking) == len(samples) or not m.use_speech):
        texts = any(u.audio is None for u in lacking)
        how = "`unislu draft --text-rows copy`, which takes the transcript where there is no audio" if texts else "`unislu draft`"
        raise UserError(f"{flag}: {len(lacking)} of {len(samples)} samples have no draft, the first {lacking[0].source}; add "
                        f"them with {how}")
    if lacking:
        log.warning("%s: %d of %d samples have no draft; they train without, as with train.draft_dropout", flag, len(lacking),
                    len(samples))
    return samples


def build_dropout(config: Config, samples: list[Sample]) -> DraftDropout | None:
    """What is left of the drafts in training; None where they stay whole.

    Raises:
        UserError: parts that are none, or without a draft or speech.
    """
    train, m = config.train, config.model
    drafts = (s.utterance.draft for s in samples if s.utterance.draft)
    dropout = DraftDropout(train.draft_dropout, train.draft_word_dropout, drafts, text_words=train.text_draft_word_dropout)
    if dropout.active and m.draft == "none":
        raise UserError("train.draft_dropout, train.draft_word_dropout, train.text_draft_word_dropout: the model reads no draft; "
                        "set model.draft, or these to 0")
    if train.draft_dropout and not m.use_speech:
        raise UserError("train.draft_dropout: without draft and speech (model.use_speech false) there is nothing to go by; set "
                        "it to 0")
    return dropout if dropout.active else None


def build_mixture(config: Config, samples: list[Sample]) -> Mixture:
    """How the corpora of a run are mixed: by `data.weights`, else by `data.temperature`.

    Raises:
        UserError: a weight for a corpus that is not there, or a value out of range.
    """
    data = config.data
    groups = group_samples(samples, data.weights)
    return Mixture(groups, target_shares(Counter(groups), data.weights, data.temperature), data.epoch_samples, config.train.seed)


def is_mixed(config: Config) -> bool:
    """Whether corpora are drawn by asked shares; otherwise an epoch has every sample once."""
    return bool(config.data.weights or config.data.temperature != 1 or config.data.epoch_samples)


def build_plan(config: Config, model: SLUModel, samples: list[Sample], mixture: Mixture, parts: int,
               simulator: TextSimulator | DraftsAlone | None = None) -> BatchPlan:
    """Batches of a run: by samples, or by tokens with `train.batch_tokens`.

    Args:
        simulator: of the samples without audio; they count as the audio that it says they stand for.

    Raises:
        UserError: sizes that do not fit each other.
    """
    train, mixed, collator = config.train, mixture if is_mixed(config) else None, model.collator()
    lengths = [simulator.seconds(s) if simulator and s.utterance.audio is None else seconds(s.utterance) for s in samples]
    if not train.batch_tokens:
        return BatchPlan(lengths, train.batch_size, parts, train.seed, train.bucket, mixed)
    sizes = [model.token_counts(math.ceil(length * SAMPLE_RATE), len(model.codec.target(sample)), len(collator.draft(sample)))
             for length, sample in zip(lengths, samples, strict=True)]
    return TokenPlan(np.array(sizes), train.batch_tokens, parts, train.seed, train.bucket, mixed)


def model_config(kind: str, m: ModelConfig, registry: TaskRegistry) -> SpeechLLMConfig | WhisperSLUConfig:
    """Configuration of the model that a run's `model` section describes."""
    shared: dict[str, Any] = {
        "encoder": m.encoder, "encoder_mode": m.encoder_mode, "encoder_top_layers": m.encoder_top_layers,
        "encoder_lora": dataclasses.asdict(m.encoder_lora) if m.encoder_mode == "lora" else None,
        "pad_to_30s": m.pad_to_30s, "draft": m.draft, "draft_checkpoint": m.draft_checkpoint, "draft_style": m.draft_style,
        "draft_language": m.language, "draft_bias": m.draft_bias, "tasks": registry.to_dict()}
    lora = dataclasses.asdict(m.lora)
    if kind == "speech_llm":
        return SpeechLLMConfig(llm=m.llm, projector=m.projector, projector_options=m.projector_options,
                               lora=lora if m.lora.rank else None, prompt_prefix=m.prompt_prefix,
                               prompt_suffix=m.prompt_suffix, draft_prompt=m.draft_prompt, use_speech=m.use_speech,
                               quantization=m.quantization, **shared)
    if kind == "whisper_slu":
        if not m.use_speech:
            raise UserError("model.use_speech false: Whisper's decoder has nothing to go by but speech")
        return WhisperSLUConfig(language=m.language, decoder_mode=m.decoder_mode,
                                lora=lora if m.decoder_mode == "lora" else None, **shared)
    raise ValueError(f"kind must be one of {KINDS}, found {kind!r}")


def build_model(kind: str, config: Config, registry: TaskRegistry, texts: Iterable[str] | None = None) -> SLUModel:
    """The untrained model of a run; frozen weights in bf16 when the run computes in bf16.

    Args:
        texts: training transcripts; a `ctc` projector without a vocabulary (`model.init` brings one along) learns it from them.

    Raises:
        UserError: a checkpoint that cannot be had, an unknown projector, a LoRA target that matches nothing, `model.init`
            that does not fit, or an unknown parameter group.
    """
    if config.train.precision == "fp16":
        raise UserError("train.precision fp16: activations of Whisper and of most LLMs overflow fp16 and training ends in "
                        "NaN; use bf16 (same speed on current GPUs) or fp32")
    torch.manual_seed(config.train.seed)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    settings = model_config(kind, config.model, registry)
    if isinstance(settings, SpeechLLMConfig) and settings.projector == "ctc":
        settings.ctc_tokens = inherited_tokens(config)
    model: SLUModel = (SpeechLLM.build(settings, dtype) if isinstance(settings, SpeechLLMConfig)
                       else WhisperSLU.build(settings, dtype))
    learn_tokens(model, texts, config.train.ctc.min_count)
    if config.model.init:
        start_from(model, Path(config.model.init))
    if config.model.init_llm:
        start_from(model, Path(config.model.init_llm), ("lora", "markers"))
    select_groups(model, config.train.groups)
    if config.train.gradient_checkpointing:
        decoder: Any = model.llm if isinstance(model, SpeechLLM) else model.whisper  # type: ignore[attr-defined]
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.train.packing:
        if not isinstance(model, SpeechLLM):
            raise UserError("train.packing: Whisper's decoder attends to one clip a row; only an LLM's rows can be packed")
        model.packing = True
    if config.train.compile:
        network: Any = model
        inner = network.llm.base_model if isinstance(model, SpeechLLM) else network.whisper.model.decoder
        inner.compile(dynamic=True)  # in place: parameters keep their names
    return model


def choose_attention(model: SLUModel, device: torch.device, precision: str) -> None:
    """Plain matrix products for an LLM that trains in bf16 on a CPU, else what it has.

    There the backward pass of torch's fused attention takes 2.5 to 3.5 times as long (torch 2.13, 75 to 150 positions).
    """
    if isinstance(model, SpeechLLM) and device.type == "cpu" and precision == "bf16":
        model.llm.set_attn_implementation("eager")


def build_cache(config: Config, model: Any) -> FrameCache | None:
    """The cache of the run's encoder frames; None where the run has none.

    Raises:
        UserError: the encoder trains, or augmentation changes what it hears.
    """
    data = config.data
    if not data.encoder_cache or not config.model.use_speech:
        return None
    if config.augment.active:
        raise UserError("data.encoder_cache: augmentation gives every epoch other audio, so there is nothing to keep; "
                        "switch the augment section or the cache off")
    return open_cache(data.encoder_cache, model.encoder, config.train.precision, data.cache_dtype, data.cache_gib,
                      config.model.encoder)


def start_from(model: SLUModel, folder: Path, groups: Collection[str] = ()) -> None:
    """Lay the trained weights of a saved model, or of a run's best (else last), over a new model; says what it lacks.

    Args:
        groups: parameter groups that are taken (`model.init_llm`); none means all (`model.init`).

    Raises:
        UserError: no such model, or weights of other names or shapes.
    """
    key, found = "model.init_llm" if groups else "model.init", find_model(folder)
    if found is None:
        raise UserError(f"{key}: {folder} is neither a saved model nor a run with one")
    if not groups:
        check_tokens(model, found)
    lacking = model.load_trained(found, partial=True, groups=groups)
    if lacking:
        counts = Counter(model.parameter_group(name) for name in lacking)
        log.warning("%s: %s lacks %s; they start untrained", key, found,
                    ", ".join(f"{n} {name} parameters" for name, n in sorted(counts.items())))


def select_groups(model: SLUModel, names: list[str]) -> None:
    """Freeze every parameter group that is not named; no name leaves all as they are.

    Raises:
        UserError: a group that does not train in this model.
    """
    groups = model.trainable_groups()
    for name in names:
        if name not in groups:
            raise UserError(f"train.groups: '{name}' does not train in this model; groups: {', '.join(groups)}"
                            f"{hint(name, list(groups))}")
    for name, named in groups.items():
        for _, parameter in named:
            parameter.requires_grad_(not names or name in names)
