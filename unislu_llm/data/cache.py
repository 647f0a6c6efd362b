"""Encoder frames on disk: a frozen encoder hears every clip once, whatever the number of epochs, processes and runs.

A folder holds one set of entries for each encoder and front end (`key`), and an entry is found by what the audio file *contains*
and the crop. So nothing stale can be read: other weights, settings, crops or file contents have other names. See `docs/cache.md`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unislu_llm.data import audio
from unislu_llm.data.shards import DATA, JsonLines, Shards
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.utterance import Utterance

CacheDtype = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FORMAT = 1  # of the files
FRONT_END = 1  # raise it when audio.py or encoder.py give other frames for the same file: old entries are then not found

log = logging.getLogger(__name__)

_FILES = "files"  # subfolder: contents of audio files by path, so that they are not hashed every time
_KEY_FILE = "key.json"
_SETTLED = 2_000_000_000  # ns: a file changed later than this before it was hashed may change again within the same time stamp


@dataclass(frozen=True)
class AudioKey:
    """Name of a stretch of audio, by content.

    Args:
        name: of the entry: SHA-256 of the file's bytes and of the crop.
        path, stamp, content: the file, what told that it has not changed, and SHA-256 of its bytes.
    """

    name: str
    path: str
    stamp: tuple[int, ...]
    content: str


@dataclass(frozen=True)
class Clip:
    """Audio of one sample: its frames where the cache has them, else its samples.

    Args:
        n_mel: valid mel frames (100 Hz).
        frames: `(T_enc, D)` at 50 Hz as stored; with `pad_to_30s` all 1,500. None: not in the cache.
        wave: `(S,)` at 16 kHz, where there are no frames. key: name to store them under; None: do not.
    """

    n_mel: int
    frames: Tensor | None = None
    wave: Tensor | None = None
    key: AudioKey | None = None


def cache_key(settings: Mapping[str, Any]) -> str:
    """Name of an encoder with its front end: SHA-256 of its settings, weights among them, and of this code's version."""
    fixed = {"format": FORMAT, "front_end": FRONT_END, "sample_rate": audio.SAMPLE_RATE, "n_fft": audio.N_FFT, "hop": audio.HOP,
             "min_samples": audio.MIN_SAMPLES}
    return hashlib.sha256(json.dumps(fixed | dict(settings), sort_keys=True).encode()).hexdigest()


class _FileHashes:
    """SHA-256 of files' bytes, remembered for as long as inode, size and times of the file stay the same."""

    def __init__(self, folder: Path) -> None:
        self._lines = JsonLines(folder)
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}
        self._stored: set[tuple[str, tuple[int, ...]]] = set()
        self.refresh()

    def refresh(self) -> None:
        for _, row in self._lines.new():
            try:
                path, stamp, content = str(row["path"]), tuple(int(v) for v in row["stamp"]), str(row["sha256"])
            except (KeyError, TypeError, ValueError):
                continue
            self._known[path] = (stamp, content)
            self._stored.add((path, stamp))

    def of(self, path: Path) -> tuple[str, tuple[int, ...], str]:
        """Absolute path, stamp and SHA-256. Raises OSError: it cannot be read."""
        name = os.path.abspath(path)
        stamp = file_stamp(path)
        known = self._known.get(name)
        if known is not None and known[0] == stamp:
            return name, *known
        with open(path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        if _settled(stamp):
            self._known[name] = (stamp, content)
        return name, stamp, content

    def store(self, keys: Sequence[AudioKey]) -> None:
        new = {(k.path, k.stamp): k for k in keys if (k.path, k.stamp) not in self._stored and _settled(k.stamp)}
        self._lines.append({"path": k.path, "stamp": k.stamp, "sha256": k.content} for k in new.values())
        self._stored |= new.keys()


def file_stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does: inode, size, and times of contents and of status (which nobody can set back)."""
    s = os.stat(path)
    return s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _settled(stamp: tuple[int, ...]) -> bool:
    return time.time_ns() - max(stamp[2:]) > _SETTLED


class FrameCache:
    """Frames of one encoder, by the content of the audio. Any number of processes may read and write at once.

    Args:
        folder: of this and other encoders' frames; made by the first :meth:`put`.
        settings: what the frames follow from besides the audio: see :func:`unislu_llm.models.frames.encoder_settings`.
        dtype: frames are stored in fp16, bf16 or fp32.
        max_gib: bound for the whole folder, other encoders' frames included; beyond it nothing is added.

    Attributes:
        dim: size of a frame.

    Raises:
        UserError: `folder` is a file, unknown dtype, or no room.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], dtype: CacheDtype = "fp16",
                 max_gib: float = 20.0) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"data.encoder_cache: {self.folder} is a file; give a folder")
        if dtype not in DTYPES:
            raise UserError(f"data.cache_dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        if not max_gib > 0:
            raise UserError(f"data.cache_gib: must be above 0, found {max_gib:g}")
        self.settings = dict(settings) | {"dtype": dtype}
        self.key = cache_key({name: value for name, value in self.settings.items() if name != "encoder"})
        self.dtype, self.dim, self.max_gib = DTYPES[dtype], int(settings["dim"]), max_gib
        self._shards = Shards(self.folder / self.key[:16])
        self._files = _FileHashes(self.folder / _FILES)
        self._full = False

    def __len__(self) -> int:
        return len(self._shards)

    def refresh(self) -> None:
        """Learn what other processes have stored since."""
        self._shards.refresh()
        self._files.refresh()

    def audio_key(self, utterance: Utterance) -> AudioKey | None:
        """Name of an utterance's audio; None where it has no file that can be read."""
        if utterance.audio is None:
            return None
        try:
            path, stamp, content = self._files.of(utterance.audio)
        except OSError:  # who decodes it says what is wrong
            return None
        crop = json.dumps([float(utterance.start), None if utterance.end is None else float(utterance.end)])
        return AudioKey(hashlib.sha256(f"{content} {crop}".encode()).hexdigest()[:40], path, stamp, content)

    def __contains__(self, key: AudioKey) -> bool:
        return key.name in self._shards

    def get(self, utterance: Utterance) -> Tensor | None:
        """Valid frames `(T_enc, D)` of an utterance at 50 Hz, in the stored dtype; None where they are not there."""
        clip = self.clip(utterance)
        return None if clip is None or clip.frames is None else clip.frames[:audio.encoder_length(clip.n_mel)]

    def clip(self, utterance: Utterance, key: AudioKey | None = None) -> Clip | None:
        """As :meth:`get`, with everything that was stored; `key` saves looking at the file again."""
        key = key or self.audio_key(utterance)
        found = None if key is None else self._shards.read(key.name)
        if found is None:
            return None
        data, meta = found
        return Clip(int(meta["mel"]), torch.from_numpy(data).view(self.dtype).reshape(-1, self.dim), key=key)

    def put(self, clips: Sequence[Clip]) -> None:
        """Store frames of clips that have a key and are not there yet. A folder that is full or cannot be written warns once.

        Raises:
            UserError: frames that the storage dtype cannot hold.
        """
        new = {c.key.name: c for c in clips if c.key is not None and c.frames is not None and c.key not in self}
        items: list[tuple[str, bytes, Mapping[str, Any]]] = []
        for name, clip in new.items():
            assert clip.frames is not None
            frames = self.stored(clip.frames).cpu().contiguous()
            if not bool(torch.isfinite(frames).all()):
                raise UserError("encoder frames are not finite (or too large for fp16: then use data.cache_dtype bf16)")
            items.append((name, frames.view(torch.uint8).numpy().tobytes(), {"mel": clip.n_mel}))
        if self._full:
            return
        size = sum(len(data) for _, data, _ in items)
        if items and folder_bytes(self.folder) + size > self.max_gib * 2**30:
            self._stop(f"is full ({self.max_gib:g} GiB); raise --data.cache-gib, or make room with `unislu cache clear`")
            return
        try:
            if items:
                self._describe()
            self._shards.append(items)
            self._files.store([c.key for c in clips if c.key is not None])
        except OSError as error:
            self._stop(f"cannot be written ({error.strerror or error})")

    def stored(self, frames: Tensor) -> Tensor:
        """Frames rounded as storing rounds them."""
        return frames.detach().to(self.dtype)

    @property
    def full(self) -> bool:
        """Whether storing has stopped."""
        return self._full

    def _stop(self, why: str) -> None:
        self._full = True
        log.warning("encoder cache %s %s; frames that it lacks are computed each time", self.folder, why)

    def _describe(self) -> None:
        path = self.folder / self.key[:16] / _KEY_FILE
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{_KEY_FILE}.{os.getpid()}")
            temporary.write_text(json.dumps(self.settings | {"key": self.key}, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)

    def seconds(self) -> float:
        """Seconds of audio that have entries."""
        return sum(int(r.meta["mel"]) for r in self._shards.records()) / audio.MEL_RATE


class FrameDataset(Dataset[tuple[Sample, Tensor]]):
    """Samples with their frames, for stages that train without the encoder: item i is `(sample, frames (T_enc, D))`.

    Raises:
        UserError: on access, when the cache lacks them.
    """

    def __init__(self, samples: Sequence[Sample], cache: FrameCache) -> None:
        self.samples, self.cache = list(samples), cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, Tensor]:
        sample = self.samples[index]
        frames = self.cache.get(sample.utterance)
        if frames is None:
            u = sample.utterance
            raise UserError(f"{u.source or u.id}: the encoder cache {self.cache.folder} lacks its frames; "
                            "store them with `unislu cache build`")
        return sample, frames


def load_clip(cache: FrameCache, utterance: Utterance, max_seconds: float) -> Clip:
    """Frames of an utterance, or else its samples and the name to store frames under.

    Raises:
        UserError: as :func:`unislu_llm.data.audio.load`.
    """
    key = cache.audio_key(utterance)
    found = None if key is None else cache.clip(utterance, key)
    if found is not None and found.n_mel <= audio.MEL_RATE * max_seconds + 1:
        return found
    assert utterance.audio is not None
    wave = audio.load(utterance.audio, utterance.start, utterance.end, max_seconds=max_seconds)
    if key is not None and file_stamp(utterance.audio) != key.stamp:  # changed between hashing and reading
        key = None
    return Clip(audio.mel_length(len(wave)), wave=wave, key=key)


def folder_bytes(folder: Path) -> int:
    """Bytes of frames in a cache folder, over all encoders."""
    return sum(path.stat().st_size for path in folder.glob(f"*/*{DATA}"))


def describe_folder(folder: Path) -> list[dict[str, Any]]:
    """One row for each encoder in a cache folder: its settings with `folder`, `clips`, `hours`, `gib` and `writers`.

    Raises:
        UserError: it is no cache folder.
    """
    keys = sorted(folder.glob(f"*/{_KEY_FILE}"))
    if not keys:
        raise UserError(f"{folder}: is no encoder cache; give the folder of data.encoder_cache")
    rows: list[dict[str, Any]] = []
    for path in keys:
        records = Shards(path.parent).records()
        files = list(path.parent.glob(f"*{DATA}"))
        rows.append(json.loads(path.read_text(encoding="utf-8")) | {
            "folder": path.parent.name, "clips": len(records), "writers": len(files),
            "hours": sum(int(r.meta["mel"]) for r in records) / audio.MEL_RATE / 3600,
            "gib": sum(f.stat().st_size for f in files) / 2**30})
    return rows


def clear_folder(folder: Path, only: str = "") -> int:
    """Delete the frames of one encoder (the start of its key) or of all; returns the bytes freed. Running readers keep theirs.

    Raises:
        UserError: it is no cache folder, or has no such key.
    """
    rows = [row for row in describe_folder(folder) if row["folder"].startswith(only)]
    if not rows:
        raise UserError(f"{folder}: has no key that starts with '{only}'; list them with `unislu cache info`")
    before = folder_bytes(folder)
    doomed = [folder / row["folder"] for row in rows] + ([folder / _FILES] if not only else [])
    for part in doomed:
        for path in part.glob("*"):  # its own files and nothing else
            if path.suffix in (DATA, ".jsonl") or path.name == _KEY_FILE:
                path.unlink(missing_ok=True)
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()
    return before - folder_bytes(folder)


__all__ = ["AudioKey", "CacheDtype", "Clip", "FrameCache", "FrameDataset", "cache_key", "clear_folder", "describe_folder",
           "folder_bytes", "load_clip"]
