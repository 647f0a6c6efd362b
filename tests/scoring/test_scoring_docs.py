"""The example of docs/scoring.md gives what is printed there, and its snippets run."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "scoring.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_example_gives_what_is_printed() -> None:
    (example,) = [block for block in BLOCKS if block.startswith(">>>")]
    test = doctest.DocTestParser().get_doctest(example, {}, PAGE.name, str(PAGE), 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted == 11
    assert result.failed == 0


def test_comparison_names_every_score_of_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    ner = {"id": "u1", "corpus": "vp", "task": "ner", "ref_text": "in paris", "ref": [["PLACE", "paris", 3, 8]],
           "hyp_text": "in paris", "hyp": [["PLACE", "paris"]]}
    sa = {"id": "u2", "corpus": "vc", "task": "sa", "ref_text": "good", "ref": "Positive", "hyp_text": "good", "hyp": "Positive"}
    for run in "ab":
        folder = tmp_path / "runs" / run / "predictions"
        folder.mkdir(parents=True)
        (folder / "best-dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ner, sa)))
    monkeypatch.chdir(tmp_path)
    (snippet,) = [block for block in BLOCKS if not block.startswith(">>>")]
    exec(compile(snippet, str(PAGE), "exec"), {})
    named = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    listed = re.search(r"# (wer, .*)", snippet)
    assert listed is not None
    expected = [name for part in listed[1].split(", ") for name in (["wer/vc", "wer/vp"] if "<corpus>" in part else [part])]
    assert named == expected
