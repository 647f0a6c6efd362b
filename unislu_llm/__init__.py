"""Unified spoken language understanding with an LLM behind a Whisper encoder (arXiv 2507.12951).

    from unislu_llm import load, understand

    model = load("adapters/whisper-base--smollm2-135m")
    answer = understand(model, "clip.wav")
    print(answer.transcript, answer.outputs)
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unislu_llm.decoding.answer import Answer
    from unislu_llm.decoding.predict import stream, understand
    from unislu_llm.models.speech_llm import SpeechLLM
    from unislu_llm.models.whisper_slu import WhisperSLU
    from unislu_llm.run_folder import load

# On a CPU it tells of missing kernels when something imports it, and of a cast in every layer.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["Answer", "SpeechLLM", "WhisperSLU", "load", "stream", "understand"]

_HOMES = {"Answer": "decoding.answer", "understand": "decoding.predict", "load": "run_folder",
          "stream": "decoding.predict",
          "SpeechLLM": "models.speech_llm", "WhisperSLU": "models.whisper_slu"}


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import, and `unislu --help` should not wait for it: a name is fetched
    # when it is first asked for.
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
