"""From a source to a manifest that validates, with a count for every row that is not in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from unislu_llm.cli import main
from unislu_llm.cli_prepare import SOURCES, main_prepare
from unislu_llm.data import prepare as module
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.prepare import Conll, Csv, SlueHub, SlueVoxCeleb, SlueVoxPopuli, Voice, prepare
from unislu_llm.data.voicing import SAMPLE_RATE, Samples
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry

SPOKEN: list[str] = []
REGISTRY = TaskRegistry()


@dataclass(frozen=True)
class Tone:
    name: str

    def speak(self, text: str) -> Samples:
        SPOKEN.append(text)
        return (0.3 * np.sin(np.arange(SAMPLE_RATE // 2) / 9)).astype(np.float32)


TONES = (Tone("low"), Tone("high"))


def clip(path: Path, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(int(16_000 * seconds)) / 9), 16_000)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("id,audio,text,ner\na,wav/a.flac,in paris,3:8:PLACE\nb,wav/b.flac,we met,[]\nc,wav/c.flac,no file,\n")
    clip(tmp_path / "wav" / "a.flac", 1.0)
    clip(tmp_path / "wav" / "b.flac", 2.0)
    return path


def test_manifest_and_counts(csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "train.jsonl"
    done = prepare(Csv(csv), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["audio"], row["duration"]) for row in rows] == [
        ("a", "../wav/a.flac", 1.0), ("b", "../wav/b.flac", 2.0)]
    assert [u.labels for u in read_manifest(out, REGISTRY, check_audio=True)] == [{"ner": (Span("PLACE", 3, 8),)}, {"ner": ()}]
    assert (done.tally.read, done.written, done.hours) == (3, 2, 3 / 3600)
    assert done.tally.dropped == {"missing audio file": 1}
    assert done.labels["ner"] == {"PLACE": 1}
    assert "rows.csv:4" in str(done)
    assert "c.flac" in str(done)


def test_all_audio_missing_is_fatal_and_writes_nothing(csv: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither does any other"):
        prepare(Csv(csv, audio=tmp_path / "empty"), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(("break_it", "reason"), [
    (lambda path: path.write_bytes(b"no audio"), "audio cannot be read or has no such stretch"),
    (lambda path: clip(path, 31.0), "longer than 30 s"),
])
def test_unusable_audio_is_dropped_and_named(csv: Path, tmp_path: Path, break_it, reason: str) -> None:  # type: ignore[no-untyped-def]
    break_it(tmp_path / "wav" / "b.flac")
    done = prepare(Csv(csv), tmp_path / "x.jsonl")
    assert done.tally.dropped[reason] == 1
    assert "rows.csv:3" in done.tally.named[reason][0]
    assert done.written == 1


def test_crop_outside_the_audio_is_dropped(tmp_path: Path) -> None:
    tsv = tmp_path / "vc.tsv"
    tsv.write_text("id\tnormalized_text\tspeaker_id\tsplit\tsentiment\tstart_second\tend_second\n"
                   "a\tgood\t1\tdev\tPositive\t0.5\t1.75\nb\tbad\t1\tdev\tNegative\t5\t7\n")
    for name in "ab":
        clip(tmp_path / "dev_raw" / f"{name}.flac", 2.0)
    done = prepare(SlueVoxCeleb(tsv, tmp_path), tmp_path / "m.jsonl")
    (u,) = read_manifest(tmp_path / "m.jsonl", REGISTRY, check_audio=True)
    assert (u.start, u.end, u.duration, u.labels, u.corpus) == (0.5, 1.75, 1.25, {"sa": "Positive"}, "slue-voxceleb")
    assert done.tally.dropped == {"audio cannot be read or has no such stretch": 1}


def test_repeated_ids_and_markers_in_the_text_are_dropped(tmp_path: Path) -> None:
    tsv = tmp_path / "vp.tsv"
    tsv.write_text("id\tnormalized_text\tnormalized_ner\na\tone\tNone\na\ttwo\tNone\nb\tsay [NER] now\tNone\n")
    done = prepare(SlueVoxPopuli(tsv), tmp_path / "m.jsonl", corpus="mine")
    assert done.tally.dropped == {"id comes again": 1, "marker [NER] in the text": 1}
    assert [(u.text, u.audio, u.corpus) for u in read_manifest(tmp_path / "m.jsonl", REGISTRY)] == [("one", None, "mine")]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text("\n")
    with pytest.raises(UserError, match="the source is empty"):
        prepare(Conll(tmp_path / "x.conll"), tmp_path / "m.jsonl")


def test_voicing_keeps_annotation_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text("in O\nparis B-PLACE\n\nwe O\nmet O\n")
    source, out = Conll(tmp_path / "x.conll"), tmp_path / "m.jsonl"
    SPOKEN.clear()
    prepare(source, out, voice=Voice(mix="clean"), speakers=TONES)
    rows = read_manifest(out, REGISTRY, check_audio=True)
    assert rows[0].text[3:8] == "paris"
    assert rows[0].labels == {"ner": (Span("PLACE", 3, 8),)}
    assert {u.speaker for u in rows} <= {"low", "high"}
    assert all(u.duration and abs(u.duration - 0.5) < 0.1 for u in rows)
    assert sorted(SPOKEN) == ["in paris", "we met"]
    assert json.loads(out.read_text().splitlines()[0])["audio"] == "m_audio/x-1.opus"
    prepare(source, out, voice=Voice(mix="clean"), speakers=TONES)
    assert len(SPOKEN) == 2


def test_voicing_leaves_recordings_alone(csv: Path, tmp_path: Path) -> None:
    csv.write_text(csv.read_text() + "d,,spoken by a machine,[]\n")
    done = prepare(Csv(csv), tmp_path / "m.jsonl", voice=Voice(voices=("low",), mix="clean"), speakers=TONES)
    rows = {u.id: u for u in read_manifest(tmp_path / "m.jsonl", REGISTRY, check_audio=True)}
    assert rows["a"].audio == tmp_path / "wav" / "a.flac"
    assert (rows["d"].speaker, rows["a"].speaker) == ("low", None)
    assert done.tally.dropped == {"missing audio file": 1}
    with pytest.raises(UserError, match="'bass' is not one of low, high"):
        prepare(Csv(csv), tmp_path / "m.jsonl", voice=Voice(voices=("bass",)), speakers=TONES)


def test_hub_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "cache" / "a.wav")
    rows = [{"id": "a", "normalized_text": "in paris", "normalized_ner": {"type": ["GPE"], "start": [3], "length": [5]},
             "audio": {"bytes": (tmp_path / "cache" / "a.wav").read_bytes(), "path": None}},
            {"id": "b", "normalized_text": "we", "normalized_ner": {"type": [], "start": [], "length": []}, "audio": None}]
    monkeypatch.setattr(module.slue, "load_hub", lambda corpus, split, path: rows)
    done = prepare(SlueHub("voxpopuli", "train"), tmp_path / "m.jsonl")
    (u,) = read_manifest(tmp_path / "m.jsonl", REGISTRY, check_audio=True)
    assert (u.audio, u.duration, u.labels) == (tmp_path / "m_audio" / "a.wav", 1.0, {"ner": (Span("PLACE", 3, 8),)})
    assert done.tally.dropped == {"no audio in the row": 1}
    assert prepare(SlueHub("voxpopuli", "train", with_audio=False), tmp_path / "t.jsonl").rows.text_only == 2


def test_command_line(csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.jsonl"
    assert main(["prepare", "csv", "--file", str(csv), "--out", str(out), "--corpus-name", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "missing audio file" in printed
    assert {u.corpus for u in read_manifest(out, REGISTRY)} == {"mine"}
    assert main_prepare(["csv", "--file", str(tmp_path / "no.csv"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main_prepare(["csv", "--file", str(csv), "--out", str(out), "--audio", str(tmp_path / "no")]) == 2
    assert "--audio" in capsys.readouterr().err


@pytest.mark.parametrize("source", list(SOURCES))
def test_every_source_has_help(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prepare", source, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--out", "--voice", "--tasks-file"))


def test_excluded_manifests_lose_their_rows_by_id_and_by_text(csv: Path, tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text(json.dumps({"id": "a", "text": "else"}) + "\n" + json.dumps({"id": "x", "text": "WE met"}) + "\n")
    rows = tmp_path / "more.csv"
    rows.write_text("id,text,ner\na,in paris,3:8:PLACE\nb,we met,[]\nc,we met again,[]\n")
    assert main_prepare(["csv", "--file", str(rows), "--out", str(tmp_path / "out.jsonl"), "--exclude", str(dev)]) == 0
    assert [u.id for u in read_manifest(tmp_path / "out.jsonl", REGISTRY)] == ["c"]
