"""Runs on several corpora: asked shares in the plan and in the log, the same for any number of processes, exact resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unislu_llm.data.batching import BatchPlan, seconds
from unislu_llm.data.manifest import write_manifest
from unislu_llm.training.build import build_mixture, build_registry, load_samples
from unislu_llm.training.config import Config, load_config
from unislu_llm.training.loop import Trainer

SCRIPT = Path(__file__).with_name("mixed_run.py")
ASKED = {"entities": 0.5, "feelings": 0.3, "speech": 0.2}
AUGMENT: dict[str, Any] = {"freq_masks": 1, "time_masks": 1, "speeds": [0.9, 1.0, 1.1], "gain_db": 3.0, "silence_share": 0.1}


@pytest.fixture
def corpora(make_utterances: Any, tmp_path: Path) -> list[str]:
    """Manifests of entities (named by its rows), sentiment and speech alone (named by their files), of uneven sizes."""
    utterances = make_utterances(seconds=[0.5 + 0.07 * i for i in range(24)])
    kinds = {"entities": [u for u in utterances if "ner" in u.labels],
             "feelings": [u for u in utterances if "sa" in u.labels][:3], "speech": [u for u in utterances if not u.labels]}
    for name, rows in kinds.items():
        corpus = name if name == "entities" else "default"
        write_manifest(tmp_path / "m" / f"{name}.jsonl", [replace(u, corpus=corpus) for u in rows])
    return [str(tmp_path / "m" / f"{name}.jsonl") for name in kinds]


def rows_of(run: Path, part: str) -> list[dict[str, Any]]:
    """Logged rows of one part of a run."""
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["part"] == part]


def shares_in(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("share_")}


def run(config: Config, folder: Path, name: str, processes: int) -> Path:
    """Train in as many processes; the run folder."""
    config.output = str(folder / name)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config.to_dict()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(launcher if processes > 1 else [sys.executable]), str(SCRIPT), str(folder / f"{name}.yaml")]
    done = subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"mixture: 3 corpora, {config.data.epoch_samples} samples an epoch" in done.stdout
    return folder / name


def test_shares_of_200_steps_are_the_asked_ones_on_1_and_2_processes(tiny_config: Callable[..., Config],
                                                                     corpora: list[str]) -> None:
    config = tiny_config(data={"train": corpora, "weights": ASKED, "epoch_samples": 300})
    samples = load_samples(corpora, build_registry(config), max_seconds=30.0)
    lengths = [seconds(s.utterance) for s in samples]
    drawn = {}
    for world in (1, 2):
        mixture = build_mixture(config, samples)
        plan = BatchPlan(lengths, 8, 2, config.train.seed, config.train.bucket, mixture)
        ranks = [[s for e in range(6) for s in plan.micro_batches(e, rank, world)][:200] for rank in range(world)]
        drawn[world] = [[i for steps in ranks for micro in steps[step] for i in micro] for step in range(200)]
    assert drawn[1] == drawn[2]
    counts = Counter(mixture.names[mixture.groups[i]] for batch in drawn[1] for i in batch)
    for name, share in ASKED.items():
        assert counts[name] / counts.total() == pytest.approx(share, abs=0.01), name


@pytest.mark.parametrize(("steps", "epoch_samples"), [
    pytest.param(50, 100, id="50-steps"),
    pytest.param(200, 300, id="200-steps", marks=pytest.mark.slow),  # ends within its third epoch
])
def test_trained_shares_are_the_asked_ones_on_1_and_2_processes(tiny_config: Callable[..., Config], corpora: list[str],
                                                                tmp_path: Path, steps: int, epoch_samples: int) -> None:
    """Real optimizer steps; the shares are those that the runs themselves logged."""
    found = {}
    for processes in (1, 2):
        config = tiny_config(data={"train": corpora, "dev": [], "weights": ASKED, "epoch_samples": epoch_samples},
                             train={"epochs": 3, "max_steps": steps, "batch_size": 4, "micro_batch_size": 2}, augment=AUGMENT)
        found[processes] = rows_of(run(config, tmp_path, f"on-{processes}", processes), "train")
    one, two = found[1], found[2]
    assert [r["step"] for r in one] == [r["step"] for r in two] == list(range(1, steps + 1))
    assert [shares_in(r) for r in one] == [shares_in(r) for r in two]
    assert [r["tokens"] for r in one] == [r["tokens"] for r in two], "the same samples fall silent"
    assert [r["audio_seconds"] for r in one] == [r["audio_seconds"] for r in two], "at the same speeds"
    assert [r["loss"] for r in one[:3]] == pytest.approx([r["loss"] for r in two[:3]], rel=1e-3)
    tasks = {"entities": "ner", "feelings": "sa", "speech": "asr"}
    for name, share in ASKED.items():
        assert one[-1][f"share_corpus_{name}"] == pytest.approx(share, abs=0.01)
        assert one[-1][f"share_task_{tasks[name]}"] == pytest.approx(share, abs=0.01), "each corpus has one task"
    epochs = rows_of(tmp_path / "on-1", "epoch")
    ends = [*range(epoch_samples // 4, steps, epoch_samples // 4), steps]
    assert [(r["epoch"], r["step"]) for r in epochs] == list(enumerate(ends))
    assert epochs[1]["share_corpus_speech"] == pytest.approx(0.2, abs=0.011)


def test_resume_is_exact_with_mixture_and_augmentation(tiny_config: Callable[..., Config], corpora: list[str]) -> None:
    """Also its log goes on where it stopped."""
    data = {"train": corpora, "dev": [], "temperature": 3.0, "epoch_samples": 20}
    sections: dict[str, Any] = {"data": data, "augment": AUGMENT}
    settings: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 4, "epochs": 2}
    whole = Trainer("speech_llm", tiny_config("whole", train=settings, **sections))
    whole.fit()
    part = Trainer("speech_llm", tiny_config("part", train=settings | {"save_every": 7}, **sections))
    part.total_steps = 8  # killed after step 8; the checkpoint is of step 7, inside epoch 2
    part.validate = lambda title: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    config = tiny_config("part", train=settings, **sections)
    config.resume = True
    resumed = Trainer("speech_llm", config)
    assert (resumed.progress.step, resumed.progress.epoch) == (7, 1)
    resumed.fit()
    assert shares_in(rows_of(resumed.run, "train")[-1]) == shares_in(rows_of(whole.run, "train")[-1])
    a, b = (load_file(folder / "last" / "model.safetensors") for folder in (whole.run, resumed.run))
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_loader_processes_change_no_batch_and_validation_hears_the_clip_itself(
        tiny_config: Callable[..., Config], corpora: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {"augment": AUGMENT | {"silence_share": 1.0}, "train": {"max_steps": 1}}
    found = []
    for workers in (0, 1):
        data = {"train": corpora, "num_workers": workers, "weights": ASKED}
        trainer = Trainer("speech_llm", tiny_config(f"w{workers}", data=data, **sections))
        found.append(next(iter(trainer.batches(0, 0)))[0])
    assert torch.equal(found[0].mel, found[1].mel)
    assert torch.equal(found[0].target_ids, found[1].target_ids)
    assert all(s.utterance.text == "" for s in found[0].samples)
    monkeypatch.setattr("unislu_llm.data.augment.Augmenter.clip", lambda *_: pytest.fail("augmented in validation"))
    monkeypatch.setattr("unislu_llm.data.augment.Augmenter.masks", lambda *_: pytest.fail("masked in validation"))
    trainer.validate("test")


def test_settings_from_files_and_flags(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {train: [a.jsonl], weights: {a: 2}}\naugment: {noise: musan, speeds: [0.9, 1.1]}\n")
    config = load_config(["--data.temperature", "2", "--data.weights", '{"b": 0.5}', "--augment.freq-masks", "2"],
                         tmp_path / "c.yaml", None, "")
    assert (config.data.temperature, config.data.weights, config.augment.freq_masks) == (2.0, {"b": 0.5}, 2)
    assert config.augment.noise == str(tmp_path / "musan"), "relative to the file"
    assert config.augment.speeds == [0.9, 1.1]
