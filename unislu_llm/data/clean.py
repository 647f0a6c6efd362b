"""Cleaned copies of manifests, and the list of what was left out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from unislu_llm.data.checks import Checked
from unislu_llm.data.manifest import relative
from unislu_llm.data.rows import resolve
from unislu_llm.errors import UserError

_AUDIO = re.compile(r'("audio"\s*:\s*)"(?:[^"\\]|\\.)*"')


class CleanCopies:
    """Copies of manifests without the rows that have errors.

    A row that stays is written as it was, byte by byte; only the path of its audio follows where the copy is. What is left
    out goes to `<out>.left-out.jsonl`: `file`, `line`, `problems` and the `row` (its text, where it is not JSON). All files
    appear whole when :meth:`finish` is called, or not at all.

    Args:
        manifests: what will be copied. out: the copy, or for several manifests the folder of the copies.

    Raises:
        UserError: a file is already there, two manifests have one name, or the folder cannot be written.
    """

    def __init__(self, manifests: Sequence[Path], out: Path) -> None:
        self.left_out = Path(f"{out}.left-out.jsonl")
        self.kept = self.dropped = 0
        self._targets = {m: out / m.name if len(manifests) > 1 else out for m in manifests}
        if len(set(self._targets.values())) < len(manifests):
            raise UserError(f"--fix {out}: two of the manifests have the same name; fix them one by one")
        self._check()
        self._files: dict[Path, IO[bytes]] = {}
        self._stack = ExitStack()
        try:
            for target in (*self._targets.values(), self.left_out):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._files[target] = self._stack.enter_context(_partial(target).open("wb"))
        except OSError as error:
            self.discard()
            raise UserError(f"--fix {out}: cannot be written ({error})") from error

    def add(self, manifest: Path, checked: Checked) -> None:
        """Write a row to the copy, or, where it has errors, to the list."""
        if not checked.errors and checked.row.line:
            target = self._targets[manifest]
            self._files[target].write(moved(checked.row.raw, checked.row.content or {}, manifest.parent, target.parent) + b"\n")
            self.kept += 1
        elif checked.row.line:
            found = [{"field": p.field, "kind": p.kind, "message": p.message} for p in checked.errors]
            entry = {"file": str(manifest), "line": checked.row.line, "problems": found}
            self._files[self.left_out].write(_line(entry, checked.row.content, checked.row.raw) + b"\n")
            self.dropped += 1

    def finish(self, unreadable: Sequence[Path] = ()) -> None:
        """Put the files in their places; a manifest that could not be read has no copy."""
        self._stack.close()
        for manifest in unreadable:
            _partial(self._targets[manifest]).unlink(missing_ok=True)
            self._targets.pop(manifest)
        self._check()
        for target in (*self._targets.values(), self.left_out):
            _partial(target).replace(target)

    def discard(self) -> None:
        """Remove what is not finished."""
        self._stack.close()
        for target in self._files:
            _partial(target).unlink(missing_ok=True)

    def _check(self) -> None:
        for target in (*self._targets.values(), self.left_out):
            if target.exists():
                what = "is a folder; name a file" if target.is_dir() else "exists; name another, or remove it"
                raise UserError(f"--fix: {target} {what}")


def moved(raw: bytes, content: dict[str, Any], old: Path, new: Path) -> bytes:
    """A row for a manifest in folder `new` instead of `old`."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    name = content.get("audio")
    if not isinstance(name, str) or os.path.isabs(name):
        return raw
    path = relative(resolve(old, name), new)
    if path == name or new.resolve() == old.resolve():
        return raw
    changed = content | {"audio": path}
    written, count = _AUDIO.subn(lambda m: m[1] + json.dumps(path, ensure_ascii=False), raw.decode("utf-8"))
    if count != 1 or json.loads(written) != changed:  # an "audio" inside of other metadata
        written = json.dumps(changed, ensure_ascii=False)
    return written.encode("utf-8")


def _line(entry: dict[str, Any], content: dict[str, Any] | None, raw: bytes) -> bytes:
    """JSON of an entry; the row as text where JSON has no word for what it holds (NaN)."""
    for row in (content, raw.decode("utf-8", "backslashreplace")):
        if row is not None:
            try:
                return json.dumps(entry | {"row": row}, allow_nan=False).encode("ascii")
            except (ValueError, RecursionError):
                continue
    raise AssertionError("text is always JSON")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.partial")
