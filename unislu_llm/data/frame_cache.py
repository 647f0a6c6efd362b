"""Encoder frames on disk: a frozen encoder hears every clip once, for all epochs and runs.

One file a clip, `<folder>/<encoder>/<clip>.npy`. The encoder's name follows from its weights and
front end, the clip's from what the audio file *contains* and the crop: nothing stale is read. Any
number of processes may read and write at once, at worst two compute the same clip.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unislu_llm.data import audio
from unislu_llm.errors import UserError
from unislu_llm.io import atomic, sha256
from unislu_llm.setting_types import Precision
from unislu_llm.utterance import Utterance

FORMAT = 2  # raise it when audio.py, the encoder or the files change: older entries are not found
_TAIL = struct.Struct("<II")  # after the array: valid frames, and CRC-32 of the array


class Frames(NamedTuple):
    """Encoder frames of a clip."""

    values: Tensor  # (T_enc, D) at 50 Hz, fp16 in a cache; its silence comes last
    length: int  # those of the clip itself


class FrameCache:
    """Frames of one encoder, by the content of the audio; `folder` may hold those of others too,
    and `settings` are those of :func:`encoder_settings`."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        counted = json.dumps({**settings, "format": FORMAT}, sort_keys=True)
        self.home = self.folder / hashlib.sha256(counted.encode()).hexdigest()[:16]
        self._contents: dict[tuple[Any, ...], str] = {}

    def name(self, utterance: Utterance) -> str:
        """Name of an utterance's clip; raises UserError: the audio cannot be read."""
        path, start, end = utterance.audio, float(utterance.start), utterance.end
        assert path is not None  # nobody asks for the frames of text
        try:
            s = os.stat(path)
        except OSError as error:
            raise UserError(f"{utterance.where}: field 'audio': {path} cannot be read: "
                            f"{error.strerror or error}") from error
        # Remembered while the file stays the same: epochs ask again, a recording has many crops.
        stamp = (path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        if stamp not in self._contents:
            self._contents[stamp] = sha256(path)
        crop = json.dumps([start, None if end is None else float(end)])
        return hashlib.sha256(f"{self._contents[stamp]} {crop}".encode()).hexdigest()

    def get(self, utterance: Utterance) -> Frames | None:
        """Frames of an utterance; None where they are not there, or damaged."""
        path = self.home / f"{self.name(utterance)}.npy"
        try:
            data = path.read_bytes()
            length, checksum = _TAIL.unpack(data[-_TAIL.size:])
            if zlib.crc32(data[:-4]) != checksum:
                return None
            values = np.load(io.BytesIO(data), allow_pickle=False)  # it stops where the array does
        except (OSError, EOFError, ValueError, struct.error):
            return None
        return Frames(torch.from_numpy(values), length)

    def put(self, name: str, frames: Frames) -> None:
        """Store frames under the name of their clip; raises UserError: they cannot be written."""
        # Half of fp32's space, and finer than bf16; the last layer norm leaves some tens at most.
        values = frames.values.detach().to("cpu", torch.float16).numpy()
        stream = io.BytesIO()
        np.save(stream, values, allow_pickle=False)
        data = stream.getvalue() + struct.pack("<I", frames.length)
        try:
            with atomic(self.home / f"{name}.npy", "wb") as file:
                file.write(data + struct.pack("<I", zlib.crc32(data)))
        except OSError as error:
            raise UserError(f"data.frame_cache: {self.folder} cannot be written ({error}); make "
                            "room, or give another folder") from error


def encoder_settings(encoder: Any, precision: Precision) -> dict[str, Any]:
    """What the frames of an encoder follow from besides the audio; raises UserError: it trains."""
    if any(p.requires_grad for p in encoder.parameters()):
        raise UserError("data.frame_cache: frames can be kept of a frozen encoder alone; set "
                        "model.encoder_mode frozen, or leave data.frame_cache empty")
    # The weights as they are in memory, not the checkpoint's name: a name may be a folder whose
    # contents change, and frames of bf16 weights are others.
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = encoder.whisper.config
    sizes = [config.encoder_layers, config.encoder_attention_heads, config.activation_function]
    return {"weights": digest.hexdigest(), "sizes": sizes, "n_mels": int(config.num_mel_bins),
            "silence": encoder.silence, "precision": precision}


@torch.no_grad()
def build_frames(cache: FrameCache, encoder: Any, utterances: Iterable[Utterance], *,
                 device: torch.device | str, rank: int = 0, world: int = 1, batch_size: int = 16,
                 progress: str = "") -> int:
    """Store the frames that a cache lacks, longest clips first; how many this process computed.

    The encoder, on `device`, takes log-mel `(batch, n_mels, T_mel)` and lengths to frames and
    lengths. Each process takes a share of the utterances with audio, and can be stopped at any
    time; `progress` names its bar. Raises as :func:`load_clip` and :meth:`FrameCache.put`.
    """
    unique = {(u.audio, u.start, u.end): u for u in utterances if u.audio is not None}
    # Dealt before looking what is there: by then another process may have stored some.
    share = sorted(unique.values(), key=lambda u: -u.seconds)[rank::world]
    lacking = [u for u in tqdm(share, f"{progress}: look up", unit="clip", leave=False,
                               disable=not progress) if cache.get(u) is None]
    silence, bf16 = cache.settings["silence"], cache.settings["precision"] == "bf16"
    with tqdm(total=len(lacking), desc=progress, unit="clip", disable=not progress) as bar:
        for first in range(0, len(lacking), batch_size):
            clips = lacking[first:first + batch_size]
            names = [cache.name(u) for u in clips]  # before they are read: a file may change then
            mel, lengths = audio.batch_log_mel([load_clip(u).to(device) for u in clips],
                                               cache.settings["n_mels"], silence=silence)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                frames, valid = encoder(mel, lengths)
            for name, values, n in zip(names, frames, valid, strict=True):
                # What lies beyond is the batch's padding.
                cache.put(name, Frames(values[:audio.with_silence(n, silence)], n))
            bar.update(len(clips))
    return len(lacking)


def load_clip(utterance: Utterance) -> Tensor:
    """Samples `(S,)` of an utterance at 16 kHz; raises UserError: none, unreadable or too long."""
    if utterance.audio is None:
        raise UserError(f"{utterance.where}: field 'audio': the row has no audio")
    try:
        return audio.load(utterance.audio, utterance.start, utterance.end,
                          max_seconds=audio.MAX_SECONDS, samples=utterance.samples)
    except UserError as error:
        if not utterance.source:  # of no manifest
            raise
        raise UserError(f"{utterance.where}: field 'audio': {error}") from error
