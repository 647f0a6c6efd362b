"""The cache benchmark: fp32 changes nothing, coarser storage little, and the control differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from unislu_llm.analysis.benchmark_cache import run
from unislu_llm.analysis.benchmark_options import CacheBenchmark
from unislu_llm.data.manifest import write_manifest


def test_rows_are_what_they_say(tiny_checkpoints: dict[str, str], make_utterances: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.jsonl", make_utterances(seconds=[0.6, 0.9, 0.7, 1.0]))
    config = {"model": {"encoder": tiny_checkpoints["whisper"], "llm": tiny_checkpoints["llm"], "projector_options": {"stack": 5},
                        "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]}},
              "data": {"train": ["train.jsonl"]}, "train": {"batch_size": 4, "micro_batch_size": 4, "epochs": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = CacheBenchmark(config=tmp_path / "config.yaml", steps=3, control=1e-2, out=tmp_path / "out.json", threads=1)
    assert run(options) == 0
    rows = {row["variant"]: row for row in json.loads(options.out.read_text())["variants"]}
    for name in ("no cache", "fp32"):
        assert rows[name]["same weights, most"] < 1e-6
        assert rows[name]["steps within 1e-3"] == 3
    assert 0 < rows["fp16"]["same weights, most"] < 1e-3
    assert 0 < rows["bf16"]["same weights, most"] < 1e-2
    assert rows["control"]["same weights, mean"] > rows["fp16"]["same weights, mean"]
