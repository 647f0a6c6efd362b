"""The measuring bench runs on random models of any size; its figures are of this machine."""

from __future__ import annotations

import json
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
