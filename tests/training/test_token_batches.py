"""Runs with batches by tokens: the same steps for any number of processes, exact resume; packing changes no step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unislu_llm.data.audio import SAMPLE_RATE
from unislu_llm.errors import UserError
from unislu_llm.training.config import Config
from unislu_llm.training.loop import Trainer

SCRIPT = Path(__file__).with_name("mixed_run.py")
TOKENS: dict[str, Any] = {"batch_tokens": 240, "micro_batch_tokens": 120, "epochs": 3}


@pytest.fixture
def odd_config(tiny_config: Callable[..., Config], make_utterances: Any, tmp_path: Path) -> Callable[..., Config]:
    """As `tiny_config`, with 11 samples and batches by tokens."""
    def make(name: str, **train: Any) -> Config:
        config = tiny_config(name, data={"dev": []}, train=TOKENS | train)
        manifest = Path(config.data.train[0])
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:11]))
        return config

    return make


def trained(run: Path) -> list[dict[str, Any]]:
    """Logged steps of a run."""
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["part"] == "train"]


def test_one_and_two_processes_take_the_same_steps(odd_config: Callable[..., Config], tmp_path: Path) -> None:
    """Three epochs of an odd number of samples, with real optimizer steps."""
    rows = {}
    for processes in (1, 2):
        config = odd_config(f"on-{processes}")
        (tmp_path / f"{processes}.yaml").write_text(yaml.safe_dump(config.to_dict()))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*(launcher if processes > 1 else [sys.executable]), str(SCRIPT), str(tmp_path / f"{processes}.yaml")]
        done = subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "batch: at most 240 tokens" in done.stdout
        rows[processes] = trained(tmp_path / f"on-{processes}")
    one, two = rows[1], rows[2]
    assert len(one) == len(two) == 6
    for key in ("step", "epoch", "tokens", "audio_seconds"):
        assert [r[key] for r in one] == [r[key] for r in two], key
    assert [r["loss"] for r in one[:3]] == pytest.approx([r["loss"] for r in two[:3]], rel=1e-3)
    assert {r["epoch"] for r in one} == {0, 1, 2}
    assert sum(r["audio_seconds"] for r in one if r["epoch"] == 2) == sum(r["audio_seconds"] for r in one if r["epoch"] == 0)
    assert all(0 <= r["padding"] < 1 and 0 <= r["data_wait"] < 1 for r in one + two)


def test_resume_in_the_middle_of_an_epoch_is_exact(odd_config: Callable[..., Config]) -> None:
    whole = Trainer("speech_llm", odd_config("whole"))
    whole.fit()
    part = Trainer("speech_llm", odd_config("part", save_every=5))
    part.total_steps = 6
    part.validate = lambda title: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    config = odd_config("part")
    config.resume = True
    resumed = Trainer("speech_llm", config)
    assert resumed.progress.step == 5
    resumed.fit()
    a, b = (load_file(folder / "last" / "model.safetensors") for folder in (whole.run, resumed.run))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_plan_counts_what_the_llm_reads(odd_config: Callable[..., Config]) -> None:
    """Also its batches keep to the budget, in tensors."""
    trainer = Trainer("speech_llm", odd_config("counted"))
    rows: list[torch.Size] = []
    trainer.model.llm.base_model.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, args, kwargs: rows.append(kwargs["inputs_embeds"].shape), with_kwargs=True)
    plan: Any = trainer.plan
    steps = plan.micro_batches(0)
    for micro, step in zip(trainer.batches(0, 0), steps, strict=True):
        for batch, members in zip(micro, step, strict=True):
            with torch.no_grad():
                trainer.model.losses(batch)
            assert rows.pop()[:2] == (len(members), int(plan.rows[members].max()))
            lengths = [trainer.model.token_counts(round(s.utterance.duration * SAMPLE_RATE), 1)[0] for s in batch.samples]
            assert lengths == plan.sizes[members, 0].tolist()


def test_packing_changes_no_step(odd_config: Callable[..., Config]) -> None:
    losses = [[r["loss"] for r in trained(_fitted(odd_config(f"packing-{on}", packing=on, max_steps=4)))] for on in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def _fitted(config: Config) -> Path:
    trainer = Trainer("speech_llm", config)
    trainer.fit()
    return trainer.run


def test_packing_a_whisper_decoder_is_refused(odd_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"train\.packing: Whisper's decoder"):
        Trainer("whisper_slu", odd_config("refused", packing=True))
