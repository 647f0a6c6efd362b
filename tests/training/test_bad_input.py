"""Bad input ends a recipe with one clear message and status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.config import Config
from unislu_llm.errors import reported
from unislu_llm.training.stages import train

GOOD = {"id": "a", "audio": "a.wav", "text": "the council met",
        "ner": [{"label": "ORG", "start": 4, "end": 11}]}


def message_of(config: Config, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a recipe that must fail; its message on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop, reported():
        train("speech_llm", config)
    assert stop.value.code == 2
    before, _, message = capfd.readouterr().err.partition("error: ")
    assert message
    assert "Traceback" not in before + message
    return message


@pytest.mark.parametrize(("change", "words"), [
    ({"audio": "gone.wav"}, ["audio", "gone.wav"]), ({"audio": "text.wav"}, ["audio", "text.wav"]),
    ({"audio": "empty.wav"}, ["audio", "empty.wav"]),
    ({"ner": None, "nerr": []}, ["nerr", "ner"]),
    ({"ner": [{"label": "ORG", "start": 4, "end": 99}]}, ["ner", "99"]),
    ({"ner": [{"label": "ORGG", "start": 4, "end": 11}]}, ["ner", "ORGG", "ORG"]),
])
def test_a_bad_row_is_named_by_file_line_and_field(
        change: dict[str, Any], words: list[str], tiny_config: Callable[..., Config],
        make_utterances: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wav = make_utterances(seconds=[1.0])[0].audio.read_bytes()
    for name, data in (("a.wav", wav), ("text.wav", b"not audio"), ("empty.wav", wav[:44])):
        (tmp_path / name).write_bytes(data)
    bad = {key: value for key, value in (GOOD | {"id": "b"} | change).items() if value is not None}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, bad)))
    config = tiny_config(data={"train": [str(manifest)], "dev": []}, train={"batch_size": 2})
    message = message_of(config, capfd)
    for word in ("m.jsonl:2", *words):
        assert word in message, message


@pytest.mark.parametrize(("sections", "words"), [
    ({"model": {"encoder": "openai/whisper-bse"}}, ["openai/whisper-bse", "openai/whisper-base"]),
    ({"model": {"llm": "no/such-model"}}, ["no/such-model"]),
    ({"model": {"lora": {"target_modules": ["q_prj"]}}}, ["q_prj", "q_proj"]),
    ({"model": {"projector": "qfomer", "projector_options": {}}}, ["qfomer", "'qformer'"]),
    ({"model": {"projector": "qfomer", "llm": "no/such"}, "data": {"train": ["gone.jsonl"]}},
     ["model.projector: unknown", "'qformer'"]),  # before data and checkpoints
    ({"stages": [{"name": "a"}, {"name": "b", "model": {"projector": "mpl"}}]}, ["'mlp'"]),
    ({"model": {"projector_options": {"stak": 3}}}, ["stak", "'stack'"]),
    ({"data": {"train": []}}, ["data.train", "no manifest"]),
    ({"data": {"train": ["nowhere.jsonl"]}}, ["nowhere.jsonl"]),
    ({"data": {"dev": ["nowhere.jsonl"]}}, ["nowhere.jsonl"]),
    ({"data": {"weights": {"tony": 1.0}}}, ["data.weights", "'tony'", "'tiny'"]),
    ({"train": {"batch_size": 2, "accumulation": 4}}, ["train.batch_size", "accumulation"]),
    ({"train": {"batch_tokens": 20}}, ["train.batch_tokens: 20"]),
    ({"train": {"hypothesis_dropout": 0.1}}, ["train.hypothesis_dropout", "model.hypothesis"]),
    ({"data": {"frame_cache": "c"}, "augment": {"gain_db": 3.0}}, ["data.frame_cache", "augment"]),
    ({"data": {"frame_cache": "c"}, "model": {"encoder_mode": "full"}}, ["encoder_mode frozen"]),
    ({"train": {"objective": "ctc"}}, ["set model.projector ctc"]),
    ({"model": {"projector": "none", "hypothesis": "manifest", "encoder_mode": "lora"}},
     ["model.encoder_mode", "leave it frozen"]),
    ({"train": {"init": "nowhere"}}, ["train.init", "neither"]),
    ({"train": {"trackers": ["tensorbord"]}}, ["train.trackers: 'tensorbord'"]),
])
def test_a_bad_setting_is_named(sections: dict[str, Any], words: list[str],
                                tiny_config: Callable[..., Config],
                                capfd: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tiny_config(**sections)
    message = message_of(config, capfd)
    for word in words:
        assert word in message, message
    assert not Path(config.output).exists()
