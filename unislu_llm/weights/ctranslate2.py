"""Whisper from CTranslate2's binary layout to transformers.

The layout is that of CTranslate2's `model_spec.py` (`ModelSpec._serialize`, binary version 6); all
numbers are little-endian, names end in a zero byte::

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
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from unislu_llm.errors import UserError
from unislu_llm.io import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig

_VERSION = 6
_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
_GELU = 3  # CTranslate2's number of the activation; dtypes are in the order of its numbers
_SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>",
            "<|startofprev|>", "<|notimestamps|>")
_SCALARS = ("decoder/activation", "decoder/pre_norm", "decoder/scale_embeddings",
            "decoder/num_heads", "encoder/num_heads")
_OUTSIDE = {
    "encoder/conv1": "encoder.conv1", "encoder/conv2": "encoder.conv2",
    "encoder/layer_norm": "encoder.layer_norm", "decoder/layer_norm": "decoder.layer_norm",
    "encoder/position_encodings": "encoder.embed_positions", "decoder/projection": "proj_out",
    "decoder/position_encodings": "decoder.embed_positions",
    "decoder/embeddings": "decoder.embed_tokens"}
_IN_A_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2"}
# Projections of attention are fused: q, k, v into one matrix, or k, v where q reads other input.
_FUSED = {"self_attention/linear_0": ("self_attn", "qkv"),
          "attention/linear_0": ("encoder_attn", "q"), "attention/linear_1": ("encoder_attn", "kv")}
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias",
          "encodings": "weight"}


def read_ctranslate2(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read a CTranslate2 `model.bin`.

    Returns:
        The spec's name (`WhisperSpec`) and the arrays by name, aliases included (they share
        memory).

    Raises:
        UserError: not such a file, of another version, or cut short.
    """
    with path.open("rb") as file:
        version = _number(file, "I")
        if version != _VERSION:
            raise UserError(f"{path}: CTranslate2 binary version {version}; this reader knows "
                            f"version {_VERSION}")
        spec, _revision = _string(file), _number(file, "I")
        arrays: dict[str, Tensor] = {}
        for _ in range(_number(file, "I")):
            name = _string(file)
            arrays[name] = _array(file)
        for _ in range(_number(file, "I")):
            alias, name = _string(file), _string(file)
            arrays[alias] = arrays[name]
    return spec, arrays


def _bytes(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise UserError(f"{file.name}: the file ends in the middle of an array; it was cut short, "
                        "fetch it again")
    return data


def _number(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(f"<{code}", _bytes(file, struct.calcsize(code)))[0])


def _string(file: BinaryIO) -> str:
    return _bytes(file, _number(file, "H")).rstrip(b"\0").decode()


def _array(file: BinaryIO) -> Tensor:
    shape = [_number(file, "I") for _ in range(_number(file, "B"))]
    kind = _number(file, "B")
    if kind >= len(_DTYPES):
        raise UserError(f"{file.name}: unknown number type {kind}; the file is damaged, or newer "
                        "than this reader")
    # A copy of its own: an array starts at any byte, and torch wants aligned memory.
    data = bytearray(_bytes(file, _number(file, "I")))
    return torch.frombuffer(data, dtype=_DTYPES[kind]).reshape(shape)


def whisper_state_dict(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `WhisperForConditionalGeneration` from a `WhisperSpec`'s arrays.

    Raises:
        UserError: an array that Whisper has not, quantised to integers, or a bias of k.
    """
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        where, _, kind = name.rpartition("/")
        layer = re.fullmatch(r"(encoder|decoder)/layer_(\d+)/(.+)", where)
        target, fused = _OUTSIDE.get(where), ""
        if layer is not None:
            part, fused = _FUSED.get(layer[3], (_IN_A_LAYER.get(layer[3]), ""))
            target = part and f"{layer[1]}.layers.{layer[2]}.{part}"
        if array.dim() == 0:
            continue  # it describes the graph and is no weight
        if target is None or kind not in _KINDS:
            raise UserError(f"the CTranslate2 file has an array that Whisper has not: {name}")
        if not array.is_floating_point():
            raise UserError(f"the CTranslate2 file is quantised to integers ({name}); use a "
                            "float16 or float32 one")
        target = target if target == "proj_out" else f"model.{target}"
        for letter, values in zip(fused or [""], array.chunk(len(fused) or 1), strict=True):
            if letter == "k" and kind == "bias":  # Whisper's k has none: a third of it is zero
                if values.count_nonzero():
                    raise UserError(f"{name}: the part for k is not zero; Whisper has no bias "
                                    "there")
                continue
            own = f"{target}.{letter}_proj" if letter else target
            state[f"{own}.{_KINDS[kind]}"] = values.contiguous() if letter else values
    return state


def whisper_config(arrays: Mapping[str, Tensor], shipped: Mapping[str, Any],
                   ids: Mapping[str, int]) -> WhisperConfig:
    """`WhisperConfig` with every size read from the arrays.

    `shipped` is the `config.json` that lies beside `model.bin` (suppressed tokens, alignment
    heads), `ids` are those of the special tokens.
    """
    from transformers import WhisperConfig

    sizes: dict[str, Any] = {}
    try:
        scalars = {name: int(arrays[name]) for name in _SCALARS}
        for side in ("encoder", "decoder"):
            layers = {m[1] for name in arrays if (m := re.match(rf"{side}/layer_(\d+)/", name))}
            sizes[f"{side}_layers"] = len(layers)
            sizes[f"{side}_attention_heads"] = scalars[f"{side}/num_heads"]
            sizes[f"{side}_ffn_dim"] = len(arrays[f"{side}/layer_0/ffn/linear_0/weight"])
        sizes["vocab_size"], sizes["d_model"] = arrays["decoder/embeddings/weight"].shape
        sizes["num_mel_bins"] = arrays["encoder/conv1/weight"].shape[1]
        sizes["max_source_positions"] = len(arrays["encoder/position_encodings/encodings"])
        sizes["max_target_positions"] = len(arrays["decoder/position_encodings/encodings"])
    except KeyError as error:
        raise UserError(f"the CTranslate2 file has no {error}; it is not a Whisper model") from None
    if scalars["decoder/activation"] != _GELU or not scalars["decoder/pre_norm"]:
        raise UserError("the CTranslate2 file is no Whisper model: another activation, or layer "
                        "norms in other places")
    end = ids["<|endoftext|>"]
    return WhisperConfig(
        **sizes, scale_embedding=bool(scalars["decoder/scale_embeddings"]), bos_token_id=end,
        eos_token_id=end, pad_token_id=end, decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=shipped["suppress_ids"],
        begin_suppress_tokens=shipped["suppress_ids_begin"])


def whisper_generation_config(config: WhisperConfig, shipped: Mapping[str, Any],
                              ids: Mapping[str, int]) -> GenerationConfig:
    """What transformers' `generate` needs to know; arguments as in :func:`whisper_config`."""
    from transformers import GenerationConfig

    start, translate = ids["<|startoftranscript|>"], ids["<|translate|>"]
    heads = {"alignment_heads": shipped["alignment_heads"]} if "alignment_heads" in shipped else {}
    names = ("begin_suppress_tokens", "suppress_tokens", "decoder_start_token_id", "bos_token_id",
             "eos_token_id", "pad_token_id")
    return GenerationConfig(
        **{name: getattr(config, name) for name in names}, **heads,
        max_length=config.max_target_positions, max_initial_timestamp_index=50,
        is_multilingual=True, return_timestamps=False,
        # Language tokens stand between these two in every multilingual Whisper vocabulary.
        lang_to_id={token: index for token, index in ids.items() if start < index < translate},
        # Without a task, `generate` leaves the task token out of the prompt, and Whisper babbles.
        task="transcribe",
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"], prev_sot_token_id=ids["<|startofprev|>"])


def convert_whisper(payload: Path, out: Path) -> None:
    """Write a Hugging Face folder for a CTranslate2 one (`model.bin`, and two JSON files).

    Raises:
        UserError: the payload is no multilingual Whisper in floating point.
    """
    import transformers as hf

    file = payload / "model.bin"
    spec, arrays = read_ctranslate2(file)
    if spec != "WhisperSpec":
        raise UserError(f"{file}: a {spec}, not a Whisper model")
    added = read_json(payload / "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in added if token["special"]}
    if missing := [token for token in _SPECIAL if token not in ids]:
        raise UserError(f"{payload / 'tokenizer.json'}: no {missing[0]}; only multilingual Whisper "
                        "checkpoints are supported")
    shipped, state = read_json(payload / "config.json"), whisper_state_dict(arrays)
    config = whisper_config(arrays, shipped, ids)
    config.dtype = state["model.decoder.embed_tokens.weight"].dtype
    model: Any = hf.WhisperForConditionalGeneration(config)
    model.to(config.dtype)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{file} does not fill Whisper exactly: {error}") from error
    model.generation_config = whisper_generation_config(config, shipped, ids)
    model.save_pretrained(out)
    hf.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)
    hf.WhisperTokenizer.from_pretrained(payload, model_max_length=1024, pad_token="<|endoftext|>",
                                        ).save_pretrained(out)
