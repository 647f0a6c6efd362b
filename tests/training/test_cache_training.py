"""Training on cached frames is training: the same losses and gradients, whether they were stored before, now, or by others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unislu_llm.cli import main
from unislu_llm.data.cache import describe_folder
from unislu_llm.errors import UserError
from unislu_llm.loss import Counts
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.training.config import Config
from unislu_llm.training.loop import Trainer

STEPS = {"max_steps": 20, "epochs": 20, "batch_size": 6, "micro_batch_size": 3}


def run_losses(kind: str, config: Config, most: int = 100) -> list[float]:
    """Losses of a run's steps, `most` of them; nothing is validated or saved."""
    trainer = Trainer(kind, config)
    losses: list[float] = []
    most = min(most, trainer.total_steps)
    while len(losses) < most:
        for micro in trainer.batches(trainer.progress.epoch, 0):
            losses.append(trainer.step(micro)["loss"])
            if len(losses) == most:
                break
        trainer.progress.epoch += 1
    trainer.close()
    return losses


@pytest.mark.parametrize(("kind", "pad"), [("speech_llm", False), ("whisper_slu", False), ("whisper_slu", True)])
def test_losses_of_20_steps_are_the_same(kind: str, pad: bool, tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    """To 1e-6 with frames kept in fp32, to 1e-3 in fp16; in the first epoch or later, with loader processes or without."""
    steps = STEPS | ({"max_steps": 4} if pad else {})
    model = {"encoder_mode": "frozen", "pad_to_30s": pad}

    def losses(name: str, most: int = 20, **data: Any) -> list[float]:
        rates = {"lr": dict.fromkeys(("projector", "lora", "decoder"), 1e-4)}
        return run_losses(kind, tiny_config(name, train=steps | rates, model=model, data=data), most)

    plain = losses("plain")
    assert plain[-1] < plain[0]
    cache = str(tmp_path / "cache")
    exact = losses("exact", encoder_cache=cache, cache_dtype="fp32")  # built in the first two steps, then read
    assert exact == pytest.approx(plain, rel=1e-6)
    rounded = losses("fp16", encoder_cache=cache)
    assert rounded == pytest.approx(plain, rel=1e-3)
    workers = losses("workers", 3, encoder_cache=cache, num_workers=2)
    assert workers == pytest.approx(rounded[:3], rel=1e-7)
    assert sorted((r["dtype"], r["clips"]) for r in describe_folder(tmp_path / "cache")) == [("fp16", 12), ("fp32", 12)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_built_by_command_training_never_encodes(precision: str, tiny_config: Callable[..., Config], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    config = tiny_config("run", train={"precision": precision, "max_steps": 2, "batch_size": 6},
                         data={"encoder_cache": str(folder)})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    for known in (0, 12):
        assert main(["cache", "build", str(file), "--batch-size", "5", "--threads", "1"]) == 0
        assert f"{12 - known} clips stored, {known} were there" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(SpeechEncoder, "forward", None)  # would fail
        patch.setattr("unislu_llm.data.audio.load", None)
        run_losses("speech_llm", config)
    assert main(["cache", "info", str(folder)]) == 0
    assert "whisper" in capsys.readouterr().out
    assert main(["cache", "clear", str(folder)]) == 0
    assert not list(folder.glob("*/*"))
    assert main(["cache", "info", str(folder)]) == 2


def test_partly_filled_cache_gives_the_same_losses(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    """Batches of known and unknown clips, as after a killed run."""
    cache = str(tmp_path / "cache")
    settings: dict[str, Any] = {"encoder_cache": cache, "cache_dtype": "fp32"}
    plain = run_losses("speech_llm", tiny_config("plain", train=STEPS | {"max_steps": 4}))
    run_losses("speech_llm", tiny_config("one", train=STEPS | {"max_steps": 1, "bucket": 0, "seed": 3}, data=settings))
    assert 0 < describe_folder(tmp_path / "cache")[0]["clips"] < 12
    rest = run_losses("speech_llm", tiny_config("rest", train=STEPS | {"max_steps": 4}, data=settings))
    assert rest == pytest.approx(plain, rel=1e-6)


def test_a_trained_encoder_and_augmentation_are_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    data = {"encoder_cache": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="encoder_mode is 'top'"):
        Trainer("speech_llm", tiny_config(model={"encoder_mode": "top", "encoder_top_layers": 1}, data=data))
    with pytest.raises(UserError, match="augmentation"):
        Trainer("speech_llm", tiny_config(data=data, augment={"time_masks": 1}))
    assert not (tmp_path / "run").exists()


def test_two_processes_share_a_cache(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    """They fill it together, and loss and gradients of a step are those of one process, from it or without it."""
    data = {"encoder_cache": str(tmp_path / "cache"), "cache_dtype": "fp32"}
    train = {"batch_size": 12, "micro_batch_size": 6}

    def first_step(config: Config) -> dict[str, Any]:
        trainer = Trainer("speech_llm", config)
        trainer.wrapped.train()
        micro = next(iter(trainer.batches(0, 0)))
        figures = trainer.figures(trainer.backward(micro, Counts(*trainer.totals(micro).tolist())), 0.0)
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
        return {"figures": figures, "gradients": gradients}

    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tiny_config("two", train=train, data=data).to_dict()))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(Path(__file__).with_name("first_step.py")), "speech_llm", str(tmp_path / "two.yaml"),
                           str(tmp_path / "two.pt")], timeout=300, capture_output=True, text=True,
                          env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    row = describe_folder(tmp_path / "cache")[0]
    assert (row["clips"], row["writers"]) == (12, 2)
    plain = first_step(tiny_config("plain", train=train))
    for found in (torch.load(tmp_path / "two.pt", weights_only=True), first_step(tiny_config("read", train=train, data=data))):
        assert found["figures"]["loss"] == pytest.approx(plain["figures"]["loss"], rel=1e-6)
        for name, gradient in plain["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-5)
