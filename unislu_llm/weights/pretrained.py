"""Folders of base checkpoints to models and tokenizers of transformers, trusting none of them.

No code of a checkpoint runs, it names no other files, and what its `config.json` asks for is
compared with its weights before memory is taken.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from unislu_llm.errors import UserError, shorten
from unislu_llm.io import MODEL_FILE, read_json
from unislu_llm.weights.resolve import weight_names

# What is built one by one takes memory before a weight is read. No model has 200 layers.
_BUILT = ((re.compile(r"(layer|depth|block|stage)s?$"), 1 << 10),
          (re.compile(r"label|expert"), 1 << 16))
_SIDE_FILE = 1 << 28  # bytes of a file beside the weights; tokenizers have up to 40 MB
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
# Where multimodal checkpoints have their causal LM, and where it is by itself.
_TEXT_MODEL = {r"^(model\.)?(language_model|text_model)\.(model\.)?(?!lm_head)": "model.",
               r"^(model\.)?(language_model|text_model)\.lm_head\.": "lm_head."}
_INDEX = "model.safetensors.index.json"

log = logging.getLogger(__name__)


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder, **options)` for a class of transformers. Raises UserError: the
    folder needs code of its own, or its files are damaged, do not fit each other, or ask for more
    than is there."""
    described, safe = _checked(folder), {"trust_remote_code": False}
    try:
        if "Tokenizer" not in kind.__name__:
            if torch.get_default_device().type == "meta":  # shapes are all that is wanted
                return _shapes(kind, folder, **options)
            # Of pickled weights, in old checkpoints, torch reads the tensors and calls nothing.
            safe["weights_only"] = True
            options |= _fitting(kind, folder)
            _warn_if_slow(options.get("dtype"))
            if "quantization_config" not in described:
                _rehearse(kind, folder, options | safe)
        elif not (any(next(folder.glob(name), None) for name in _TOKENIZERS) or any(
                b"ByT5Tokenizer" in path.read_bytes()  # its tokens are bytes and need no file
                for path in folder.glob("tokenizer_config.json"))):
            raise UserError(f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}); copy it there")
        return kind.from_pretrained(folder, **options, **safe)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers has no class of its own for what it cannot read
        if "trust_remote_code" in (said := " ".join(str(error).split())):
            files = ", ".join(path.name for path in sorted(folder.glob("*.json"))
                              if "auto_map" in path.read_text(encoding="utf-8"))
            raise UserError(f"{folder} needs code of its own (auto_map in {files}), which is not "
                            "run; take a model that transformers itself has") from error
        raise UserError(f"{_culprit(folder)} cannot be loaded as {kind.__name__}: "
                        f"{shorten(said, 200) or type(error).__name__}") from error


def fast_type(device: torch.device | None = None) -> torch.dtype:
    """bf16 where the device multiplies it fast, in which Whisper errs no more; else fp32. Default:
    the GPU where there is one."""
    if device.type == "cuda" if device else torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # what torch uses may be less than what the processor has
        fast = "AVX512" in torch.backends.cpu.get_cpu_capability() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


@cache  # once a process
def _warn_if_slow(dtype: torch.dtype | None) -> None:
    if dtype is torch.bfloat16 and platform.machine() in ("x86_64", "AMD64") and (
            fast_type() is not dtype):
        log.warning("bf16 can be 50 times slower than fp32 on this machine; use precision fp32")


def _shapes(kind: Any, folder: Path, dtype: torch.dtype, attn_implementation: str | None = None,
            **_: Any) -> Any:
    """The model of a folder by its `config.json` alone."""
    config = _fitting(kind, folder).get("config") or AutoConfig.from_pretrained(
        folder, trust_remote_code=False)
    make = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
    return make(config, dtype=dtype, attn_implementation=attn_implementation)


def _fitting(kind: Any, folder: Path) -> dict[str, Any]:
    """Arguments that take the causal text model out of a multimodal checkpoint; raises UserError:
    a checkpoint of another kind of model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if (wanted := getattr(kind, "config_class", None)) and not isinstance(config, wanted):
        raise UserError(f"{folder / MODEL_FILE}: model_type is {config.model_type}, and a "
                        f"{wanted.model_type} is needed")
    if kind is not AutoModelForCausalLM:
        return {}
    # The decoder alone says that it is none, but has layers that read an encoder.
    both = config.is_encoder_decoder or type(config).is_encoder_decoder
    if both or type(text := config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{folder / MODEL_FILE}: a {config.model_type} is "
                        f"{'an encoder-decoder model' * both or 'no causal LM'}; take a causal LM")
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise UserError(f"{folder / MODEL_FILE}: a {config.model_type} reads token ids beside "
                        "embeddings (per-layer embeddings): speech cannot be put in; take another")
    if text is config:
        return {}
    if (packed := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = packed
    # transformers ties nothing that a checkpoint has apart.
    text.tie_word_embeddings |= getattr(config, "tie_word_embeddings", False)
    return {"config": text, "key_mapping": _TEXT_MODEL}


def _culprit(folder: Path) -> Path:
    """The file of a checkpoint that cannot be read; the folder where each can."""
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix in (".json", ".safetensors"):
                read_json(file) if file.suffix == ".json" else safe_open(file, "pt")
        except (UserError, SafetensorError, OSError):
            return file
    return folder


def _checked(folder: Path) -> dict[str, Any]:
    """`config.json`, where transformers may act by it and by what lies beside it."""
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt", ".model", ".jinja") and (
                not file.is_file() or file.stat().st_size > _SIDE_FILE):
            raise UserError(f"{file} is no file, or over {_SIDE_FILE >> 20} MB; fetch it again")
        if file.is_file() and file.stat().st_size < 1000 and b"//git-lfs" in file.read_bytes():
            raise UserError(f"{file} is a Git LFS pointer; run `git lfs pull`, or fetch it again")
    # PEFT would import modules that it names, and add weights that were not hashed.
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}/adapter_config.json: the folder holds an adapter of PEFT; merge "
                        "it into the weights (`merge_and_unload`), or remove its files")
    described, weights = read_json(folder / MODEL_FILE), weight_names(os.listdir(folder))
    parts: list[Any] = [described]
    for part in parts:
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            parts += [value] if isinstance(value, (dict, list)) else []
            limit = next((most for name, most in _BUILT if name.search(str(key))), None)
            if limit and isinstance(value, (int, float)) and value > limit:
                raise UserError(f"{folder / MODEL_FILE}: {shorten(str(key))} is {value:g}; no model"
                                f" has over {limit}: the file is damaged, fetch it again")
    # Others than those that were hashed, perhaps in another folder.
    named = {str(described.get("transformers_weights") or (weights or [""])[0])}
    if (folder / _INDEX).is_file() and "model.safetensors" not in weights:
        named |= set(map(str, dict(read_json(folder / _INDEX).get("weight_map") or {}).values()))
    if strange := sorted(named.difference(weights, [""])):
        raise UserError(f"{folder}: its files name '{shorten(strange[0])}' for weights, which is "
                        "none of its weight files; fetch it again")
    return described


def _rehearse(kind: Any, folder: Path, options: dict[str, Any]) -> None:
    """Load without values, in a tenth of the time, to see whether the files fit each other."""
    options = {k: v for k, v in options.items() if k != "quantization_config"}
    _, found = kind.from_pretrained(folder, device_map="meta", output_loading_info=True,
                                    ignore_mismatched_sizes=True, **options)
    # transformers draws what is missing at random, and says so among warnings.
    if "key_mapping" in options or kind is not AutoModelForCausalLM:
        found["unexpected_keys"] = []  # of a part that is left out
    # Masks that GPT-Neo, GPT-J and CodeGen once kept among their weights.
    found["unexpected_keys"] = [key for key in found["unexpected_keys"] if not re.search(
        r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$", key)]
    for keys, fault in (("missing_keys", "lack"), ("mismatched_keys", "have another shape of"),
                        ("unexpected_keys", "have, beyond what fits,")):
        if wrong := sorted(map(str, found[keys])):
            raise UserError(f"{folder}: its weight files {fault} {len(wrong)} tensors of the model "
                            f"of config.json, {shorten(wrong[0], 80)} first; fetch all of it again")
