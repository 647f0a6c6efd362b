"""The console command: answers on stdout, problems named, exit status for scripts."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed import TCPStore

from unislu_llm import Answer, load, understand
from unislu_llm.cli import main
from unislu_llm.config import DecodeConfig
from unislu_llm.utterance import Utterance

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def unislu(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command: exit status, stdout, error lines."""

    def run(*args: str | Path) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in args])
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        return status, printed.out, errors

    return run


@pytest.fixture
def files(make_utterances: Callable[..., list[Utterance]]) -> list[Path]:
    return [u.audio for u in make_utterances(seconds=[0.9, 1.6, 0.6]) if u.audio]


def said(answers: list[Answer]) -> list[dict]:
    found = json.loads(json.dumps([answer.to_dict() for answer in answers]))
    return [{k: v for k, v in answer.items() if k not in ("confidence", "evidence")}
            for answer in found]


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_predict_prints_what_understand_gives(kind: str, unislu: Run, files: list[Path],
                                              tiny_run: Callable[..., Path]) -> None:
    run = tiny_run(kind)
    status, out, errors = unislu("predict", run, *files, "--json")
    assert (status, errors) == (0, [])
    printed = [json.loads(line) for line in out.splitlines()]
    assert [row.pop("file") for row in printed] == [str(file) for file in files]
    assert printed == said(understand(load(run / "best"), files))
    status, out, _ = unislu("predict", run / "best", *files, "--tasks", "sa")
    assert status == 0
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [*map(str, files)]
    assert out.count("  sa: ") == out.count("  text: ") == 3
    assert "  ner: " not in out
    _, out, _ = unislu("predict", run, files[0], "--json", "--confidences")
    assert json.loads(out)["confidence"]["text"] > 0


def test_people_see_entities_and_labels(unislu: Run, tiny_run: Callable[..., Path],
                                        files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [Answer("anna met the council", 1.0,
                      {"ner": (("PERSON", "anna"), ("ORG", "council")), "sa": "Neutral"}),
               Answer("\x1b[2J", 1.0, {"ner": (), "sa": None}, {"sa": ("no_end",)})]
    monkeypatch.setattr("unislu_llm.decoding.files.understand", lambda *_, **__: answers)
    odd = files[1].with_name(os.fsdecode(b"caf\xe9.wav"))  # a name that is none of UTF-8
    shutil.copyfile(files[1], odd)
    _, out, _ = unislu("predict", tiny_run(), files[0], odd)
    assert out.splitlines() == [
        str(files[0]), "  text: anna met the council", "  ner: PERSON: anna; ORG: council",
        "  sa: Neutral", str(odd.with_name("caf\ufffd.wav")), "  text: \ufffd[2J", "  ner: none",
        "  sa: no usable answer", "  malformed: no_end"]


def test_predict_answers_the_readable_files(unislu: Run, tiny_run: Callable[..., Path],
                                            files: list[Path], tmp_path: Path) -> None:
    junk, gone, empty = tmp_path / "junk.wav", tmp_path / "gone.wav", tmp_path / "empty"
    junk.write_text("not audio")
    empty.mkdir()
    status, out, errors = unislu("predict", tiny_run(), files[0], junk, gone, files[1], empty,
                                 "--json")
    assert status == 2
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(f) for f in files[:2]]
    assert len(errors) == 3
    for path, error in zip((junk, gone, empty), errors, strict=True):
        assert error.startswith(f"error: {path}: ")


def test_folders_patterns_and_the_standard_input(unislu: Run, tiny_run: Callable[..., Path],
                                                 files: list[Path],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = tiny_run(), files[0].parent
    pattern = f"{folder}/u[01].wav"
    with files[2].open("rb") as file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
        status, out, errors = unislu("predict", run, folder, pattern, "-", "--json",
                                     "--batch-size", "1")
    assert (status, errors) == (0, [])
    rows = [json.loads(line) for line in out.splitlines()]
    names = [row.pop("file") for row in rows]
    assert names == [*map(str, files), *map(str, files[:2]), "-"]
    assert [row["text"] for row in rows[3:]] == [rows[i]["text"] for i in (0, 1, 2)]
    # The same lines in a file, which is made once.
    args = ("predict", run, folder, "--out", "made/answers.jsonl")
    assert unislu(*args) == (0, "made/answers.jsonl: 3 answers\n", [])
    made = Path("made/answers.jsonl").read_text()
    assert [json.loads(line)["text"] for line in made.splitlines()] == [
        row["text"] for row in rows[:3]]
    status, _, errors = unislu(*args)
    assert (status, Path("made/answers.jsonl").read_text()) == (2, made)
    assert "is there already" in errors[0]
    assert unislu("predict", run, "gone.wav", "--out", "none.jsonl")[0] == 2
    assert not Path("none.jsonl").exists()


def test_answers_come_one_by_one_with_a_bar_on_a_terminal(
        unislu: Run, tiny_run: Callable[..., Path], files: list[Path],
        monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []

    def answers(_: object, inputs: list[object], *__: object, **___: object) -> list[Answer]:
        printed.append(sys.stdout.getvalue())  # type: ignore[attr-defined]
        return [Answer("words", 1.0) for _ in inputs]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("unislu_llm.decoding.files.understand", answers)
    run, shown = tiny_run(), Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", shown)
        patch.setattr("sys.stdout", io.StringIO())
        assert main(["predict", str(run), *map(str, files), "gone.wav", "--batch-size", "1"]) == 2
    assert [text.count("words") for text in printed] == [0, 1, 2], "each batch as it comes"
    assert "4/4" in shown.getvalue()
    assert "error: gone.wav: audio file does not exist" in shown.getvalue()
    assert "file/s" not in unislu("predict", run, *files)[1]

    def stopped(_: object, inputs: list[object], *__: object, **___: object) -> list[Answer]:
        printed.append("")
        if len(printed) == 2:
            raise KeyboardInterrupt
        return [Answer("words", 1.0)]

    printed.clear()
    monkeypatch.setattr("unislu_llm.decoding.files.understand", stopped)
    status, out, errors = unislu("predict", run, *files, "--batch-size", "1")
    assert (status, out.count("words")) == (130, 1), "Ctrl-C keeps what was printed"
    assert not errors, "it is told, and is none"


def test_predict_answers_long_files_by_windows(unislu: Run, tiny_run: Callable[..., Path],
                                               files: list[Path], tmp_path: Path) -> None:
    long = tmp_path / "long.wav"
    soundfile.write(long, 0.1 * np.random.default_rng(0).standard_normal(40 * 8000), 8000)
    run = tiny_run("whisper_slu")
    ways = ("--grounded", "--num-beams", "2")
    status, out, errors = unislu("predict", run, files[0], long, *ways, "--json")
    assert (status, errors) == (0, [])
    short, windowed = map(json.loads, out.splitlines())
    options = DecodeConfig(grounded=True, num_beams=2)
    assert short == {"file": str(files[0]),
                     **said(understand(load(run / "best"), files[:1], options=options))[0]}
    first, last = windowed["windows"][0], windowed["windows"][-1]
    assert (first["start"], last["end"]) == (0.0, 40.0)
    assert first["end"] == windowed["windows"][1]["start"]
    status, out, _ = unislu("predict", run, long, *ways)
    assert status == 0
    assert f"  sa: {windowed['sa'] or 'no usable answer'}" in out.splitlines()


@pytest.mark.parametrize(("args", "expected"), [
    (["gone", "a.wav"], "gone: there is no such folder"),
    (["runs", "a.wav"], "runs is neither a run folder"),
    (["runs/tiny"], "no audio file is named"),
    (["runs/tiny", "a.wav", "--tasks", "nerr"], "unknown task 'nerr'"),
    (["runs/tiny", "a.wav", "--batch-size", "0"], "--batch-size: must be at least 1"),
    (["runs/tiny", "a.wav", "--num-beams", "0"], "needs --num-beams 1 or more"),
    (["runs/tiny", "a.wav"], "a.wav: audio file does not exist"),
    (["runs/tiny", "a.wav", "--n-best", "2"], "needs --num-beams 2"),
    (["runs/tiny", "a.wav", "--grounded", "--no-grammar"], "--grounded needs the grammar"),
    (["runs/tiny", "corpus/audio/u0.wav", "--language", "de"], "language 'de': no recogniser"),
])
def test_predict_refuses(args: list[str], expected: str, unislu: Run,
                         tiny_run: Callable[..., Path]) -> None:
    tiny_run()
    status, out, errors = unislu("predict", *args)
    assert (status, out) == (2, "")
    assert len(errors) == 1
    assert expected in errors[0]


def test_transcribe_adds_what_a_saved_model_recognises(unislu: Run,
                                                       tiny_run: Callable[..., Path]) -> None:
    run = tiny_run("whisper_slu")
    Path("text.jsonl").write_text('{"id": "a", "text": "so it goes"}\n')
    _, out, _ = unislu("transcribe", run, "text.jsonl", "--out", "texts")
    assert "texts/text.jsonl: 1 rows have no audio and no hypothesis; --copy-text" in out
    args = ("transcribe", run, "corpus/dev.jsonl", "--out", "made")
    status, out, errors = unislu(*args)
    assert (status, errors) == (0, [])
    rows = [json.loads(line) for line in Path("made/dev.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all("hypothesis" in row for row in rows)
    assert out.splitlines()[-1].split()[:3] == ["made/dev.jsonl", "8", "8"]
    _, _, errors = unislu(*args, "--pseudo-label", "--copy-text")
    assert "call it twice" in errors[0]


def test_a_manifest_is_prepared_and_validated(unislu: Run, tmp_path: Path) -> None:
    table, out = tmp_path / "own.csv", tmp_path / "own.jsonl"
    table.write_text("id,text,sa\na,we like it,Positive\nb,we left,Neutral\n", encoding="utf-8")
    status, printed, _ = unislu("prepare", "csv", "--file", table, "--out", out)
    assert status == 0
    assert str(out) in printed
    status, printed, _ = unislu("validate", out)
    assert status == 0
    assert "no errors" in printed
    out.write_text(out.read_text().replace("Neutral", "Neutra"), encoding="utf-8")
    status, printed, _ = unislu("validate", out)
    assert status == 1
    assert f"{out}:2: sa: " in printed


def test_frames_are_stored_once(unislu: Run, tiny_run: Callable[..., Path]) -> None:
    run = tiny_run()
    assert "give --folder" in unislu("cache", run)[2][0]
    args = ("cache", run, "--folder", "frames")
    assert unislu(*args)[:2] == (0, "8 clips stored\n")
    assert unislu(*args)[:2] == (0, "0 clips stored\n")
    assert len(list(Path("frames").glob("*/*.npy"))) == 8


def test_flags_of_commands_are_mistyped_or_given_twice(
        unislu: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for args, flag in ((("predict", "m", "a.wav", "--taks", "ner"), "--tasks"),
                       (("evaluate", "m", "--manifset", "a.jsonl"), "--manifest"),
                       (("train", "--train.epcohs", "2"), "--train.epochs")):
        with pytest.raises(SystemExit) as stop:
            main(list(args))
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err
    for args in (("predict", "m", "a.wav", "--tasks", "ner", "--tasks", "sa"),
                 ("evaluate", "m", "--manifest", "a.jsonl", "--manifest", "b.jsonl"),
                 ("export", "m", "--out", "o", "--results", "a.json", "--results=b.json"),
                 ("prepare", "csv", "--file", "f", "--out", "o", "--exclude", "a", "--exclude",
                  "b"), ("train", "--data.dev", "a", "--data.dev", "b")):
        status, _, errors = unislu(*args)
        assert status == 2
        assert re.search(r"--(\S+) is given 2 times; give all of its values behind one", errors[0])


@pytest.mark.parametrize(("decoder", "kind"), [("llm", "speech_llm"), ("whisper", "whisper_slu")])
def test_runs_are_trained_scored_and_compared(decoder: str, kind: str, unislu: Run,
                                              tiny_run: Callable[..., Path]) -> None:
    run = tiny_run(kind)
    dev = "corpus/dev.jsonl"
    status, out, errors = unislu("train", "--decoder", decoder, "--config", run / "config.yaml",
                                 "--output", "a", "--data.train", dev, "--data.dev", dev)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert (status, errors) == (0, [])
    assert out.startswith(f"config: {run / 'config.yaml'}")
    assert ("; preset: none for " in out.splitlines()[0]) == (decoder == "llm")
    assert out.endswith("score it: unislu evaluate a\n"
                        "use it: unislu predict a corpus/audio/u0.wav\n")
    status, out, errors = unislu("evaluate", "a", run, "--out", "scores")
    assert (status, errors) == (0, [])
    assert out.count("| a ") == out.count("| tiny ") == 2
    # The same settings, by the command and by the training loop itself.
    for systems in (("a", run), ("scores/a.json", "scores/tiny.json")):
        status, out, _ = unislu("compare", *systems)
        assert status == 0
        assert re.search(r"\| wer .* \+0\.00 \[\+0\.00, \+0\.00\] p 1\.000 \|", out)


def test_libraries_are_quiet_about_what_nobody_can_change(
        unislu: Run, caplog: pytest.LogCaptureFixture) -> None:
    unislu("--version")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("kernels are missing")
    log.error("this matters")
    assert caplog.messages == ["this matters"]


def test_mistyped_decoders_and_configs(unislu: Run) -> None:
    assert "'wisper' is not one of llm, whisper; did you mean 'whisper'?" in unislu(
        "train", "--decoder", "wisper")[2][0]
    assert "config file gone.yaml does not exist" in unislu("train", "--config", "gone.yaml")[2][0]


def test_a_mini_corpus_that_is_not_there_is_named(unislu: Run, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "recipes" / "configs", tmp_path / "recipes" / "configs")
    monkeypatch.setattr("unislu_llm.training.recipe.shipped", lambda: tmp_path)
    status, out, errors = unislu("train")
    assert (status, out) == (2, "")
    assert "the mini corpus is not there; give corpora of your own by --data.train" in errors[0]


def test_accelerate_launches_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "-m",
               "unislu_llm.cli", "train", "--config", "gone.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "error: config file gone.yaml does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_under_a_launcher_the_message_says_that_nothing_more_follows(
        unislu: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, quiet in (("ACCELERATE_MIXED_PRECISION", True), ("LOCAL_RANK", False)):
        monkeypatch.setenv(name, "0")
        assert main(["train", "--config", "gone.yaml"]) == 2
        error, *more = capsys.readouterr().err.splitlines()
        assert error.startswith("error: config file gone.yaml")
        assert len(more) == 1
        assert "launcher" in more[0]
        assert ("--quiet" in more[0]) == quiet


def test_of_several_processes_one_tells_what_all_have(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "RANK": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)

    def told(*args: str) -> str:
        with contextlib.suppress(SystemExit):
            main(["train", *args])
        return capsys.readouterr().err

    for args, message in ((("--config", "gone.yaml"), "config file gone.yaml"),
                          (("--config", "other.yaml"), "config file other.yaml"),
                          (("--train.lr.lora", "much"), "found 'much'")):
        assert told(*args).count(message) == 1
        assert told(*args) == ""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "gone.yaml" in told("--config", "gone.yaml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "gone")
    assert "gone.yaml" in told("--config", "gone.yaml"), "rather twice than never"


def test_help_version_and_mistyped_commands(unislu: Run) -> None:
    for args in ((), ("--help",)):
        status, out, _ = unislu(*args)
        assert status == 0
        assert re.findall(r"• (\w+)", out) == [
            "predict", "transcribe", "prepare", "validate", "train", "evaluate", "compare",
            "export", "parity", "serve", "demo", "cache"]
        assert len(out.splitlines()) < 40, "a page, not the help of every command"
    for command in ("predict", "transcribe", "validate", "evaluate", "compare"):
        assert "(default: )" not in unislu(command, "--help")[1].partition("-h, --help")[0]
    assert re.fullmatch(r"unislu_llm \S+( \(git [0-9a-f]{40}(\+dirty)?\))?\n",
                        unislu("--version")[1])
    for words, known in ((("predit",), "predict"), (("prepare", "csvv"), "csv"),
                         (("trian",), "train"), (("evalute",), "evaluate")):
        status, _, errors = unislu(*words)
        assert status == 2
        assert f"unknown command '{words[-1]}'; did you mean '{known}'?" in errors[0]
