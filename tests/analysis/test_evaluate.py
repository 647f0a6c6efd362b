"""Evaluation of runs: what it writes, what it reuses, and that nothing decoded is lost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.analysis import evaluate as module
from unislu_llm.analysis.evaluate import add_draft_wer, evaluate
from unislu_llm.analysis.options import DecodeFlags, EvalOptions
from unislu_llm.analysis.runs import checkpoint_step, find_run, portable
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.scoring.calibration import calibrate_rows
from unislu_llm.scoring.rows import read_rows
from unislu_llm.scoring.slue import score_rows
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.config import apply
from unislu_llm.utterance import Utterance

DEV = Path("corpus/dev.jsonl")


def options(*runs: Path, **settings: Any) -> EvalOptions:
    """Options for the current folder."""
    return EvalOptions(list(runs), **{"out": Path("results"), "threads": 1} | settings)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Ids of the samples of every batch that is decoded."""
    from unislu_llm.decoding import generate

    seen: list[list[str]] = []
    real = generate.decode_batch

    def decode_batch(model: Any, samples: Any, *rest: Any) -> Any:
        seen.append([s.utterance.id for s in samples])
        return real(model, samples, *rest)

    monkeypatch.setattr(generate, "decode_batch", decode_batch)
    return seen


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_run_is_decoded_scored_and_described(kind: str, tiny_run: Callable[..., Path], tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(kind)
    capsys.readouterr()
    command = ["eval/evaluate.py", str(run.absolute()), f"--out={Path('results').absolute()}", "--threads", "1"]
    assert evaluate(options(run), command) == 0
    rows = read_rows(run / "predictions/best-dev.jsonl", TaskRegistry())
    assert rows == lines(run / "predictions/step-000002.jsonl")  # training validated the same model in the same way
    result = json.loads(Path("results/tiny.json").read_text())
    assert result["scores"] == json.loads(json.dumps(score_rows(rows, TaskRegistry())))
    assert result["scores"]["protocols"].keys() == {"slue", "whisper"}
    assert (result["run"], result["checkpoint"], result["step"]) == ("tiny", "best", 2)
    assert result["model"]["model_type"] == kind
    assert result["samples"] == {"ner": 4, "sa": 2, "asr": 2}
    assert result["decode"]["max_new_tokens"] == 12  # the run's own
    decoding = result["decoding"]
    assert decoding["audio_seconds"] == pytest.approx(7.3)
    assert decoding["rtf"] == pytest.approx(decoding["seconds"] / 7.3, rel=0.01)
    trained = result["trainable_parameters"]
    assert 0 < trained["markers"] < trained["total"] == sum(v for k, v in trained.items() if k != "total")
    assert {"git", "packages"} <= result["versions"].keys()
    assert result["training"].keys() == {"seed", "git", "packages"}
    assert result["command"] == "eval/evaluate.py runs/tiny --out=results --threads 1"
    assert result["manifests"][0]["file"] == "corpus/dev.jsonl"
    assert result["predictions"] == "runs/tiny/predictions/best-dev.jsonl"
    for written in (Path("results/tiny.json"), run / "predictions/best-dev.meta.json"):
        assert str(tmp_path.parent) not in written.read_text()
    out = capsys.readouterr().out
    assert "Protocol: slue" in out
    assert "Protocol: whisper" in out
    assert out.count("| tiny ") == 2


def test_predictions_are_reused_until_anything_changes(tiny_run: Callable[..., Path], batches: list[list[str]],
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    batches.clear()  # its training validated
    assert evaluate(options(run)) == 0
    first = json.loads(Path("results/tiny.json").read_text())
    assert len(batches) == 3

    def decoded(**settings: Any) -> int:
        before = len(batches)
        capsys.readouterr()
        assert evaluate(options(run, **settings)) == 0
        assert ("reused" in capsys.readouterr().out) == (len(batches) == before)
        return sum(len(ids) for ids in batches[before:])

    assert decoded() == 0
    again = json.loads(Path("results/tiny.json").read_text())
    assert (again["decoding"], again["scores"]) == (first["decoding"], first["scores"])
    assert decoded(again=True) == 8
    assert decoded(force_task=True) == 8
    assert decoded(decode=DecodeFlags(batch_size=8)) == 8
    assert decoded(decode=DecodeFlags(grammar=True, num_beams=2)) == 8
    assert decoded(limit=4) == 4
    assert decoded(precision="bf16") == 8
    assert decoded(checkpoint="last") == 8  # its own file
    assert decoded() == 0  # the first ones, found again
    assert decoded(force_task=True) == 0
    weights = run / "best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert decoded() == 8
    DEV.write_text(DEV.read_text().replace("paris", "basel"))
    assert decoded() == 8
    row = json.loads((run / "predictions/best-dev.jsonl").read_text().partition("\n")[0])
    assert "basel" in row["ref_text"]
    (run / "predictions/best-dev.jsonl").write_text(json.dumps(row | {"hyp_text": "typed in by hand"}) + "\n")
    assert decoded() == 8
    kept = [p for p in (run / "predictions").glob("best-dev.*.jsonl") if "typed in by hand" in p.read_text()]
    assert len(kept) == 1


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_probabilities_are_kept_and_scored(kind: str, tiny_run: Callable[..., Path], batches: list[list[str]],
                                           monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(kind)
    assert evaluate(options(run, probabilities=True)) == 0
    rows = lines(run / "predictions/best-dev.jsonl")
    plain = lines(run / "predictions/step-000002.jsonl")
    assert [{k: v for k, v in row.items() if k != "probabilities"} for row in rows] == plain
    assert [row["task"] for row in rows if "probabilities" in row] == ["sa"] * 2
    samples = {s.key: s for s in module.load_samples([str(DEV)], TaskRegistry(), 0, "dev", 30.0, "refuse")}
    model = module.load_model(find_run(run))
    again = [{**row} for row in plain]
    module.add_probabilities(model, again, samples, 4)
    for row, other in zip(rows, again, strict=True):
        assert row.get("probabilities", {}) == pytest.approx(other.get("probabilities", {}), abs=1e-4)
        assert "probabilities" not in row or sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    result = json.loads(Path("results/tiny.json").read_text())
    assert result["calibration"] == {"sa": json.loads(json.dumps(calibrate_rows(rows, TaskRegistry())["sa"].to_dict()))}
    picture = Path("results/tiny-calibration.svg")
    first = picture.read_bytes()
    assert b"sa: ECE" in first
    before = len(batches)
    assert evaluate(options(run, probabilities=True)) == 0  # reused
    assert (len(batches), picture.read_bytes()) == (before, first)
    assert evaluate(options(run)) == 0  # without the flag nothing of it
    assert "calibration" not in json.loads(Path("results/tiny.json").read_text())
    picture.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert evaluate(options(run, probabilities=True)) == 0
    assert "unislu_llm[plot]" in capsys.readouterr().err
    assert not picture.exists()


def test_interrupted_evaluation_goes_on(tiny_run: Callable[..., Path], batches: list[list[str]],
                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    real = module.predict

    def stop(model: Any, samples: Any, decode: Any, *, progress: str, on_rows: Callable[..., None]) -> Any:
        count = iter(range(2))

        def keep(rows: Any) -> None:
            if next(count):
                raise KeyboardInterrupt
            on_rows(rows)

        return real(model, samples, decode, on_rows=keep)

    monkeypatch.setattr(module, "predict", stop)
    assert evaluate(options(run)) == 130
    assert not (run / "predictions/best-dev.jsonl").exists()
    partial = next((run / "predictions").glob("*.partial"))
    partial.write_text(partial.read_text() + '{"seconds": 1.0, "rows": [{"id": "u')  # a kill in the middle of a line
    monkeypatch.setattr(module, "predict", real)
    kept, batches[:] = batches[0], []
    assert evaluate(options(run)) == 0
    assert [len(ids) for ids in batches] == [3, 2]
    assert not set(kept) & {i for ids in batches for i in ids}
    assert lines(run / "predictions/best-dev.jsonl") == lines(run / "predictions/step-000002.jsonl")
    assert not list((run / "predictions").glob("*.partial"))
    assert "3 samples were decoded before" in capsys.readouterr().out


def test_one_bad_run_does_not_cost_the_others(tiny_run: Callable[..., Path],
                                              capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    empty, other = Path("runs/empty"), Path("runs/other")
    for folder in (empty, other):
        folder.mkdir()
        (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    (run / "last").rename(other / "last")
    assert evaluate(options(run, empty, Path("runs/gone"), run, other)) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [e.split()[1] for e in errors] == ["runs/empty:", "runs/gone:", "runs/tiny:", "3"]
    assert "no checkpoint" in errors[0]
    assert "no such folder" in errors[1]
    assert "another run was named 'tiny'" in errors[2]
    assert {p.name for p in Path("results").iterdir()} == {"tiny.json", "other-last.json"}
    assert printed.out.count("| other-last ") == 2


def test_broken_weights_name_the_run(tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    (run / "best/model.safetensors").write_bytes(b"short")
    assert evaluate(options(run)) == 2
    assert "error: runs/tiny" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "expected"), [
    ({"manifest": [Path("gone.jsonl")]}, "manifest gone.jsonl does not exist"),
    ({"manifest": [DEV, DEV]}, r"dev.jsonl:1: field 'id': 'u0' of corpus 'tiny' is also at"),
    ({"manifest": [Path("text.jsonl")]}, "text.jsonl:1: field 'audio': the row has no audio"),
    ({"checkpoint": "last"}, "no checkpoint 'last'; it has 'best'"),
    ({"decode": DecodeFlags(batch_size=0)}, "--decode.batch-size must be 1 or more, found 0"),
    ({"label": "a/b"}, "--label a/b"),
])
def test_what_cannot_be_scored_is_said_before_decoding(settings: dict[str, Any], expected: str,
                                                       tiny_run: Callable[..., Path], batches: list[list[str]],
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    (run / "last").rename("elsewhere")
    Path("text.jsonl").write_text('{"id": "t", "text": "the council met"}\n')
    assert evaluate(options(run, **settings)) == 2
    assert expected in capsys.readouterr().err
    assert not batches


def test_model_folder_needs_a_manifest(tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run()
    Path("runs/tiny/best").rename("mine")
    assert evaluate(options(Path("mine"))) == 2
    assert "give --manifest FILE" in capsys.readouterr().err
    assert evaluate(options(Path("mine"), manifest=[DEV], label="forced", force_task=True)) == 0
    result = json.loads(Path("results/mine-dev-forced.json").read_text())
    assert (result["checkpoint"], result["step"], result["decode"]["force_task"]) == ("model", None, True)
    assert result["predictions"] == "mine/predictions/model-dev-forced.jsonl"


def test_checkpoint_folder_counts_as_its_run(tiny_run: Callable[..., Path]) -> None:
    run = tiny_run()
    found = find_run(run / "last")
    assert (found.folder, found.checkpoint, found.label, checkpoint_step(found)) == (run, "last", "tiny-last", 2)
    assert find_run(run).checkpoint == "best"
    with pytest.raises(UserError, match="says 'best'"):
        find_run(run / "last", "best")


def test_step_of_a_checkpoint_comes_from_the_log(tiny_run: Callable[..., Path]) -> None:
    run = tiny_run()
    log = [{"part": "dev", "step": 0, "score": 99.0}, {"part": "dev", "step": 10, "score": 5.0},
           {"part": "dev", "step": 20, "score": 7.0}, {"part": "train", "step": 28},
           {"part": "dev", "step": 30, "score": 7.0}, {"part": "train", "step": 36}, {"part": "train", "step": 39}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    best, last = find_run(run, "best"), find_run(run, "last")
    assert (checkpoint_step(best), checkpoint_step(last)) == (20, 30)
    assert last.config is not None
    apply(last.config, {"train": {"save_every": 4}}, "test")
    assert checkpoint_step(last) == 36
    (run / "metrics.jsonl").unlink()
    assert checkpoint_step(best) is None


def test_stored_paths_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert portable("a/b.json") == portable(tmp_path / "here" / "a" / "b.json") == "a/b.json"
    assert portable(tmp_path / "there" / "c.json") == "there/c.json"
    assert portable("/somewhere/else/entirely.json") == "else/entirely.json"


def test_scores_tell_the_wer_of_drafts_by_corpus() -> None:
    said = [Utterance("a", None, "the council met", corpus="x", draft="the council met"),
            Utterance("b", None, "i loved it all", corpus="y", draft="i loved all"),
            Utterance("b", None, "i loved it all", corpus="y", draft="i loved all")]  # another task of it: counted once
    samples = [Sample(u, None) for u in said]

    def scores(rows: list[dict[str, Any]], samples: list[Sample], mode: str = "manifest") -> dict[str, Any]:
        found: dict[str, Any] = {"protocols": {"whisper": {}, "slue": {}}}
        add_draft_wer(found, rows, samples, mode)
        return dict(found["protocols"]["slue"])

    assert scores([], samples)["draft_wer"] == pytest.approx(100 / 7)
    assert scores([], samples)["draft_wer_by_corpus"] == {"x": 0.0, "y": 25.0}
    made = [{"corpus": "y", "id": "b", "task": "asr", "draft": "i loved it all"}]  # what was read counts
    assert scores(made, samples)["draft_wer"] == 0
    assert scores([], [*samples, Sample(Utterance("c", None, "yes"), None)]) == {}  # of a part it would mislead
    assert scores([], samples, "none") == {}
