"""The benchmark of decoding: every system writes the same number of tokens, and the result has its fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unislu_llm.analysis import benchmark_decode
from unislu_llm.analysis.benchmark_decode import PlainGenerate, endless, run
from unislu_llm.analysis.benchmark_options import DecodeBenchmark
from unislu_llm.analysis.benchmarking import alternate, decoder_of
from unislu_llm.analysis.runs import find_run, load_model

BOTH = pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])


@BOTH
def test_rows_of_every_system(kind: str, tiny_run: Callable[..., Path], tmp_path: Path) -> None:
    options = DecodeBenchmark(model=[tiny_run(kind)], batch_sizes=[2], clips=2, new_tokens=14, repeats=1, threads=1,
                              manifest=[Path("corpus/dev.jsonl")], parts=["speed", "tasks"], out=tmp_path / "out.json")
    assert run(options, ["benchmark"]) == 0
    result = json.loads(options.out.read_text())
    assert [(r["system"], r["batch"]) for r in result["speed"]] == [
        (name, 2) for name in ("ours", "ours, grammar", "plain generate")]
    for row in result["speed"]:
        assert row["tokens_per_s"] == pytest.approx(14 * row["utterances_per_s"])
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["peak_gib"] > 0
        assert row["device"] == "cpu"
        assert row["dtype"] == "fp32"
    assert len(result["tasks"]) == 3
    assert result["environment"]["git"]


@BOTH
def test_plain_generate_writes_as_many_tokens_as_ours(kind: str, tiny_run: Callable[..., Path]) -> None:
    model = load_model(find_run(tiny_run(kind)))
    waves = [torch.randn(16_000), torch.randn(8_000)]
    with endless(model):
        out = PlainGenerate(model, 9)(waves)
    assert out[:, -9:].shape == (2, 9)
    assert out.shape[1] - len(getattr(model, "prompt", ())) == 9
    assert decoder_of(model).generation_config.eos_token_id == model.codec.eos_id


def test_grammar_overhead_has_its_row(tiny_checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_decode, "VOCABULARIES", (tiny_checkpoints["llm"],))
    options = DecodeBenchmark(new_tokens=12, repeats=2, threads=1, parts=["grammar"], out=tmp_path / "out.json")
    assert run(options) == 0
    row, = json.loads(options.out.read_text())["grammar"]
    assert row["batch"] == 16
    assert row["vocabulary"] > 19
    assert set(row["overhead_percent"]) == {"median", "min", "max"}
    assert row["inside_percent"]["min"] > 0


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(DecodeBenchmark(threads=1, out=tmp_path / "x.json")) == 2
    assert "--model" in capsys.readouterr().err


def test_runs_alternate_and_turn_round() -> None:
    order: list[str] = []
    times = alternate({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert "".join(order) == "baabba"
    assert [len(t) for t in times.values()] == [2, 2]
