"""Append-only records on disk that many processes read by memory map and write at the same time, without locks.

Every writer has two files of its own: `<writer>.bin`, the records' bytes one after the other, and `<writer>.jsonl`, a line for
each record with its name, offset, size and checksum, written after the bytes. Readers merge all index files of a folder. So no
writer touches the files of another, and one that is killed leaves at most bytes without a line or a torn last
line: both are passed over.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DATA, INDEX = ".bin", ".jsonl"


@dataclass(frozen=True)
class Record:
    """Where a record is: `shard` is the writer's name, `meta` what its line says beyond that."""

    shard: str
    offset: int
    size: int
    crc: int
    meta: Mapping[str, Any] = field(default_factory=dict)


class JsonLines:
    """Lines of all `*.jsonl` files of a folder as they grow, and one file of this process to append to.

    Args:
        folder: need not exist; it is made by the first append.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, int] = {}  # bytes of each file that were handed out
        self._writer: tuple[int, str] | None = None

    def new(self) -> list[tuple[str, Any]]:
        """`(file stem, parsed line)` of what came since the last call; a last line without its end is left for later."""
        found: list[tuple[str, Any]] = []
        try:
            entries = sorted((e.name, e.stat().st_size) for e in os.scandir(self.folder) if e.name.endswith(INDEX))
        except FileNotFoundError:
            return found
        for name, size in entries:
            stem, seen = name.removesuffix(INDEX), self._read.get(name, 0)
            if size <= seen:
                continue
            try:
                with (self.folder / name).open("rb") as stream:
                    stream.seek(seen)
                    block = stream.read()
            except FileNotFoundError:  # cleared meanwhile
                continue
            whole = block.rfind(b"\n") + 1
            self._read[name] = seen + whole
            found += [(stem, row) for line in block[:whole].splitlines() if (row := _parsed(line)) is not None]
        return found

    @property
    def writer(self) -> str:
        """Stem of this process's own files; a forked child has another."""
        if self._writer is None or self._writer[0] != os.getpid():
            self._writer = (os.getpid(), f"{os.getpid()}-{uuid.uuid4().hex[:12]}")
        return self._writer[1]

    def append(self, rows: Iterable[Any]) -> None:
        """Write rows in one piece. Raises OSError: the folder cannot be written, or the disk is full."""
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        if text:
            append_bytes(self.folder / f"{self.writer}{INDEX}", text.encode())


def append_bytes(path: Path, data: bytes) -> int:
    """Append to a file that this process alone writes; returns where. What a failed write left is cut off again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as stream:
        start = stream.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) or 0:]
        except OSError:
            stream.truncate(start)
            raise
    return start


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Shards:
    """Named records of a folder.

    Args:
        folder: need not exist; it is made by the first :meth:`append`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = JsonLines(folder)
        self._records: dict[str, list[Record]] = {}
        self._maps: dict[str, np.ndarray] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # loader processes map the files themselves

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def records(self) -> list[Record]:
        """One record of every name."""
        return [found[0] for found in self._records.values()]

    def refresh(self) -> None:
        """Learn what other processes have written since."""
        for shard, row in self._lines.new():
            self._add(shard, row)

    def _add(self, shard: str, row: Any) -> None:
        try:
            record = Record(shard, int(row["offset"]), int(row["size"]), int(row["crc"]), row.get("meta", {}))
            places = self._records.setdefault(str(row["name"]), [])
        except (KeyError, TypeError, ValueError):
            return
        if record not in places:
            places.append(record)

    def read(self, name: str) -> tuple[np.ndarray, Mapping[str, Any]] | None:
        """Bytes of a record as a new `(size,)` uint8 array, and its meta; None where it is not there or damaged."""
        places = self._records.get(name, [])
        while places:
            record = places[0]
            data = self._bytes(record)
            if data is not None and zlib.crc32(data.data) == record.crc:
                return data, record.meta
            places.pop(0)  # its file was cleared, cut or damaged; another writer may have it too
        self._records.pop(name, None)
        return None

    def _bytes(self, record: Record) -> np.ndarray | None:
        end = record.offset + record.size
        mapped = self._maps.get(record.shard)
        if mapped is None or len(mapped) < end:  # the file has grown since it was mapped
            try:
                mapped = np.memmap(self.folder / f"{record.shard}{DATA}", dtype=np.uint8, mode="r")
            except (OSError, ValueError):  # ValueError: it is empty
                return None
            self._maps[record.shard] = mapped
        return np.array(mapped[record.offset:end]) if len(mapped) >= end else None

    def append(self, items: Sequence[tuple[str, bytes, Mapping[str, Any]]]) -> None:
        """Write `(name, bytes, meta)` records; readable at once here, after a refresh elsewhere.

        Raises:
            OSError: the folder cannot be written, or the disk is full; nothing is stored then.
        """
        if not items:
            return
        writer = self._lines.writer
        offset = append_bytes(self.folder / f"{writer}{DATA}", b"".join(data for _, data, _ in items))
        rows: list[dict[str, Any]] = []
        for name, data, meta in items:
            rows.append({"name": name, "offset": offset, "size": len(data), "crc": zlib.crc32(data), "meta": dict(meta)})
            offset += len(data)
        self._lines.append(rows)
        for row in rows:
            self._add(writer, row)
