"""The training benchmark: equal clips for all systems, figures that add up, and memory measured apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from unislu_llm.analysis import benchmark_train
from unislu_llm.analysis.benchmark_options import TrainBenchmark
from unislu_llm.analysis.benchmark_peers import PEERS, Ours, Peer, Sizes, slue_clips, write_clips

TINY = Sizes("tiny", "tiny", 512)


def test_clips_have_the_means_of_slue() -> None:
    for n in (4, 16, 500):
        seconds, tokens = slue_clips(n)
        assert len(seconds) == len(tokens) == n
        assert seconds.mean() == pytest.approx(9.2, abs=0.3)
        assert seconds.min() >= 0.5
        assert seconds.max() <= 30
    assert np.array_equal(slue_clips(16)[0], slue_clips(16)[0])


def test_every_system_learns_from_the_same_clips(tmp_path: Path) -> None:
    """Each step changes what trains and nothing else, and its parts are timed."""
    samples, targets = write_clips(tmp_path, np.array([1.0, 2.2]), np.array([12, 20]))
    for name in ("ours", *PEERS):
        torch.manual_seed(0)
        system = Ours(name, TINY, samples, targets) if name == "ours" else Peer(name, TINY, samples, targets)
        before = {n: p.detach().clone() for n, p in system.model.named_parameters()}
        system.step([0, 1])
        system.step([0, 1])
        changed = {n for n, p in system.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed <= {n for n, p in system.model.named_parameters() if p.requires_grad}, name
        assert any(".lora_" in n for n in changed), name
        assert any("projector" in n for n in changed), name
        assert not any("encoder" in n or "audio_tower" in n for n in changed), name
        assert {"load", "mel", "encoder", "projector", "forward", "backward", "optimizer"} == set(system.clock.seconds), name
        assert 0 < system.used <= system.positions


def test_ours_with_a_cache_hears_the_same_and_runs_no_encoder(tmp_path: Path) -> None:
    samples, targets = write_clips(tmp_path, np.array([1.0, 2.2]), np.array([12, 20]))
    found = []
    for cache in (None, tmp_path / "cache"):
        torch.manual_seed(0)
        system = Ours("ours", TINY, samples, targets, cache)
        with torch.no_grad():
            found.append(float(system.loss(system.batch(system.items([0, 1])))))
        assert ("encoder" in system.clock.seconds) == (cache is None)
    assert found[1] == pytest.approx(found[0], rel=1e-3), "frames are stored in fp16"


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    options = TrainBenchmark(encoder="tiny", llm="tiny", vocab=512, parts=["speed"], systems=["ours", "ours, cached", "GlmAsr"],
                             clips=2, batch_size=2, repeats=2, warm_up=0, threads=1, out=out, plot=tmp_path / "speed.svg")
    assert benchmark_train.run(options) == 0
    result = json.loads(out.read_text())["speed"]
    assert set(result["systems"]) == set(options.systems)
    for row in result["systems"].values():
        assert len(row["times"]) == 2
        assert sum(row["share"].values()) == pytest.approx(1.0)
        assert row["samples_per_s"] == pytest.approx(2 / row["seconds"]["median"])
    assert result["systems"]["ours, cached"]["share"]["encoder"] == 0.0
    speed = {name: row["samples_per_s"] for name, row in result["systems"].items()}
    assert result["ratios"]["ours / fastest peer"] == pytest.approx(speed["ours"] / speed["GlmAsr"])
    assert "| ours, cached" in capsys.readouterr().out
    assert (tmp_path / "speed.svg").stat().st_size > 1000


def test_bad_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert benchmark_train.run(TrainBenchmark(systems=["GlmASR"], out=out)) == 2
    assert "did you mean 'GlmAsr'" in capsys.readouterr().err
    assert benchmark_train.run(TrainBenchmark(clips=2, out=out)) == 2
    assert not out.exists()
