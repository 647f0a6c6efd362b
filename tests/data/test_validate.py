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


def run(manifests: Sequence[Path], strict: bool = False, max_warnings: int = 10,
        **options: Any) -> tuple[str, int]:
    """The page, and the exit status."""
    report = validate(manifests, **options)
    return report.page(max_warnings), report.status(strict)


def write_rows(path: Path, rows: Sequence[Line]) -> Path:
    """A manifest; a string or bytes are a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else row for row in rows]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n"
                              for line in lines))
    return path


def noise(seconds: float, channels: int = 1, rate: int = RATE) -> np.ndarray:
    shape = (int(seconds * rate), channels) if channels > 1 else (int(seconds * rate),)
    return np.random.default_rng(0).uniform(-0.3, 0.3, shape).astype(np.float32)


def sound(folder: Path, name: str, samples: np.ndarray | None = None, rate: int = RATE,
          **options: Any) -> str:
    """A file of noise in `folder`/wav; its name as in a manifest."""
    path = folder / "wav" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(3.0) if samples is None else samples, rate, **options)
    return f"wav/{name}"


def cut_bytes(folder: Path, name: str, share: float) -> str:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return name


def broken_audio(folder: Path) -> list[tuple[dict[str, Any], str, str]]:
    """Rows whose audio is at fault, the field that is named, and the kind."""
    sound(folder, "cut.flac", noise(6.0))
    sound(folder, "cut.wav")
    sound(folder, "cut.ogg", noise(6.0))
    nan, loud = noise(3.0), noise(3.0)
    nan[100] = np.nan
    loud *= 30_000
    (folder / "wav/dir.wav").mkdir()
    (folder / "wav/text.wav").write_text("this is no audio")
    (folder / "wav/zero.wav").write_bytes(b"")
    good = sound(folder, "good.wav")
    long = sound(folder, "long.flac", noise(31.0, rate=8000), 8000)

    def cut(*segments: Any) -> dict[str, Any]:
        return {"audio": long, "segments": list(segments)}

    first = {"start": 0, "end": 9, "text": "a"}
    return [
        ({"audio": cut_bytes(folder, "wav/cut.flac", 0.5)}, "audio", "audio"),
        ({"audio": cut_bytes(folder, "wav/cut.wav", 0.5)}, "audio", "audio"),  # the header lies
        ({"audio": cut_bytes(folder, "wav/cut.ogg", 0.5)}, "audio", "audio"),
        ({"audio": "wav/zero.wav"}, "audio", "audio"),
        ({"audio": "wav/dir.wav"}, "audio", "audio"),
        ({"audio": "wav/text.wav"}, "audio", "audio"),
        ({"audio": "wav/gone.wav"}, "audio", "audio_missing"),
        ({"audio": "wav/" + "x" * 300}, "audio", "audio"),
        ({"audio": sound(folder, "nan.wav", nan, subtype="FLOAT")}, "audio", "samples"),
        ({"audio": sound(folder, "integers.wav", loud, subtype="FLOAT")}, "audio", "samples"),
        ({"audio": sound(folder, "empty.wav", np.zeros(0, np.float32))}, "audio", "audio"),
        ({"audio": long}, "audio", "too_long"),
        ({"audio": good, "start": 3.5}, "start", "crop"),
        ({"audio": good, "start": 1.0, "end": 9.0}, "end", "crop"),
        ({"audio": good, "duration": 9.0}, "duration", "length"),
        (cut({"start": 0, "end": 31, "text": "a"}), "segments[0]", "segments"),
        (cut(first | {"ner": [["ORG", 0, 9]]}), "segments[0].ner[0].end", "segments"),
        (cut(first, {"start": 5, "end": 20, "text": "b"}), "segments[1].start", "segments"),
        (cut("a"), "segments[0]", "segments"),
    ]


BROKEN_ROWS: list[tuple[Line, str, str]] = [
    (b'{"id": "u", "text": "caf\xe9"}', "line", "encoding"),
    ("{'id': 'u'}", "line", "json"),
    ('{"id": "u", "text": "a", "text": "b"}', "line", "json"),
    ("{}", "id", "missing"),
    ({"id": "good-0"}, "id", "duplicate_id"),
    ({"text": ""}, "text", "missing"),
    ({"text": "so [NER] it is"}, "text", "marker"),
    ({"sentiment": "Positive"}, "sentiment", "unknown_key"),
    ({"ner": [["PLACE", 19, 99]]}, "ner[0].end", "span"),
    ({"ner": [["ORG", 4, 24], ["PLACE", 19, 24]]}, "ner", "overlap"),
    ({"end": float("inf")}, "end", "value"),
    ({"segments": {}}, "segments", "segments"),
]


def test_every_kind_of_broken_row_is_named_in_one_run_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    rows: list[Line] = []
    expected = []
    broken = [*BROKEN_ROWS, *broken_audio(folder)]
    for i, (change, field, kind) in enumerate(broken):
        audio = sound(folder, f"{i}.wav", noise(2.0 + i / 100))
        rows.append({"id": f"good-{i}", "audio": audio, "text": f"{TEXT} {i}",
                     "ner": [["ORG", 4, 11]], "café": "ü"})
        bad = {"id": f"bad-{i}", "text": TEXT} | change if isinstance(change, dict) else change
        rows.append(bad)
        expected.append((2 * i + 2, field, kind))
    path, out = write_rows(folder / "m.jsonl", rows), tmp_path / "clean/m.jsonl"
    report = validate([path], audio="full", fix=out)
    errors = [(p.line, p.field, p.kind) for p in report.problems if not p.warning]
    assert {line for line, _, _ in errors} == {line for line, _, _ in expected}
    assert set(expected) <= set(errors)
    page = report.page()
    assert all(f"\n{path}:{line}: {field}: " in f"\n{page}" for line, field, _ in expected)
    assert f"{2 * len(broken)} ({len(broken)} with errors, not counted below)" in page
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row | {"audio": ""} for row in kept] == [row | {"audio": ""} for row in rows[::2]
                                                     if isinstance(row, dict)]
    assert run([out], audio="full", strict=True)[1] == 0
    cleaned = read_manifest(out, TaskRegistry(), check_audio=True)
    assert [u.audio.name for u in cleaned if u.audio] == [f"{i}.wav" for i in range(len(broken))]


def test_what_is_worth_a_look_is_a_warning(tmp_path: Path) -> None:
    clipped = np.where(np.arange(3 * RATE) % 100 < 50, 1.0, -1.0).astype(np.float32)
    zeros, low = np.zeros(RATE * 3, np.float32), noise(3.0, rate=4000)
    plain = sound(tmp_path, "plain.wav")
    (tmp_path / "wav/copy.mp3").write_bytes((tmp_path / plain).read_bytes())
    segments = [{"start": 0, "end": 16, "text": "a"}, {"start": 16, "end": 31, "text": "b"}]
    looks = [
        ({"audio": sound(tmp_path, "clipped.wav", clipped)}, "audio", "clipped"),
        ({"audio": sound(tmp_path, "zeros.wav", zeros)}, "audio", "silent (zeros"),
        ({"audio": sound(tmp_path, "low.wav", low, 4000)}, "audio", "4000 Hz"),
        ({"audio": sound(tmp_path, "eight.wav", noise(3.0, 8))}, "audio", "8 channels"),
        ({"audio": "wav/copy.mp3"}, "audio", "is WAV by its content and '.mp3' by its name"),
        ({"audio": plain, "text": "what else"}, "audio", "same audio and another text"),
        ({"audio": sound(tmp_path, "short.wav", noise(1.0)), "text": " ".join([TEXT] * 3)},
         "text", "18.0 words"),
        ({"audio": sound(tmp_path, "slow.wav", noise(20.0)), "text": "hm"},
         "text", "is the transcript whole"),
        ({"text": "caf\ufffd au lait"}, "text", "U+FFFD"),
        ({"text": "so\u200bit is"}, "text", "invisible"),
        ({"text": "a\u0378b"}, "text", "not assigned"),
        ({"audio": sound(tmp_path, "long.wav", noise(31.0)), "text": " ".join([TEXT] * 4),
          "segments": segments}, "audio", "cut at its segments"),
    ]
    rows = [{"id": str(i), "text": TEXT} | change for i, (change, _, _) in enumerate(looks)]
    path = write_rows(tmp_path / "m.jsonl", rows)
    page, status = run([path], audio="full")
    assert status == 0
    for i, (_, field, message) in enumerate(looks, 1):
        (found,) = (line for line in page.splitlines()
                    if line.startswith(f"{path}:{i}: {field}: warning: "))
        assert message in found
    assert f"no errors and {len(looks)} warnings" in page
    assert run([path], audio="full", strict=True)[1] == 1
    short = run([path], audio="full", max_warnings=0)[0]
    assert "warning: " not in short
    assert "more warnings of kind 'clipping'" in short


def test_what_two_manifests_share_is_found(tmp_path: Path) -> None:
    one, two = sound(tmp_path, "a.wav"), sound(tmp_path, "b.wav", noise(2.0))
    train = write_rows(tmp_path / "train.jsonl", [
        {"id": "a", "text": TEXT, "audio": one}, {"id": "b", "text": "yes", "audio": two},
        {"id": "c", "text": TEXT}])
    dev = write_rows(tmp_path / "lists/dev.jsonl", [
        {"id": "x", "text": "no", "audio": f"../{one}"}, {"id": "y", "text": TEXT},
        {"id": "b", "text": "sure"}, {"id": "z", "text": "yes"}])
    report = validate([train, dev])
    starts = [f"{dev}:1: audio: warning: the same audio is in {train}:1",
              f"{dev}:2: text: warning: the same text is in {train}:1",
              f"{dev}:3: id: 'b' is already the id of {train}:2; an id may be in one"]
    assert len(report.problems) == len(starts)
    for problem, start in zip(report.problems, starts, strict=True):
        assert str(problem).startswith(start)
    assert report.status() == 1
    assert validate([train]).status() == 0


def test_copies_of_several_manifests_and_what_is_refused(tmp_path: Path) -> None:
    line = {"text": "ok", "id": "k", "n": [1.5, None]}
    first = write_rows(tmp_path / "one.jsonl", [
        {"id": "a", "text": TEXT, "audio": sound(tmp_path, "a.wav")}, "{}", line])
    second = write_rows(tmp_path / "two.jsonl", [{"id": "z", "text": "b"}])
    out = tmp_path / "clean"
    page, status = run([first, second], fix=out)
    assert status == 1
    assert "4 (1 with errors, not counted below)" in page
    assert sorted(p.name for p in out.iterdir()) == ["one.jsonl", "two.jsonl"]
    kept, as_it_was = map(json.loads, (out / "one.jsonl").read_bytes().splitlines())
    assert as_it_was == line
    assert kept["audio"] == "../wav/a.wav"
    assert run([out / "one.jsonl", out / "two.jsonl"])[1] == 0
    before = {p: p.read_bytes() for p in out.iterdir()}
    for target in (out, tmp_path / "one.jsonl"):
        with pytest.raises(UserError, match="--fix: "):
            run([first], fix=target)
    with pytest.raises(UserError, match="not be written"):
        run([first], fix=first / "below a file")
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert not list(tmp_path.rglob("*.partial"))


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
    page, status = run([path], audio="none")
    assert status == 0
    head, _, *lines = page.splitlines()
    assert head == f"no errors and no warnings in {path}"
    summary = {line[:15].strip(): line[16:] for line in lines}
    assert summary["rows"] == "4 (0 with errors, not counted below)"
    assert summary["text-only rows"] == "1"
    assert summary["pseudo-labels"].startswith("1 rows")
    assert summary["audio"] == "0.00 h; longest 7.5 s; 1 rows of unknown length"
    assert summary["words"] == "12"
    assert summary["corpora"] == "default 2, meetings 2"
    assert summary["speakers"] == "1"
    assert summary["ner"] == ("2 rows (1 of them empty): PLACE 0, QUANT 0, ORG 1, WHEN 0, NORP 0, "
                              "PERSON 1, LAW 0")
    assert summary["sa"] == "1 rows: Positive 1, Neutral 0, Negative 0"
    assert summary["no annotation"] == "1"
    assert run([path])[0].count("audio file does not exist") == 3


def test_tasks_of_ones_own_and_rare_labels(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text('- {kind: label, name: topic, marker: "[TOP]", labels: [a, b], '
                     'open: "[T]", close: "[/T]", multi: true}\n')
    rows: list[Line] = [{"id": str(i), "text": "x", "topic": ["a"]} for i in range(300)]
    rows += [{"id": "x", "text": "a", "topic": ["b", "a"]}, {"id": "y", "text": "a", "topic": []}]
    path = write_rows(tmp_path / "m.jsonl", rows)
    page, status = run([path], tasks_file=tasks)
    assert status == 0
    assert "topic           302 rows: a 301, b 1" in page
    assert f"{path}: topic: warning: 'b' is there 1 times, 'a' 301 times" in page


def test_manifests_are_there_and_named_once(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "m.jsonl", GOOD)
    for none in ([], [good, good], [good, tmp_path / "gone.jsonl"]):
        with pytest.raises(UserError, match=r"no manifest|named twice"):
            validate(none)
