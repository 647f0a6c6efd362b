"""The scorers find in made rows what was counted while corrupting them, and the check says so when they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unislu_llm.analysis import check_scoring
from unislu_llm.analysis.check_scoring import ENTITY_KINDS, WORD_KINDS, Corrupted, check_all, corrupt, run_check
from unislu_llm.tasks import Span
from unislu_llm.utterance import Utterance

PHRASES = [("PLACE", "europe"), ("ORG", "the european council"), ("WHEN", "two thousand and four"), ("QUANT", "twenty percent"),
           ("PERSON", "o'neil"), ("NORP", "europe's"), ("LAW", "article 7."), ("PLACE", "europe")]


def made(i: int) -> Utterance:
    """Row i of many: none to three entities, also the same twice, beside numbers, fillers and contractions."""
    chosen = [PHRASES[(i + j) % len(PHRASES)] for j in range(i % 4)]
    text, spans = "we have to work with the people of this parliament. uh, don't", []
    for label, phrase in chosen:
        text += " say"
        spans.append(Span(label, len(text) + 1, len(text) + 1 + len(phrase)))
        text += f" {phrase}"
    return Utterance(f"u{i}", None, f"{text} as you can. it is twenty one today", {"ner": tuple(spans)}, corpus="made")


ROWS = [made(i) for i in range(50)]


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    lines = ["id\tnormalized_text\tnormalized_ner"]
    tags = {"PLACE": "GPE", "WHEN": "DATE", "QUANT": "PERCENT"}
    for u in ROWS:
        spans = [[tags.get(s.label, s.label), s.start, s.end - s.start] for s in u.labels["ner"] if isinstance(s, Span)]
        lines.append(f"{u.id}\t{u.text}\t{spans}")
    path = tmp_path / "made.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("seed", range(2))
def test_every_scenario_has_the_counts_known_by_construction(seed: int) -> None:
    results = check_all(ROWS, 8, seed)
    assert list(results) == ["gold", *ENTITY_KINDS, *WORD_KINDS, "all at once"]
    assert all(r["equal"] for r in results.values()), {name: r for name, r in results.items() if not r["equal"]}
    gold = results["gold"]["rates"]
    assert {p: [v for k, v in gold[p].items() if k != "equal"] for p in gold} == {
        "slue": [0.0, 100.0, 100.0], "whisper": [0.0, 100.0, 100.0], "position": [100.0]}
    n = sum(len(u.labels["ner"]) for u in ROWS)
    dropped = results["drop entity"]["counts"]["whisper"]["entity"]
    assert dropped["found"] == {"tp": n - 8, "fp": 0, "fn": 8}
    assert results["change label"]["counts"]["slue"]["label"]["found"] == {"tp": n - 8, "fp": 8, "fn": 8}
    assert results["change phrase word"]["counts"]["slue"]["label"]["found"] == {"tp": n, "fp": 0, "fn": 0}
    assert results["add entity"]["counts"]["position"]["entity"]["found"] == {"tp": n, "fp": 8, "fn": 0}
    for kind, name in zip(WORD_KINDS, ("deletions", "substitutions", "insertions"), strict=True):
        zeros = {"substitutions": 0, "deletions": 0, "insertions": 0}
        assert results[kind]["counts"]["whisper"]["edits"]["found"] == zeros | {name: 8}


def test_corruptions_change_what_they_say() -> None:
    (row,) = [c for c in corrupt(ROWS, ("change phrase word",), 1, 0) if c.used]
    before = Corrupted.of(row.ref)
    assert row.words == before.words
    assert [a[0] for a in row.pred] == [b[0] for b in before.pred]
    assert sum(a != b for a, b in zip(row.pred, before.pred, strict=True)) == 1
    texts = [[c.text for c in corrupt(ROWS, WORD_KINDS, 5, seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("name", "broken", "scenario"), [
    ("entity_counts", lambda f: lambda *a, **k: np.minimum(f(*a, **k), 2), "gold"),
    ("position_counts", lambda f: lambda items: f([i._replace(pred=i.pred[:2]) for i in items]), "gold"),
    ("edit_counts", lambda f: lambda refs, hyps, p: f(refs, hyps, p)[:, [1, 0, 2, 3]], "drop word"),
])
def test_a_scorer_that_errs_is_found_out(name: str, broken: Callable[[Any], Any], scenario: str, tsv: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check_scoring, name, broken(getattr(check_scoring, name)))
    assert run_check(tsv, 3, 0, tmp_path / "out.json") == 1
    result = json.loads((tmp_path / "out.json").read_text())
    assert not result["equal"]
    assert not result["scenarios"][scenario]["equal"]
    assert f"DIFFERS  {scenario}:" in capsys.readouterr().out


def test_results_name_the_file_and_no_folder(tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "out.json"
    assert run_check(tsv, 3, 0, out, ["eval/check_scoring.py", f"--tsv={tsv}", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["tsv"]["file"], result["rows"], result["equal"]) == ("made.tsv", 50, True)
    assert str(tmp_path) not in out.read_text()
    assert {"git", "python", "packages", "date"} <= set(result["versions"])
    assert run_check(tsv, 10_000, 0, out) == 2
    assert "give --k" in capsys.readouterr().err
    assert json.loads(out.read_text()) == result, "nothing is written then"
