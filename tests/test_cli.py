"""The console command: answers on stdout, problems named, exit status for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from unislu_llm.cli import main
from unislu_llm.decoding.generate import DecodeOptions, understand
from unislu_llm.models.base import SLUModel
from unislu_llm.utterance import Utterance

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def unislu(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command: exit status, stdout, error lines."""

    def run(*args: str | Path) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        status = main([str(a) for a in args])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out, [line for line in printed.err.splitlines() if line.startswith("error: ")]

    return run


@pytest.fixture
def files(make_utterances: Callable[..., list[Utterance]]) -> list[Path]:
    return [u.audio for u in make_utterances(seconds=[0.9, 1.6, 0.6]) if u.audio]


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_predict_prints_what_understand_gives(kind: str, unislu: Run, tiny_run: Callable[..., Path],
                                              files: list[Path]) -> None:
    run = tiny_run(kind)
    status, out, errors = unislu("predict", run, *files, "--json", "--threads", "1")
    assert (status, errors) == (0, [])
    expected = understand(SLUModel.from_pretrained(run / "best"), files)
    assert [json.loads(line) for line in out.splitlines()] == json.loads(json.dumps(expected))
    status, out, _ = unislu("predict", run / "best", *files, "--tasks", "sa", "--threads", "1")
    assert status == 0
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [str(f) for f in files]
    assert out.count("  sa: ") == out.count("  text: ") == 3
    assert "  ner: " not in out


def test_people_see_entities_and_labels(unislu: Run, tiny_run: Callable[..., Path], files: list[Path],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"text": "anna met the council", "ner": [["PERSON", "anna"], ["ORG", "council"]], "sa": "Neutral",
                "problems": []},
               {"text": "\x1b[2J", "ner": [], "sa": None, "problems": ["no_end"]}]
    monkeypatch.setattr("unislu_llm.decoding.generate.understand",
                        lambda model, files, *_, **__: [{"file": str(f), **a} for f, a in zip(files, answers, strict=True)])
    _, out, _ = unislu("predict", tiny_run(), *files[:2], "--threads", "1")
    assert out.splitlines() == [
        str(files[0]), "  text: anna met the council", "  ner: PERSON: anna; ORG: council", "  sa: Neutral",
        str(files[1]), "  text: \ufffd[2J", "  ner: none", "  sa: no usable answer", "  malformed: no_end"]


def test_predict_answers_the_readable_files(unislu: Run, tiny_run: Callable[..., Path], files: list[Path],
                                            tmp_path: Path) -> None:
    junk, long = tmp_path / "junk.wav", tmp_path / "long.wav"
    junk.write_text("not audio")
    soundfile.write(long, np.zeros(31 * 8000, dtype=np.float32), 8000)
    gone = tmp_path / "gone.wav"
    status, out, errors = unislu("predict", tiny_run(), files[0], junk, gone, files[1], long, "--json",
                                 "--threads", "1")
    assert status == 2
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(files[0]), str(files[1])]
    assert len(errors) == 3
    for path, error in zip((junk, gone, long), errors, strict=True):
        assert error.startswith(f"error: {path}: ")
    assert "add --long-audio windows" in errors[-1]


def test_predict_answers_long_files_by_windows(unislu: Run, tiny_run: Callable[..., Path], files: list[Path],
                                               tmp_path: Path) -> None:
    long = tmp_path / "long.wav"
    soundfile.write(long, 0.1 * np.random.default_rng(0).standard_normal(40 * 8000), 8000)
    run = tiny_run("whisper_slu")
    ways = ("--long-audio", "windows", "--overlap", "3", "--grounded", "--num-beams", "2", "--threads", "1")
    status, out, errors = unislu("predict", run, files[0], long, *ways, "--json")
    assert (status, errors) == (0, [])
    short, windowed = map(json.loads, out.splitlines())
    model = SLUModel.from_pretrained(run / "best")
    assert short == json.loads(json.dumps(understand(model, files[:1], options=DecodeOptions(grounded=True, num_beams=2))[0]))
    assert (windowed["windows"][0]["start"], windowed["windows"][-1]["end"]) == (0.0, 40.0)
    assert windowed["windows"][0]["end"] - windowed["windows"][1]["start"] == pytest.approx(3.0)
    status, out, _ = unislu("predict", run, long, *ways)
    assert status == 0
    assert out.splitlines()[0] == str(long)
    assert f"  sa: {windowed['sa']}" in out.splitlines()


@pytest.mark.parametrize(("args", "expected"), [
    (["gone", "a.wav"], "gone: there is no such folder"),
    (["runs", "a.wav"], "runs is neither a run folder"),
    (["runs/tiny"], "no audio file is named"),
    (["runs/tiny", "a.wav", "--tasks", "nerr"], "unknown task 'nerr'"),
    (["runs/tiny", "a.wav", "--batch-size", "0"], "--batch-size must be 1 or more"),
    (["runs/tiny", "a.wav"], "a.wav: audio file does not exist"),
    (["runs/tiny", "a.wav", "--num-beams", "0"], "--num-beams must be 1 or more"),
    (["runs/tiny", "a.wav", "--n-best", "2"], "--n-best 2 needs --num-beams 2"),
    (["runs/tiny", "a.wav", "--grounded", "--no-grammar"], "--grounded needs the grammar"),
    (["runs/tiny", "a.wav", "--overlap", "2"], "add --long-audio windows"),
    (["runs/tiny", "a.wav", "--overlap", "12", "--long-audio", "windows"], "an overlap of windows must be"),
])
def test_predict_refuses(args: list[str], expected: str, unislu: Run, tiny_run: Callable[..., Path]) -> None:
    tiny_run()
    status, out, errors = unislu("predict", *args)
    assert (status, out) == (2, "")
    assert len(errors) == 1
    assert expected in errors[0]


def test_help_does_not_wait_for_torch() -> None:
    code = ("import sys\nfrom unislu_llm.cli import main\n"
            "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout
    assert "validate" in done.stdout


def test_evaluate_script_shows_its_settings() -> None:
    script = Path(__file__).resolve().parents[1] / "eval" / "evaluate.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--decode.batch-size" in done.stdout
