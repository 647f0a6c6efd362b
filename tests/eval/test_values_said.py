"""Values count as said where their words stand in a transcript, however they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import values_said

SAID = {"first": ["a 12 ounce latte, please", "no milk", ""],
        "second": ["twelve ounce latte", "a soymilk mocha", "colour it"]}
SLOTS = [{"size": "twelve ounce", "drink": "latte"}, {"milk": " milk"}, {"drink": "color"}]


def test_values_that_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": str(i), "audio": f"{i}.wav", "slots": slots} for i, slots in enumerate(SLOTS)]
    (tmp_path / "orders.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(values_said, "transcripts", lambda name, clips: SAID[name])
    values_said.main(values_said.Options(tmp_path / "orders.jsonl", [*SAID],
                                         out=tmp_path / "said.json"))
    first, second = json.loads((tmp_path / "said.json").read_text())["rows"]
    assert (first["clips"], first["values"]) == (3, 4)
    assert [row["recall"]["value"] for row in (first, second)] == [75.0, 75.0]
    assert second["difference"]["low"] < second["difference"]["value"] == 0
    assert "| second  |" in capsys.readouterr().out
