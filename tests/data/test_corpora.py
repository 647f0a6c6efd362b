"""Corpora to manifests: what their author meant, or a message that says where not; a count for
every row that is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.data.corpora import SOURCES, prepare
from unislu_llm.data.corpora.own_data import Conll, Csv
from unislu_llm.data.corpora.slue import SlueVoxCeleb, SlueVoxPopuli
from unislu_llm.data.corpora.source import Dropped
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.row_reader import RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.utterance import Utterance

REGISTRY = TaskRegistry.from_dict([
    {"builtin": "ner"}, {"builtin": "sa"},
    {"kind": "label", "name": "da", "marker": "[DA]", "labels": ["ask", "thanks"], "open": "[A]",
     "close": "[/A]", "multi": True}])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(source: Any) -> list[Utterance]:
    found = []
    for where, row in source.rows(REGISTRY, Dropped(list), Path()):
        u, problems = RowReader(REGISTRY).read(row, where)
        if u is None:
            raise UserError(f"{where}: {problems[0].field}: {problems[0].message}")
        found.append(u)
    return found


def phrases(u: Utterance) -> list[tuple[str, str]]:
    return [(s.label, u.text[s.start:s.end]) for s in u.labels["ner"] if isinstance(s, Span)]


def test_conll(tmp_path: Path) -> None:
    path = write(tmp_path / "x.conll", """-DOCSTART- -X- O O

# a comment
# id = s1
# audio = wav/s1.flac
# sa = Positive
Anna NNP B-PERSON
Smith NNP I-PERSON
loves VB O
New NNP B-PLACE
York NNP I-PLACE
Paris NNP B-PLACE

nothing NN O
""")
    first, second = read(Conll(path))
    assert first.text == "Anna Smith loves New York Paris"
    assert phrases(first) == [("PERSON", "Anna Smith"), ("PLACE", "New York"), ("PLACE", "Paris")]
    assert (first.id, first.audio) == ("s1", tmp_path / "wav" / "s1.flac")
    assert first.labels["sa"] == "Positive"
    assert (second.id, second.audio, second.labels) == ("x-2", None, {"ner": ()})


@pytest.mark.parametrize(("tags", "found"), [
    (["I-ORG", "I-ORG", "O"], ["a b"]),  # IOB1
    (["S-ORG", "B-ORG", "E-ORG"], ["a", "b c"]),
    (["U-ORG", "B-ORG", "L-ORG"], ["a", "b c"]),
    (["B-ORG", "B-ORG", "I-ORG"], ["a", "b c"]),
    (["B-ORG", "I-LAW", "O"], ["a", "b"]),
])
def test_tag_schemes(tmp_path: Path, tags: list[str], found: list[str]) -> None:
    lines = "".join(f"{t}\t{g}\n" for t, g in zip("abc", tags, strict=True))
    (u,) = read(Conll(write(tmp_path / "x", lines)))
    assert [phrase for _, phrase in phrases(u)] == found


def test_conll_columns_and_a_hash_that_is_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "O\t#\nB-ORG\tun\n")
    (u,) = read(Conll(path, token_column=1, tag_column=0))
    assert (u.text, phrases(u)) == ("# un", [("ORG", "un")])
    (u,) = read(Conll(write(tmp_path / "x", "# O\nun B-ORG\n")))
    assert u.text == "# un"


def test_audio_is_found_by_id(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "# id = a\nu O\n\n# id = b\n# audio = clips/1.wav\nv O\n")
    (tmp_path / "a.ogg").touch()
    assert [u.audio for u in read(Conll(path, audio=tmp_path))] == [
        tmp_path / "a.ogg", tmp_path / "clips" / "1.wav"]
    (u,) = read(Csv(write(tmp_path / "x.csv", "id,text\na,b\n"), audio=tmp_path))
    assert u.audio == tmp_path / "a.ogg"


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", """id,audio,text,sa,ner,start,end,speaker,da
a,wav/a.flac,"in Paris, today",Neutral,"[[""PLACE"",3,8],[""WHEN"",10,15]]",1.5,4,anna,"[""ask""]"
b,,in paris,,"[{""label"": ""PLACE"", ""start"": 3, ""end"": 8}]",,,,[]
c,,plain,Negative,[],,,,
""")
    a, b, c = read(Csv(path))
    assert phrases(a) == [("PLACE", "Paris"), ("WHEN", "today")]
    assert (a.start, a.end, a.speaker) == (1.5, 4.0, "anna")
    assert a.audio == tmp_path / "wav" / "a.flac"
    assert (a.labels["sa"], a.labels["da"]) == ("Neutral", ("ask",))
    assert (phrases(b), b.labels["da"]) == ([("PLACE", "paris")], ())
    assert "sa" not in b.labels
    assert c.labels == {"sa": "Negative", "ner": ()}
    (u,) = read(Csv(write(tmp_path / "x.tsv", "id\ttext\tner\na\t in  paris \t[]\n")))
    assert (u.text, u.labels) == ("in paris", {"ner": ()}), "blanks that no span counts"


@pytest.mark.parametrize(("name", "text", "message"), [
    ("x", "a O\nb X-ORG\n", "x:2: expected a token"),
    ("x", "a\n", "x:1: expected a token"),
    ("x", "a O\n\nb B-CITY\n", r"x:3: ner\[0\].label: 'CITY' is not a label"),
    ("x", "# id = q\n# sa = Glad\na O\n", "x:3: sa: 'Glad' is not a label"),
    ("x.csv", "id,words\na,b\n", "x.csv:1: needs one column 'text'"),
    ("x.csv", "id,text,id\na,b,c\n", "x.csv:1: needs one column 'id'"),
    ("x.csv", "id,text\na,b,c\n", "x.csv:2: another number of cells"),
    ("x.csv", "id,text,sa\na,b,glad\n", "x.csv:2: sa: 'glad' is not a label"),
    ("x.csv", "id,text,ner\na,b,[1\n", "x.csv:2: ner: expected .* a JSON list"),
    ("x.csv", 'id,text,ner\na,paris,"[[""PLACE"", 0, 9]]"\n', "x.csv:2: ner.*outside the text"),
    ("x.csv", 'id,text,ner\na,in  it,"[[""PLACE"", 0, 2]]"\n', "x.csv:2: text: has two blanks"),
    ("x.csv", "id,text,start\na,b,soon\n", "x.csv:2: start: expected seconds"),
    ("x.csv", "id,text,sentiment\na,b,Positive\n", "x.csv:2: sentiment: .*did you mean 'sa'"),
    ("x.csv", "id,text\n,b\n", "x.csv:2: id: is missing"),
])
def test_faults_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    source = Csv if name.endswith("csv") else Conll
    with pytest.raises(UserError, match=message):
        read(source(write(tmp_path / name, text)))
    with pytest.raises(UserError, match="cannot be read"):
        read(source(tmp_path / "no"))


# From a source to a manifest


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
    path = write(tmp_path / "x.csv", "id,text,sa\na,b,glad\nc,d,Neutral\n,e,\n")
    with pytest.raises(UserError, match=r"2 problems; (.|\n)*x.csv:2: sa(.|\n)*x.csv:4: id"):
        prepare(Csv(path), tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="no row of 0 is left"):
        prepare(Conll(write(tmp_path / "x.conll", "\n")), tmp_path / "m.jsonl")


def test_excluded_manifests_lose_their_rows_by_id_and_by_text(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.jsonl",
                '{"id": "a", "text": "else"}\n{"id": "x", "text": "WE met"}\n')
    rows = write(tmp_path / "more.csv", "id,text\na,in paris\nb,we met\nc,we met again\n")
    prepare(Csv(rows), tmp_path / "out.jsonl", exclude=[dev])
    assert [u.id for u in read_manifest(tmp_path / "out.jsonl", REGISTRY)] == ["c"]


def test_every_kind_of_source_has_a_name() -> None:
    assert list(SOURCES) == ["slue-voxpopuli", "slue-voxceleb", "slue-hub", "conll", "csv"]
