"""Which preset (`adapters/*.yaml`) is an LLM's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unislu_llm.errors import UserError
from unislu_llm.io import MODEL_FILE, is_hub_name, read_json


def preset_of(llm: str, presets: Mapping[Path, Mapping[str, Any]]) -> Path | None:
    """The preset of an LLM among `presets`, their values by file: by its name, however it is
    spelled, else by its `config.json`."""
    def plain(name: str) -> str:
        return name.partition("@")[0].rstrip("/").lower()

    named = [path for path, values in presets.items() if plain(values.get("llm", "")) == plain(llm)]
    if named:
        return named[0]
    place: Path | str | None = Path(llm).expanduser() / MODEL_FILE
    if not Path(llm).expanduser().is_dir():
        if not is_hub_name(llm):
            return None
        from huggingface_hub import try_to_load_from_cache

        name, _, revision = llm.partition("@")
        found = try_to_load_from_cache(name, MODEL_FILE, revision=revision or None)
        place = found if isinstance(found, str) else None
    try:
        config = read_json(place) if place else {}
    except UserError:  # said where the checkpoint is read
        return None
    config = config.get("text_config") or config
    return next((path for path, values in presets.items() if values.get("config") and all(
        config.get(key) == value for key, value in values["config"].items())), None)
