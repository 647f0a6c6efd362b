"""Corpora to manifests: what their author meant, or a message that says where not; a count for
every row that is left out."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from tests.tiny import unified_string
from unislu_llm.data import audio
from unislu_llm.data.corpora import prepare, published
from unislu_llm.data.corpora.own_data import Conll, Table
from unislu_llm.data.corpora.published import SlueHub, SlueVoxCeleb, SlueVoxPopuli
from unislu_llm.data.corpora.source import Dropped
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.row_reader import RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import RAW_TO_COMBINED, Span, TaskRegistry
from unislu_llm.utterance import Utterance

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
HVB = TaskRegistry.from_yaml(CONFIGS / "tasks_hvb.yaml")
REGISTRY = TaskRegistry([*TaskRegistry(), HVB["da"]])
RATE = 16_000
WAVE = (0.5 * np.sin(np.arange(4 * RATE) ** 1.3 / 900)).astype(np.float32)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(source: Any, dropped: Dropped | None = None, clips: Path = Path(),
         registry: TaskRegistry = REGISTRY) -> list[Utterance]:
    """Utterances of a source; without `dropped` a row with a problem is an error."""
    reader, found = RowReader(registry), []
    reasons = Dropped(list) if dropped is None else dropped
    for where, row in source.rows(registry, reasons, clips):
        u, problems = reader.read(row, where)
        found += [u] if u else []
        if problems:
            reasons[problems[0].kind].append(where)
            if dropped is None:
                raise UserError(f"{where}: {problems[0].field}: {problems[0].message}")
    return found


def phrases(u: Utterance) -> list[tuple[str, str]]:
    return [(s.label, u.text[s.start:s.end]) for s in u.labels["ner"] if isinstance(s, Span)]


# Own data


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
    (u,) = read(Table(write(tmp_path / "x.csv", "id,text\na,b\n"), audio=tmp_path))
    assert u.audio == tmp_path / "a.ogg"


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", """id,audio,text,sa,ner,start,end,speaker,da
a,wav/a.flac,"in Paris, today",Neutral,"[[""PLACE"",3,8],[""WHEN"",10,15]]",1.5,4,x,"[""thanks""]"
b,,in paris,,"[{""label"": ""PLACE"", ""start"": 3, ""end"": 8}]",,,,[]
c,,plain,Negative,[],,,,
""")
    a, b, c = read(Table(path))
    assert phrases(a) == [("PLACE", "Paris"), ("WHEN", "today")]
    assert (a.start, a.end, a.speaker) == (1.5, 4.0, "x")
    assert a.audio == tmp_path / "wav" / "a.flac"
    assert (a.labels["sa"], a.labels["da"]) == ("Neutral", ("thanks",))
    assert (phrases(b), b.labels["da"]) == ([("PLACE", "paris")], ())
    assert "sa" not in b.labels
    assert c.labels == {"sa": "Negative", "ner": ()}
    (u,) = read(Table(write(tmp_path / "x.tsv", "id\ttext\tner\na\t in  paris \t[]\n")))
    assert (u.text, u.labels) == ("in paris", {"ner": ()}), "blanks that no span counts"


def test_examples_of_the_docs_are_read(tmp_path: Path) -> None:
    page = (CONFIGS.parents[1] / "docs" / "data.md").read_text("utf-8")
    for kind, source in (("csv", Table), ("conll", Conll)):
        block, = re.findall(rf"(?ms)^```{kind}\n(.*?)^```", page)
        first, second = read(source(write(tmp_path / f"x.{kind}", block)))
        assert phrases(first) == [("ORG", "council"), ("PLACE", "paris")]
        assert (first.audio, second.id) == (tmp_path / "wav" / "a1.flac", "b7")
        assert second.labels["ner"] == ()


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
    ("x.csv", "id,text\n,b\n", "x.csv:2: id: is empty"),
])
def test_faults_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    source = Table if name.endswith("csv") else Conll
    with pytest.raises(UserError, match=message):
        read(source(write(tmp_path / name, text)))
    with pytest.raises(UserError, match="cannot be read"):
        read(source(tmp_path / "no"))


# SLUE


VP_COLUMNS = ("id", "raw_text", "normalized_text", "speaker_id", "split", "raw_ner",
              "normalized_ner")
VP_ROWS = [  # entities of the raw and of the normalised text, the right-most first
    ("20:01_0", "In Paris, \"we\" met in May.", "in paris \"we\" met in may.", "119", "dev",
     "[['DATE', 22, 3], ['GPE', 3, 5]]", "[['DATE', 21, 3], ['GPE', 3, 5]]"),
    ("20:01_1", "", "nobody spoke.", "None", "dev", "[]", "None"),
    ("20:01_2", "The Euro 2000 was fun.", "the euro two thousand was fun.", "7", "dev",
     "[['EVENT', 4, 9]]", "[['EVENT', 4, 17]]"),
]
VC_COLUMNS = ("id", "normalized_text", "speaker_id", "split", "sentiment", "start_second",
              "end_second")


def write_tsv(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    return write(path, "".join("\t".join(row) + "\n" for row in [columns, *rows]))


@pytest.fixture
def voxpopuli(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "vp.tsv", VP_COLUMNS, VP_ROWS)


def listed(triples: Iterable[tuple[str, int, int]]) -> dict[str, list[Any]]:
    return {key: [t[i] for t in triples] for i, key in enumerate(("type", "start", "length"))}


def flac() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, RATE, format="FLAC")
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], None]:
    """Let the hub have these rows."""
    return lambda rows: monkeypatch.setattr(published, "load_split", lambda *names: rows)


def test_spans_cut_the_words_from_left_to_right(voxpopuli: Path) -> None:
    dropped = Dropped(list)
    rows = read(SlueVoxPopuli(voxpopuli, Path("vp")), dropped)
    assert rows[0].audio == Path("vp/dev/20:01_0.ogg")
    assert phrases(rows[0]) == [("PLACE", "paris"), ("WHEN", "may")]
    assert rows[0].text == 'in paris "we" met in may.'  # quotes are text
    assert [u.speaker for u in rows] == ["119", None, "7"]
    assert rows[1].labels == rows[2].labels == {"ner": ()}
    assert dropped == {"span dropped: label EVENT (not scored in SLUE)": [f"{voxpopuli}:4"]}


def test_raw_labels(voxpopuli: Path) -> None:
    registry = TaskRegistry.from_yaml(CONFIGS / "tasks_ontonotes.yaml")
    rows = read(SlueVoxPopuli(voxpopuli), registry=registry)
    assert [phrases(u) for u in rows] == [[("GPE", "paris"), ("DATE", "may")], [],
                                          [("EVENT", "euro two thousand")]]
    assert set(registry["ner"].labels) == set(RAW_TO_COMBINED)
    target = unified_string(rows[2], registry["ner"])
    assert target.endswith("[NER][EVENT]euro two thousand[/EVENT]")


def test_hub_rows_and_tsv_agree(voxpopuli: Path, hub: Any) -> None:
    rows = []
    for cells in VP_ROWS:
        row: dict[str, Any] = dict(zip(VP_COLUMNS, cells, strict=True))
        row["normalized_ner"] = listed(eval(row["normalized_ner"]) or [])  # as the TSV has them
        rows.append(row)
    hub(rows)
    from_tsv = read(SlueVoxPopuli(voxpopuli))
    from_hub = read(SlueHub("voxpopuli", "dev", with_audio=False))
    assert [(u.id, u.text, u.labels, u.speaker) for u in from_hub] == [
        (u.id, u.text, u.labels, u.speaker) for u in from_tsv]


@pytest.mark.parametrize(("rows", "message"), [
    ([("a", "in paris", "[['GPE', 3]]")], "x.tsv:2: normalized_ner: "),
    ([("a", "in paris")], "x.tsv:2: another number of cells"),
])
def test_what_cannot_be_read_is_named(tmp_path: Path, rows: list[tuple[str, ...]],
                                      message: str) -> None:
    path = write_tsv(tmp_path / "x.tsv", ("id", "normalized_text", "normalized_ner"), rows)
    with pytest.raises(UserError, match=message):
        read(SlueVoxPopuli(path))
    path = write_tsv(path, ("id", "normalized_text"), [("a", "in paris")])
    assert read(SlueVoxPopuli(path))[0].labels == {}, "a blind split is not annotated"


def test_voxceleb_crops_and_drops_what_has_no_class(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "vc.tsv", VC_COLUMNS, [
        ("id1_0", "lovely day", "id1", "dev", "Positive", "1.25", "3.5"),
        ("id1_1", "well", "id1", "dev", "Disagreement", "0", "1"),
        ("id1_2", "so", "id1", "dev", "<mixed>", "0", "1"),
        ("id1_3", "hm", "id1", "dev", "Neutral", "2", "2"),
    ])
    dropped = Dropped(list)
    (u,) = read(SlueVoxCeleb(path, tmp_path), dropped)
    assert (u.labels, u.start, u.end) == ({"sa": "Positive"}, 1.25, 3.5)
    assert u.audio == tmp_path / "dev_raw" / "id1_0.flac"
    assert dropped == {"label": [f"{path}:3", f"{path}:4"], "value": [f"{path}:5"]}
    text = read(SlueVoxCeleb(path), dropped)[0]
    assert (text.audio, text.start, text.end) == (None, 0.0, None)


def test_hub_audio_is_written_as_it_is(tmp_path: Path, hub: Any) -> None:
    data = flac()
    hub([{"index": 0, "id": "id1/x y", "audio": {"bytes": data, "path": "x.flac"},
          "speaker_id": "id1", "normalized_text": "good", "sentiment": "Negative",
          "start_second": 0.5, "end_second": 2.0}])
    (u,) = read(SlueHub("voxceleb", "dev"), clips=tmp_path / "clips")
    assert re.fullmatch(r"id1-x-y-[0-9a-f]{12}\.flac", u.audio.name)
    assert u.audio.read_bytes() == data
    assert (u.start, u.end) == (0.5, 2.0)  # the manifest crops
    before = u.audio.stat().st_mtime_ns
    read(SlueHub("voxceleb", "dev"), clips=tmp_path / "clips")
    assert u.audio.stat().st_mtime_ns == before
    hub([{"id": "a", "audio": {"path": "a.wav"}}])
    with pytest.raises(UserError, match=r"voxpopuli\[0\]: .*'normalized_text'"):
        read(SlueHub("voxpopuli", "dev"), clips=tmp_path)


def test_dialogue_acts_are_a_task_of_the_registry_alone(tmp_path: Path, hub: Any) -> None:
    rows = [{"audio": {"bytes": flac(), "path": "c0ffee_100_900.wav"}, "speaker_id": "4",
             "text": "thanks bye", "dialog_acts": ["thanks", "statement_close", "thanks"]},
            {"audio": {"bytes": flac(), "path": "c0ffee_900_990.wav"}, "text": "mm",
             "dialog_acts": []}]
    hub(rows)
    dropped = Dropped(list)
    found = read(SlueHub("hvb", "dev"), dropped, tmp_path / "clips", HVB)
    assert [u.id for u in found] == ["c0ffee_100_900", "c0ffee_900_990"]
    assert [u.labels["da"] for u in found] == [("statement_close", "thanks"), ()]
    assert not dropped
    assert unified_string(found[0], HVB["da"]) == (
        "thanks bye[T/L][DA][A]statement_close[/A][A]thanks[/A]")
    rows[0]["dialog_acts"] = ["thanks", "shout"]
    assert len(read(SlueHub("hvb", "dev", with_audio=False), dropped)) == 1
    assert dropped == {"label": ["hvb[0]"]}
    with pytest.raises(UserError, match="'da'"):
        read(SlueHub("hvb", "dev", with_audio=False), registry=TaskRegistry())


# Copies of the hub's data sets on this machine


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The split `validation` of VoxCeleb as parquet, its audio a feature of `datasets`."""
    datasets.disable_progress_bars()
    clip = {"bytes": flac(), "path": "a.flac"}
    rows = [{"id": f"id1_{i}", "audio": clip, "speaker_id": "id1", "normalized_text": "lovely day",
             "sentiment": label, "start_second": 0.5 + i, "end_second": 2.25 + i}
            for i, label in enumerate(("Positive", "<mixed>"))]
    made = datasets.Dataset.from_list(rows)
    made = made.cast_column("audio", datasets.Audio(sampling_rate=RATE))
    made.to_parquet(str(tmp_path / "copy/validation-00000-of-00001.parquet"))
    return tmp_path / "copy"


def test_copies_are_read_without_the_network(copy: Path, tmp_path: Path) -> None:
    dropped = Dropped(list)
    (u,) = read(SlueHub("voxceleb", "validation", path=copy), dropped, tmp_path / "clips")
    assert dropped == {"label": ["voxceleb[1]"]}
    assert (u.id, u.labels, u.start, u.end) == ("id1_0", {"sa": "Positive"}, 0.5, 2.25)
    wave = audio.load(u.audio, u.start, u.end)
    np.testing.assert_allclose(wave, WAVE[int(0.5 * RATE):int(2.25 * RATE)], atol=1e-4)


def test_a_copy_without_the_split_missing_or_damaged_is_one_error(copy: Path,
                                                                  tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        read(SlueHub("voxceleb", "validation", tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"split 'test': .*test.*; is the copy whole"):
        read(SlueHub("voxceleb", "test", copy))
    (file,) = copy.rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is the copy whole"):
        read(SlueHub("voxceleb", "validation", copy))


# From a source to a manifest


def clip(path: Path, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(int(16_000 * seconds)) / 9), 16_000)


def reasons(page: str) -> dict[str, int]:
    """How many rows were dropped, by reason."""
    return {reason: int(n) for n, reason in re.findall(r"(?m)^ +(\d+) rows? dropped: (.*)$", page)}


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
    done = prepare(Table(csv), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["audio"], row["duration"]) for row in rows] == [
        ("a", "../wav/a.flac", 1.0), ("b", "../wav/b.flac", 2.0)]
    read = read_manifest(out, REGISTRY, check_audio=True)
    assert [u.labels for u in read] == [{"ner": (Span("PLACE", 3, 8),)}, {"ner": ()}]
    assert reasons(done) == {"missing audio file": 1}
    assert all(part in done for part in ("rows.csv:4", "c.flac", "3 rows read", str(out)))
    assert "no audio, and" not in done
    csv.write_text(csv.read_text() + "d,,text alone,\n")
    assert "1 of 3 rows have no audio, and are text alone" in prepare(Table(csv), out)


def test_all_audio_missing_is_fatal_and_writes_nothing(csv: Path, tmp_path: Path) -> None:
    (tmp_path / "wav").rename(tmp_path / "elsewhere")
    csv.write_text(csv.read_text() + "d,,text alone,\n")
    with pytest.raises(UserError, match=r"with audio of 4 is left(.|\n)* 3 rows dropped: missing "):
        prepare(Table(csv), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(("break_it", "reason"), [
    (lambda path: path.write_bytes(b"no audio"), "audio cannot be read or has no such stretch"),
    (lambda path: clip(path, 31.0), "longer than 30 s"),
])
def test_unusable_audio_is_dropped_and_named(csv: Path, tmp_path: Path,
                                             break_it: Callable[[Path], object],
                                             reason: str) -> None:
    break_it(tmp_path / "wav" / "b.flac")
    done = prepare(Table(csv), tmp_path / "x.jsonl")
    assert reasons(done)[reason] == 1
    assert f"{csv}:3: " in done
    assert len(read_manifest(tmp_path / "x.jsonl", REGISTRY)) == 1


def test_crop_outside_the_audio_is_dropped(tmp_path: Path) -> None:
    tsv = write_tsv(tmp_path / "vc.tsv", VC_COLUMNS, [
        ("a", "good", "1", "dev", "Positive", "0.5", "1.75"),
        ("b", "bad", "1", "dev", "Negative", "5", "7")])
    for name in "ab":
        clip(tmp_path / "dev_raw" / f"{name}.flac", 2.0)
    done = prepare(SlueVoxCeleb(tsv, tmp_path), tmp_path / "m.jsonl")
    (u,) = read_manifest(tmp_path / "m.jsonl", REGISTRY, check_audio=True)
    assert (u.start, u.end, u.duration, u.corpus) == (0.5, 1.75, 1.25, "slue-voxceleb")
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
        prepare(Table(path), tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="no row of 0 is left"):
        prepare(Conll(write(tmp_path / "x.conll", "\n")), tmp_path / "m.jsonl")


def test_excluded_manifests_lose_their_rows_by_id_and_by_text(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.jsonl",
                '{"id": "a", "text": "else"}\n{"id": "x", "text": "WE met"}\n')
    rows = write(tmp_path / "more.csv", "id,text\na,in paris\nb,we met\nc,we met again\n")
    prepare(Table(rows), tmp_path / "out.jsonl", exclude=[dev])
    assert [u.id for u in read_manifest(tmp_path / "out.jsonl", REGISTRY)] == ["c"]
