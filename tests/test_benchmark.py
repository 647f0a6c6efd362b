"""The measuring bench runs on random models of any size; its figures are of this machine."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from eval.benchmark import main


@pytest.mark.parametrize(("what", "names"), [("train", ["batch 2"]),
                                             ("decode", ["batch 1", "batch 2"])])
def test_it_measures(what: str, names: list[str], tmp_path: Path,
                     capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    main([what, "--encoder", "tiny", "--llm", "tiny", "--clips", "3", "--rounds", "1",
          "--batch-size", "2", "--batch-sizes", "1", "2", "--new-tokens", "24", "--threads", "1",
          "--device", "cpu", "--no-memory", "--out", str(out)])
    found = json.loads(out.read_text())[what]
    assert list(found) == names
    assert all(row["clips_per_s"] > 0 and row["tokens_per_s"] > 0 for row in found.values())
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_ways_of_a_hypothesis_and_recognisers(tiny_checkpoints: dict[str, str],
                                              tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    common = ["--clips", "2", "--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(out)]
    main(["decode", "--encoder", "tiny", "--llm", "tiny", "--batch-sizes", "2", "--new-tokens",
          "24", "--ways", "token", "verbatim", *common])
    found = json.loads(out.read_text())["decode"]
    assert list(found) == ["batch 2, token", "batch 2, verbatim"]
    assert all(0 < row["prompt_s"] < row["seconds"] for row in found.values())
    main(["recognise", "--recogniser", tiny_checkpoints["whisper"], "--silence", "1",
          "--num-beams", "1", "2", *common])
    found = json.loads(out.read_text())["recognise"]
    name = f"{tiny_checkpoints['whisper']}, 1 s of silence"
    assert list(found) == [name, f"{name}, 2 beams"]
    assert all(row["wer"] > 0 for row in found.values())


def test_the_gpu_job_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny, without the adapters, which need weights; a part that fails exits with 1."""
    folder = Path(__file__).parents[1] / "eval"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.argv", [
        "gpu_job.py", "--tiny", "--device", "cpu", "--steps", "1", "--out", str(tmp_path),
        "--only", "exact", "train", "decode", "shards"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(folder / "gpu_job.py"), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().out
    exact = json.loads((tmp_path / "exact.json").read_text())["rows"]
    assert [row["equal"] for row in exact if "equal" in row] == [4, 4]
    assert all(row["gradient_difference"] < (0.1 if "bf16" in row["what"] else 1e-6)
               for row in exact if "loss" in row)
    shards = json.loads((tmp_path / "shards.json").read_text())["rows"]
    assert [row["what"][:3] for row in shards if row["gradient_difference"] < 1e-5] == [
        "whi", "llm"]
    train = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert not [row["way"] for row in train if "failed" in row]
