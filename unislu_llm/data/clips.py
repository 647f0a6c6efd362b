"""Audio that comes inside of rows: bytes to files, undecoded."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import soundfile

from unislu_llm.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
"""Audio files that are looked for by id, in this order."""


def find_clip(folder: Path, name: str) -> Path:
    """File of an id in a folder: the first of :data:`SUFFIXES` that exists, else the WAV that is missing."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), folder / f"{name}.wav")


def save_clip(audio: Any, folder: Path, name: str, where: str) -> Path | None:
    """File of an undecoded audio field `{"bytes", "path"}` of the hub: its own file, or its bytes under `folder`.

    Bytes are written as they are (nothing is encoded again), whole or not at all, once: a later call finds the file.
    A field without bytes gives its path, whether there is such a file or not. None where the field is empty.

    Raises:
        UserError: the audio is decoded already.
    """
    if audio is None:
        return None
    if not isinstance(audio, Mapping) or not {"bytes", "path"} & set(audio):
        raise UserError(f"{where}: audio is decoded already; load with `cast_column('audio', Audio(decode=False))`")
    data, path = audio.get("bytes"), audio.get("path")
    if data is None:
        return Path(path) if path else None
    target = folder / (re.sub(r"[^A-Za-z0-9._-]+", "-", name) + _suffix(data, str(path or "")))
    if not (target.is_file() and target.stat().st_size == len(data)):
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.write_bytes(data)
        partial.replace(target)
    return target


def _suffix(data: bytes, path: str) -> str:
    try:
        kind = str(soundfile.info(io.BytesIO(data)).format).lower()
    except soundfile.LibsndfileError:  # unreadable: the one who measures it says so
        return Path(path).suffix or ".bin"
    return {"mpeg": ".mp3"}.get(kind, f".{kind}")
