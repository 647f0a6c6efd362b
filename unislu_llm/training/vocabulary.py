"""The token vocabulary of a `ctc` projector in a run: of the model that it starts from, or learned from transcripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unislu_llm.errors import UserError
from unislu_llm.models.base import WEIGHTS_FILE, SLUModel
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.training.config import Config
from unislu_llm.training.state import BEST, LAST


def find_model(folder: Path) -> Path | None:
    """A saved model: the folder itself, or a run's best, else its last; None where there is none."""
    return next((p for p in (folder, folder / BEST, folder / LAST) if (p / WEIGHTS_FILE).is_file()), None)


def saved_tokens(folder: Path) -> list[int] | None:
    """`ctc_tokens` of the model in a folder; None where there is no model, or one without a vocabulary."""
    found = find_model(folder)
    if found is None or not (found / "config.json").is_file():
        return None
    tokens: list[int] | None = json.loads((found / "config.json").read_text(encoding="utf-8")).get("ctc_tokens")
    return tokens or None


def inherited_tokens(config: Config) -> list[int] | None:
    """The vocabulary that a run has before it sees a transcript: of its own checkpoint when resumed, else of `model.init`."""
    own = saved_tokens(Path(config.output) / LAST) if config.resume and config.output else None
    return own or (saved_tokens(Path(config.model.init)) if config.model.init else None)


def learn_tokens(model: Any, texts: Iterable[str] | None, min_count: int) -> None:
    """Learn the vocabulary of a `ctc` projector that has none from transcripts; without transcripts leave it as it is."""
    if isinstance(model, SpeechLLM) and model.projector.needs_embeddings and not model.config.ctc_tokens and texts is not None:
        model.learn_vocabulary(dict.fromkeys(texts), min_count)


def check_tokens(model: SLUModel, folder: Path) -> None:
    """A projector's weights mean nothing for another vocabulary.

    Raises:
        UserError: model and folder have different ones.
    """
    own, saved = getattr(model.config, "ctc_tokens", None), saved_tokens(folder)
    if own and saved and list(own) != list(saved):
        raise UserError(f"model.init: {folder} predicts {len(saved)} tokens by CTC and this model {len(own)} others, learned "
                        "from other transcripts; build the model with `ctc_tokens` of that model's config.json")
