"""Own data: CoNLL and CSV become the utterances that their author meant, or a message that says where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unislu_llm.data.convert import read_conll, read_csv
from unislu_llm.data.tally import Tally
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.utterance import Utterance

REGISTRY = TaskRegistry()
MULTI = TaskRegistry.from_dict([
    {"builtin": "ner"}, {"builtin": "sa"},
    {"kind": "label", "name": "da", "marker": "[DA]", "labels": ["ask", "thanks"], "open": "[A]", "close": "[/A]",
     "multi": True}])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


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
    tally = Tally()
    first, second = read_conll(path, REGISTRY, tally)
    assert first.text == "Anna Smith loves New York Paris"
    assert phrases(first) == [("PERSON", "Anna Smith"), ("PLACE", "New York"), ("PLACE", "Paris")]
    assert (first.id, first.audio, first.labels["sa"]) == ("s1", tmp_path / "wav" / "s1.flac", "Positive")
    assert (second.id, second.audio, second.labels) == ("x-2", None, {"ner": ()})
    assert tally.read == 2
    assert not tally.notes


@pytest.mark.parametrize(("tags", "found", "notes"), [
    (["I-ORG", "I-ORG", "O"], ["a b"], 1),  # IOB1
    (["S-ORG", "B-ORG", "E-ORG"], ["a", "b c"], 0),
    (["U-ORG", "B-ORG", "L-ORG"], ["a", "b c"], 0),
    (["B-ORG", "B-ORG", "I-ORG"], ["a", "b c"], 0),
    (["B-ORG", "I-LAW", "O"], ["a", "b"], 1),
])
def test_tag_schemes(tmp_path: Path, tags: list[str], found: list[str], notes: int) -> None:
    tally = Tally()
    (u,) = read_conll(write(tmp_path / "x", "".join(f"{t}\t{g}\n" for t, g in zip("abc", tags, strict=True))), REGISTRY, tally)
    assert [phrase for _, phrase in phrases(u)] == found
    assert tally.notes.total() == notes


def test_conll_columns_and_a_hash_that_is_a_word(tmp_path: Path) -> None:
    (u,) = read_conll(write(tmp_path / "x", "O\t#\nB-ORG\tun\n"), REGISTRY, Tally(), token_column=1, tag_column=0)
    assert (u.text, phrases(u)) == ("# un", [("ORG", "un")])
    (u,) = read_conll(write(tmp_path / "x", "# O\nun B-ORG\n"), REGISTRY, Tally())
    assert u.text == "# un"


def test_conll_audio_by_map_and_by_id(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "# id = a\nu O\n\n# id = b\nv O\n")
    names = write(tmp_path / "names.tsv", "a\tclips/1.wav\n")
    (tmp_path / "b.ogg").touch()
    a, b = read_conll(path, REGISTRY, Tally(), audio=tmp_path, audio_map=names)
    assert (a.audio, b.audio) == (tmp_path / "clips" / "1.wav", tmp_path / "b.ogg")


@pytest.mark.parametrize(("text", "message"), [
    ("a O\nb X-ORG\n", "x:2: expected a token"),
    ("a\n", "x:1: expected a token"),
    ("a O\n\nb B-CITY\n", r"x:3: ner\[0\].label: 'CITY' is not a label"),
    ("# id = q\n# sa = Glad\na O\n", "x:3: sa: 'Glad' is not a label"),
])
def test_conll_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_conll(write(tmp_path / "x", text), REGISTRY, Tally()))


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", """id,audio,text,sa,entities,start,end,speaker,da
a,wav/a.flac,"in Paris, today",Neutral,"3:8:PLACE;10:15:WHEN",1.5,4,anna,ask;thanks
b,,in paris,,"[{""label"": ""PLACE"", ""start"": 3, ""end"": 8}]",,,,[]
c,,plain,Negative,[],,,,
""")
    a, b, c = read_csv(path, MULTI, Tally())
    assert phrases(a) == [("PLACE", "Paris"), ("WHEN", "today")]
    assert (a.audio, a.start, a.end, a.speaker) == (tmp_path / "wav" / "a.flac", 1.5, 4.0, "anna")
    assert (a.labels["sa"], a.labels["da"]) == ("Neutral", ("ask", "thanks"))
    assert (phrases(b), b.labels["da"], "sa" in b.labels) == ([("PLACE", "paris")], (), False)
    assert c.labels == {"sa": "Negative", "ner": ()}


def test_csv_moves_offsets_with_the_blanks(tmp_path: Path) -> None:
    tally = Tally()
    (u,) = read_csv(write(tmp_path / "x.tsv", "id\ttext\tner\na\t in  paris \t5:10:PLACE\n"), REGISTRY, tally)
    assert (u.text, phrases(u)) == ("in paris", [("PLACE", "paris")])
    assert tally.notes == {"blanks of the text tidied": 1}


@pytest.mark.parametrize(("text", "message"), [
    ("id,words\na,b\n", "x.csv:1: no column 'text'"),
    ("id,text\na,b,c\n", "x.csv:2: another number of cells"),
    ("id,text,sa\na,b,glad\n", "x.csv:2: sa: 'glad' is not a label"),
    ("id,text,ner\na,b,0-1\n", "x.csv:2: ner: expected a JSON list"),
    ("id,text,ner\na,b,[1\n", "x.csv:2: ner: not valid JSON"),
    ("id,text,ner\na,paris,0:9:PLACE\n", "x.csv:2: ner.*past the end"),
    ("id,text,start\na,b,soon\n", "x.csv:2: start: must be a number"),
    ("id,text,sentiment\na,b,Positive\n", "x.csv:2: sentiment: .*did you mean 'sa'"),
    ("id,text,ner,entities\na,b,[],[]\n", "column 'entities' stands for 'ner'"),
    ("id,text\n,b\n", "x.csv:2: id: is missing"),
])
def test_csv_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_csv(write(tmp_path / "x.csv", text), REGISTRY, Tally()))


def test_all_faults_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "id,text,sa\n" + "".join(f"u{i},b,bad\n" for i in range(14)))
    with pytest.raises(UserError, match=r"14 problems(.|\n)*and 4 more") as caught:
        list(read_csv(path, REGISTRY, Tally()))
    assert str(caught.value).count("is not a label") == 10


def test_no_such_file(tmp_path: Path) -> None:
    readers: list[Any] = [read_conll, read_csv]
    for reader in readers:
        with pytest.raises(UserError, match="does not exist"):
            list(reader(tmp_path / "no", REGISTRY, Tally()))
