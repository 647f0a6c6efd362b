"""The better system is better, and everything that a report needs is named when it is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.errors import Options, label_errors, report, word_errors
from tests.scoring.rows import NAMES, REGISTRY, TEXT, WRONG, ner, records, row
from unislu_llm.errors import UserError
from unislu_llm.scoring.score import flat_scores, score_predictions
from unislu_llm.tasks import SA, TaskRegistry


def system(quality: int) -> list[dict[str, Any]]:
    """12 predictions of entities and 12 of sentiment; the first `quality` of each are right."""
    spoken = [ner(f"{TEXT} row {i}", NAMES, f"{TEXT} row {i}" if i < quality else WRONG,
                  NAMES if i < quality else [], i) for i in range(12)]
    felt = [row(i, "sa", "so it goes", "so it goes", SA.labels[i % 3],
                SA.labels[(i if i < quality else i + 1) % 3], corpus="vc") for i in range(12)]
    return [*spoken, *felt]


def write(path: Path, some: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two runs with predictions."""
    monkeypatch.chdir(tmp_path)
    found = [Path("runs/bad"), Path("runs/good")]
    for run, quality in zip(found, (3, 9), strict=True):
        write(run / "predictions/best-dev.jsonl", system(quality))
        write(run / "config.yaml", [{}])
        write(run / "best/config.json", [{"model_type": "speech_llm", "model": {}, "bases": {},
                                          "tasks": TaskRegistry().to_dict()}])
        write(run / "best/model.safetensors", [])
    return found


def test_words_and_labels_by_kind_of_error() -> None:
    spoken = [ner("a b c d", [], "a x c", [], 1),        # 1 substitution, 1 deletion
              ner("e f", [], "e f g h i", [], 2),        # 3 insertions, too long
              ner("k l m n o p", [], "k l m n o p", [], 3, problems=["loop"]),
              ner("q r s t u v w y", [], "a x c", [], 4)]  # 3 substitutions, 5 deletions
    found = word_errors(records(*spoken), "slue")
    assert found["words"] == {"n": 4, "wer": 65.0, "errors": 13, "substitutions": 4,
                              "deletions": 6, "insertions": 3, "hits": 10, "ref_words": 20,
                              "long": 1, "loop": 1, "wer_without": pytest.approx(100 * 10 / 12)}
    assert {name: part["wer"] for name, part in found["length"].items()} == {
        "2-2 words": 150.0, "4-4 words": 50.0, "6-6 words": 0.0, "8-8 words": 100.0}
    some = records(row(3, "sa", "a b c d e", "a b c d x", "Neutral", "Neutral"),  # 20 % wrong
                   row(1, "sa", "so", "so", "Positive", "Negative"))
    scores = label_errors(some, SA, "slue")["scores"]
    assert (scores["accuracy_at_0"], scores["accuracy_at_0-20"]) == (0.0, 100.0)


def test_the_better_system_is_better_and_both_have_their_scores(
        runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(Options(runs, out=Path("out/e.md"), resamples=200))
    text, numbers = Path("out/e.md").read_text(), Path("out/e.json").read_text()
    assert str(tmp_path.parent) not in text + numbers
    assert all(title in text for title in ("WER by length", "vp: PLACE", "## `sa`", "`3` (vp)"))
    result = json.loads(numbers)
    pair, found = result["comparisons"]["good"], result["systems"]["good"]["corpora"]["(all)"]
    scores, flat = pair["scores"], flat_scores(score_predictions(system(9), REGISTRY))
    assert scores.keys() >= {"wer", "wer/vp", "wer/vc", "ner/f1", "sa/macro_f1", "slue_score"}
    assert scores["wer"]["high"] < 0 < scores["ner/f1"]["low"] <= scores["ner/f1"]["difference"]
    assert pair["utterances"]["vp"] == {"better": 6, "equal": 6, "worse": 0}
    assert pair["utterances"]["(all)"] == {"better": 6, "equal": 18, "worse": 0}
    assert [e["id"] for e in pair["examples"]] == ["3", "4", "5", "6", "7"]
    assert (pair["examples"][0]["first"], pair["examples"][0]["errors"]) == (WRONG, [4, 0])
    assert scores["ner/f1"]["other"] == pytest.approx(flat["ner_f1"])
    assert found["tasks"]["ner"]["scores"]["f1"] == flat["ner_f1"]
    assert found["tasks"]["sa"]["scores"]["macro_f1"] == flat["sa_f1"]
    assert found["words"]["wer"] == flat["wer"]
    # Files, in any order of rows, make the same report.
    capsys.readouterr()
    files = [write(Path("bad.jsonl"), system(3)[::-1]), write(Path("good.jsonl"), system(9))]
    report(Options(files, resamples=200))
    assert capsys.readouterr().out == text


def test_data_that_differ_are_refused_or_left_out(runs: list[Path],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(Path("a.jsonl"), system(3)[2:]), write(Path("b.jsonl"), system(9)[:-1])]
    with pytest.raises(UserError, match=r"'a' lacks 2 of 24 \(e.g. vp/0#ner\), 'b' lacks 1 of 24"):
        report(Options(files))
    report(Options(files, common=True, resamples=20))
    assert "21 predictions; 3 that not all systems have left out" in capsys.readouterr().out
    write(files[1], [r | {"ref_text": r["ref_text"] + " too"} for r in system(3)[2:]])
    with pytest.raises(UserError, match="different references of v"):
        report(Options(files))


def test_bad_input_is_named(runs: list[Path]) -> None:
    x, empty = write(Path("x.jsonl"), [{"id": "a", "corpus": "c"}]), write(Path("e.jsonl"), [])
    (runs[0] / "predictions/best-dev.jsonl").rename("bad.jsonl")
    for options, message in (
            (Options(), "no system is named"), (Options(runs[1:] * 2), "named twice"),
            (Options(runs, resamples=0), "--resamples must be"),
            (Options(runs, out=Path("a.json")), "names the Markdown report"),
            (Options(runs), "run `unislu evaluate runs/bad` first"),
            (Options([x]), "prediction 1, field 'task'.*unislu evaluate"),
            (Options([empty]), "there are none")):
        with pytest.raises(UserError, match=f"(?s){message}"):
            report(options)
