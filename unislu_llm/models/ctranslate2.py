"""Whisper from CTranslate2's binary layout to transformers.

The layout is that of CTranslate2's `model_spec.py` (`ModelSpec._serialize`, binary version 6); all numbers are
little-endian::

    u32 version | u16 n, n bytes: spec name | u32 revision
    u32 arrays,  then for each: u16 n, n bytes: name | u8 rank | u32 x rank: shape | u8 dtype | u32 n, n bytes: data
    u32 aliases, then for each: u16 n, n bytes: alias | u16 n, n bytes: name

Names end in a zero byte. Projections are fused: `linear_0` of self-attention is q, k, v; of cross-attention q alone,
with k, v in `linear_1`. Whisper's k has no bias, so its third of the fused bias is zero.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from unislu_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig

BINARY_VERSION = 6
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)  # by CTranslate2's id
GELU = 3  # CTranslate2's ActivationType
SCALARS = (
    "decoder/activation",
    "decoder/num_heads",
    "decoder/pre_norm",
    "decoder/scale_embeddings",
    "encoder/num_heads",
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startofprev|>",
    "<|notimestamps|>",
)


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise UserError(f"{file.name}: the file ends in the middle of an array; it was cut short, fetch it again")
    return data


def _number(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(f"<{code}", _read_exactly(file, struct.calcsize(code)))[0])


def _string(file: BinaryIO) -> str:
    return _read_exactly(file, _number(file, "H")).rstrip(b"\0").decode()


def _array(file: BinaryIO) -> Tensor:
    shape = [_number(file, "I") for _ in range(_number(file, "B"))]
    kind = _number(file, "B")
    if kind >= len(DTYPES):
        raise UserError(f"{file.name}: unknown number type {kind}; the file is damaged, or newer than this reader")
    size = _number(file, "I")
    # A copy of its own: an array starts at any byte, and torch wants aligned memory.
    return torch.frombuffer(bytearray(_read_exactly(file, size)), dtype=DTYPES[kind]).reshape(shape)


def read_ctranslate2(path: Path, *, progress: bool = False) -> tuple[str, dict[str, Tensor]]:
    """Reads a CTranslate2 `model.bin`.

    Returns:
        The spec's name (`WhisperSpec`) and the arrays by name, aliases included (they share memory).

    Raises:
        UserError: not such a file, of another version, or cut short.
    """
    with path.open("rb") as file:
        version = _number(file, "I")
        if version != BINARY_VERSION:
            raise UserError(f"{path}: CTranslate2 binary version {version}; this reader knows version {BINARY_VERSION}")
        spec = _string(file)
        _number(file, "I")  # revision of the spec
        arrays: dict[str, Tensor] = {}
        bar = tqdm(range(_number(file, "I")), desc=f"reading {path.name}", unit="array", disable=not progress)
        for _ in bar:
            name = _string(file)
            arrays[name] = _array(file)
        for _ in range(_number(file, "I")):
            alias, name = _string(file), _string(file)
            arrays[alias] = arrays[name]
    return spec, arrays


class _Renamer:
    """Moves arrays from CTranslate2's names to transformers', and knows which ones nobody asked for."""

    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        self._left = dict(arrays)
        self.state: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        try:
            return self._left.pop(name)
        except KeyError:
            raise UserError(f"the CTranslate2 file has no array {name!r}; it is not a Whisper model") from None

    def pair(self, source: str, target: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        for old, new in zip(names, ("weight", "bias"), strict=True):
            self.state[f"{target}.{new}"] = self.take(f"{source}/{old}")

    def norm(self, source: str, target: str) -> None:
        self.pair(source, target, ("gamma", "beta"))

    def fused(self, source: str, target: str, projections: str) -> None:
        """Splits a fused projection: `projections` is "qkv", "q" or "kv"."""
        weights = self.take(f"{source}/weight").chunk(len(projections))
        biases = self.take(f"{source}/bias").chunk(len(projections))
        for letter, weight, bias in zip(projections, weights, biases, strict=True):
            self.state[f"{target}.{letter}_proj.weight"] = weight.contiguous()
            if letter != "k":
                self.state[f"{target}.{letter}_proj.bias"] = bias.contiguous()
            elif bias.count_nonzero():
                raise UserError(f"{source}/bias: the part for k is not zero; Whisper has no bias there")

    def leftovers(self) -> list[str]:
        """Names of unused arrays; scalars describe the graph and are no weights."""
        return [name for name, array in self._left.items() if array.dim() > 0]


def _layers(arrays: Mapping[str, Tensor], side: str) -> int:
    return len({m[1] for name in arrays if (m := re.match(rf"{side}/layer_(\d+)/", name))})


def whisper_state_dict(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `WhisperForConditionalGeneration` from a `WhisperSpec`'s arrays.

    Raises:
        UserError: an array is missing, is left over, is quantised to integers, or k has a bias.
    """
    renamer = _Renamer(arrays)
    for side in ("encoder", "decoder"):
        renamer.state[f"model.{side}.embed_positions.weight"] = renamer.take(f"{side}/position_encodings/encodings")
        renamer.norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(_layers(arrays, side)):
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            renamer.norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            renamer.fused(f"{source}/self_attention/linear_0", f"{target}.self_attn", "qkv")
            renamer.pair(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            if side == "decoder":
                renamer.norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
                renamer.fused(f"{source}/attention/linear_0", f"{target}.encoder_attn", "q")
                renamer.fused(f"{source}/attention/linear_1", f"{target}.encoder_attn", "kv")
                renamer.pair(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
            renamer.norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            renamer.pair(f"{source}/ffn/linear_0", f"{target}.fc1")
            renamer.pair(f"{source}/ffn/linear_1", f"{target}.fc2")
    for index in (1, 2):
        renamer.pair(f"encoder/conv{index}", f"model.encoder.conv{index}")
    renamer.state["model.decoder.embed_tokens.weight"] = renamer.take("decoder/embeddings/weight")
    renamer.state["proj_out.weight"] = renamer.take("decoder/projection/weight")
    if left := renamer.leftovers():
        raise UserError(f"the CTranslate2 file has arrays that Whisper does not: {', '.join(left[:5])}")
    if quantised := [name for name, array in renamer.state.items() if not array.is_floating_point()]:
        raise UserError(f"the CTranslate2 file is quantised to integers ({quantised[0]}); use a float16 or float32 one")
    return renamer.state


def whisper_config(arrays: Mapping[str, Tensor], shipped: Mapping[str, Any], ids: Mapping[str, int]) -> WhisperConfig:
    """`WhisperConfig` with every size read from the arrays; the other arguments as in `whisper_generation_config`."""
    from transformers import WhisperConfig

    if missing := [name for name in SCALARS if name not in arrays]:
        raise UserError(f"the CTranslate2 file has no {missing[0]!r}; it is not a Whisper model")
    if int(arrays["decoder/activation"]) != GELU or not bool(arrays["decoder/pre_norm"]):
        raise UserError("the CTranslate2 file is no Whisper model: another activation, or layer norms in other places")
    sizes: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = _layers(arrays, side)
        sizes[f"{side}_attention_heads"] = int(arrays[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = arrays[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
    vocabulary, width = arrays["decoder/embeddings/weight"].shape
    end = ids["<|endoftext|>"]
    return WhisperConfig(
        **sizes,
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        max_source_positions=arrays["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=arrays["decoder/position_encodings/encodings"].shape[0],
        scale_embedding=bool(arrays["decoder/scale_embeddings"]),
        decoder_start_token_id=ids["<|startoftranscript|>"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=shipped["suppress_ids"],
        begin_suppress_tokens=shipped["suppress_ids_begin"],
    )


def whisper_generation_config(
    config: WhisperConfig, shipped: Mapping[str, Any], ids: Mapping[str, int]
) -> GenerationConfig:
    """What `generate` needs to know.

    Args:
        config: of the model.
        shipped: the `config.json` that lies beside CTranslate2's `model.bin`: suppressed tokens, alignment heads.
        ids: the special tokens' ids by token.
    """
    from transformers import GenerationConfig

    start, translate = ids["<|startoftranscript|>"], ids["<|translate|>"]
    optional = {"alignment_heads": shipped["alignment_heads"]} if "alignment_heads" in shipped else {}
    return GenerationConfig(
        begin_suppress_tokens=shipped["suppress_ids_begin"],
        suppress_tokens=shipped["suppress_ids"],
        decoder_start_token_id=start,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_length=config.max_target_positions,
        max_initial_timestamp_index=50,
        is_multilingual=True,
        # Language tokens stand between these two in every multilingual Whisper vocabulary.
        lang_to_id={token: index for token, index in ids.items() if start < index < translate},
        # Without a task, `generate` leaves the task token out of the prompt, and Whisper babbles.
        task="transcribe",
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
        **optional,
    )


def _special_ids(tokenizer_file: Path) -> dict[str, int]:
    added = json.loads(tokenizer_file.read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added if token["special"]}
    if missing := [token for token in SPECIAL_TOKENS if token not in ids]:
        raise UserError(f"{tokenizer_file}: no {missing[0]}; only multilingual Whisper checkpoints are supported")
    return ids


def convert_whisper(payload: Path, out: Path, *, progress: bool = True) -> None:
    """Writes a Hugging Face Whisper folder (weights, config, tokenizer, feature extractor) for a CTranslate2 one.

    Args:
        payload: folder with `model.bin`, `config.json` and `tokenizer.json`.
        out: existing folder to write to.

    Raises:
        UserError: the payload is no multilingual Whisper in floating point.
    """
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    spec, arrays = read_ctranslate2(payload / "model.bin", progress=progress)
    if spec != "WhisperSpec":
        raise UserError(f"{payload / 'model.bin'}: a {spec}, not a Whisper model")
    ids = _special_ids(payload / "tokenizer.json")
    shipped = json.loads((payload / "config.json").read_text(encoding="utf-8"))
    state = whisper_state_dict(arrays)
    config = whisper_config(arrays, shipped, ids)
    config.dtype = state["proj_out.weight"].dtype
    model: Any = WhisperForConditionalGeneration(config)
    model.to(config.dtype)
    model.load_state_dict(state, strict=True)
    model.generation_config = whisper_generation_config(config, shipped, ids)
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)
    tokenizer = WhisperTokenizer.from_pretrained(payload, model_max_length=1024, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(out)
