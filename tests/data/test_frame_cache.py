"""Frames on disk: what is read is what was stored for this audio and encoder, or nothing."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unislu_llm.config import ModelConfig
from unislu_llm.data import audio
from unislu_llm.data.frame_cache import FrameCache, Frames, build_frames, encoder_settings
from unislu_llm.errors import UserError
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.utterance import Utterance

SETTINGS = {"weights": "w", "n_mels": 80, "silence": 0.0, "precision": "fp32"}
MakeUtterances = Callable[..., list[Utterance]]


def frames_for(name: str) -> torch.Tensor:
    """Frames that follow from a name, so that a mix-up shows; fp16 holds them exactly."""
    seeded = torch.Generator().manual_seed(int(name[:8], 16))
    return torch.randn(5, 8, generator=seeded).half()


def fill(cache: FrameCache, utterances: list[Utterance]) -> None:
    for u in utterances:
        cache.put(cache.name(u), Frames(frames_for(cache.name(u)), 4))


def test_what_is_read_is_what_was_stored(tmp_path: Path, make_utterances: MakeUtterances) -> None:
    utterances = make_utterances()
    cache = FrameCache(tmp_path / "c", SETTINGS)
    assert not any(map(cache.get, utterances))
    fill(cache, utterances)
    for reader in (cache, pickle.loads(pickle.dumps(cache))):  # as loader processes get it
        for u in utterances:
            values, length = reader.get(u)
            assert (length, torch.equal(values, frames_for(cache.name(u)))) == (4, True)
    path = cache.home / f"{cache.name(utterances[0])}.npy"
    assert np.load(path).shape == (5, 8), "files are numpy's"
    cache.put("bf16", Frames(torch.ones(2, 3, dtype=torch.bfloat16), 2))


def test_other_contents_crops_and_encoders_have_no_stale_entries(
        tmp_path: Path, make_utterances: MakeUtterances) -> None:
    first = make_utterances()[0]
    cache = FrameCache(tmp_path / "c", SETTINGS)
    fill(cache, [first])
    for crop in ({"start": 0.1}, {"end": 0.5}, {"start": 0.1, "end": 0.5}):
        assert cache.get(replace(first, **crop)) is None, crop
    for change in ({"weights": "v"}, {"n_mels": 128}, {"silence": 30.0}, {"precision": "bf16"}):
        assert FrameCache(tmp_path / "c", SETTINGS | change).get(first) is None, change
    copy = tmp_path / "elsewhere.wav"
    shutil.copy(first.audio, copy)
    assert cache.get(replace(first, id="other", audio=copy)) is not None, "the same bytes"
    # One byte of the same file, its size and its old time put back.
    stat, data = first.audio.stat(), bytearray(first.audio.read_bytes())
    data[-1] ^= 1
    first.audio.write_bytes(data)
    os.utime(first.audio, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.get(first) is None
    assert FrameCache(tmp_path / "c", SETTINGS).get(first) is None


def test_damaged_and_cut_files_are_not_trusted(tmp_path: Path,
                                               make_utterances: MakeUtterances) -> None:
    first, second, *_ = make_utterances()
    cache = FrameCache(tmp_path / "c", SETTINGS)
    fill(cache, [first, second])
    path = cache.home / f"{cache.name(first)}.npy"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert cache.get(first) is None, cut
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        assert cache.get(first) is None, place
    assert cache.get(second) is not None
    fill(cache, [first])
    assert path.read_bytes() == whole
    path.unlink()
    assert cache.get(first) is None


WRITER = """
import sys
import torch
from unislu_llm.data.frame_cache import FrameCache, Frames
cache, start, count = FrameCache(sys.argv[1], {"weights": "w"}), int(sys.argv[2]), int(sys.argv[3])
for i in range(start, start + count):
    name = str(i % 100)
    cache.put(name, Frames(torch.full((400, 64), float(name)), i % 100))
    print(i, flush=True)
"""


def test_two_writers_at_once_and_a_killed_one_leave_whole_entries(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen([*command, "0", "1000000"], stdout=subprocess.PIPE) as endless:
        subprocess.run([*command, "40", "200"], stdout=subprocess.PIPE, timeout=120, check=True)
        assert endless.stdout is not None
        endless.stdout.readline()  # it writes
        endless.send_signal(signal.SIGKILL)
    assert endless.wait(60) == -signal.SIGKILL
    cache = FrameCache(tmp_path, {"weights": "w"})
    cache.name = lambda utterance: utterance.id
    for i in range(100):
        found = cache.get(Utterance(str(i), None, ""))
        assert found.length == i
        assert torch.equal(found.values, torch.full((400, 64), float(i)).half())


@pytest.mark.parametrize("pad", [False, True])
def test_built_frames_are_the_encoders_own(pad: bool, tmp_path: Path,
                                           make_utterances: MakeUtterances,
                                           tiny_whisper_encoder: Callable[..., Any]) -> None:
    """Batched by length they equal those of every clip alone; two processes share the work."""
    utterances = make_utterances()
    text = Utterance("t", None, "a row without audio")
    encoder: Any = SpeechEncoder(tiny_whisper_encoder(), ModelConfig(silence=30.0 * pad)).eval()

    def build(rank: int = 0, world: int = 1) -> int:
        # Several tasks of an utterance are one clip.
        return build_frames(cache, encoder, [*utterances, *utterances, text], device="cpu",
                            rank=rank, world=world, batch_size=3)

    cache = FrameCache(tmp_path / "c", encoder_settings(encoder, "fp32"))
    assert [build(rank, 2) for rank in range(2)] == [2, 2]
    assert build() == 0
    for u in utterances:
        mel, lengths = audio.batch_log_mel([audio.load(u.audio)], silence=30.0 * pad)
        own, valid = encoder(mel, lengths)
        found = cache.get(u)
        assert found.length == int(valid[0])
        assert found.values.shape == own[0].shape
        torch.testing.assert_close(found.values.float(), own[0], rtol=2e-3, atol=2e-3)
    next(cache.home.glob("*.npy")).write_bytes(b"damaged")
    assert build() == 1
    with torch.no_grad():
        encoder.whisper.layers[1].fc2.bias[3] += 1e-3
    other = FrameCache(tmp_path / "c", encoder_settings(encoder, "fp32"))
    assert other.get(utterances[0]) is None


def test_what_cannot_be_cached_is_named(tmp_path: Path, make_utterances: MakeUtterances,
                                        tiny_whisper_encoder: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"model\.encoder_mode frozen"):
        encoder_settings(SpeechEncoder(tiny_whisper_encoder(), ModelConfig(encoder_mode="full")),
                         "fp32")
    cache = FrameCache(tmp_path / "c", SETTINGS)
    with pytest.raises(UserError, match=r"m\.jsonl:3: field 'audio': .*gone\.wav"):
        cache.get(Utterance("u", tmp_path / "gone.wav", "a", source="m.jsonl:3"))
    cache.folder.mkdir()
    cache.home.write_text("in the way")
    with pytest.raises(UserError, match=r"data\.frame_cache: .* cannot be written"):
        fill(cache, make_utterances()[:1])
