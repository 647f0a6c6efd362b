"""The console command: answers on stdout, problems named, exit status for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.cli import main
from unislu_llm.decoding.generate import understand
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


def write_rows(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    """A manifest; a string is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


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
                        lambda model, files, *_: [{"file": str(f), **a} for f, a in zip(files, answers, strict=True)])
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


@pytest.mark.parametrize(("args", "expected"), [
    (["gone", "a.wav"], "gone: there is no such folder"),
    (["runs", "a.wav"], "runs is neither a run folder"),
    (["runs/tiny"], "no audio file is named"),
    (["runs/tiny", "a.wav", "--tasks", "nerr"], "unknown task 'nerr'"),
    (["runs/tiny", "a.wav", "--batch-size", "0"], "--batch-size must be 1 or more"),
    (["runs/tiny", "a.wav"], "a.wav: audio file does not exist"),
])
def test_predict_refuses(args: list[str], expected: str, unislu: Run, tiny_run: Callable[..., Path]) -> None:
    tiny_run()
    status, out, errors = unislu("predict", *args)
    assert (status, out) == (2, "")
    assert len(errors) == 1
    assert expected in errors[0]


GOOD = [
    {"id": "a", "text": "anna met the council", "corpus": "meetings", "speaker": "s1", "duration": 2.5,
     "audio": "u0.wav", "ner": [{"label": "PERSON", "start": 0, "end": 4}, {"label": "ORG", "start": 13, "end": 20}]},
    {"id": "b", "text": "all is well", "corpus": "meetings", "speaker": "s1", "end": 9.0, "start": 1.5,
     "audio": "u1.wav", "ner": []},
    {"id": "c", "text": "glad of it", "sa": "Positive"},
    {"id": "d", "text": "so so", "audio": "u2.wav"},
]


def test_validate_summarises_a_good_manifest(unislu: Run, tmp_path: Path) -> None:
    status, out, errors = unislu("validate", write_rows(tmp_path / "m.jsonl", GOOD))
    assert (status, errors) == (0, [])
    summary = {line[:15].strip(): line[16:] for line in out.splitlines()[2:]}
    assert "no problems" in out
    assert summary["rows"] == "4"
    assert summary["text-only rows"] == "1"
    assert summary["audio"] == ("0.00 h (2 rows; mean 5.0 s, longest 7.5 s); 1 rows of unknown length "
                                "(--audio measures them)")
    assert summary["words"] == "12"
    assert summary["corpora"] == "default 2, meetings 2"
    assert summary["speakers"] == "1"
    assert summary["ner"] == ("2 rows (1 of them empty), 2 spans: PLACE 0, QUANT 0, ORG 1, WHEN 0, NORP 0, PERSON 1, "
                              "LAW 0")
    assert summary["sa"] == "1 rows: Positive 1, Neutral 0, Negative 0"
    assert summary["no annotation"] == "1"
    bars = [line.split() for line in out.splitlines() if "#" in line]
    assert [(bar[0], bar[1]) for bar in bars] == [("2-3", "1"), ("7-8", "1")]


def test_validate_reads_to_the_end_and_names_every_problem(unislu: Run, tmp_path: Path) -> None:
    rows = [GOOD[0] | {"ner": [{"label": "ORG", "start": 13, "end": 99}, {"label": "PERSN", "start": 0, "end": 4}]},
            "{not json", GOOD[1] | {"end": 40.0}, GOOD[2], GOOD[2]]
    first, second = write_rows(tmp_path / "m.jsonl", rows), write_rows(tmp_path / "n.jsonl", [GOOD[2] | {"sa": "Glad"}])
    status, out, errors = unislu("validate", first, second)
    assert (status, errors) == (1, [])
    problems = out.partition(" problems in ")[0].splitlines()[:-1]
    starts = [f"{first}:1: ner[0].end: ", f"{first}:1: ner[1].label: ", f"{first}:2: line: ",
              f"{first}:3: audio: 38.50 s ", f"{first}:5: id: ", f"{second}:1: sa: "]
    assert len(problems) == len(starts)
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(start)
    assert "6 problems in" in out
    assert "6 (5 with problems, not counted below)" in out


def test_validate_opens_audio_when_asked(unislu: Run, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "junk.wav").write_text("not audio")
    rows = [{"id": "ok", "text": "a", "audio": "audio/u0.wav"},
            {"id": "stated", "text": "a", "audio": "audio/u1.wav", "duration": 5.0},
            {"id": "crop", "text": "a", "audio": "audio/u2.wav", "start": 7},
            {"id": "junk", "text": "a", "audio": "junk.wav"},
            {"id": "gone", "text": "a", "audio": "gone.wav"}]
    path = write_rows(tmp_path / "m.jsonl", rows)
    assert unislu("validate", path)[0] == 0
    status, out, _ = unislu("validate", path, "--audio")
    assert status == 1
    starts = [f"{path}:2: duration: the row says 5 s, the audio has 1.60 s", f"{path}:3: audio: ", f"{path}:4: audio: ",
              f"{path}:5: audio: "]
    for line, start in zip(out.splitlines()[:4], starts, strict=True):
        assert line.startswith(start)
    assert "1 rows; mean 0.9 s" in out


def test_validate_with_tasks_of_ones_own(unislu: Run, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text('- {kind: label, name: topic, marker: "[TOP]", labels: [a, b], open: "[T]", close: "[/T]", '
                     'multi: true}\n')
    path = write_rows(tmp_path / "m.jsonl", [{"id": "x", "text": "a", "topic": ["b", "a"]},
                                             {"id": "y", "text": "a", "topic": []}])
    status, out, _ = unislu("validate", path, "--tasks-file", tasks)
    assert status == 0
    assert "topic           2 rows: a 1, b 1" in out


def test_validate_goes_on_behind_a_missing_manifest(unislu: Run, tmp_path: Path) -> None:
    good = write_rows(tmp_path / "m.jsonl", GOOD)
    status, out, errors = unislu("validate", tmp_path / "gone.jsonl", good)
    assert status == 2
    assert len(errors) == 1
    assert "gone.jsonl" in errors[0]
    assert "rows            4" in out
    assert unislu("validate")[0] == 2


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
