"""A short form of `eval/survive.py`: what a torn run loses, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_torn_and_damaged_runs_end_as_whole_ones(tmp_path: Path) -> None:
    """In a process of its own: it forks, which a process with threads must not."""
    out = tmp_path / "survive.json"
    done = subprocess.run([sys.executable, str(ROOT / "eval" / "survive.py"), "--moments", "1",
                           "--flips", "32", "--only", "kill", "damage", "twice", "--out", str(out)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in rows} == {"SIGKILL", "damage", "two resumes"}
    assert sum(row["tried"] for row in rows if row["part"] == "damage") == 32
