"""Encoders, projectors and the two decoders."""

from __future__ import annotations

import os

import torch

from unislu_llm.models.base import SLUModel
from unislu_llm.models.saved import Description
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.whisper_slu import WhisperSLU

KINDS: dict[str, type[SLUModel]] = {"speech_llm": SpeechLLM, "whisper_slu": WhisperSLU}


def load(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> SLUModel:
    """Load a saved model of either kind, as :meth:`SLUModel.from_pretrained` does."""
    return KINDS[Description.read(folder).model_type].from_pretrained(folder, dtype)
