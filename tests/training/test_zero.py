"""DeepSpeed: two processes by ZeRO-2 or ZeRO-3 train, decode and save what one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.test_sharding import check, launched_by
from tests.training.test_sharding import make as make  # a fixture
from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.training.trainer import Trainer
from unislu_llm.training.zero import zero_of


@pytest.mark.parametrize(("file", "share"), [("zero2.yaml", 1.0), ("zero3.yaml", 0.5)])
def test_two_processes_do_what_one_does(
        file: str, share: float, make: Callable[..., Config], launch: Callable[..., str],
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    launched_by(file, monkeypatch)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore::FutureWarning")  # of torch, for DeepSpeed
    check(make, launch, tmp_path, share)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A launch by DeepSpeed, as if it were installed."""
    launched_by("zero3.yaml", monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return monkeypatch


@pytest.mark.parametrize(("flag", "value", "says"), [
    ("DEEPSPEED_ZERO_STAGE", "1", "set 2 or 3"),
    ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device is cpu; set none"),
    ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device is nvme; set none"),
    ("DEEPSPEED_CONFIG_FILE", "ds.json", r"config_file is ds\.json; set none"),
    ("DEEPSPEED_ZERO3_INIT", "true", "zero3_init is true; set false"),
    ("GRADIENT_ACCUMULATION_STEPS", "4", r"train\.accumulation"),
    ("GRADIENT_CLIPPING", "0.3", r"train\.max_grad_norm")])
def test_other_ways_are_refused_before_anything_is_loaded(
        flag: str, value: str, says: str, tiny_config: Callable[..., Config],
        asked: pytest.MonkeyPatch) -> None:
    asked.setenv(f"ACCELERATE_{flag}", value)
    with pytest.raises(UserError, match=says):
        Trainer("speech_llm", tiny_config(model={"llm": "no/such-model"}))


def test_settings_that_do_not_go_with_it_are_refused(
        tiny_config: Callable[..., Config], asked: pytest.MonkeyPatch) -> None:
    assert zero_of(tiny_config()) is None  # one process has nothing to share out
    for section, setting in (("train", {"on_oom": "split"}), ("model", {"quantization": "4bit"})):
        with pytest.raises(UserError, match=next(iter(setting))):
            zero_of(tiny_config(**{section: setting}))
    asked.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unislu_llm\[deepspeed\]'"):
        zero_of(tiny_config())
