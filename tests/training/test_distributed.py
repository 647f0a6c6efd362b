"""However processes and micro-batches share a global batch, it is one batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import CTC, fitted, logged, weights
from tests.training.run import first_step
from unislu_llm.config import Config
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.run_folder import read_finished
from unislu_llm.tasks import TaskRegistry

LAYOUTS = {"whole": (1, 1), "accumulated": (4, 1), "two": (2, 2)}
"""Accumulation and processes."""
AUGMENT: dict[str, Any] = {"freq_masks": 1, "time_masks": 1, "speeds": [0.9, 1.0, 1.1],
                           "gain_db": 3.0, "silence_share": 0.1}
STILL = CTC | {"projector_options": CTC["projector_options"] | {"dropout": 0.0}}
"""Each process draws a dropout of its own."""


@pytest.fixture
def texts_and_speech(tiny_config: Callable[..., Config]) -> list[str]:
    """A manifest in which every third row has no audio, in batches of both."""
    path = Path(tiny_config().data.train[0])
    rows = [replace(u, audio=None, duration=None) if i % 3 == 0 else u
            for i, u in enumerate(read_manifest(path, TaskRegistry()))]
    write_manifest(path.with_name("mixed.jsonl"), rows)
    return [str(path.with_name("mixed.jsonl"))]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("speech_llm", {}),
    "fixed": ("speech_llm", {"train": {"loss": "fixed"}}),
    "whisper": ("whisper_slu", {}),
    "ctc": ("speech_llm", {"model": STILL, "train": {"objective": "ctc"}}),
    "text": ("speech_llm", {"model": STILL, "data": {"train": ["mixed.jsonl"], "dev": []}}),
    "cache": ("speech_llm", {"data": {"frame_cache": "frames"}}),
}


def test_processes_and_accumulation_change_no_loss_and_no_gradient(
        tiny_config: Callable[..., Config], launch: Callable[..., str],
        texts_and_speech: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 process x 8, 4 micro-batches of 2, and 2 processes x 2 micro-batches of 2."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as the processes have it
    asked = list[tuple[str, Config]]()
    for case, (kind, given) in CASES.items():
        sections = json.loads(json.dumps(given).replace("mixed.jsonl", texts_and_speech[0]).replace(
            "frames", str(tmp_path / "frames")))
        for name, (accumulation, on) in LAYOUTS.items():
            config = tiny_config(f"{case}-{name}", **sections | {
                "train": sections.get("train", {}) | {"accumulation": accumulation}})
            if on == 1:  # here, which spares the start of a process
                first_step(kind, config)
            else:
                asked.append((kind, config))
    launch(2, *asked, mode="first")
    for case in CASES:
        found = {name: (json.loads((tmp_path / f"{case}-{name}.json").read_text()),
                        load_file(tmp_path / f"{case}-{name}.safetensors")) for name in LAYOUTS}
        metrics, gradients = found["whole"]
        assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4
        for name in ("accumulated", "two"):
            others, other_gradients = found[name]
            for key in metrics.keys() & {"loss", "loss_asr", "loss_task", "loss_ner", "w_asr",
                                         "tokens", "audio_seconds", "steps"}:
                assert others[key] == pytest.approx(metrics[key], rel=1e-5), (case, name, key)
            assert other_gradients.keys() == gradients.keys()
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(
                    other_gradients[parameter], gradient, rtol=1e-3, atol=1e-5,
                    msg=lambda m, p=parameter, c=case: f"{c}, {p}: {m}")


@pytest.mark.slow
def test_a_stopped_run_of_stages_on_two_processes_ends_as_one_that_was_not(
        tiny_config: Callable[..., Config], launch: Callable[..., str]) -> None:
    """Stopped within an epoch of either objective; dropout is at work. Also against one process."""
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    stages = [{"name": "ctc", "train": {"objective": "ctc", "epochs": 2}},
              {"name": "adapt", "train": {"epochs": 2}}]

    def config(name: str, **more: Any) -> Config:
        return tiny_config(name, model=CTC | {"lora": lora}, stages=stages, **more,
                           train={"batch_size": 4, "accumulation": 2, "save_every": 2})

    printed = launch(2, ("speech_llm", config("whole")))
    whole = Path(config("whole").output)
    clip = whole.parent / "audio" / "u0.wav"
    assert printed.endswith(f"best: {whole / 'best'}\nscore it: unislu evaluate {whole}\n"
                            f"use it: unislu predict {whole} {clip}\n")
    launch(2, ("speech_llm", config("part")), mode="stop:5", fails=True)
    part = Path(config("part").output)
    assert not read_finished(part / "ctc")
    # It goes on from step 4, and stops again at step 5 of the stage after.
    launch(2, ("speech_llm", config("part", resume=True)), mode="stop:5", fails=True)
    launch(2, ("speech_llm", config("part", resume=True)))
    for place in ("ctc/best", "ctc/last", "adapt/last", "best"):
        a, b = weights(whole / place), weights(part / place)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), place
    assert read_finished(part)["step"] == 12


@pytest.mark.parametrize(("sections", "says"), [
    ({"train": {"batch_tokens": 240}}, "batch: at most 240 tokens"),
    pytest.param({"data": {"temperature": 3.0, "epoch_samples": 20}, "augment": AUGMENT,
                  "train": {"batch_size": 4}}, "mixture: 20 samples an epoch",
                 marks=pytest.mark.slow),
], ids=["tokens", "mixture"])
def test_one_and_two_processes_take_the_same_steps(
        sections: dict[str, Any], says: str, tiny_config: Callable[..., Config],
        launch: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Three epochs of an odd number of examples, with real optimizer steps."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as the processes have it
    rows = {}
    for processes in (1, 2):
        train = sections["train"] | {"accumulation": 2 // processes, "epochs": 3}
        data = sections.get("data", {}) | {"dev": []}
        config = tiny_config(f"on-{processes}", **sections | {"data": data, "train": train})
        manifest = Path(config.data.train[0])
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:11]))
        if processes == 1:  # here, which spares the start of a process
            fitted("speech_llm", config)
        assert says in (capsys.readouterr().out if processes == 1 else
                        launch(processes, ("speech_llm", config)))
        rows[processes] = logged(Path(config.output))
    one, two = rows[1], rows[2]
    assert len(one) == len(two) >= 6
    # The same clips fall silent, at the same speeds.
    for key in ("step", "epoch", "tokens", "audio_seconds"):
        assert [r[key] for r in one] == pytest.approx([r[key] for r in two]), key
    assert [r["loss"] for r in one[:3]] == pytest.approx([r["loss"] for r in two[:3]], rel=1e-3)
    assert {r["epoch"] for r in one} == {0, 1, 2}
    assert all(0 <= r["padding"] < 1 and 0 <= r["data_wait"] < 1 for r in one + two)
