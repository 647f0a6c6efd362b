"""From a run's configuration to its model: what it starts from, and which parts of it train."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from unislu_llm import weights
from unislu_llm.config import Config, ModelConfig
from unislu_llm.config_file import saved_model
from unislu_llm.data.text_injection import SimulationRates
from unislu_llm.errors import UserError
from unislu_llm.io import LAST, RATES_FILE, check_saved, find_model
from unislu_llm.models import KINDS
from unislu_llm.models.base import SLUModel
from unislu_llm.models.lora import leave_casts_to_autocast
from unislu_llm.models.projectors import NONE
from unislu_llm.models.saved import Description
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tasks import TaskRegistry

log = logging.getLogger(__name__)


def build_registry(config: Config) -> TaskRegistry:
    """The tasks of a run: those of `data.tasks`, else of what it goes on from, else the built-in.

    Raises UserError: no such file, or a run that is resumed had other tasks.
    """
    path, sources = config.data.tasks, _sources(config)
    if not sources:
        return TaskRegistry.from_yaml(path)
    saved = Description.read(sources[0]).registry(sources[0])
    own = TaskRegistry.from_yaml(path) if path else saved
    # Its optimizer has moments for these markers, and its plan batches of these examples.
    if sources[0].name == LAST and config.resume and own.to_dict() != saved.to_dict():
        raise UserError(f"--resume: the run's tasks are {_told(saved)}; yours ({path}) are "
                        f"{_told(own)}. Resume with its own, or start a new run from it with "
                        "--train.init")
    return own


def _told(registry: TaskRegistry) -> str:
    return ", ".join(f"{task.name} ({' '.join(task.labels)})" for task in registry)


def build_model(kind: str, config: Config, registry: TaskRegistry,
                texts: Iterable[str] = (), device: torch.device | None = None) -> SLUModel:
    """The model of a run before training; frozen weights are bf16 where the run computes in bf16.

    Args:
        kind: `speech_llm` or `whisper_slu`.
        config: of the run.
        registry: its tasks.
        texts: training transcripts, of which a new `ctc` projector learns its vocabulary.
        device: that it will train on.

    Raises UserError: a checkpoint that cannot be had, an unknown projector or parameter group, a
    LoRA target that matches nothing, or a `train.init` that does not fit.
    """
    train = config.train
    # Before anything is drawn: every process must begin with the same new weights.
    torch.manual_seed(train.seed)
    half, tokens = train.precision == "bf16", None
    if train.init:  # before checkpoints are fetched that do not fit
        check_settings(kind, config.model, saved_model(train.init))
    if config.model.projector == "ctc":  # a projector that was trained before has its vocabulary
        saved = (Description.read(folder).ctc_tokens for folder in _sources(config))
        tokens = next(filter(None, saved), None)
    model = KINDS[kind].build(config.model, registry, torch.bfloat16 if half else torch.float32,
                              ctc_tokens=tokens)
    model.tokenizer.check(config.model.llm if kind == "speech_llm" else config.model.encoder)
    if isinstance(model, SpeechLLM) and config.model.projector == "ctc" and tokens is None:
        model.learn_vocabulary(dict.fromkeys(texts))
    if train.init:
        start_from(model, saved_model(train.init))
    listens = [name for name in ("projector", "encoder") if name in model.trainable_groups()]
    model.select_groups(listens if train.objective == "ctc" else train.groups)
    if half:
        leave_casts_to_autocast(model)
    if train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if (device and device.type == "cpu" and half and isinstance(model, SpeechLLM)
            and config.model.attention == "auto"):
        # Plain matrix products: there the backward pass of torch's fused attention takes 2.5 to 3.5
        # times as long (torch 2.13, 75 to 150 positions). Whisper's decoder has few positions.
        model.lm.set_attn_implementation("eager")
    return model


def check_settings(kind: str, own: ModelConfig, folder: Path) -> None:
    """Whether trained weights can go on in a model of these settings; else a UserError names them.

    Parts that the saved model has not, such as LoRA, may be added.
    """
    saved = Description.read(folder)
    if saved.model_type != kind:
        raise UserError(f"train.init: {folder} is a {saved.model_type}, and this recipe trains a "
                        f"{kind}; use the other recipe (train_llm, train_whisper)")
    if found := [f"model.{name} is {mine!r} here and {its!r} there"
                 for name, mine, its in _conflicts(own, saved)]:
        raise UserError(f"train.init: the weights of {folder} do not fit this run's settings: "
                        f"{'; '.join(found)}. Leave the settings out, which then are those of the "
                        "saved model, or train without --train.init")


def _conflicts(own: ModelConfig, saved: Description) -> Iterator[tuple[str, Any, Any]]:
    """Settings without which the weights mean something else, or would be lost: name, own, its."""
    its, llm = saved.model, saved.model_type == "speech_llm"
    if llm and not _same_base(own.llm, saved, "llm"):
        yield "llm", own.llm, its.llm
    if llm and its.projector not in (NONE, own.projector):
        yield "projector", own.projector, its.projector
    elif (not llm or its.projector != NONE) and not _same_base(own.encoder, saved, "encoder"):
        yield "encoder", own.encoder, its.encoder
    # Trained layers stay where all of them are trained on.
    if its.encoder_mode not in ("frozen", own.encoder_mode) and (
            its.encoder_mode, own.encoder_mode) != ("top", "full"):
        yield "encoder_mode", own.encoder_mode, its.encoder_mode
    elif (own.encoder_mode, its.encoder_mode) == ("top", "top") and (
            own.encoder_top_layers < its.encoder_top_layers):
        yield "encoder_top_layers", own.encoder_top_layers, its.encoder_top_layers
    if not llm and its.decoder_mode not in ("frozen", own.decoder_mode):
        yield "decoder_mode", own.decoder_mode, its.decoder_mode
    if its.lora.rank and (llm or its.decoder_mode == "lora" or its.encoder_mode == "lora"):
        for key in ("rank", "alpha"):
            if getattr(own.lora, key) != getattr(its.lora, key):
                yield f"lora.{key}", getattr(own.lora, key), getattr(its.lora, key)
        mine, theirs = own.lora.target_modules, its.lora.target_modules
        if mine not in (["all-linear"], ["auto"]) and not set(theirs) <= set(mine):
            yield "lora.target_modules", mine, theirs


def _same_base(name: str, saved: Description, part: str) -> bool:
    """Whether a checkpoint is the one that a saved model was trained on, by name or by weights."""
    there = saved.bases.get(part)
    if there is None or name == there.name:
        return True
    # A copy in a folder is the same checkpoint; two names on the hub are two, and a look at their
    # weights would fetch them.
    if not (Path(name).is_dir() or Path(there.name).is_absolute()):
        return False
    try:
        return weights.weights_hash(weights.resolve(name).path) == there.sha256
    except UserError:  # there is no such checkpoint: not the same
        return False


def start_from(model: SLUModel, folder: Path) -> None:
    """Lay the trained weights of a saved model over a new model, marker rows by their names.

    What either lacks is said: new markers start from the words that they stand for.

    Raises UserError: weights that do not fit, or are damaged.
    """
    check_saved(folder)
    saved = Description.read(folder)
    # Vocabularies of one size have weights of one shape, which would load and mean other tokens.
    own, its = model.ctc_tokens, saved.ctc_tokens
    if own and its and list(own) != list(its):
        raise UserError(f"train.init: {folder} predicts {len(its)} tokens by CTC and this model "
                        f"{len(own)} others, learned from other transcripts")
    lacking = Counter(model.parameter_group(n) for n in model.load_trained(folder, partial=True))
    if lacking:
        log.warning("train.init: %s lacks %s; they start untrained", folder, ", ".join(
            f"{n} {group} parameters" for group, n in sorted(lacking.items())))
    there, wanted = saved.markers, list(model.registry.markers)
    new, gone = ([m for m in some if m not in others]
                 for some, others in ((wanted, there), (there, wanted)))
    if new or gone:
        log.warning("train.init: the tasks of %s are %s; yours are %s. New markers, which start "
                    "from the words that they stand for: %s; dropped ones: %s", folder,
                    ", ".join(saved.registry(folder).names), ", ".join(model.registry.names),
                    " ".join(new) or "none", " ".join(gone) or "none")


def _sources(config: Config) -> list[Path]:
    """Saved models that a run goes on from: its own checkpoint, what it was begun with."""
    own = find_model(Path(config.output) / LAST) if config.resume else None
    init = saved_model(config.train.init) if config.train.init else None
    return [folder for folder in (own, init) if folder]


def fitted_rates(config: Config) -> SimulationRates | None:
    """Rates of text injection that were fitted before this run; None where none were."""
    files = (folder / RATES_FILE for folder in _sources(config))
    return next((SimulationRates.load(path) for path in files if path.is_file()), None)
