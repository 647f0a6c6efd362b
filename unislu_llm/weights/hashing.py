"""Which files are a checkpoint's weights, and their hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from unislu_llm.errors import UserError
from unislu_llm.io import read_json, write_json

_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-(\d+)\.(safetensors|bin)")
CHUNK = 1 << 20
"""Bytes read at a time."""


def cache_dir() -> Path:
    """Folder of converted checkpoints and known hashes: `UNISLU_CACHE`, else in `~/.cache`."""
    configured = os.environ.get("UNISLU_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "unislu_llm"


def weight_names(names: Iterable[str]) -> list[str]:
    """The weight files that transformers would load, sorted; empty where there are none.

    One set only, and only with all of its shards: repositories also hold the same weights in other
    formats and precisions.
    """
    present = set(names)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{suffix}" in present:
            return [f"{stem}.{suffix}"]
        shards = [m for name in sorted(present)
                  if (m := _SHARD.fullmatch(name)) and (m[1], m[3]) == (stem, suffix)]
        if shards:
            return [m[0] for m in shards] if len(shards) == int(shards[0][2]) else []
        others = sorted(n for n in present if n.endswith(".safetensors") and "/" not in n)
        if suffix == "safetensors" and others:
            return others
    return []


def weights_hash(folder: Path) -> str:
    """SHA-256 over the content of a folder's weight files, in the order of their names.

    It is remembered for as long as names, sizes and modification times stay the same: gigabytes
    need not be read again at each start.

    Raises:
        UserError: the folder has no weights.
    """
    folder = folder.resolve()
    names = weight_names(f.name for f in folder.iterdir()) if folder.is_dir() else []
    if not names:
        raise UserError(f"{folder}: no weights there (model.safetensors, or all of its shards)")
    files = [folder / name for name in names]
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
    memo = cache_dir() / "hashes" / f"{key}.json"
    with contextlib.suppress(UserError):
        known = read_json(memo)
        if known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
        write_json(memo, {"stamp": stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()
