"""Prediction files that are neither lost nor decoded twice.

`best-dev.jsonl` holds the rows of the last evaluation, `best-dev.meta.json` what they were decoded with. Predictions
decoded otherwise before stay, as `best-dev.<hash>.jsonl`, and come back when they are asked for again. While decoding,
finished batches are appended to `best-dev.<hash>.partial`, from which an interrupted evaluation goes on.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unislu_llm.errors import UserError
from unislu_llm.training.state import append_json, write_text

Row = dict[str, Any]


class PredictionFile:
    """Predictions of one model on one set of samples, decoded in one way.

    Args:
        path: `<folder>/<stem>.jsonl`.
        key: everything that decides what the rows are, as plain data.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.partial = path.with_name(f"{path.stem}.{self.key[:8]}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: predictions cannot be written there ({error.strerror})") from error

    def finished(self) -> tuple[list[Row], dict[str, Any]] | None:
        """Rows and meta of a complete decoding with this key, put in place as `path`; None when there is none."""
        pattern = f"{glob.escape(str(self.path.with_suffix('')))}.{'[0-9a-f]' * 8}.jsonl"
        newest_first = sorted(map(Path, glob.glob(pattern)), key=lambda file: -file.stat().st_mtime_ns)
        for file in [self.path, *newest_first]:
            meta = self._meta(file)
            if meta is None or meta.get("key") != self.key:
                continue
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != meta.get("rows_sha256"):
                continue  # changed by hand, or a kill came between the two files
            if file != self.path:
                self._archive()
                file.replace(self.path)
                _meta_file(file).replace(_meta_file(self.path))
            return [json.loads(line) for line in content.decode("utf-8").split("\n") if line], meta
        return None

    def resume(self) -> tuple[dict[str, Row], float]:
        """Rows of an interrupted decoding by sample key, and the seconds they took."""
        rows: dict[str, Row] = {}
        seconds, whole = 0.0, []
        try:
            lines = self.partial.read_text(encoding="utf-8", errors="replace").split("\n")  # rows may hold U+2028
        except FileNotFoundError:
            return {}, 0.0
        for line in filter(None, lines):
            try:
                batch = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill
                break
            whole.append(line + "\n")
            rows |= {row_key(row): row for row in batch["rows"]}
            seconds += batch["seconds"]
        write_text(self.partial, "".join(whole))
        return rows, seconds

    def append(self, rows: Sequence[Row], seconds: float) -> None:
        """Keep the rows of a finished batch and the time they took."""
        append_json(self.partial, {"seconds": seconds, "rows": list(rows)})

    def restart(self) -> None:
        """Forget what an interrupted decoding left."""
        self.partial.unlink(missing_ok=True)

    def finish(self, rows: Sequence[Row], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Write all rows and `meta`; what lay there is kept under another name. Returns the meta as written."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self._archive(unless=digest)
        write_text(self.path, text)
        about = {"key": self.key, "rows_sha256": digest, **meta}
        write_text(_meta_file(self.path), json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        self.restart()
        return about

    def _meta(self, file: Path) -> dict[str, Any] | None:
        try:
            meta = json.loads(_meta_file(file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return meta if isinstance(meta, dict) and file.is_file() else None

    def _archive(self, unless: str = "") -> None:
        """Put what lies at `path` under a name of its own; not when it is ours already, with the hash `unless`."""
        if not self.path.is_file():
            return
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        key = (self._meta(self.path) or {}).get("key", "")
        if (key, digest) == (self.key, unless):
            return
        name = hashlib.sha256(f"{key} {digest}".encode()).hexdigest()[:8]
        old = self.path.with_name(f"{self.path.stem}.{name}.jsonl")
        self.path.replace(old)
        if _meta_file(self.path).is_file():
            _meta_file(self.path).replace(_meta_file(old))


def row_key(row: Mapping[str, Any]) -> str:
    """Key of the sample that a prediction row answers, as `Sample.key`."""
    return f"{row['corpus']}/{row['id']}#{row['task']}"


def _meta_file(file: Path) -> Path:
    return file.with_suffix(".meta.json")
