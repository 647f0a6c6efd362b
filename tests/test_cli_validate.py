"""`unislu validate`: everything that is wrong is named with file, line and field; the rest is counted, and can be kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.cli import main
from unislu_llm.data.manifest import read_manifest
from unislu_llm.tasks import TaskRegistry

Run = Callable[..., tuple[int, str, list[str]]]
TEXT = "the council met in paris today"
RATE = 16_000


@pytest.fixture
def validate(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command: exit status, stdout, error lines."""

    def run(*args: str | Path) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        status = main(["validate", *map(str, args)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out, [line for line in printed.err.splitlines() if line.startswith("error: ")]

    return run


def write_rows(path: Path, rows: Sequence[dict[str, Any] | str | bytes]) -> Path:
    """A manifest; a string or bytes are a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else row for row in rows]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def noise(seconds: float, channels: int = 1, rate: int = RATE) -> np.ndarray:
    shape = (int(seconds * rate), channels) if channels > 1 else (int(seconds * rate),)
    return np.random.default_rng(0).uniform(-0.3, 0.3, shape).astype(np.float32)


def sound(folder: Path, name: str, samples: np.ndarray | None = None, rate: int = RATE, **options: Any) -> str:
    """A file of noise in `folder`/wav; its name as in a manifest."""
    path = folder / "wav" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(3.0) if samples is None else samples, rate, **options)
    return f"wav/{name}"


def cut_bytes(folder: Path, name: str, share: float) -> str:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return name


def broken_audio(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Rows whose audio is at fault, and the field that is named."""
    sound(folder, "cut.flac", noise(6.0))
    sound(folder, "cut.wav")
    sound(folder, "cut.ogg", noise(6.0))
    nan, loud = noise(3.0), noise(3.0)
    nan[100] = np.nan
    loud *= 30_000
    (folder / "wav/dir.wav").mkdir()
    (folder / "wav/text.wav").write_text("this is no audio")
    (folder / "wav/zero.wav").write_bytes(b"")
    (folder / "wav/page.html.flac").write_text("<html>404</html>")
    good, long = sound(folder, "good.wav"), sound(folder, "long.flac", noise(31.0, rate=8000), 8000)
    return [
        ({"audio": cut_bytes(folder, "wav/cut.flac", 0.5)}, "audio"),
        ({"audio": cut_bytes(folder, "wav/cut.wav", 0.5)}, "audio"),  # the header lies
        ({"audio": cut_bytes(folder, "wav/cut.ogg", 0.5)}, "audio"),
        ({"audio": "wav/zero.wav"}, "audio"),
        ({"audio": "wav/dir.wav"}, "audio"),
        ({"audio": "wav/text.wav"}, "audio"),
        ({"audio": "wav/page.html.flac"}, "audio"),
        ({"audio": "wav/gone.wav"}, "audio"),
        ({"audio": "wav/" + "x" * 300}, "audio"),
        ({"audio": sound(folder, "nan.wav", nan, subtype="FLOAT")}, "audio"),
        ({"audio": sound(folder, "integers.wav", loud, subtype="FLOAT")}, "audio"),
        ({"audio": sound(folder, "empty.wav", np.zeros(0, np.float32))}, "audio"),
        ({"audio": long}, "audio"),
        ({"audio": good, "start": 3.5}, "start"),
        ({"audio": good, "start": 1.0, "end": 9.0}, "end"),
        ({"audio": good, "duration": 9.0}, "duration"),
        ({"audio": long, "segments": [{"start": 0, "end": 31, "text": "a"}]}, "segments[0]"),
        ({"audio": long, "segments": [{"start": 0, "end": 9, "text": "a", "ner": [["ORG", 0, 9]]}]}, "segments[0].ner[0].end"),
        ({"audio": long, "segments": [{"start": 0, "end": 9, "text": "a"}, {"start": 5, "end": 20, "text": "b"}]},
         "segments[1].start"),
        ({"audio": long, "segments": ["a"]}, "segments[0]"),
    ]


BROKEN_ROWS: list[tuple[dict[str, Any] | str | bytes, str]] = [
    (b'{"id": "u", "text": "caf\xe9"}', "line"),
    ("{'id': 'u'}", "line"),
    ('["an", "array"]', "line"),
    ('{"id": "u", "text": "a", "text": "b"}', "line"),
    ('{"id": "u", "end": ' + "9" * 5000 + "}", "line"),
    ({"id": None}, "id"),
    ({"id": "good-0"}, "id"),
    ({"id": 7}, "id"),
    ({"text": ""}, "text"),
    ({"text": 5}, "text"),
    ({"text": "so [NER] it is"}, "text"),
    ({"text": " so it is"}, "text"),
    ({"text": "so\tit is"}, "text"),
    ({"sa": "positive"}, "sa"),
    ({"sa": "Angry"}, "sa"),
    ({"sa": ["Positive"]}, "sa"),
    ({"nre": []}, "nre"),
    ({"sentiment": "Positive"}, "sentiment"),
    ({"ner": [["CITY", 19, 24]]}, "ner[0].label"),
    ({"ner": [["PLACE", 19, 99]]}, "ner[0].end"),
    ({"ner": [["PLACE", -1, 4]]}, "ner[0].start"),
    ({"ner": [["ORG", 4, 24], ["PLACE", 19, 24]]}, "ner"),
    ({"ner": [["ORG", 4, 12]]}, "ner[0].end"),
    ({"ner": [["ORG", 4, "11"]]}, "ner[0].end"),
    ({"ner": [["ORG", 4]]}, "ner[0]"),
    ({"ner": {}}, "ner"),
    ({"start": -1.0}, "start"),
    ({"start": 2.0, "end": 1.0}, "end"),
    ({"start": "0"}, "start"),
    ({"end": float("inf")}, "end"),
    ({"duration": 0}, "duration"),
    ({"speaker": 12}, "speaker"),
    ({"segments": {}}, "segments"),
]


def test_every_kind_of_broken_row_is_named_in_one_run_and_left_out(validate: Run, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    rows: list[dict[str, Any] | str | bytes] = []
    expected: list[str] = []
    broken = [*BROKEN_ROWS, *broken_audio(folder)]
    assert len(broken) > 50
    for i, (change, field) in enumerate(broken):
        rows.append({"id": f"good-{i}", "audio": sound(folder, f"{i}.wav", noise(2.0 + i / 100)), "text": f"{TEXT} {i}",
                     "ner": [["ORG", 4, 11]], "café": "ü"})
        bad = {"id": f"bad-{i}", "text": TEXT} | change if isinstance(change, dict) else change
        rows.append({k: v for k, v in bad.items() if v is not None} if isinstance(bad, dict) else bad)
        expected.append(f"{folder / 'm.jsonl'}:{2 * i + 2}: {field}: ")
    path, out = write_rows(folder / "m.jsonl", rows), tmp_path / "clean/m.jsonl"
    status, printed, errors = validate(path, "--audio", "full", "--fix", out)
    assert (status, errors) == (1, [])
    named = [line for line in printed.splitlines() if line.startswith(f"{path}:") and ": warning: " not in line]
    assert {line.partition(": ")[0] for line in named} == {place.partition(": ")[0] for place in expected}
    for place in expected:
        assert any(line.startswith(place) for line in named), place
    assert f"{2 * len(broken)} ({len(broken)} with errors, not counted below)" in printed
    left = [json.loads(line) for line in Path(f"{out}.left-out.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in left] == [2 * i + 2 for i in range(len(broken))]
    assert left[0]["row"] == '{"id": "u", "text": "caf\\xe9"}'
    assert all(entry["problems"] and entry["file"] == str(path) and entry["row"] for entry in left)
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row | {"audio": ""} for row in kept] == [row | {"audio": ""} for row in rows[::2] if isinstance(row, dict)]
    assert validate(out, "--audio", "full", "--strict")[0] == 0
    assert [u.audio and u.audio.name for u in read_manifest(out, TaskRegistry(), check_audio=True)] == [
        f"{i}.wav" for i in range(len(broken))]


def test_what_is_worth_a_look_is_a_warning(validate: Run, tmp_path: Path) -> None:
    clipped = np.where(np.arange(3 * RATE) % 100 < 50, 1.0, -1.0).astype(np.float32)
    plain = sound(tmp_path, "plain.wav")
    (tmp_path / "wav/copy.mp3").write_bytes((tmp_path / plain).read_bytes())
    soundfile.write(tmp_path / "wav/other.wav", noise(2.5), RATE)
    looks = [
        ({"audio": sound(tmp_path, "clipped.wav", clipped)}, "audio", "clipped"),
        ({"audio": sound(tmp_path, "zeros.wav", np.zeros(RATE * 3, np.float32))}, "audio", "silent (zeros"),
        ({"audio": sound(tmp_path, "low.wav", noise(3.0, rate=4000), 4000)}, "audio", "4000 Hz"),
        ({"audio": sound(tmp_path, "eight.wav", noise(3.0, 8))}, "audio", "8 channels"),
        ({"audio": "wav/copy.mp3"}, "audio", "is WAV by its content and '.mp3' by its name"),
        ({"audio": plain, "text": "what else"}, "audio", "same audio and another text"),  # known by its samples
        ({"audio": sound(tmp_path, "short.wav", noise(1.0)), "text": " ".join(TEXT.split() * 3)}, "text", "18.0 words"),
        ({"audio": sound(tmp_path, "slow.wav", noise(20.0)), "text": "hm"}, "text", "is the transcript whole"),
        ({"text": "caf\ufffd au lait"}, "text", "U+FFFD"),
        ({"text": "so\u200bit is"}, "text", "invisible"),
        ({"text": "a\u0378b"}, "text", "not assigned"),
        ({"audio": sound(tmp_path, "long.wav", noise(31.0)), "text": " ".join(TEXT.split() * 4),
          "segments": [{"start": 0, "end": 16, "text": "a"}, {"start": 16, "end": 31, "text": "b"}]}, "audio", "long_audio cut"),
    ]
    rows = [{"id": str(i), "text": TEXT} | change for i, (change, _, _) in enumerate(looks)]
    path = write_rows(tmp_path / "m.jsonl", rows)
    status, out, _ = validate(path, "--audio", "full")
    assert status == 0
    for i, (_, field, message) in enumerate(looks, 1):
        found = [line for line in out.splitlines() if line.startswith(f"{path}:{i}: {field}: warning: ")]
        assert len(found) == 1, (i, out)
        assert message in found[0]
    assert f"no errors and {len(looks)} warnings" in out
    assert validate(path, "--audio", "full", "--strict")[0] == 1
    assert "warning: " not in validate(path, "--audio", "full", "--max-warnings", "0")[1]
    assert "more warnings of kind 'clipping'" in validate(path, "--audio", "full", "--max-warnings", "0")[1]


def test_what_two_manifests_share_is_found(validate: Run, tmp_path: Path) -> None:
    one, two = sound(tmp_path, "a.wav"), sound(tmp_path, "b.wav", noise(2.0))
    train = write_rows(tmp_path / "train.jsonl", [{"id": "a", "text": TEXT, "audio": one},
                                                  {"id": "b", "text": "yes", "audio": two}, {"id": "c", "text": TEXT}])
    dev = write_rows(tmp_path / "lists/dev.jsonl", [{"id": "x", "text": "no", "audio": f"../{one}"}, {"id": "y", "text": TEXT},
                                                    {"id": "b", "text": "sure"}, {"id": "z", "text": "yes"}])
    status, out, _ = validate(train, dev)
    assert status == 1
    lines = [line for line in out.splitlines() if line.startswith(f"{dev}:") or line.startswith(f"{train}:")]
    starts = [f"{dev}:1: audio: warning: the same audio is in {train}:1",
              f"{dev}:2: text: warning: the same text is in {train}:1",
              f"{dev}:3: id: 'b' is already the id of {train}:2; an id may be in one"]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)
    assert validate(train)[0] == 0


def test_fix_of_several_manifests_and_what_it_refuses(validate: Run, tmp_path: Path) -> None:
    rows: list[dict[str, Any] | str | bytes] = [{"id": "a", "text": TEXT, "audio": sound(tmp_path, "a.wav")}, "{}",
            b'{"text":"ok" , "id":"k",   "n": 1.50}']
    first, second = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "two.jsonl", [{"id": "z", "text": "b"}])
    out = tmp_path / "clean"
    assert validate(first, second, tmp_path / "gone.jsonl", "--fix", out)[0] == 2
    assert sorted(p.name for p in out.iterdir()) == ["one.jsonl", "two.jsonl"]
    assert (out / "one.jsonl").read_bytes().splitlines()[1] == rows[2]
    assert json.loads((out / "one.jsonl").read_text().splitlines()[0])["audio"] == "../wav/a.wav"
    assert validate(out / "one.jsonl", out / "two.jsonl")[0] == 0
    before = {p: p.read_bytes() for p in out.iterdir()}
    for target in (out, tmp_path / "one.jsonl"):
        status, _, errors = validate(first, "--fix", target)
        assert (status, len(errors)) == (2, 1)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert not list(tmp_path.rglob("*.partial"))


def test_characters_that_a_tokenizer_cannot_hold(validate: Run, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    inner = Tokenizer(WordLevel(letters, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "tok")
    path = write_rows(tmp_path / "m.jsonl", [{"id": "a", "text": "all is well"}, {"id": "b", "text": "über łódź"}])
    assert "no warnings" in validate(path)[1]
    status, out, _ = validate(path, "--tokenizer", tmp_path / "tok")
    assert status == 0
    assert f"{path}:2: text: warning: 'ü' (U+00FC) cannot be held by {tmp_path / 'tok'}; 'ł' (U+0142)" in out
    assert "1 warning in" in out
    assert validate(path, "--tokenizer", tmp_path / "nothing here")[0] == 2


GOOD: list[dict[str, Any]] = [
    {"id": "a", "text": "anna met the council", "corpus": "meetings", "speaker": "s1", "duration": 2.5,
     "audio": "u0.wav", "ner": [{"label": "PERSON", "start": 0, "end": 4}, {"label": "ORG", "start": 13, "end": 20}]},
    {"id": "b", "text": "all is well", "corpus": "meetings", "speaker": "s1", "end": 9.0, "start": 1.5,
     "audio": "u1.wav", "ner": []},
    {"id": "c", "text": "glad of it", "sa": "Positive"},
    {"id": "d", "text": "so so", "audio": "u2.wav"},
]


def test_summary_of_a_good_manifest(validate: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", GOOD)
    status, out, errors = validate(path, "--audio", "none")
    assert (status, errors) == (0, [])
    summary = {line[:15].strip(): line[16:] for line in out.splitlines()[2:]}
    assert "no errors and no warnings" in out
    assert summary["rows"] == "4"
    assert summary["text-only rows"] == "1"
    assert summary["audio"] == ("0.00 h (2 rows; mean 5.0 s, longest 7.5 s); 1 rows of unknown length "
                                "(--audio header measures them)")
    assert summary["words"] == "12"
    assert summary["corpora"] == "default 2, meetings 2"
    assert summary["speakers"] == "1"
    assert summary["ner"] == ("2 rows (1 of them empty), 2 spans: PLACE 0, QUANT 0, ORG 1, WHEN 0, NORP 0, PERSON 1, "
                              "LAW 0")
    assert summary["sa"] == "1 rows: Positive 1, Neutral 0, Negative 0"
    assert summary["no annotation"] == "1"
    bars = [line.split() for line in out.splitlines() if "#" in line]
    assert [(bar[0], bar[1]) for bar in bars] == [("2-3", "1"), ("7-8", "1")]
    assert validate(path)[1].count("audio file does not exist") == 3


def test_tasks_of_ones_own_and_rare_labels(validate: Run, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text('- {kind: label, name: topic, marker: "[TOP]", labels: [a, b], open: "[T]", close: "[/T]", '
                     'multi: true}\n')
    rows: list[Any] = [{"id": str(i), "text": "x", "topic": ["a"]} for i in range(300)]
    path = write_rows(tmp_path / "m.jsonl", [*rows, {"id": "x", "text": "a", "topic": ["b", "a"]},
                                             {"id": "y", "text": "a", "topic": []}])
    status, out, _ = validate(path, "--tasks-file", tasks)
    assert status == 0
    assert "topic           302 rows: a 301, b 1" in out
    assert f"{path}: topic: warning: 'b' is there 1 times, 'a' 301 times" in out


def test_goes_on_behind_a_missing_manifest(validate: Run, tmp_path: Path) -> None:
    good = write_rows(tmp_path / "m.jsonl", GOOD)
    status, out, errors = validate(tmp_path / "gone.jsonl", good, "--audio", "none")
    assert status == 2
    assert len(errors) == 1
    assert "gone.jsonl" in errors[0]
    assert "rows            4" in out
    assert validate()[0] == validate(good, good)[0] == 2
