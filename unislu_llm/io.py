"""Files: written whole or not at all, hashed, and recognised."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from unislu_llm.errors import UserError, hint
from unislu_llm.text_files import read_text

WEIGHTS_FILE = "model.safetensors"
MODEL_FILE = "config.json"
RATES_FILE = "simulation.json"
"""Files of a saved model: what was trained, what it was trained on, the rates of text injection."""
MODEL_TYPES = ("speech_llm", "whisper_slu")
"""What a saved model may be; `models.KINDS` has their classes."""
BEST, LAST = "best", "last"
"""Folders of a run's checkpoints, which are saved models."""


def git_revision() -> str:
    """Commit of the checkout that runs, `+dirty` where files have changed; empty if it is none."""
    root = Path(__file__).resolve().parents[1]
    # An installed package may lie inside a checkout of something else, whose commit says nothing.
    if not (root / ".git").exists():
        return ""
    # Tags are excluded, for they are no commits.
    git = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40",
           "--dirty=+dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextlib.contextmanager
def atomic(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name when the block ends well, and not at all otherwise.

    Its folder is made where it is missing. Text is UTF-8 with `\\n` line ends.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a disk may give two processes one number.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(partial, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())  # a rename may reach the disk before the contents do
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as handle:
        handle.write(text)


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object; a file that is missing or anything else is a `UserError`."""
    try:
        value = json.loads(read_text(path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of :func:`numbered_json_lines` alone."""
    return [row for _, row in numbered_json_lines(path)]


def numbered_json_lines(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with the number of its line.

    Raises UserError: the file is missing, or a line is no JSON object; file and line are named.
    """
    rows = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, found "
                                    f"{type(row).__name__}")
                rows.append((number, row))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no file of JSON lines: not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not JSON ({getattr(error, 'msg', 'too deep')}); write "
                        "one object a line") from error
    return rows


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal; one that cannot be read is a `UserError`."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def swap_folder(new: Path, final: Path) -> None:
    """Put a freshly written folder in the place of another; a kill in between loses neither."""
    old = final.with_name(final.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        # No system exchanges two folders at once. From here to the next rename `final` is missing
        # and `<final>.old` is the last whole one: restore_folder puts it back.
        final.rename(old)
    new.rename(final)
    if old.exists():
        shutil.rmtree(old)


def restore_folder(final: Path) -> None:
    """Finish what a kill inside :func:`swap_folder` left half done."""
    old = final.with_name(final.name + ".old")
    if old.is_dir() and not final.exists():
        old.rename(final)


def is_saved_model(folder: str | Path) -> bool:
    """Whether a folder holds a model that :meth:`SLUModel.save_pretrained` wrote."""
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        return False
    try:
        return read_json(folder / MODEL_FILE).get("model_type") in MODEL_TYPES
    except UserError:
        return False


def find_model(folder: str | Path) -> Path | None:
    """The folder itself, or a run's best, else its last: the first that is a saved model."""
    folder = Path(folder)
    return next((p for p in (folder, folder / BEST, folder / LAST) if is_saved_model(p)), None)


def near_models(path: str | Path) -> str:
    """The end of a message: the nearest name of a model on this machine, or nothing."""
    places = (Path(path).parent, Path("."), Path("runs"), Path("adapters"))
    return hint(path, (str(p) for place in places if place.is_dir() for p in sorted(place.iterdir())
                       if find_model(p)))


def is_hub_name(text: str, folder: str | Path = ".") -> bool:
    """Whether a model that is not there, seen from a folder, may be one of the Hugging Face hub:
    `user/model`, or `user/model@revision`."""
    # A mistyped `runs/mine` should be asked of nobody: the name may be somebody's by chance.
    return (re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", text) is not None
            and not (Path(folder) / text.partition("/")[0]).exists())


def printable(text: str) -> str:
    """A text as a terminal may show it."""
    # Byte-level models can emit any character, and some of them steer a terminal.
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def portable(path: str | Path) -> str:
    """A path as results store it: relative to the current folder, or its last two parts."""
    # Results are shared, and the way to a folder says more of a machine than of a result.
    full, here = Path(os.path.abspath(path)), Path.cwd()
    if full.is_relative_to(here):
        return full.relative_to(here).as_posix()
    return Path(*full.parts[-2:]).as_posix() if len(full.parts) > 2 else full.name
