"""What a checkpoint is loaded as: the dtype that suits the processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from tests.tiny import make_whisper
from unislu_llm.models.lora import quantization
from unislu_llm.weights import fast_type, from_pretrained, pretrained


@pytest.mark.parametrize(("machine", "torch_uses", "instructions", "fast"), [
    ("x86_64", "AVX2", True, False), ("x86_64", "AVX512", False, False),
    ("x86_64", "AVX512", True, True), ("arm64", "DEFAULT", False, None)])
def test_slow_bf16_is_told_once(machine: str, torch_uses: str, instructions: bool,
                                fast: bool | None, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch,
                                caplog: pytest.LogCaptureFixture) -> None:
    make_whisper()[0].save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_uses)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    pretrained._warn_if_slow.cache_clear()
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        from_pretrained(WhisperForConditionalGeneration, tmp_path, dtype=dtype)
    assert len([r for r in caplog.records if "bf16" in r.message]) == (fast is False)
    assert fast_type(torch.device("cpu")) is (torch.bfloat16 if fast else torch.float32)
    assert quantization("4bit")["quantization_config"].bnb_4bit_compute_dtype is fast_type()
