"""Bring the adapters that ship, once, into the format of the rebuilt library; deleted after it ran.

    python adapters/convert.py [FOLDER ...]

`config.json` gets its sections (`model`, `tasks`, `bases`, `ctc_tokens`), the card its words. The
weights stay as they are, byte for byte: no parameter changed its name or value.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from unislu_llm.config import LoraConfig, ModelConfig
from unislu_llm.io import MODEL_FILE, WEIGHTS_FILE, read_json, write_json, write_text

RENAMED = {"draft_prompt": "hypothesis_prompt", "draft_bias": "hypothesis_bias",
           "draft_checkpoint": "recogniser", "draft_language": "language"}
"""Old setting to new."""

KEPT = ("encoder", "encoder_mode", "encoder_top_layers", "pad_to_30s", "llm", "projector",
        "projector_options", "prompt_prefix", "prompt_suffix", "quantization")


def convert_config(old: dict[str, Any]) -> dict[str, Any]:
    """The new `config.json` of an old one; a setting that has no place any more must be neutral."""
    assert old["encoder_lora"] is None
    assert old["draft_style"] == "lower"
    lora = dict(old["lora"])
    assert lora.pop("dropout") == 0
    assert not lora.pop("use_rslora")
    values = {key: old[key] for key in KEPT} | {new: old[key] for key, new in RENAMED.items()}
    values["hypothesis"] = {"gold": "reference"}.get(old["draft"], old["draft"])
    if not old["use_speech"]:
        values |= {"projector": "none", "projector_options": {}}
    model = ModelConfig(**values, lora=LoraConfig(**lora))
    bases = {key: {"name": old[key], "revision": old[f"{key}_revision"],
                   "sha256": old[f"{key}_hash"]} for key in ("encoder", "llm")}
    return {"model_type": old["model_type"], "model": model.model_dump(), "tasks": old["tasks"],
            "bases": bases, "ctc_tokens": old["ctc_tokens"] if old["use_speech"] else None}


WORDS = (
    (r"from unislu_llm\.decoding\.generate import understand\nfrom unislu_llm\.models import load",
     "from unislu_llm import load, understand"),
    (r'model = load\("(?:adapters/)?([\w.-]+)"\)', r'model = load("adapters/\1")'),
    (r"unislu predict (?:adapters/)?(whisper-base--[\w.-]+)", r"unislu predict adapters/\1"),
    (r"eval/evaluate\.py (?:adapters/)?(whisper-base--[\w.-]+) --manifest test",
     r"eval/evaluate.py adapters/\1 --manifest test"),
    (r"`--model\.init (?:adapters/)?([\w.-]+)` and the model settings below",
     r"`--train.init adapters/\1` and the settings in the `model` section of `config.json`"),
    (r"a draft transcript by (`[^`]*`) stands", r"a first-pass hypothesis by \1 stands"),
    (r"The LLM reads the draft and", "The LLM reads the hypothesis and"),
    (r"\nDrafts are those of", "\nHypotheses are those of"),
    (r"heard by Whisper's frozen encoder and its draft",
     "heard by Whisper's frozen encoder and its hypothesis"),
    (r"`--long-audio windows` alone", "`--long-form` alone"),
    # What stands below is quoted from the run: commands, settings and decoding of its time.
    (r"(The run's `config\.yaml` where it differs from the defaults, paths as names)",
     r"\1, keys as that revision had them"),
)
"""Passages of the cards that speak of the library as it was."""


def convert(folder: Path) -> str:
    """Convert one folder; returns what was done."""
    old = read_json(folder / MODEL_FILE)
    if "model" in old:
        return "is converted already"
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        left = [name for name in file.keys() if name.startswith("projector.")]  # noqa: SIM118
    assert old["use_speech"] or not left, f"{folder}: a projector that nothing reads: {left[:3]}"
    card = (folder / "README.md").read_text(encoding="utf-8")
    for pattern, new in WORDS:
        card = re.sub(pattern, new, card)
    write_json(folder / MODEL_FILE, convert_config(old))
    write_text(folder / "README.md", card)
    return "converted"


def main() -> None:
    here = Path(__file__).resolve().parent
    for folder in map(Path, sys.argv[1:] or sorted(here.glob("*--*"))):
        print(f"{folder.name}: {convert(folder)}")


if __name__ == "__main__":
    main()
