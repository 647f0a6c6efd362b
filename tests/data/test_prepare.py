"""From a source to a manifest that validates, with a count for every row that is not in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from unislu_llm.data.corpora import SOURCES, prepare
from unislu_llm.data.corpora.own_data import Conll, Csv
from unislu_llm.data.corpora.slue import SlueVoxCeleb, SlueVoxPopuli
from unislu_llm.data.manifest import read_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry

REGISTRY = TaskRegistry()


def clip(path: Path, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(int(16_000 * seconds)) / 9), 16_000)


def reasons(page: str) -> dict[str, int]:
    """How many rows were dropped, by reason."""
    return {reason: int(n) for n, reason in re.findall(r"(?m)^ +(\d+) row dropped: (.*)$", page)}


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text('id,audio,text,ner\na,wav/a.flac,in paris,"[[""PLACE"", 3, 8]]"\n'
                    "b,wav/b.flac,we met,[]\nc,wav/c.flac,no file,\n")
    clip(tmp_path / "wav" / "a.flac", 1.0)
    clip(tmp_path / "wav" / "b.flac", 2.0)
    return path


def test_manifest_and_counts(csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "train.jsonl"
    done = prepare(Csv(csv), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["audio"], row["duration"]) for row in rows] == [
        ("a", "../wav/a.flac", 1.0), ("b", "../wav/b.flac", 2.0)]
    read = read_manifest(out, REGISTRY, check_audio=True)
    assert [u.labels for u in read] == [{"ner": (Span("PLACE", 3, 8),)}, {"ner": ()}]
    assert reasons(done) == {"missing audio file": 1}
    assert all(part in done for part in ("rows.csv:4", "c.flac", "3 rows read", str(out)))


def test_all_audio_missing_is_fatal_and_writes_nothing(csv: Path, tmp_path: Path) -> None:
    (tmp_path / "wav").rename(tmp_path / "elsewhere")
    csv.write_text(csv.read_text() + "d,,text alone,\n")
    with pytest.raises(UserError, match=r"with audio of 4 is left(.|\n)* 3 row dropped: missing "):
        prepare(Csv(csv), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(("break_it", "reason"), [
    (lambda path: path.write_bytes(b"no audio"), "audio cannot be read or has no such stretch"),
    (lambda path: clip(path, 31.0), "longer than 30 s"),
])
def test_unusable_audio_is_dropped_and_named(csv: Path, tmp_path: Path,
                                             break_it: Callable[[Path], object],
                                             reason: str) -> None:
    break_it(tmp_path / "wav" / "b.flac")
    done = prepare(Csv(csv), tmp_path / "x.jsonl")
    assert reasons(done)[reason] == 1
    assert f"{csv}:3: " in done
    assert len(read_manifest(tmp_path / "x.jsonl", REGISTRY)) == 1


def test_crop_outside_the_audio_is_dropped(tmp_path: Path) -> None:
    tsv = tmp_path / "vc.tsv"
    tsv.write_text("id\tnormalized_text\tspeaker_id\tsplit\tsentiment\tstart_second\tend_second\n"
                   "a\tgood\t1\tdev\tPositive\t0.5\t1.75\nb\tbad\t1\tdev\tNegative\t5\t7\n")
    for name in "ab":
        clip(tmp_path / "dev_raw" / f"{name}.flac", 2.0)
    done = prepare(SlueVoxCeleb(tsv, tmp_path), tmp_path / "m.jsonl")
    (u,) = read_manifest(tmp_path / "m.jsonl", REGISTRY, check_audio=True)
    assert (u.start, u.end, u.duration, u.labels) == (0.5, 1.75, 1.25, {"sa": "Positive"})
    assert u.corpus == "slue-voxceleb"
    assert reasons(done) == {"audio cannot be read or has no such stretch": 1}


def test_repeated_ids_and_markers_in_the_text_are_dropped(tmp_path: Path) -> None:
    tsv = tmp_path / "vp.tsv"
    tsv.write_text("id\tnormalized_text\tnormalized_ner\na\tone\tNone\na\ttwo\tNone\n"
                   "b\tsay [NER] now\tNone\n")
    done = prepare(SlueVoxPopuli(tsv), tmp_path / "m.jsonl", corpus_name="mine")
    assert reasons(done) == {"id comes again": 1, "marker": 1}
    assert f"{tsv}:4: text: holds the marker [NER]" in done
    (u,) = read_manifest(tmp_path / "m.jsonl", REGISTRY)
    assert (u.text, u.audio, u.corpus) == ("one", None, "mine")


def test_what_is_wrong_with_own_data_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,text,sa\na,b,glad\nc,d,Neutral\n,e,\n")
    with pytest.raises(UserError, match=r"2 problems; (.|\n)*x.csv:2: sa(.|\n)*x.csv:4: id"):
        prepare(Csv(tmp_path / "x.csv"), tmp_path / "m.jsonl")


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text("\n")
    with pytest.raises(UserError, match="no row of 0 is left"):
        prepare(Conll(tmp_path / "x.conll"), tmp_path / "m.jsonl")


def test_excluded_manifests_lose_their_rows_by_id_and_by_text(tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text('{"id": "a", "text": "else"}\n{"id": "x", "text": "WE met"}\n')
    rows = tmp_path / "more.csv"
    rows.write_text("id,text,ner\na,in paris,[]\nb,we met,[]\nc,we met again,[]\n")
    prepare(Csv(rows), tmp_path / "out.jsonl", exclude=[dev])
    assert [u.id for u in read_manifest(tmp_path / "out.jsonl", REGISTRY)] == ["c"]


def test_tasks_of_ones_own(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text('- {kind: label, name: topic, marker: "[TOP]", labels: [a, b], '
                     'open: "[T]", close: "[/T]"}\n')
    (tmp_path / "x.csv").write_text("id,text,topic\nu,so it is,b\n")
    done = prepare(Csv(tmp_path / "x.csv"), tmp_path / "m.jsonl", tasks_file=tasks)
    assert "topic           1 rows: a 0, b 1" in done


def test_every_kind_of_source_has_a_name() -> None:
    assert list(SOURCES) == ["slue-voxpopuli", "slue-voxceleb", "slue-hub", "conll", "csv"]
