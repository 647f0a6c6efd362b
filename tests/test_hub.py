"""Models by their names on the hub, which a small server stands in for."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub import Hub, connected
from unislu_llm import load, understand
from unislu_llm.cli import main
from unislu_llm.config import Config
from unislu_llm.config_file import config_from_file
from unislu_llm.decoding.hypotheses import ModelRecogniser, load_recogniser
from unislu_llm.errors import UserError
from unislu_llm.evaluate import Options, make_job
from unislu_llm.run_folder import find_run
from unislu_llm.training.build import build_model, build_registry
from unislu_llm.weights import resolve

NAME = "me/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with connected(Hub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def best(tiny_run: Callable[..., Path]) -> Path:
    return tiny_run() / "best"


def files_of(folder: Path) -> dict[str, bytes]:
    """A saved model, and beside it what somebody else may have put there."""
    return {p.name: p.read_bytes() for p in folder.iterdir()} | {
        "pytorch_model.bin": b"a pickle", "model.py": b"raise SystemExit"}


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.trained_state().values()])


def test_a_name_loads_as_its_folder_and_only_our_files_are_fetched(
        hub: Hub, best: Path, caplog: pytest.LogCaptureFixture) -> None:
    commit = hub.commit(NAME, files_of(best))
    model = load(NAME)
    assert not model.training
    assert torch.equal(weights(model), weights(load(best)))
    fetched = {path.rpartition("/")[2] for path in hub.asked if path.startswith("GET /me/")}
    assert fetched == {"config.json", "model.safetensors"}
    # Pushed again, the new one is loaded, and the old one by its commit, without asking.
    changed = load(best)
    with torch.no_grad():
        next(p for p in changed.parameters() if p.requires_grad).add_(1.0)
    changed.save_pretrained("changed")
    hub.commit(NAME, files_of(Path("changed")))
    hub.commit(NAME, files_of(best), "v1")
    assert torch.equal(weights(load(NAME)), weights(changed))
    assert torch.equal(weights(load(f"{NAME}@v1")), weights(model))
    hub.asked.clear()
    assert find_run(f"{NAME}@{commit}").model.name == commit
    assert not hub.asked
    # A hub that does not answer is told of, and the cache has the last one.
    hub.repos.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(weights(load(NAME)), weights(changed))
    assert f"'{NAME}' is taken from the cache, commit" in caplog.text
    assert "no public repository" in caplog.text


def test_offline_the_cache_is_taken_without_a_word(
        hub: Hub, best: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    hub.commit(NAME, files_of(best))
    found = find_run(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_run(NAME) == found
    assert (found.name, found.folder, found.config) == ("me--tiny", Path("runs/me--tiny"), None)
    assert not caplog.records
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        find_run("me/other")


def test_what_is_not_there_or_not_ours_is_named(hub: Hub, best: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(NAME, files_of(best))
    hub.commit("me/whisper", {"config.json": b'{"model_type": "whisper"}',
                              "model.safetensors": b""})
    hub.commit("me/empty", {"README.md": b""})
    hub.commit("me/half", {"config.json": (best / "config.json").read_bytes()})
    for name, message in (
            ("me/gone", "no public repository me/gone; for a private one `hf auth login`"),
            (f"{NAME}@v9", "no branch, tag or commit 'v9'"),
            ("me/whisper", "its model_type is 'whisper', and no model that unislu_llm"),
            ("me/empty", r"me/empty has no config\.json"),
            ("me/half", r"me/half has no model\.safetensors"),
            ("run/tiny", "did you mean 'runs/tiny'"),
            # With such a folder here, it is a path, and the hub is not asked.
            ("runs/tinny", "there is no such folder; .*; did you mean 'runs/tiny'"),
            (Path("me/gone"), "there is no such folder"), ("tiny", "there is no such folder"),
            ("./me/tiny", "there is no such folder")):
        hub.asked.clear()
        with pytest.raises(UserError, match=message):
            load(name)
        assert bool(hub.asked) == (isinstance(name, str) and name.startswith(("me/", "run/")))
        assert not any(path.endswith("model.safetensors") for path in hub.asked)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"'me/new' was not found[\s\S]*ConnectError"):
        load("me/new")


def test_a_base_of_which_some_files_were_fetched_is_found_offline(
        hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("me/base", {"config.json": b"{}", "model.safetensors": b"", "tf_model.h5": b"",
                           "onnx/model.onnx": b""})
    found = resolve("me/base@main")
    assert sorted(p.name for p in found.path.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("me/base") == resolve("me/base", found.revision) == found


def test_a_name_is_taken_wherever_a_folder_is(hub: Hub, best: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    hub.commit(NAME, files_of(best))
    run = find_run(best.parent)
    assert run.config is not None
    config = Config.model_validate(run.config.model_dump() | {"train": {"init": NAME}})
    assert torch.equal(weights(build_model("speech_llm", config, run.registry())),
                       weights(load(best)))
    job = make_job(NAME, Options([NAME], manifest=[Path("corpus/dev.jsonl")]))
    assert (job.label, job.run.folder) == ("me--tiny-dev", Path("runs/me--tiny"))
    load_recogniser.cache_clear()
    assert isinstance(load_recogniser(NAME), ModelRecogniser)
    load_recogniser.cache_clear()
    assert main(["transcribe", NAME, "corpus/dev.jsonl", "--out", "made"]) == 0
    assert '"hypothesis"' in Path("made/dev.jsonl").read_text()
    assert main(["predict", NAME, "corpus/audio/u0.wav"]) == 0
    assert "  sa: " in capsys.readouterr().out
    load_recogniser.cache_clear()


def test_a_run_is_of_one_commit_whatever_is_pushed_meanwhile(hub: Hub, best: Path) -> None:
    hub.commit(NAME, files_of(best))
    Path("a.yaml").write_text(f"train: {{init: {NAME}}}\n")
    config = config_from_file("a.yaml")
    changed = load(best)
    with torch.no_grad():
        next(p for p in changed.parameters() if p.requires_grad).add_(1.0)
    changed.save_pretrained("changed")
    hub.commit(NAME, files_of(Path("changed")))
    hub.asked.clear()
    model = build_model("speech_llm", config, build_registry(config))
    assert torch.equal(weights(model), weights(load(best)))
    assert not hub.asked
    assert torch.equal(weights(load(NAME)), weights(changed)), "asked for again, it is the new one"


def test_in_a_config_file_a_name_stays_one(hub: Hub, best: Path, tmp_path: Path) -> None:
    """A folder's and a name's model bring their settings alike."""
    hub.commit(NAME, files_of(best))
    path = tmp_path / "configs" / "a.yaml"
    for folder in (tmp_path, path.parent):
        shutil.copytree(best, folder / "runs" / "best", dirs_exist_ok=True)
    llm = json.loads((best / "config.json").read_text())["model"]["llm"]
    for init, expected in ((NAME, NAME), ("../runs/best", str(tmp_path / "runs" / "best")),
                           ("runs/best", str(path.parent / "runs" / "best"))):
        path.write_text(f"train:\n  init: {init}\ndata:\n  frame_cache: my/frames\n")
        config = config_from_file(path)
        assert (config.train.init, config.model.llm) == (expected, llm)
        assert config.data.frame_cache == str(path.parent / "my" / "frames")


def test_device_and_dtype(best: Path) -> None:
    for dtype in ("bf16", torch.bfloat16):
        half = load(best, dtype)
        assert next(half.encoder.parameters()).dtype == torch.bfloat16  # type: ignore[union-attr]
        assert understand(half, (torch.rand(16_000), 16_000), "sa").outputs["sa"]
    assert load(best.parent, device="cpu").device.type == "cpu"
    for options, message in (({"dtype": "fp16"}, "fp32 or bf16"),
                             ({"dtype": torch.float16}, "fp32 or bf16"),
                             ({"device": "gpu"}, "device 'gpu' cannot be used here")):
        with pytest.raises(UserError, match=message):
            load(best, **options)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda' cannot be used here"):
            load(best, device="cuda")
    shutil.rmtree(best)
    assert load("runs/tiny").config.llm  # the last one
