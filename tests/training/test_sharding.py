"""FSDP2: two processes that shard the weights train, decode and save what one process does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.training.conftest import CTC, logged, weights
from tests.training.run import GRADIENTS, record
from unislu_llm.config import Config
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.errors import UserError
from unislu_llm.io import RATES_FILE
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.sharding import sharding_of
from unislu_llm.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
STILL = CTC | {"projector_options": CTC["projector_options"] | {"dropout": 0.0}}
ASKED = {"grammar": True, "force_task": True, "max_new_tokens": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Clipped, and decoded by chance.
    "llm": ("speech_llm", {"train": {"max_grad_norm": 0.05, "save_every": 2},
                           "decode": {"temperature": 1.0}}),
    # A recogniser's, that Whisper makes before training.
    "hypothesis": ("speech_llm", {"model": {"hypothesis": "manifest", "encoder_mode": "lora"},
                                  "data": {"guard": ["guard.jsonl"], "dev_limit": 5},
                                  "train": {"gradient_checkpointing": True}, "decode": ASKED}),
    # Rates of text injection at the end; frames made before anything is sharded.
    "ctc": ("speech_llm", {"model": STILL, "train": {"objective": "ctc"},
                           "data": {"frame_cache": "frames"}}),
    # Micro-batches of both kinds; layers that train as a whole.
    "injected": ("speech_llm", {"model": STILL | {"encoder_mode": "top", "encoder_top_layers": 1},
                                "data": {"train": ["mixed.jsonl"]}}),
    "whisper": ("whisper_slu", {"model": {"decoder_mode": "lora", "encoder_mode": "full"},
                                "decode": ASKED | {"num_beams": 2}}),
    "left_out": ("speech_llm:nan", {"train": {"on_nonfinite": "skip"}, "data": {"dev": []}}),
    "bf16": ("speech_llm", {"train": {"precision": "bf16", "max_steps": 2}}),
}


def launched_by(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what `accelerate launch` sets by a config file that ships."""
    words = ["--config_file", str(ROOT / "recipes" / "accelerate" / file), "script.py"]
    given, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    given.deepspeed_fields_from_accelerate_config = ""
    env = (prepare_deepspeed_cmd_env(given)[1] if given.use_deepspeed
           else prepare_multi_gpu_env(given))
    for key, value in env.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    launched_by("fsdp2.yaml", monkeypatch)


@pytest.fixture
def make(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """Factory of the configuration of a case on some processes: 4 steps of 4 micro-batches."""
    manifest = Path(tiny_config().data.train[0])
    rows = [replace(u, audio=None, duration=None) if i % 3 == 0 else u
            for i, u in enumerate(read_manifest(manifest, TaskRegistry()))]
    write_manifest(manifest.with_name("mixed.jsonl"), rows)

    def config(case: str, on: int, name: str = "", **train: Any) -> Config:
        more = json.loads(json.dumps(CASES[case][1]).replace(
            "mixed.jsonl", str(manifest.with_name("mixed.jsonl"))).replace(
                "guard.jsonl", str(manifest)))
        if "frame_cache" in more.get("data", {}):
            more["data"]["frame_cache"] = str(tmp_path / f"frames-{on}")
        return tiny_config(name or f"{case}-{on}", **more | {
            "train": {"max_steps": 4, "epochs": 4, "accumulation": 4 // on} | more.get("train", {})
            | train})

    return config


def predictions(run: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((run / "predictions").glob("*.jsonl")):
        yield from map(json.loads, file.read_text().splitlines())


def compare(one: Path, two: Path, share: float, rough: float = 1.0) -> None:
    """A run on one process and one on two of which each has a share of the parameters: losses,
    norms, gradients, weights."""
    for key, limit in (("loss", 1e-5), ("grad_norm", 1e-4)):
        alone, both = ([row[key] for row in logged(run)] for run in (one, two))
        assert both == pytest.approx(alone, rel=limit * rough), key
    for name, limit in ((GRADIENTS, 1e-4), ("last/model.safetensors", 1e-3)):
        alone, both = load_file(one / name), load_file(two / name)
        assert alone.pop("share", 1) == 1
        assert both.pop("share", share) == pytest.approx(share, abs=0.02)
        assert alone.keys() == both.keys()
        for tensor, value in alone.items():
            torch.testing.assert_close(both[tensor], value, rtol=limit * rough,
                                       atol=limit * rough, msg=lambda m, n=tensor: f"{n}: {m}")


def test_two_processes_that_shard_do_what_one_does(
        make: Callable[..., Config], launch: Callable[..., str], tmp_path: Path,
        sharded: None) -> None:
    check(make, launch, tmp_path, 0.5)


def check(make: Callable[..., Config], launch: Callable[..., str], tmp_path: Path,
          share: float) -> None:
    """All cases on two processes, as the environment says, and on one."""
    runs = [(kind, make(case, 2)) for case, (kind, _) in CASES.items()]
    part = make("llm", 2, "part")
    runs[1:1] = [("speech_llm:3", part),
                 ("speech_llm", part.model_copy(update={"resume": True}))]
    launch(2, *runs, mode="each")
    for case, (kind, _) in CASES.items():
        one, two = (Path(make(case, on).output) for on in (1, 2))
        record(kind, make(case, 1))
        compare(one, two, share, 1e3 if case == "bf16" else 1.0)
        assert (one / "last" / RATES_FILE).is_file() == (two / "last" / RATES_FILE).is_file() == (
            case in ("ctc", "injected"))
        # In shards, both draw the same; whole, each decodes its own part of dev.
        if case not in ("bf16", "left_out") and (share < 1 or case != "llm"):
            alone, both = list(predictions(one)), list(predictions(two))
            assert len(both) > 12
            for a, b in zip(alone, both, strict=True):  # batches of others round otherwise
                assert b.pop("probabilities", {}) == pytest.approx(a.pop("probabilities", {}),
                                                                   abs=1e-4)
                assert b == a
    # Killed after step 3 and resumed from step 2.
    whole, resumed = (Path(config.output) for config in (make("llm", 2), part))
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(run / "last" / name) for run in (whole, resumed))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert [row["loss"] for row in logged(whole)] == [row["loss"] for row in logged(resumed)]
    # Two more steps on one process, from what either has saved.
    for on in (1, 2):
        config = make("llm", on, max_steps=6).model_copy(update={"resume": True})
        Trainer("speech_llm", config).fit()
    steps = [[row["loss"] for row in logged(Path(make("llm", on).output))] for on in (1, 2)]
    assert len(steps[0]) == 6
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
    assert {value.dtype for value in weights(Path(make("bf16", 2).output) / "last").values()} == {
        torch.float32}


@pytest.mark.parametrize(("flag", "value", "says"), [
    ("FSDP_VERSION", "1", "fsdp_version: 2"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: false"),
    ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
    ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"train\.gradient_checkpointing")])
def test_other_ways_to_shard_are_refused_before_anything_is_loaded(
        flag: str, value: str, says: str, tiny_config: Callable[..., Config], sharded: None,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flag, value)
    with pytest.raises(UserError, match=says):
        Trainer("speech_llm", tiny_config(model={"llm": "no/such-model"}))


def test_settings_that_do_not_go_with_shards_are_refused(
        tiny_config: Callable[..., Config], sharded: None) -> None:
    assert sharding_of(tiny_config()) is None  # one process has nothing to share out
    with pytest.raises(UserError, match=r"set train\.on_oom stop"):
        sharding_of(tiny_config(train={"on_oom": "split"}))
    with pytest.raises(UserError, match=r"set model\.quantization none"):
        sharding_of(tiny_config(model={"quantization": "4bit"}))
