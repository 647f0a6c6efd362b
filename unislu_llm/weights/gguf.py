"""Language models from GGUF files (llama.cpp's format) to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from gguf import GGUFReader
from tokenizers import pre_tokenizers

from unislu_llm.errors import UserError


def convert_gguf(payload: Path, out: Path, dtype: str) -> None:
    """Write a Hugging Face folder (weights of `dtype`, tokenizer) for the GGUF file in `payload`;
    raises UserError: the file does not fill the model exactly."""
    (file,) = payload.glob("*.gguf")
    tokenizer: Any = hf.AutoTokenizer.from_pretrained(payload, gguf_file=file.name)
    loaded: Any = hf.AutoModelForCausalLM.from_pretrained(
        payload, gguf_file=file.name, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    # transformers draws at random what it does not find, and this part of it changes by release.
    if problems := {kind: sorted(keys) for kind, keys in report.items() if keys}:
        raise UserError(f"{file.name} does not fill the model: {problems}")
    field = GGUFReader(file).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        # transformers does not read this name: SmolLM splits numbers into digits before the
        # byte-level BPE.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = model.config.max_position_embeddings
    model = model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    # Plain tensors are saved; left in, the first would make transformers look for a GGUF file.
    for attribute in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
