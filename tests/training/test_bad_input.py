"""Bad input ends a recipe with one clear line and status 2, and names file, line and field or flag."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.training.config import Config, apply
from unislu_llm.training.entry import run_recipe

GOOD = {"id": "a", "audio": "a.wav", "text": "the council met", "ner": [{"label": "ORG", "start": 4, "end": 11}]}


def break_row(folder: Path, wav: Path, how: str) -> Path:
    """A manifest whose second row is broken in one way."""
    (folder / "a.wav").write_bytes(wav.read_bytes())
    row: dict[str, Any] = GOOD | {"id": "b"}
    if how == "missing audio":
        row["audio"] = "gone.wav"
    elif how == "unreadable audio":
        (folder / "b.wav").write_text("not audio")
        row["audio"] = "b.wav"
    elif how == "empty clip":
        (folder / "b.wav").write_bytes(wav.read_bytes()[:44])
        row["audio"] = "b.wav"
    elif how == "unknown task":
        row["nerr"] = row.pop("ner")
    elif how == "span outside":
        row["ner"] = [{"label": "ORG", "start": 4, "end": 99}]
    elif how == "unknown label":
        row["ner"] = [{"label": "ORGG", "start": 4, "end": 11}]
    manifest = folder / "m.jsonl"
    manifest.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    return manifest


def error_of(kind: str, config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a recipe that must fail; its one message on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_recipe(kind, lambda: config)
    assert stop.value.code == 2
    before, _, message = capsys.readouterr().err.partition("error: ")
    assert message
    assert "Traceback" not in before + message
    return message


@pytest.mark.parametrize(("how", "expected"), [
    ("missing audio", ["m.jsonl:2", "audio", "gone.wav"]),
    ("unreadable audio", ["m.jsonl:2", "audio", "b.wav"]),
    ("empty clip", ["m.jsonl:2", "audio", "b.wav"]),
    ("unknown task", ["m.jsonl:2", "nerr", "ner"]),
    ("span outside", ["m.jsonl:2", "ner", "99"]),
    ("unknown label", ["m.jsonl:2", "ner", "ORGG", "ORG"]),
])
def test_bad_rows(how: str, expected: list[str], tiny_config: Callable[..., Config], make_utterances: Any, tmp_path: Path,
                  capfd: pytest.CaptureFixture[str]) -> None:
    wav = make_utterances(seconds=[1.0])[0].audio
    manifest = break_row(tmp_path, wav, how)
    config = tiny_config(data={"train": [str(manifest)], "dev": []}, train={"batch_size": 2})
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_recipe("speech_llm", lambda: config)
    assert stop.value.code == 2
    message = capfd.readouterr().err.partition("error: ")[2]
    assert "Traceback" not in message
    for word in expected:
        assert word in message, message


@pytest.mark.parametrize(("section", "expected"), [
    ({"model": {"encoder": "openai/whisper-bse"}}, ["openai/whisper-bse", "openai/whisper-base"]),
    ({"model": {"llm": "no/such-model"}}, ["no/such-model"]),
    ({"model": {"lora": {"target_modules": ["q_prj"]}}}, ["q_prj", "q_proj"]),
    ({"model": {"projector": "qfomer"}}, ["qfomer", "'qformer'"]),
    ({"model": {"projector_options": {"stak": 3}}}, ["stak", "'stack'"]),
    ({"train": {"precision": "fp16"}}, ["fp16", "bf16"]),
    ({"data": {"train": []}}, ["data.train", "no manifest"]),
    ({"data": {"train": ["nowhere.jsonl"]}}, ["nowhere.jsonl"]),
])
def test_bad_settings(section: dict[str, Any], expected: list[str], tiny_config: Callable[..., Config],
                      capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tiny_config()
    apply(config, section, "test")
    message = error_of("speech_llm", config, capsys)
    for word in expected:
        assert word in message, message
    assert not Path(config.output).exists() or not any(Path(config.output).iterdir())

