"""README's table of what ran where is that of the result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "eval")
    import what_ran

    return what_ran


def test_readme_shows_the_result_files(script: Any) -> None:
    assert script.table(script.read_results()) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_fault_is_shown_and_what_nobody_tried_is_not_run(script: Any) -> None:
    ways = {name: {"status": "run"} for name in script.WAYS}
    files = {"cpu": {"ways": ways | {"4-bit weights": {"status": "wrong"}}},
             "H100": {"ways": {"4-bit weights": {"status": "run"},
                               "8-bit weights": {"status": "failed"}}}}
    lines = script.table(files).splitlines()
    assert "| one process, fp32 | run | not run |" in lines
    assert "| 4-bit weights | wrong | run |" in lines
    assert "| 8-bit weights | run | failed |" in lines


def test_each_way_has_its_config(script: Any) -> None:
    for way in script.WAYS.values():
        path = ROOT / "recipes" / "accelerate" / f"{way.launch}.yaml"
        assert not way.launch or path.is_file()
