"""From a run's configuration to its model: what it starts from, and which parts of it train."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from unislu_llm.config import Config
from unislu_llm.data.text_injection import RATES_FILE, SimulationRates
from unislu_llm.errors import UserError
from unislu_llm.models import KINDS
from unislu_llm.models.base import SLUModel
from unislu_llm.models.saved import Description
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.run_folder import LAST, find_model, near_models
from unislu_llm.tasks import TaskRegistry

log = logging.getLogger(__name__)


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
    if config.model.projector == "ctc":  # a projector that was trained before has its vocabulary
        saved = (Description.read(folder).ctc_tokens for folder in _sources(config))
        tokens = next(filter(None, saved), None)
    model = KINDS[kind].build(config.model, registry, torch.bfloat16 if half else torch.float32,
                              ctc_tokens=tokens)
    if isinstance(model, SpeechLLM) and config.model.projector == "ctc" and tokens is None:
        model.learn_vocabulary(dict.fromkeys(texts))
    if train.init:
        start_from(model, train.init)
    model.select_groups(["projector"] if train.objective == "ctc" else train.groups)
    if train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if device and device.type == "cpu" and half and isinstance(model, SpeechLLM):
        # Plain matrix products: there the backward pass of torch's fused attention takes 2.5 to 3.5
        # times as long (torch 2.13, 75 to 150 positions). Whisper's decoder has few positions.
        model.lm.set_attn_implementation("eager")
    return model


def start_from(model: SLUModel, folder: str | Path) -> None:
    """Lay the trained weights of a saved model (a folder, a run, a name on the hub) over a new one.

    Raises UserError: no such model, or one that does not fit.
    """
    found = _saved(folder)
    # Vocabularies of one size have weights of one shape, which would load and mean other tokens.
    own, saved = model.ctc_tokens, Description.read(found).ctc_tokens
    if own and saved and list(own) != list(saved):
        raise UserError(f"train.init: {found} predicts {len(saved)} tokens by CTC and this model "
                        f"{len(own)} others, learned from other transcripts")
    lacking = Counter(model.parameter_group(n) for n in model.load_trained(found, partial=True))
    if lacking:
        log.warning("train.init: %s lacks %s; they start untrained", found, ", ".join(
            f"{n} {group} parameters" for group, n in sorted(lacking.items())))


def _saved(folder: str | Path) -> Path:
    found = find_model(folder)
    if found is None:
        raise UserError(f"train.init: {folder} is neither a saved model nor a run with one"
                        f"{near_models(folder)}")
    return found


def _sources(config: Config) -> list[Path]:
    """Saved models that a run goes on from: its own checkpoint, what it was begun with."""
    own = find_model(Path(config.output) / LAST) if config.resume else None
    init = _saved(config.train.init) if config.train.init else None
    return [folder for folder in (own, init) if folder]


def fitted_rates(config: Config) -> SimulationRates | None:
    """Rates of text injection that were fitted before this run; None where none were."""
    files = (folder / RATES_FILE for folder in _sources(config))
    return next((SimulationRates.load(path) for path in files if path.is_file()), None)
