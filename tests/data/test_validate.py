"""Validation: all that is wrong is named with file, line and field; the rest is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.validate import validate
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry

TEXT = "the council met in paris today"
RATE = 16_000
Line = dict[str, Any] | str | bytes


def write_rows(path: Path, rows: Sequence[Line]) -> Path:
    """A manifest; a string or bytes are a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else row for row in rows]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n"
                              for line in lines))
    return path


def noise(seconds: float, *channels: int, rate: int = RATE) -> np.ndarray:
    shape = (int(seconds * rate), *channels)
    return np.random.default_rng(0).uniform(-0.3, 0.3, shape).astype(np.float32)


def sound(folder: Path, name: str, samples: np.ndarray | None = None, rate: int = RATE,
          share: float = 1.0, **options: Any) -> str:
    """A file of noise in `folder`/wav, or a share of its bytes; its name as in a manifest."""
    path = folder / "wav" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(6.0) if samples is None else samples, rate, **options)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return f"wav/{name}"


BROKEN_ROWS: list[tuple[Line, str]] = [
    (b'{"id": "u", "text": "caf\xe9"}', "line: byte"),
    ("{}", "id: is missing"),
    ({"id": "good-0"}, "id: 'good-0' is already the id of line 1"),
    ({"ner": [["PLACE", 19, 99]]}, "ner[0].end: 99 is outside"),
    ({"segments": {}}, "segments: is missing"),
]
FIRST = {"start": 0, "end": 9, "text": "a"}
BROKEN_SEGMENTS: list[tuple[list[Any], str]] = [
    ([{"start": 0, "end": 31, "text": "a"}], "segments[0]: has 31.0 s"),
    ([FIRST, {"start": 5, "end": 20, "text": "b"}], "segments[1].start: 5 s is before"),
    (["a"], "segments[0]: must be an object"),
]


def broken_audio(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Rows whose audio is at fault, and what is said of them."""
    nan = noise(3.0)
    nan[100] = np.nan
    good = sound(folder, "good.wav")
    long = sound(folder, "long.flac", noise(31.0, rate=8000), 8000)
    header = sound(folder, "header.wav", np.zeros(RATE), share=44 / (2 * RATE + 44))
    (folder / "wav/dir.wav").mkdir()
    (folder / "wav/zero.wav").write_bytes(b"")
    files = [
        (sound(folder, "cut.flac", share=0.5), "cannot be decoded"),
        (sound(folder, "cut.wav", share=0.5), "truncated"),
        (sound(folder, "cut.ogg", share=0.5), "truncated"),
        (header, "truncated (0 of 32000 bytes"),
        (sound(folder, "empty.wav", np.zeros(0)), "holds no samples"),
        ("wav/zero.wav", "cannot be read as audio"), ("wav/dir.wav", "not a file"),
        ("wav/gone.wav", "does not exist"), ("wav/" + "x" * 300, "does not exist"),
        (sound(folder, "nan.wav", nan, subtype="FLOAT"), "NaN"),
        (sound(folder, "integers.wav", 30_000 * noise(3.0), subtype="FLOAT"), "divide"),
        (long, "31.00 s is longer than 30 s"),
    ]
    return [
        *(({"audio": name}, f"audio: *{message}") for name, message in files),
        *(({"audio": long, "segments": cut}, message) for cut, message in BROKEN_SEGMENTS),
        ({"audio": good, "start": 6.5}, "start: *is outside the file"),
        ({"audio": good, "start": 1.0, "end": 9.0}, "end: *is outside the file"),
        ({"audio": good, "duration": 9.0}, "duration: the row says 9 s"),
    ]


def test_every_kind_of_broken_row_is_named_in_one_run_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    rows: list[Line] = []
    broken = [*BROKEN_ROWS, *broken_audio(folder)]
    for i, (change, _) in enumerate(broken):
        audio = sound(folder, f"{i}.wav", noise(2.0 + i / 100))
        rows.append({"id": f"good-{i}", "audio": audio, "text": f"{TEXT} {i}",
                     "ner": [["ORG", 4, 11]], "condition": "ü"})
        bad = {"id": f"bad-{i}", "text": TEXT} | change if isinstance(change, dict) else change
        rows.append(bad)
    path, out = write_rows(folder / "m.jsonl", rows), tmp_path / "clean/m.jsonl"
    report = validate([path], audio="full", fix=out)
    page = report.page().splitlines()
    for i, (_, message) in enumerate(broken):
        start, _, inside = f"{path}:{2 * i + 2}: {message}".partition("*")
        assert any(line.startswith(start) and inside in line for line in page), message
    assert f"{2 * len(broken)} ({len(broken)} with errors, not counted below)" in report.page()
    assert {p.line % 2 for p in report.problems if not p.warning} == {0}
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row | {"audio": ""} for row in kept] == [row | {"audio": ""} for row in rows[::2]
                                                     if isinstance(row, dict)]
    assert validate([out], audio="full").status(strict=True) == 0
    cleaned = read_manifest(out, TaskRegistry(), check_audio=True)
    assert [u.audio.name for u in cleaned if u.audio] == [f"{i}.wav" for i in range(len(broken))]


def test_what_is_worth_a_look_is_a_warning(tmp_path: Path) -> None:
    clipped = np.where(np.arange(3 * RATE) % 100 < 50, 1.0, -1.0)
    plain = sound(tmp_path, "plain.wav")
    segments = [{"start": 0, "end": 16, "text": "a"}, {"start": 16, "end": 31, "text": "b"}]
    looks = [
        ({"audio": sound(tmp_path, "clipped.wav", clipped)}, "audio", "clipped"),
        ({"audio": sound(tmp_path, "zeros.wav", np.zeros(3 * RATE))}, "audio", "silent (zeros"),
        ({"audio": sound(tmp_path, "low.wav", noise(3.0, rate=4000), 4000)}, "audio", "4000 Hz"),
        ({"audio": sound(tmp_path, "eight.wav", noise(3.0, 8))}, "audio", "8 channels"),
        ({"audio": plain}, "text", "U+FFFD"),
        ({"audio": plain}, "audio", "line 5 has the same audio"),
        ({"audio": sound(tmp_path, "short.wav", noise(1.0)), "text": " ".join([TEXT] * 3)},
         "text", "92 characters a second"),
        ({"audio": sound(tmp_path, "slow.wav", noise(20.0)), "text": "hm"},
         "text", "is the transcript whole"),
        ({"text": "so\u200bit is"}, "text", "invisible"),
        ({"text": "a\u0378b"}, "text", "not assigned"),
        ({"audio": sound(tmp_path, "long.wav", noise(31.0)), "text": " ".join([TEXT] * 4),
          "segments": segments}, "audio", "cut at its segments"),
    ]
    looks[4][0]["text"] = "caf\ufffd au lait"
    rows = [{"id": str(i), "text": TEXT} | change for i, (change, _, _) in enumerate(looks)]
    path = write_rows(tmp_path / "m.jsonl", rows)
    report = validate([path], audio="full")
    page = report.page()
    for i, (_, field, message) in enumerate(looks, 1):
        (found,) = (line for line in page.splitlines()
                    if line.startswith(f"{path}:{i}: {field}: warning: "))
        assert message in found
    assert f"no errors and {len(looks)} warnings" in page
    assert (report.status(), report.status(strict=True)) == (0, 1)
    short = report.page(max_warnings=0)
    assert "warning: " not in short
    assert "more warnings of kind 'clipping'" in short


def test_what_two_manifests_share_is_found(tmp_path: Path) -> None:
    one, two = sound(tmp_path, "a.wav"), sound(tmp_path, "b.wav", noise(2.0))
    train = write_rows(tmp_path / "train.jsonl", [
        {"id": "a", "text": TEXT, "audio": one}, {"id": "b", "text": "yes", "audio": two},
        {"id": "c", "text": TEXT}])
    dev = write_rows(tmp_path / "lists/dev.jsonl", [
        {"id": "x", "text": "it was no", "audio": f"../{one}"}, {"id": "y", "text": TEXT},
        {"id": "b", "text": "sure"}, {"id": "z", "text": "yes"}])
    report = validate([train, dev])
    starts = [f"{dev}:1: audio: warning: the same audio is in {train}:1",
              f"{dev}:2: text: warning: the same text is in {train}:1",
              f"{dev}:3: id: 'b' is already the id of {train}:2; an id may be in one"]
    assert len(report.problems) == len(starts)
    for problem, start in zip(report.problems, starts, strict=True):
        assert str(problem).startswith(start)
    assert (report.status(), validate([train]).status()) == (1, 0)


def test_copies_of_several_manifests_and_what_is_refused(tmp_path: Path) -> None:
    line = {"text": "ok", "id": "k", "n": [1.5, None]}
    first = write_rows(tmp_path / "one.jsonl", [
        {"id": "a", "text": TEXT, "audio": sound(tmp_path, "a.wav")}, "{}", line])
    second = write_rows(tmp_path / "two.jsonl", [{"id": "z", "text": "b"}])
    out = tmp_path / "clean"
    report = validate([first, second], fix=out)
    assert report.status() == 1
    assert "4 (1 with errors, not counted below)" in report.page()
    assert sorted(p.name for p in out.iterdir()) == ["one.jsonl", "two.jsonl"]
    kept, as_it_was = map(json.loads, (out / "one.jsonl").read_bytes().splitlines())
    assert (as_it_was, kept["audio"]) == (line, "../wav/a.wav")
    before = {p: p.read_bytes() for p in out.iterdir()}
    for target, message in ((out, "--fix: "), (first, "--fix: "),
                            (first / "below a file", "not be written")):
        with pytest.raises(UserError, match=message):
            validate([first], fix=target)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert not list(tmp_path.rglob("*.partial"))
    for none in ([], [first, first], [first, tmp_path / "gone.jsonl"]):
        with pytest.raises(UserError, match=r"no manifest|named twice"):
            validate(none)


GOOD: list[dict[str, Any]] = [
    {"id": "a", "text": "anna met the council", "corpus": "meetings", "speaker": "s1",
     "duration": 2.5, "audio": "u0.wav",
     "ner": [{"label": "PERSON", "start": 0, "end": 4}, {"label": "ORG", "start": 13, "end": 20}]},
    {"id": "b", "text": "all is well", "corpus": "meetings", "speaker": "s1", "end": 9.0,
     "start": 1.5, "audio": "u1.wav", "ner": []},
    {"id": "c", "text": "glad of it", "sa": "Positive"},
    {"id": "d", "text": "so so", "audio": "u2.wav", "text_source": "whisper"},
]


def test_summary_of_a_good_manifest(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", GOOD)
    report = validate([path], audio="none")
    assert report.status() == 0
    assert report.page() == f"""no errors and no warnings in {path}

rows            4 (0 with errors, not counted below)
text-only rows  1
pseudo-labels   1 rows, transcribed by a recogniser
audio           0.00 h; longest 7.5 s; 1 rows of unknown length
words           12
corpora         default 2, meetings 2
speakers        1
ner             2 rows (1 of them empty): PLACE 0, QUANT 0, ORG 1, WHEN 0, NORP 0, PERSON 1, LAW 0
sa              1 rows: Positive 1, Neutral 0, Negative 0
no annotation   1"""


def test_tasks_of_ones_own_and_rare_labels(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text('- {kind: label, name: topic, marker: "[TOP]", labels: [a, b], '
                     'open: "[T]", close: "[/T]", multi: true}\n')
    topics = [["a"]] * 300 + [["b", "a"], []]
    path = write_rows(tmp_path / "m.jsonl", [{"id": str(i), "text": "x", "topic": topic}
                                             for i, topic in enumerate(topics)])
    report = validate([path], tasks_file=tasks)
    assert report.status() == 0
    assert "topic           302 rows: a 301, b 1" in report.page()
    assert f"{path}: topic: warning: 'b' is there 1 times, 'a' 301 times" in report.page()


def test_annotations_of_no_known_task_are_warned_of(tmp_path: Path) -> None:
    dose = {"label": "DOSE", "start": 0, "end": 3}
    rows = [{"id": str(i), "text": TEXT, "drugs": [dose] * i, "gender": "f"} for i in range(3)]
    report = validate([write_rows(tmp_path / "m.jsonl", rows)])
    assert [str(p) for p in report.problems] == [
        f"{tmp_path / 'm.jsonl'}:1: {key}: warning: is no key of a manifest and no known task (3 "
        "rows), and will not be read; if it is one, --tasks-file FILE names it"
        for key in ("drugs", "gender")]
    assert (report.status(), report.status(strict=True)) == (0, 1)
