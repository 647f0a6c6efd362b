"""Manifests, audio, YAML and JSON that mean harm: one error each, soon, and little memory."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.config_file import YamlFile
from unislu_llm.data.audio import from_bytes, load
from unislu_llm.data.manifest import iter_rows, read_rows
from unislu_llm.errors import UserError
from unislu_llm.io import find_model, read_json
from unislu_llm.tasks import TaskRegistry
from unislu_llm.unified import parse

DATA = b"\0\1" * 16_000
W64 = [bytes.fromhex(f"{name}F3ACD3118CD100C04F8EDB8A") for name in (
    "77617665", "666D7420", "64617461")]


def fmt(rate: int = 16_000, channels: int = 1, bits: int = 16) -> bytes:
    size = channels * bits // 8
    return struct.pack("<HHIIHH", 1, channels, rate, rate * size & 0xFFFFFFFF, size & 0xFFFF, bits)


def wav(size: int = len(DATA), **head: int) -> bytes:
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt(**head) + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", len(body) + len(DATA)) + body + DATA


def rf64(size: int) -> bytes:
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, size + 72, size, size // 2, 0)
    return (b"RF64\xff\xff\xff\xffWAVE" + ds64 + b"fmt " + struct.pack("<I", 16) + fmt()
            + b"data\xff\xff\xff\xff" + DATA)


def w64(size: int) -> bytes:
    body = (W64[0] + W64[1] + struct.pack("<Q", 40) + fmt() + W64[2]
            + struct.pack("<Q", size + 24) + DATA)
    return bytes.fromhex("726966662E91CF11A5D628DB04C10000") + struct.pack(
        "<Q", len(body) + 24) + body


def encoded(kind: str, subtype: str) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).standard_normal(16_000).astype("float32") * 0.1
    soundfile.write(stream, noise, 16_000, format=kind, subtype=subtype)
    return stream.getvalue()


def flac(frames: int) -> bytes:
    """With this number of frames in its header, of 36 bits."""
    content = bytearray(encoded("FLAC", "PCM_16"))
    content[21] = content[21] & 0xF0 | frames >> 32
    content[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(content)


def ogg(subtype: str) -> bytes:
    return encoded("OGG", subtype)


@pytest.mark.parametrize("content", [wav(), rf64(len(DATA)), w64(len(DATA)), ogg("VORBIS"),
                                     ogg("OPUS"), flac(16_000)])
def test_what_a_true_header_says_is_read(content: bytes) -> None:
    assert len(from_bytes(content, "a")) == 16_000


@pytest.mark.parametrize(("content", "message"), [
    (wav(1 << 30), r"truncated \(32000 of 1073741824 bytes"),
    (rf64(1 << 62), r"truncated \(32000 of 4611686018427387904 bytes"),
    (rf64(1 << 33), r"truncated \(32000 of 8589934592 bytes"),
    (w64(1 << 62), r"truncated \(32000 of 4611686018427387904 bytes"),
    (w64(len(DATA) + 100), r"truncated \(32000 of 32104 bytes"),
    (wav(channels=0), "cannot be read"), (wav(channels=65_535), "cannot be read"),
    (wav(rate=0), "cannot be read"), (wav(bits=0), "cannot be read"),
    (wav(rate=1), "a sampling rate of 1 Hz is not between 1000 and 1000000; its header"),
    (wav(rate=10**9), "a sampling rate of 1000000000 Hz"),
    (flac((1 << 36) - 1), "68719476735 frames of 1 channels, as its header says"),
    (flac(1 << 30), "truncated|cannot be decoded"), (flac(0), "does not say how long"),
    *((encoded("FLAC", "PCM_16")[:n], "cannot be") for n in (0, 4, 50, 9_000)),
    *((ogg(kind)[:n], "cannot be|truncated") for kind in ("OPUS", "VORBIS") for n in (4, 60, 999)),
], ids=range(24))
def test_a_header_that_lies_is_named_before_memory_is_taken(content: bytes, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"^clip: .*({message})"):
        from_bytes(content, "clip")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "zero", "loop"):
        path = tmp_path / name
        for read in (load, read_json, YamlFile.read, TaskRegistry.from_yaml,
                     lambda p: list(iter_rows(p, TaskRegistry()))):
            with pytest.raises(UserError, match=name):
                read(path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").symlink_to(tmp_path / "pipe")
    assert find_model(tmp_path) is None


def row(**values: Any) -> str:
    return json.dumps({"id": "a", "text": "b", **values})


def random_words(n: int, letters: str = "ab") -> str:
    draw = random.Random(n)
    return " ".join(draw.choice(letters) for _ in range(n))


REPEATED = "ab " * 10_000 + "x"
ROWS = {
    "keys": row(**{f"key{i}": i for i in range(20_000)}),
    "keys that look alike": row(**{f"audi{i}": i for i in range(20_000)}),
    "labels": row(ner={f"label{i}": ["b"] for i in range(10_000)}),
    "spans": row(text=REPEATED, ner=[["PLACE", 3 * i, 3 * i + 2] for i in range(10_000)]),
    "one phrase": row(text=REPEATED, ner=[["PLACE", "ab"]] * 10_000),
    "many phrases": row(text=" ".join(f"w{i}" for i in range(10_000)),
                        ner=[["PLACE", f"w{i}"] for i in range(10_000)]),
    "long phrases": row(text=REPEATED, ner={"PLACE": ["ab " * i + "ab" for i in range(100)]}),
    "phrases that are not said": row(text=random_words(2_000), ner=[
        ["PLACE", random_words(15 + i % 3, "abc")] for i in range(2_000)]),
    "a phrase in other words": row(text=random_words(490), ner=[["PLACE", random_words(480)]]),
    "a long text": row(text="a b " * 500_000 + "x"),
    "a deep value": '{"id": "a", "text": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "numbers": '{"id": "a", "text": "b", "start": 1e400, "end": NaN, "x": ' + "9" * 100_000 + "}",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_row_is_read_in_seconds(name: str, tmp_path: Path) -> None:
    """20,000 of anything in a row: a quadratic way would take minutes."""
    (tmp_path / "m.jsonl").write_text(ROWS[name])
    start = time.process_time()
    (found,) = iter_rows(tmp_path / "m.jsonl", TaskRegistry())
    assert time.process_time() - start < 8
    assert (found.utterance is None) == bool(found.problems)


def test_a_line_without_end_is_not_held(tmp_path: Path) -> None:
    with (tmp_path / "m.jsonl").open("wb") as file:
        file.write(b'{"id": "')
        file.truncate(1 << 40)  # of which nothing is on disk
    with pytest.raises(UserError, match=r"m\.jsonl:1: the line has over 64 MB"):
        read_rows(tmp_path / "m.jsonl", TaskRegistry())


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True))


@pytest.mark.parametrize(("text", "message"), [
    (BOMB, "aliases .* stand for too much"), ("&a [*a]", "aliases .* stand for too much"),
    ("a: &a {x: 1}\n" + "".join(f"{n}: &{n} {{<<: [{', '.join([f'*{o}'] * 8)}]}}\n" for o, n in zip(
        "abcdefg", "bcdefgh", strict=True)), "aliases .* stand for too much"),
    ("[" * 5_000, "not valid YAML"), ("a: !!python/object/apply:os.system ['touch ran']",
                                       "not valid YAML"),
    ("a: " + "x" * (1 << 20), "it has over 256 KB"), ("a: !!timestamp x", "not valid YAML"),
    ("a: !!bool x", "not valid YAML"), ("a: !!int ''", "not valid YAML"),
    ("a: " + "9" * 10_000, "not valid YAML"), ("\0", "not valid YAML")])
def test_hostile_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    for read in (YamlFile.read, TaskRegistry.from_yaml):
        with pytest.raises(UserError, match=r"a\.yaml.*" + message):
            read(tmp_path / "a.yaml")


def test_aliases_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {x: 1}\nother: {<<: *base, y: 2}\n")
    assert YamlFile.read(tmp_path / "a.yaml").values["other"] == {"x": 1, "y": 2}


def test_an_error_does_not_steer_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path / "\x1b]0;title\x07\x1b[2J\u202ecod.exe\r.wav")
    assert str(error.value).isprintable()
    assert "title" in str(error.value)


def test_labels_are_no_patterns() -> None:
    registry = TaskRegistry.from_dict([{"kind": "label", "name": "mood", "marker": "[M]",
                                        "open": "[a-z]", "close": "[/a-z]", "labels": ["(a+)+$"]}])
    assert parse("abc[T/L][M][a-z](a+)+$[/a-z]", registry, "mood").outputs == "(a+)+$"
    assert parse("abc[T/L][M][a-z]" + "a" * 5_000 + "[/a-z]", registry, "mood").problems == (
        "unknown_label", "missing_label")
