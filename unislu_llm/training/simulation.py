"""What stands for the audio of a run's rows without: posteriors by rates fitted in a `ctc` stage, laid over by `data.simulate`
(docs/ctc.md); nothing where the model does not listen (docs/drafts.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unislu_llm.data.simulate import SimulationOptions
from unislu_llm.data.targets import Sample
from unislu_llm.data.text_rows import (
    SIMULATION_FILE,
    DraftsAlone,
    TextSimulator,
    read_simulation,
    save_simulation,
    with_options,
)
from unislu_llm.errors import UserError
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.training.config import Config
from unislu_llm.training.vocabulary import find_model

_FRAME = 0.02  # seconds of an encoder frame


def build_simulator(config: Config, model: Any, samples: list[Sample]) -> TextSimulator | DraftsAlone | None:
    """What stands for the audio of samples without; None where all have audio.

    Raises:
        UserError: the model cannot train on text, or `data.simulate` is wrong.
    """
    silent = [s for s in samples if s.utterance.audio is None]
    if not silent:
        return None
    if isinstance(model, SpeechLLM) and not model.config.use_speech:
        return DraftsAlone()
    if not isinstance(model, SpeechLLM) or not isinstance(model.projector, CTCProjector):
        raise UserError(f"{silent[0].utterance.source}: field 'audio': the row has no audio ({len(silent)} samples have none); "
                        "only an LLM with the projector 'ctc' (docs/ctc.md), or one that reads drafts without speech "
                        "(docs/drafts.md), trains on text: set model.projector ctc, or model.draft manifest and model.use_speech "
                        "false, or voice the corpus by `unislu prepare --voice`")
    codec, vocabulary = model.codec, model.ctc_vocabulary

    def classes(text: str) -> list[int]:
        return vocabulary.classes(codec.text_ids(text), codec.tokenizer)

    return TextSimulator(with_options(_fitted(config), config.data.simulate), classes, len(vocabulary),
                         _FRAME * model.projector.stack)


def _fitted(config: Config) -> SimulationOptions | None:
    """Rates that the run, or the model that it starts from, has; None where nothing was fitted."""
    places = [Path(config.output)] if config.resume and config.output else []
    if config.model.init:
        found = find_model(Path(config.model.init))
        places += [p for p in (found, Path(config.model.init), Path(config.model.init).parent) if p is not None]
    path = next((p / SIMULATION_FILE for p in places if (p / SIMULATION_FILE).is_file()), None)
    return None if path is None else read_simulation(path)


def keep_simulation(config: Config, simulator: TextSimulator | DraftsAlone | None, run: Path) -> None:
    """Write what a run simulates by, or has inherited, into its folder: for those that resume it or start from it."""
    inherited = _fitted(config) if config.model.projector == "ctc" else None
    options = simulator.options if isinstance(simulator, TextSimulator) else inherited
    if options is not None and not (run / SIMULATION_FILE).exists():
        save_simulation(options, run)
