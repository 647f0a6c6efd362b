"""Folders of base checkpoints to models and tokenizers of transformers, trusting none of them.

A checkpoint may come from anybody. No code of it runs (`auto_map`, `custom_generate`, pickles), it
names no other checkpoint, and what its `config.json` asks for is compared with what its weight
files hold before memory is taken.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import dynamic_module_utils
from transformers.integrations import is_deepspeed_zero3_enabled

from unislu_llm.errors import UserError, shorten
from unislu_llm.io import MODEL_FILE, read_json
from unislu_llm.weights.resolve import weight_names

# Numbers of what is built one by one, which takes memory before any weight is read, and the most
# that is believed; the largest models have 126 layers and 512 experts.
_BUILT = ((re.compile(r"(layer|depth|block|stage)s?$"), 1 << 10),
          (re.compile(r"label|expert"), 1 << 16))
_SIDE_FILE = 1 << 28  # bytes of a file beside the weights; tokenizers have up to 40 MB
_BUFFERS = 1 << 27  # values that a model computes and no file holds, such as masks
_INDEX = "model.safetensors.index.json"

# Classes of transformers that load others pass the argument below to none of them, and those would
# ask on the terminal. Without a time to answer in they refuse.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder, **options)` for a class of transformers.

    Raises:
        UserError: the folder needs code of its own, or its files are damaged, do not fit each
            other, or ask for more than is there.
    """
    description, safe = _checked(folder), {"trust_remote_code": False}
    try:
        if "Tokenizer" not in kind.__name__:
            # Of pickled weights, in old checkpoints, torch reads the tensors and calls nothing.
            safe["weights_only"] = True
            if "quantization_config" not in description and not is_deepspeed_zero3_enabled():
                _rehearse(kind, folder, options | safe)
        return kind.from_pretrained(folder, **options, **safe)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers has no class of its own for what it cannot read
        said = str(error)
        if "custom code" in said or "trust_remote_code" in said:
            raise UserError(f"{folder} needs code of its own ({_auto_map(folder)}); unislu_llm "
                            "runs no foreign code; take a model that transformers itself has"
                            ) from error
        raise UserError(f"{folder} cannot be loaded as {kind.__name__}: "
                        f"{shorten(' '.join(said.split()), 400) or type(error).__name__}"
                        ) from error


def _checked(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, which was looked at before transformers acts by it."""
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt", ".model", ".jinja") and (
                not file.is_file() or file.stat().st_size > _SIDE_FILE):
            raise UserError(f"{file} is no file, or over {_SIDE_FILE >> 20} MB; fetch it again")
    # PEFT would import modules that it names, and its weights would change what was hashed.
    if (file := folder / "adapter_config.json").exists():
        raise UserError(f"{file}: the folder holds an adapter of PEFT; merge it into the weights "
                        "(`merge_and_unload`), or remove its files")
    path, weights = folder / MODEL_FILE, weight_names(os.listdir(folder))
    description = read_json(path)
    _check_counts(path, description)
    # Other files than those that were hashed, or in another folder.
    named = {str(description.get("transformers_weights") or weights[0])} if weights else set()
    if (folder / _INDEX).is_file() and _INDEX.replace(".index.json", "") not in weights:
        index = read_json(folder / _INDEX).get("weight_map")
        named |= set(map(str, index.values())) if isinstance(index, dict) else {"no weight_map"}
    if strange := sorted(named - set(weights)):
        raise UserError(f"{folder}: its files name '{shorten(strange[0])}' for weights, which is "
                        "none of its weight files; fetch it again")
    return description


def _check_counts(path: Path, description: dict[str, Any]) -> None:
    parts: list[Any] = [description]
    while parts:
        part = parts.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, (dict, list)):
                parts.append(value)
            limit = next((most for name, most in _BUILT if name.search(str(key))), None)
            if limit and isinstance(value, (int, float)) and value > limit:
                raise UserError(f"{path}: {shorten(str(key))} is {value}; no model has over "
                                f"{limit}: the file is damaged, fetch it again")


def _rehearse(kind: Any, folder: Path, options: dict[str, Any]) -> None:
    """Load without values, in a fraction of the time, to see whether the files fit each other."""
    options = {k: v for k, v in options.items() if k != "quantization_config"}
    model, found = kind.from_pretrained(folder, device_map="meta", output_loading_info=True,
                                        **options)
    # transformers draws these at random, and says so among warnings.
    for keys, fault in (("missing_keys", "lack"), ("mismatched_keys", "have another shape of")):
        if wrong := sorted(map(str, found[keys])):
            raise UserError(f"{folder}: its weight files {fault} {len(wrong)} tensors of the model "
                            f"that config.json describes, {shorten(wrong[0], 80)} first; fetch it "
                            "again, or take a checkpoint of a whole model")
    asked = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    there = sum((folder / name).stat().st_size for name in weight_names(os.listdir(folder)))
    # Eight values a byte would be weights of one bit.
    if asked > 8 * there + _BUFFERS:
        raise UserError(f"{folder}: config.json describes a model of {asked:.1e} values, and its "
                        f"weight files have {there:,} bytes; fetch it again")


def _auto_map(folder: Path) -> str:
    """The files that ask for code."""
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".json")
             and "auto_map" in read_json(folder / name)]
    return f"auto_map in {', '.join(names)}" if names else "a file of Python"
