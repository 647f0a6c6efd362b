"""Systems side by side: differences with intervals, and what makes them no comparison is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.test_evaluate import options
from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.evaluate import evaluate
from unislu_llm.evaluate_options import DecodeFlags
from unislu_llm.io import read_json_lines
from unislu_llm.report.compare import compare
from unislu_llm.report.details import training_phrases
from unislu_llm.report.systems import Member
from unislu_llm.tasks import TaskRegistry

A, B = Path("runs/tiny"), Path("runs/perfect")
FILE = Path("predictions/best-dev.jsonl")


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the rows of a prediction file."""
    rows = read_json_lines(path)
    path.write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))


@pytest.fixture
def systems(tiny_run: Callable[..., Path]) -> list[Path]:
    """A run, and one that hears every word."""
    assert evaluate(options(tiny_run())) == 0
    shutil.copytree(A, B)
    rewrite(B / FILE, lambda row: {"hyp_text": row["ref_text"]})
    return [A, B]


def row_of(text: str, score: str) -> list[str]:
    line = next(line for line in text.splitlines() if re.match(rf"\| {score} ", line))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_are_to_the_first_and_those_of_the_report(systems: list[Path]) -> None:
    text = compare(systems, out=Path("out"))
    assert "warning" not in text
    score, first, other, difference = row_of(text, "wer")
    assert (score, other) == ("wer", "0.00")
    report = json.loads(Path("out/report.json").read_text())
    found = next(row for row in report["scores"] if row["key"] == "wer")
    value, change = found["values"]["tiny"], found["differences"]["perfect"]
    assert first == f"{value['value']:.2f}"
    assert difference == (f"{change['value']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}] "
                          f"p {change['p']:.3f}")
    assert change["high"] < 0
    # What a run knows beside its predictions.
    one, two = report["systems"]
    assert (one["baseline"], two["baseline"], two["seeds"]) == (True, False, ["perfect"])
    assert one["decoding"] == two["decoding"]
    assert one["cost"]["parameters"] > one["cost"]["trained"] > 0
    assert one["cost"]["train_minutes"] == report["curves"]["tiny"][-1]["minutes"] > 0
    assert report["curves"]["tiny"][-1]["step"] == 2
    assert "manifests are not here" not in text
    assert sum(row["n"] for row in report["entities"]["ner"]["by_rarity"]) == 4
    example = report["examples"][0]
    assert Path(example["audio"]).is_file()
    assert str(Path.cwd()) not in json.dumps(report)
    assert "transcribes" in report["verdict"][0]
    assert report["verdict"][0] == text.splitlines()[0]
    assert {p.name for p in Path("out").iterdir()} >= {"report.md", "report.tex"}
    shutil.copytree(B, "runs/third")
    assert row_of(compare([*systems, Path("runs/third")]), "wer")[4] == difference
    slue = compare(systems, "slue")
    assert "Protocol: slue" in slue
    assert row_of(slue, "wer")[1] != first


def test_another_decoding_is_named_in_both_tables(systems: list[Path],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    flags = DecodeFlags(grammar=True, transcript="verbatim")
    assert evaluate(options(B, decode=flags, again=True)) == 0
    text = compare(systems)
    assert "warning: not decoded alike: decode.grammar is false in tiny, true in perfect" in text
    assert 'decode.transcript is "rewrite" in tiny, "verbatim" in perfect' in text
    assert text.count("warning") == 2
    assert "warning" not in capsys.readouterr().out, "there was one system"
    (B / FILE).with_suffix(".meta.json").unlink()
    assert "warning: how 'perfect' was decoded is not known" in compare(systems)
    assert evaluate(options(A, B, precision="fp32")) == 0
    assert "warning" not in capsys.readouterr().out
    changed = (B / "config.yaml").read_text().replace("grammar: false", "grammar: true")
    (B / "config.yaml").write_text(changed)
    assert evaluate(options(A, B)) == 0
    assert ("warning: not decoded alike: decode.grammar is false in tiny, true in perfect"
            in capsys.readouterr().out)


def test_a_fresh_run_is_compared_by_the_validation_of_its_best(
        tiny_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_run(), B)
    capsys.readouterr()
    text = compare([A, B])
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: predictions of its validation after 2 steps (best)" for run in ("tiny", "perfect")]
    assert "warning" not in text, "how validations decode is known"
    assert row_of(text, "wer")[3].startswith("+0.00 [")
    # What validation is yet to choose is decoded by rewriting.
    assert evaluate(options(B, decode=DecodeFlags(transcript="rewrite"))) == 0
    assert "warning" not in compare([A, B])
    assert evaluate(options(B, decode=DecodeFlags(transcript="verbatim"))) == 0
    assert 'decode.transcript is "rewrite" in tiny, "verbatim" in perfect' in compare([A, B])
    # A few of them are said to be; of a model that is gone they are left alone.
    assert evaluate(options(A, B, limit=1)) == 0
    capsys.readouterr()
    compare([A, B])
    assert "perfect: predictions of 1 rows of each manifest (--limit)" in capsys.readouterr().out
    state = load_file(B / "best" / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, B / "best" / "model.safetensors")
    assert evaluate(options(A)) == 0
    compare([A, B])
    assert "perfect: predictions of its validation" in capsys.readouterr().out
    # Of stages the last finished one made the best; a file of it is known as well.
    monkeypatch.chdir(A)
    shutil.copytree(".", "adapt", ignore=shutil.ignore_patterns("adapt"))
    shutil.rmtree("predictions")
    config = Path("config.yaml")
    config.write_text(config.read_text().replace("stages: []", "stages: [{name: adapt}]"))
    text = compare([Path("."), Path("adapt/predictions/step-000000.jsonl")])
    assert "warning" not in text
    # The projector's text is no answer of the model: it is decoded.
    config = Path("adapt/config.yaml")
    config.write_text(config.read_text().replace("objective: unified", "objective: ctc"))
    compare([Path("."), Path("adapt")])
    assert Path("adapt/predictions/best-dev.jsonl").is_file()


def test_training_phrases_are_normalised_by_the_models_language(tmp_path: Path) -> None:
    (file := tmp_path / "train.jsonl").write_text(json.dumps(
        {"id": "a", "text": "frau müller sprach", "ner": [["PERSON", 5, 11]]}) + "\n")
    config = Config.model_validate({"data": {"train": [str(file)]}, "model": {"language": "de"}})
    member = Member("a", None, None, {}, SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert training_phrases(member, TaskRegistry(), "whisper") ["ner"] == {"müller": 1}


def test_other_data_is_refused(systems: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(B / FILE, lambda row: {"ref_text": row["ref_text"] + " indeed"})
    with pytest.raises(UserError, match="'perfect' and 'tiny' have different references of 8 of"):
        compare(systems)
    rewrite(B / FILE, lambda row: {"ref_text": row["ref_text"].removesuffix(" indeed"),
                                   "language": "de"})
    with pytest.raises(UserError, match="different languages, which texts are normalised by, of 8"):
        compare(systems)
    rewrite(B / FILE, lambda row: {"language": "en"})
    # Score files whose predictions are elsewhere.
    score = json.loads(Path("results/tiny.json").read_text())
    for name in ("one", "two"):
        Path(f"{name}.json").write_text(json.dumps(score | {"predictions": "gone.jsonl"}))
        score["scores"]["protocols"]["whisper"]["wer"]["by_corpus"]["tiny"]["ref_words"] += 1
    with pytest.raises(UserError, match=r"not scored on the same data: \d+ words of tiny in"):
        compare([Path("one.json"), Path("two.json")])
    score["versions"]["packages"]["whisper-normalizer"] = "0.0.1"
    Path("two.json").write_text(Path("one.json").read_text())
    score["scores"]["protocols"]["whisper"]["wer"]["by_corpus"]["tiny"]["ref_words"] -= 2
    Path("one.json").write_text(json.dumps(score | {"predictions": "gone.jsonl"}))
    with pytest.raises(UserError, match=r"one version of .*; it was 0.0.1 in one, .* in two"):
        compare([Path("one.json"), Path("two.json")])
    # In one table of `unislu evaluate`, two runs with dev sets of their own.
    dev = Path("corpus/dev.jsonl").read_text()
    Path("corpus/other.jsonl").write_text("".join(dev.splitlines(keepends=True)[:4]))
    (B / "config.yaml").write_text((B / "config.yaml").read_text().replace("dev.jsonl",
                                                                         "other.jsonl"))
    assert evaluate(options(A, B)) == 0
    assert "warning: not scored on the same data: " in capsys.readouterr().out


def test_score_files_without_predictions_have_no_intervals(systems: list[Path]) -> None:
    one, two = Path("results/tiny.json"), Path("two.json")
    assert " p 0." in row_of(compare([one, B]), "wer")[3]
    two.write_text(json.dumps(json.loads(one.read_text()) | {"predictions": "gone.jsonl"}))
    text = compare([two, B])
    assert "no intervals of the differences: the predictions of two are not there" in text
    assert re.fullmatch(r"[+-]\d+\.\d\d", row_of(text, "wer")[3])
    assert re.match(r"perfect beside two: transcribes [\d.]+ points better, ", text)
    assert "ner F1" in text.splitlines()[0]


def test_what_is_no_system_is_named(systems: list[Path]) -> None:
    Path("x.json").write_text('{"scores": {}}')
    Path("x.jsonl").write_text('{"id": 3}\n')
    (Path("runs/new") / "predictions").mkdir(parents=True)
    for paths, message in (([], "name the systems"), ([A, A], "is named twice"),
                           ([A, Path("gone")], "gone"), ([A, Path("x.json")], "is no score file"),
                           ([A, Path("x.jsonl")], "x.jsonl cannot be read as predictions"),
                           ([A, Path("gone.jsonl")], "^gone.jsonl cannot be read: No such"),
                           ([A, Path("runs/new")], "neither a run folder")):
        with pytest.raises(UserError, match=message):
            compare(paths)
    shutil.copytree(B / "best", "mine")
    with pytest.raises(UserError, match="nothing to score it on"):
        compare([A, Path("mine")])
    with pytest.raises(UserError, match="--resamples must be 1 or more"):
        compare(systems, resamples=0)


def test_what_is_not_decoded_yet_is_decoded(systems: list[Path]) -> None:
    shutil.rmtree(B / "predictions")
    assert row_of(compare(systems), "wer")[3] == "+0.00 [+0.00, +0.00] p 1.000"
    assert (B / FILE).is_file()


def test_seeds_of_a_system_are_pooled(systems: list[Path]) -> None:
    runs = [Path(f"runs/new-s{seed}") for seed in (1, 2)]
    for seed, (source, run) in enumerate(zip(systems, runs, strict=True), 1):
        shutil.copytree(source, run)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("  seed: 0", f"  seed: {seed}"))
    text = compare([A, *runs], out=Path("out"))
    assert "new is the mean over new-s1, new-s2" in text
    assert "resamples of seeds and utterances" in text
    one, two = (float(row_of(compare([run]), "wer")[1]) for run in runs)
    assert float(row_of(text, "wer")[2]) == pytest.approx((one + two) / 2, abs=0.011)
    report = json.loads(Path("out/report.json").read_text())
    assert report["systems"][1]["seeds"] == ["new-s1", "new-s2"]
    words = report["words"]
    assert words["new"]["all"]["words"] == 2 * words["tiny"]["all"]["words"]
    assert row_of(compare(runs), "wer")[1:3] == [f"{one:.2f}", f"{two:.2f}"], "there is no other"
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 2", "max_steps: 3"))
    assert "runs new-s... are not all pooled" in compare([A, *runs])
