"""Encoders, projectors and the two decoders."""

from __future__ import annotations

from unislu_llm.models.base import SLUModel
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.whisper_slu import WhisperSLU

KINDS: dict[str, type[SLUModel]] = {"speech_llm": SpeechLLM, "whisper_slu": WhisperSLU}

load = SLUModel.from_pretrained
