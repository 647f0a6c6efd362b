"""Evaluation of runs: what it writes, what it takes up, and that nothing decoded is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unislu_llm import evaluate as module
from unislu_llm.config import DecodeConfig
from unislu_llm.evaluate import evaluate
from unislu_llm.evaluate_options import DecodeFlags, Options
from unislu_llm.io import read_json_lines as lines
from unislu_llm.io import write_sums
from unislu_llm.model_card import read_results
from unislu_llm.scoring.score import score_predictions
from unislu_llm.tasks import TaskRegistry

DEV = Path("corpus/dev.jsonl")
BEST = Path("runs/tiny/predictions/best-dev.jsonl")
Runs = Callable[..., Path]
Printed = pytest.CaptureFixture[str]


def options(*runs: Path, **settings: Any) -> Options:
    """Options for the current folder."""
    return Options(list(runs), **{"out": Path("results"), "threads": 1} | settings)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Ids of the examples of every call of the decoder."""
    seen: list[list[str]] = []
    real = module.predict

    def predict(model: Any, examples: Any, *rest: Any, **more: Any) -> Any:
        seen.append([e.utterance.id for e in examples])
        return real(model, examples, *rest, **more)

    monkeypatch.setattr(module, "predict", predict)
    return seen


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_run_is_decoded_scored_and_described(kind: str, tiny_run: Runs, tmp_path: Path,
                                             decoded: list[list[str]], capsys: Printed) -> None:
    run = tiny_run(kind)
    capsys.readouterr()
    assert evaluate(options(run.absolute())) == 0
    rows = lines(BEST)
    # Training validated the same model in the same way.
    assert rows == lines(run / "predictions/step-000002.jsonl")
    text = Path("results/tiny.json").read_text()
    result = json.loads(text)
    assert result["scores"] == json.loads(json.dumps(score_predictions(rows, TaskRegistry())))
    assert (result["run"], result["checkpoint"], result["step"]) == ("tiny", "best", 2)
    assert result["model"]["model_type"] == kind
    assert result["samples"] == {"ner": 4, "sa": 2, "asr": 2}
    assert result["decode"] == DecodeConfig(max_new_tokens=12, batch_size=3).model_dump()
    decoding, trained = result["decoding"], result["trainable_parameters"]
    assert decoding["audio_seconds"] == pytest.approx(7.3)
    assert decoding["rtf"] == pytest.approx(decoding["seconds"] / 7.3, rel=0.01)
    assert 0 < trained["markers"] < trained["total"] == sum(
        v for k, v in trained.items() if k != "total")
    assert result["training"].keys() == {"seed", "git", "packages"}
    assert str(tmp_path.parent) not in text + BEST.with_suffix(".meta.json").read_text()
    assert read_results([Path("results/tiny.json")], {result["weights_sha256"]: "these"})
    assert capsys.readouterr().out.count("| tiny ") == 2
    assert evaluate(options(run)) == 0
    assert "reused" in capsys.readouterr().out
    assert len(decoded) == 1
    assert json.loads(Path("results/tiny.json").read_text())["decoding"] == decoding


def test_predictions_are_taken_up_until_anything_changes(tiny_run: Runs,
                                                         decoded: list[list[str]]) -> None:
    run = tiny_run()

    def samples(**settings: Any) -> int:
        decoded.clear()
        assert evaluate(options(run, **settings)) == 0
        return sum(map(len, decoded))

    assert [samples(), samples(), samples(again=True)] == [8, 0, 8]
    assert samples(decode=DecodeFlags(batch_size=8)) == 8
    assert samples(limit=4) == 4
    assert samples(precision="bf16") == 8
    assert samples(checkpoint="last") == 8  # its own file
    assert [samples(), samples()] == [8, 0]
    weights = run / "best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    write_sums(run / "best")
    assert samples() == 8
    DEV.write_text(DEV.read_text().replace("paris", "basel"))
    assert samples() == 8
    assert "basel" in BEST.read_text()
    BEST.write_text(BEST.read_text().replace("basel", "paris"))  # typed in by hand
    assert samples() == 8


def test_interrupted_evaluation_goes_on(tiny_run: Runs, decoded: list[list[str]], capsys: Printed,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = tiny_run(), module.predict

    def stop(*args: Any, on_predictions: Callable[..., None], **more: Any) -> Any:
        def keep(rows: Any) -> None:
            on_predictions(rows)
            raise KeyboardInterrupt

        return real(*args, on_predictions=keep, **more)

    monkeypatch.setattr(module, "predict", stop)
    assert evaluate(options(run)) == 130
    assert not BEST.exists()
    partial = next(BEST.parent.glob("*.partial"))
    done = [row["id"] for row in json.loads(partial.read_text())["predictions"]]
    # A kill in the middle of a line.
    partial.write_text(partial.read_text() + '{"seconds": 1.0, "predictions": [{"id": "u')
    monkeypatch.setattr(module, "predict", real)
    whole = partial.read_text()
    partial.write_text(f"{{]\n{whole}")
    assert evaluate(options(run)) == 2
    assert f"{partial}:1: not JSON" in capsys.readouterr().err
    partial.write_text(whole)
    assert evaluate(options(run)) == 0
    assert "3 examples were decoded before" in capsys.readouterr().out
    assert sorted(decoded[1] + done) == sorted(decoded[0])
    assert lines(BEST) == lines(run / "predictions/step-000002.jsonl")
    assert not list(BEST.parent.glob("*.partial"))


def test_one_bad_run_does_not_cost_the_others(tiny_run: Runs, capsys: Printed) -> None:
    run, empty, other = tiny_run(), Path("runs/empty"), Path("runs/other")
    for folder in (empty, other):
        folder.mkdir()
        (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    (run / "last").rename(other / "last")
    assert evaluate(options(run, empty, Path("runs/gone"), run, other)) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [e.split()[1] for e in errors] == ["runs/empty:", "runs/gone:", "runs/tiny:", "3"]
    assert {p.name for p in Path("results").iterdir()} == {"tiny.json", "other-last.json"}
    assert printed.out.count("| other-last ") == 2


def test_what_sets_the_rows_of_a_table_apart_is_named(tiny_run: Runs, capsys: Printed) -> None:
    run, other = tiny_run(), Path("runs/other")
    shutil.copytree(run, other)
    capsys.readouterr()
    assert evaluate(options(run, other)) == 0
    assert "warning" not in capsys.readouterr().out
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("grammar: false", "grammar: true")
                      .replace("  batch_size: 3", "  batch_size: 4"))
    assert evaluate(options(run, other)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "warning: not decoded alike: decode.grammar is false in tiny, true in other")


def test_what_cannot_be_scored_is_said_before_decoding(tiny_run: Runs, decoded: list[list[str]],
                                                       capsys: Printed) -> None:
    run = tiny_run()
    (run / "last").rename("elsewhere")
    Path("text.jsonl").write_text('{"id": "t", "text": "the council met"}\n')
    for expected, settings in {
            "manifest gone.jsonl does not exist": {"manifest": [Path("gone.jsonl")]},
            "dev.jsonl:1: field 'id': tiny/u0#ner is there 2 times": {"manifest": [DEV, DEV]},
            "text.jsonl:1: field 'audio': the row has no": {"manifest": [Path("text.jsonl")]},
            "no checkpoint 'last'; it has 'best'": {"checkpoint": "last"},
            "--decode.num-beams": {"decode": DecodeFlags.model_construct(num_beams=0)},
            "--label a/b": {"label": "a/b"}, "--limit must be 0 or more": {"limit": -1}}.items():
        assert evaluate(options(run, **settings)) == 2
        assert expected in capsys.readouterr().err
    assert not decoded


def test_model_folder_needs_a_manifest_and_probabilities_are_scored(tiny_run: Runs,
                                                                    capsys: Printed) -> None:
    (tiny_run() / "best").rename("mine")
    assert evaluate(options(Path("mine"))) == 2
    assert "give --manifest FILE" in capsys.readouterr().err
    flags = DecodeFlags(force_task=True, grammar=True, max_new_tokens=20)
    assert evaluate(options(Path("mine"), manifest=[DEV], label="x", decode=flags)) == 0
    assert "calibration of sa: ECE" in capsys.readouterr().out
    scores = json.loads(Path("results/mine-dev-x.json").read_text())
    assert scores["predictions"] == "mine/predictions/model-dev-x.jsonl"
    assert scores["decode"] == DecodeConfig(**flags.model_dump(exclude_defaults=True)).model_dump()
    assert scores["calibration"]["sa"]["n"] == 2
    assert scores["scores"]["malformed"]["kinds"].keys() <= {"no_end"}
    assert DecodeFlags.model_fields.keys() == DecodeConfig.model_fields.keys()
