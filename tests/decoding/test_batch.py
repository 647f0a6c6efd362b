"""Encoding for decoding: how clips are dealt to the encoder changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from unislu_llm.decoding.batch import encode_waves
from unislu_llm.models.base import SLUModel


@pytest.mark.parametrize("pad_to_30s", [False, True])
@pytest.mark.parametrize("kind", ["llm", "whisper"])
def test_many_clips_are_encoded_as_one_by_one(kind: str, pad_to_30s: bool, tiny_speech_llm: Callable[..., SLUModel],
                                              tiny_whisper_slu: Callable[..., SLUModel]) -> None:
    model = (tiny_speech_llm if kind == "llm" else tiny_whisper_slu)(pad_to_30s=pad_to_30s).eval()
    generator = torch.Generator().manual_seed(0)
    waves = [torch.randn(n, generator=generator) * 0.1 for n in (30_000, 9_000, 0, 48_000, 16_000, 12_345, 8_000, 40_000, 20_000)]
    together = encode_waves(model, waves)
    for i, wave in enumerate(waves):
        alone = encode_waves(model, [wave])
        n = int(alone.lengths[0])
        assert int(together.lengths[i]) == n
        torch.testing.assert_close(together.frames[i, :n], alone.frames[0, :n], rtol=1e-4, atol=1e-5)
