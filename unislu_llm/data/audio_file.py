"""Audio files: opened, checked for damage, cropped, and read as floats at their own rate."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import soundfile

from unislu_llm.errors import UserError

END_SLACK = 0.1  # seconds that a crop may pass the end of its file: corpora round their time stamps

_MAX_PEAK = 100.0  # above it, samples are integers written as floats rather than loud audio
_MP3_PREROLL = 1 << 14  # samples decoded and dropped: an MP3 frame needs the bits of earlier ones
_STREAM_SIZE = 0x7FFF0000  # a chunk size from here on stands for "not known": written to a pipe
_OGG_TAIL = 1 << 17  # bytes; an Ogg page has 65,307 at most
_DECLARED = re.compile(r"(?:data|SSND|BODY|Data Size)\s*: (\d+) \(should be (\d+)\)")


def open_audio(path: Path) -> soundfile.SoundFile:
    """Open for reading; refuse what is not there, not audio, truncated or without a length."""
    if not path.is_file():
        raise UserError(f"{path}: " + ("not a file; give an audio file" if path.exists() else
                        "audio file does not exist; correct the path (in a manifest: from its "
                        "folder)"))
    try:
        sound = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        raise UserError(f"{path}: cannot be read as audio ({error}); convert it to WAV, FLAC or "
                        "Ogg/Opus") from error
    if problem := _damage(path, sound):
        sound.close()
        raise UserError(f"{path}: {problem}")
    return sound


def _damage(path: Path, sound: soundfile.SoundFile) -> str:
    """What libsndfile passes over in silence: data cut off, or a length that nobody wrote."""
    truncated = "the file is truncated ({}); fetch or convert it again"
    # Its log is the only place where it says that a chunk is shorter than declared.
    for declared, found in _DECLARED.findall(sound.extra_info):
        if int(found) < int(declared) < _STREAM_SIZE:
            return truncated.format(f"{found} of {declared} bytes of audio")
    if sound.format == "OGG" and _ogg_cut(path):
        return truncated.format("its last page is incomplete")
    if sound.frames == 0:
        return "holds no samples; drop it"
    no_length = "the header does not say how long it is (written to a pipe); convert it again"
    return no_length if sound.frames > 1 << 48 else ""


def _ogg_cut(path: Path) -> bool:
    """Whether the last Ogg page (RFC 3533: 27 bytes, segment table, segments) is incomplete."""
    with path.open("rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(max(0, size - _OGG_TAIL))
        tail = handle.read()
    page = tail[tail.rfind(b"OggS"):]
    table = page[27: 27 + page[26]] if len(page) > 26 else b""
    return len(page) <= 26 or len(table) < page[26] or len(page) < 27 + len(table) + sum(table)


def crop(path: Path, frames: int, rate: int, start: float, end: float | None) -> tuple[int, int]:
    """First and last (exclusive) frame of a stretch in seconds, as slue-toolkit crops."""
    total = frames / rate
    last = total if end is None else end
    # Written so that a time that is not a number is outside, too.
    if not (0 <= start < total and last <= total + END_SLACK):
        key, value = ("end", last) if 0 <= start < total else ("start", start)
        raise UserError(f"{path}: {key} {value:g} s is outside the file, which has {total:.2f} s")
    begin, stop = int(start * rate), frames if end is None else min(int(end * rate), frames)
    if stop <= begin:
        raise UserError(f"{path}: the stretch from {start:g} s to {last:g} s is empty; `end` must "
                        "be after `start`")
    return begin, stop


def read_frames(path: Path, sound: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """`(frames, channels)` float32, usually in -1..1, of frames `first` to `last`.

    Raises:
        UserError: they cannot be decoded, are fewer than the header says, not finite, or integers.
    """
    skip = min(first, _MP3_PREROLL) if sound.format == "MP3" else 0
    try:
        if first > skip:
            sound.seek(first - skip)
        block = sound.read(last - first + skip, dtype="float32", always_2d=True)[skip:]
    except (soundfile.SoundFileError, MemoryError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); fetch or convert it again"
                        ) from error
    if len(block) == 0 or len(block) < last - first - END_SLACK * sound.samplerate:
        raise UserError(f"{path}: the file is truncated: {len(block) / sound.samplerate:.2f} s of "
                        f"{(last - first) / sound.samplerate:.2f} s can be decoded; fetch or "
                        "convert it again")
    if not np.isfinite(block).all():
        raise UserError(f"{path}: has samples that are NaN or infinite; decode it again or drop it")
    if (peak := float(np.abs(block).max())) > _MAX_PEAK:
        raise UserError(f"{path}: samples reach {peak:g}, expected -1 to 1; divide 16-bit samples "
                        "by 32768")
    return block
