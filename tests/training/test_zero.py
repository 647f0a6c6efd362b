"""DeepSpeed: two processes by ZeRO-2 or ZeRO-3 train, decode and save what one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.test_sharding import check
from tests.training.test_sharding import make as make  # a fixture
from unislu_llm.config import Config


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Factory: ask for a stage of ZeRO, as `accelerate launch` does."""
    pytest.importorskip("deepspeed")

    def ask(stage: int) -> None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setenv("PYTHONWARNINGS", "ignore::FutureWarning")  # of torch, for DeepSpeed

    return ask


@pytest.mark.parametrize(("stage", "share"), [(2, 1.0), (3, 0.5)])
def test_two_processes_do_what_one_does(
        stage: int, share: float, make: Callable[..., Config], launch: Callable[..., str],
        tmp_path: Path, zero: Callable[[int], None]) -> None:
    zero(stage)
    check(make, launch, tmp_path, share)
