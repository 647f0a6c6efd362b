"""Real speech through the whole of WhisperSLU, untrained: with the markers installed Whisper still transcribes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from whisper_normalizer.english import EnglishTextNormalizer

from unislu_llm.data import audio
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.generate import DecodeOptions, decode_batch
from unislu_llm.models.whisper_slu import WhisperSLU, WhisperSLUConfig
from unislu_llm.unified import parse
from unislu_llm.utterance import Utterance

CLIP = Path(__file__).parents[1] / "data_files" / "librivox.flac"
TEXT = "and mister john dashwood had then leisure to consider how much there might be prudently in his power to do for them"


@pytest.mark.weights
def test_whisper_base_transcribes_real_speech() -> None:
    torch.manual_seed(0)
    model = WhisperSLU.build(WhisperSLUConfig(encoder="openai/whisper-base", pad_to_30s=True)).eval()
    wave = audio.load(CLIP)
    [ids] = decode_batch(model, [Sample(Utterance("u", CLIP, ""), None)], [wave], DecodeOptions())
    assert ids[-1] == model.codec.eos_id
    parsed = parse(model.codec.decode(ids), model.codec.registry)
    assert parsed.problems == ()
    normalise = EnglishTextNormalizer()
    assert normalise(parsed.transcript) == normalise(TEXT)
