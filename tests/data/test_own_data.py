"""Own data: CoNLL and CSV become what their author meant, or a message that says where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unislu_llm.data.corpora.own_data import Conll, Csv
from unislu_llm.data.corpora.source import Dropped
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


@pytest.mark.parametrize(("text", "message"), [
    ("a O\nb X-ORG\n", "x:2: expected a token"),
    ("a\n", "x:1: expected a token"),
    ("a O\n\nb B-CITY\n", r"x:3: ner\[0\].label: 'CITY' is not a label"),
    ("# id = q\n# sa = Glad\na O\n", "x:3: sa: 'Glad' is not a label"),
])
def test_conll_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(Conll(write(tmp_path / "x", text)))


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


def test_csv_tidies_blanks_that_no_span_counts(tmp_path: Path) -> None:
    (u,) = read(Csv(write(tmp_path / "x.tsv", "id\ttext\tner\na\t in  paris \t[]\n")))
    assert (u.text, u.labels) == ("in paris", {"ner": ()})


@pytest.mark.parametrize(("text", "message"), [
    ("id,words\na,b\n", "x.csv:1: needs one column 'text'"),
    ("id,text,id\na,b,c\n", "x.csv:1: needs one column 'id'"),
    ("id,text\na,b,c\n", "x.csv:2: another number of cells"),
    ("id,text,sa\na,b,glad\n", "x.csv:2: sa: 'glad' is not a label"),
    ("id,text,ner\na,b,0-1\n", "x.csv:2: ner: expected .* a JSON list"),
    ("id,text,ner\na,b,[1\n", "x.csv:2: ner: expected .* a JSON list"),
    ('id,text,ner\na,paris,"[[""PLACE"", 0, 9]]"\n', "x.csv:2: ner.*outside the text"),
    ('id,text,ner\na,in  it,"[[""PLACE"", 0, 2]]"\n', "x.csv:2: text: has two blanks"),
    ("id,text,start\na,b,soon\n", "x.csv:2: start: expected seconds"),
    ("id,text,sentiment\na,b,Positive\n", "x.csv:2: sentiment: .*did you mean 'sa'"),
    ("id,text\n,b\n", "x.csv:2: id: is missing"),
])
def test_csv_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(Csv(write(tmp_path / "x.csv", text)))


@pytest.mark.parametrize("source", [Conll, Csv])
def test_no_such_file(tmp_path: Path, source: Any) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read(source(tmp_path / "no"))
