"""Encoders, projectors and the two decoders."""

from __future__ import annotations

import os

import torch

from unislu_llm.io import check_saved
from unislu_llm.models.base import SLUModel
from unislu_llm.models.saved import Description
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.whisper_slu import WhisperSLU

KINDS: dict[str, type[SLUModel]] = {"speech_llm": SpeechLLM, "whisper_slu": WhisperSLU}


def load(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> SLUModel:
    """The saved model of either kind in a folder, in eval mode; frozen weights are of `dtype`.

    :func:`unislu_llm.load` takes names and runs as well.

    Raises:
        UserError: not such a folder, a file in it that is damaged, or a base checkpoint that cannot
            be had.
    """
    check_saved(folder)
    saved = Description.read(folder)
    model = KINDS[saved.model_type].build(saved.model, saved.registry(folder), dtype,
                                          saved.ctc_tokens, saved.bases)
    model.load_trained(folder)
    return model.eval()
