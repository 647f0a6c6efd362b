"""Frames on disk: what is read is what was stored for this audio and encoder, whoever else writes, and whatever is killed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unislu_llm.data.cache import Clip, FrameCache, FrameDataset, clear_folder, describe_folder, folder_bytes, load_clip
from unislu_llm.data.shards import Shards
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.models.frames import build, encoder_settings

SETTINGS = {"weights": "w", "dim": 8, "n_mels": 80, "pad_to_30s": False, "precision": "fp32"}


def frames_for(key: str, rows: int = 5) -> torch.Tensor:
    """Frames that follow from a name, so that a mix-up shows."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(int(key[:8], 16)))


def fill(cache: FrameCache, utterances: list[Any]) -> None:
    keys = [cache.audio_key(u) for u in utterances]
    cache.put([Clip(10, frames_for(k.name), key=k) for k in keys if k is not None])


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 2.0 ** -11), ("bf16", 2.0 ** -8)])
def test_what_is_read_is_what_was_stored(dtype: Any, tolerance: float, tmp_path: Path, make_utterances: Any) -> None:
    utterances = make_utterances()
    cache = FrameCache(tmp_path / "c", SETTINGS, dtype)
    assert all(cache.get(u) is None for u in utterances)
    fill(cache, utterances)
    fresh = FrameCache(tmp_path / "c", SETTINGS, dtype)
    for reader in (cache, fresh, pickle.loads(pickle.dumps(cache))):  # loader processes get a pickled one
        assert len(reader) == len(utterances)
        for u in utterances:
            found, expected = reader.get(u), frames_for(cache.audio_key(u).name)  # type: ignore[union-attr]
            assert found is not None
            torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=1e-7)
    before = folder_bytes(tmp_path / "c")
    fill(fresh, utterances)
    assert folder_bytes(tmp_path / "c") == before, "nothing is stored twice"


def test_other_contents_crops_and_encoders_have_no_stale_entries(tmp_path: Path, make_utterances: Any) -> None:
    first, second, *_ = make_utterances()
    cache = FrameCache(tmp_path / "c", SETTINGS)
    fill(cache, [first])
    assert cache.get(first) is not None
    for crop in ({"start": 0.1}, {"end": 0.5}, {"start": 0.1, "end": 0.5}):
        assert cache.get(replace(first, **crop)) is None, crop
    for change in ({"weights": "v"}, {"n_mels": 128}, {"pad_to_30s": True}, {"precision": "bf16"}):
        assert FrameCache(tmp_path / "c", SETTINGS | change).get(first) is None, change
    assert FrameCache(tmp_path / "c", SETTINGS, "bf16").get(first) is None
    copy = tmp_path / "elsewhere.wav"
    shutil.copy(first.audio, copy)
    assert cache.get(replace(first, id="other", audio=copy)) is not None, "the same bytes are the same audio"
    stat = first.audio.stat()
    shutil.copyfile(second.audio, first.audio)  # other contents of the same name, even with the old time put back
    os.utime(first.audio, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.get(first) is None
    assert FrameCache(tmp_path / "c", SETTINGS).get(first) is None


def test_file_hashes_are_remembered_only_while_the_file_is_the_same(tmp_path: Path, make_utterances: Any,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_utterances()[0]
    monkeypatch.setattr(time, "time_ns", lambda: os.stat(first.audio).st_ctime_ns + 10**10)  # the file is old
    cache = FrameCache(tmp_path / "c", SETTINGS)
    fill(cache, [first])
    fresh = FrameCache(tmp_path / "c", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)  # would fail
        assert fresh.get(first) is not None
    stat = first.audio.stat()
    data = bytearray(first.audio.read_bytes())
    data[-1] ^= 1  # same size, same inode, same modification time
    with first.audio.open("r+b") as stream:
        stream.write(data)
    os.utime(first.audio, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fresh.get(first) is None


def test_an_index_cut_anywhere_gives_only_whole_entries(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    stored = {f"n{i}": bytes([i]) * (3 + i) for i in range(4)}
    for name, data in stored.items():
        shards.append([(name, data, {})])
    index, data = next(tmp_path.glob("*.jsonl")), next(tmp_path.glob("*.bin"))
    lines, blob = index.read_bytes(), data.read_bytes()
    for cut in range(len(lines) + 1):
        index.write_bytes(lines[:cut])
        reader = Shards(tmp_path)
        found = {n: reader.read(n) for n in stored}
        assert {n for n, v in found.items() if v} == set(list(stored)[:lines[:cut].count(b"\n")])
        assert all(v is None or v[0].tobytes() == stored[n] for n, v in found.items())
    index.write_bytes(lines)
    for cut in range(len(blob) + 1):  # a crash of the machine can lose bytes whose line is there
        data.write_bytes(blob[:cut])
        reader = Shards(tmp_path)
        for name, value in stored.items():
            read = reader.read(name)
            assert read is None or read[0].tobytes() == value
    data.write_bytes(blob[:-1] + b"\xff")
    reader = Shards(tmp_path)
    assert reader.read("n3") is None
    assert reader.read("n0") is not None
    reader.append([("n3", stored["n3"], {})])
    again = Shards(tmp_path).read("n3")
    assert again is not None
    assert again[0].tobytes() == stored["n3"]


WRITER = """
import hashlib, sys
from unislu_llm.data.shards import Shards
shards, seed = Shards(__import__("pathlib").Path(sys.argv[1])), int(sys.argv[2])
for i in range(int(sys.argv[3])):
    name = f"{(i * 7 + seed * 3) % 400}"
    shards.append([(name, hashlib.sha256(name.encode()).digest() * 300, {})])
    if i == 5:
        print("going", flush=True)
"""


def test_two_writers_at_once_and_a_killed_one_leave_a_readable_store(tmp_path: Path) -> None:
    import hashlib

    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(seed), n], stdout=subprocess.PIPE) for seed, n in ((1, "1000000"), (2, "300"))]
    reader = Shards(tmp_path)
    assert writers[0].stdout is not None
    writers[0].stdout.readline()
    reader.refresh()  # while they write
    assert len(reader) > 0
    assert all(reader.read(r) is not None for r in list(reader._records))
    assert writers[1].wait(60) == 0
    writers[0].send_signal(signal.SIGKILL)
    assert writers[0].wait(60) == -signal.SIGKILL
    writers[0].stdout.close()
    final = Shards(tmp_path)
    assert len(final) >= 300
    for name in list(final._records):
        found = final.read(name)
        assert found is not None
        assert found[0].tobytes() == hashlib.sha256(name.encode()).digest() * 300


def test_a_full_folder_and_one_that_cannot_be_written_go_on_without_storing(
        tmp_path: Path, make_utterances: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second, *_ = make_utterances()
    one = 5 * 8 * 2
    cache = FrameCache(tmp_path / "c", SETTINGS, "fp16", max_gib=1.5 * one / 2**30)
    fill(cache, [first])
    fill(cache, [second])
    fill(cache, [second])
    assert cache.get(first) is not None
    assert cache.get(second) is None
    assert cache.full
    assert len(caplog.records) == 1
    assert "--data.cache-gib" in caplog.text
    other = FrameCache(tmp_path / "c", SETTINGS | {"weights": "v"}, "fp16", max_gib=1.5 * one / 2**30)
    fill(other, [first])
    assert other.full, "the bound is for the folder"
    (tmp_path / "f").mkdir()
    blocked = FrameCache(tmp_path / "f", SETTINGS)
    (tmp_path / "f" / blocked.key[:16]).write_text("in the way")
    fill(blocked, [first])
    assert blocked.full
    assert "cannot be written" in caplog.text


def test_bad_arguments_and_frames_are_refused(tmp_path: Path, make_utterances: Any) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (((tmp_path / "file",), "is a file"), ((tmp_path, SETTINGS, "int8"), "cache_dtype"),
                             ((tmp_path, SETTINGS, "fp16", 0.0), "cache_gib")):
        with pytest.raises(UserError, match=words):
            FrameCache(*(arguments if len(arguments) > 1 else (arguments[0], SETTINGS)))  # type: ignore[arg-type]
    cache = FrameCache(tmp_path / "c", SETTINGS)
    u = make_utterances()[0]
    with pytest.raises(UserError, match="bf16"):
        cache.put([Clip(10, torch.full((5, 8), 1e6), key=cache.audio_key(u))])
    with pytest.raises(UserError, match="unislu cache build"):
        FrameDataset([Sample(u, None)], cache)[0]


def test_a_file_that_changes_while_it_is_read_is_not_stored(tmp_path: Path, make_utterances: Any,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from unislu_llm.data import audio

    first, second, *_ = make_utterances()
    cache, real = FrameCache(tmp_path / "c", SETTINGS), audio.load

    def load(path: Path, *args: Any, **options: Any) -> Any:
        shutil.copyfile(second.audio, path)
        return real(path, *args, **options)

    monkeypatch.setattr(audio, "load", load)
    assert load_clip(cache, first, 30.0).key is None


def test_built_frames_are_the_encoders_own(tmp_path: Path, make_utterances: Any, tiny_whisper_encoder: Any) -> None:
    """Batched by length, they equal those of every clip alone; a second build finds all; other weights find none."""
    from unislu_llm.data import audio

    utterances = make_utterances()
    encoder = SpeechEncoder(tiny_whisper_encoder()).eval()
    cache = FrameCache(tmp_path / "c", encoder_settings(encoder, "fp32"), "fp32")
    assert build(cache, encoder, utterances, batch_size=3, progress=False) == (4, 0)
    assert build(FrameCache(tmp_path / "c", cache.settings, "fp32"), encoder, utterances, progress=False) == (0, 4)
    for sample, frames in FrameDataset([Sample(u, None) for u in utterances], cache):  # type: ignore[attr-defined]
        mel, lengths = audio.batch_log_mel([audio.load(sample.utterance.audio)])
        own, _ = encoder(mel, lengths)
        assert frames.shape == own[0].shape
        torch.testing.assert_close(frames, own[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        encoder.whisper.layers[1].fc2.bias[3] += 1e-3
    changed = FrameCache(tmp_path / "c", encoder_settings(encoder, "fp32"), "fp32")
    assert changed.get(utterances[0]) is None
    rows = describe_folder(tmp_path / "c")
    assert [(r["clips"], r["encoder"]) for r in rows] == [(4, "")]
    assert json.dumps(rows)
    (tmp_path / "c" / "notes.txt").write_text("kept")
    assert clear_folder(tmp_path / "c") > 0
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="frozen"):
        encoder_settings(SpeechEncoder(tiny_whisper_encoder(), "top", top_layers=1), "fp32")
