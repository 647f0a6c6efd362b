"""Manifests: what a row may say, what is refused and with which message, and the round trip."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unislu_llm.data.manifest import iter_rows, manifest_name, moved, read_manifest, write_manifest
from unislu_llm.data.row_reader import Problem
from unislu_llm.errors import UserError
from unislu_llm.tasks import NER, SA, LabelTask, Span, TaskRegistry
from unislu_llm.utterance import Utterance

ACTS = LabelTask("acts", "[ACT]", ("question", "answer", "thanks"), "[A]", "[/A]", multi=True)
REGISTRY = TaskRegistry([NER, SA, ACTS])
TEXT = "the council met in paris today"


def row(**changes: Any) -> dict[str, Any]:
    """A valid row with some keys set, or (None) taken out."""
    full = {"id": "a", "audio": "wav/a.flac", "text": TEXT} | changes
    return {key: value for key, value in full.items() if value is not None}


def write(tmp_path: Path, *rows: Any) -> Path:
    """A manifest of rows (JSON), strings and bytes (as they are)."""
    path = tmp_path / "m.jsonl"
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
             for r in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def problems(tmp_path: Path, *rows: Any, **options: Any) -> list[Problem]:
    return [p for r in iter_rows(write(tmp_path, *rows), REGISTRY, **options) for p in r.problems]


# What is read


def test_a_full_row(tmp_path: Path) -> None:
    path = write(tmp_path, row(
        ner=[{"label": "PLACE", "start": 19, "end": 24}, ["ORG", 7, 11], ["LAW", 4, 7]],
        sa="Neutral", acts=["thanks", "question"], start=1, end=3.5, duration=2.5, speaker="s1",
        language="en", corpus="vp", condition="clean", hypothesis=" the  council",
        text_source="whisper"))
    assert read_manifest(path, REGISTRY) == [Utterance(
        id="a", audio=tmp_path / "wav/a.flac", text=TEXT, start=1.0, end=3.5, duration=2.5,
        labels={"ner": (Span("LAW", 4, 7), Span("ORG", 7, 11), Span("PLACE", 19, 24)),
                "sa": "Neutral", "acts": ("question", "thanks")},
        speaker="s1", language="en", corpus="vp", source=f"{path}:1", hypothesis="the council",
        text_source="whisper")]


def test_what_a_row_leaves_out(tmp_path: Path) -> None:
    """Not annotated differs from annotated and empty; the corpus may be the caller's."""
    nulls = {"ner": None, "end": None, "audio": None, "hypothesis": None}
    path = write(tmp_path, row() | nulls, row(id="b", corpus="own", sa="Neutral", ner=[], acts=[]))
    bare, empty = read_manifest(path, REGISTRY)
    assert (bare.labels, bare.end, bare.audio, bare.corpus) == ({}, None, None, "default")
    assert (empty.labels, empty.corpus) == ({"ner": (), "acts": (), "sa": "Neutral"}, "own")
    assert read_manifest(path, TaskRegistry([SA]))[1].labels == {"sa": "Neutral"}
    assert [u.corpus for u in read_manifest(path, REGISTRY, corpus="mine")] == ["mine", "own"]


def test_blank_lines_crlf_and_byte_order_mark_are_no_problem(tmp_path: Path) -> None:
    lines = [json.dumps(row(id=name)).encode() for name in "abc"]
    path = write(tmp_path, b"\xef\xbb\xbf" + lines[0] + b"\r\n\r", lines[1] + b"\n", lines[2])
    assert [u.source.rpartition(":")[2] for u in read_manifest(path, REGISTRY)] == ["1", "3", "5"]


def test_a_stretch_may_be_given_by_its_length(tmp_path: Path) -> None:
    path = write(tmp_path, row(start=5, duration=3), row(id="b", start=0, duration=3),
                 row(id="c", duration=3))
    assert [(u.start, u.end, u.seconds) for u in read_manifest(path, REGISTRY)] == [
        (5.0, 8.0, 3.0), (0.0, 3.0, 3.0), (0.0, None, 3.0)]


def test_a_path_is_no_text(tmp_path: Path) -> None:
    """Marks stay as the file system has them, and letters of the text are composed."""
    (tmp_path / (name := "u\u0308ber.wav")).touch()
    path = write(tmp_path, row(audio=name, text=None), row(id="b", audio=name, text="u\u0308ber"))
    rows = iter_rows(path, REGISTRY, check_audio=True, without_text=True)
    assert [u.text for r in rows if (u := r.utterance)] == ["", "\u00fcber"]


def test_a_lookalike_beside_the_field_itself_is_metadata(tmp_path: Path) -> None:
    text = "l'été [applause] 你好 5\u00a0[ner] x]"
    (u,) = read_manifest(write(tmp_path, row(
        speaker="s1", speaker_id=17, path="/x.wav", transcript="The council.", condition="x",
        split="x", gender="x", raw_text="x", segment="x", text=text)), REGISTRY)
    assert (u.text, u.speaker) == (text, "s1")


def test_parent_folders_are_those_of_the_real_manifest_folder(tmp_path: Path) -> None:
    (tmp_path / "corpus/lists").mkdir(parents=True)
    (tmp_path / "corpus/a.wav").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "corpus/lists")
    path = write(tmp_path / "link", row(audio="../a.wav"))
    assert read_manifest(path, REGISTRY, check_audio=True)[0].audio == tmp_path / "corpus/a.wav"
    assert manifest_name(path) == "m"
    assert manifest_name(path.with_name("train.jsonl")) == "lists", "behind the link"


# What is refused: the changes to a valid row, field, kind, part of the message


BAD_ROWS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"id": None}, "id", "missing", "unique id"),
    ({"id": 7}, "id", "type", "must be a valid string, found 7"),
    ({"text": None}, "text", "missing", "needs a transcript"),
    ({"text": None, "transcript": TEXT}, "text", "missing", "rename 'transcript'"),
    ({"text": ""}, "text", "missing", "is empty"),
    ({"text": " the"}, "text", "text", "starts or ends with a blank"),
    ({"text": "the  council"}, "text", "text", "two blanks"),
    ({"text": "the\tcouncil"}, "text", "text", "control character '\\t' at character 3"),
    ({"text": "the\ud800council"}, "text", "text", "control character"),
    ({"text": "the [NER] council"}, "text", "marker", "[NER]"),
    ({"audio": ""}, "audio", "value", "leave the key out"),
    ({"start": -1}, "start", "value", "greater than or equal to 0, found -1"),
    ({"start": float("nan")}, "start", "value", "must be a finite number"),
    ({"start": "1.5"}, "start", "type", 'found "1.5"'),
    ({"end": 10**30}, "end", "value", "found 1000"),
    ({"start": 2.0, "end": 2.0}, "end", "value", "2 s is not after start 2 s"),
    ({"start": 1.0, "end": 2.0, "duration": 9.0}, "duration", "value", "from 1 s to 2 s"),
    ({"sa": "positive"}, "sa", "label", "did you mean 'Positive'"),
    ({"acts": "question"}, "acts", "type", 'must be a valid list, found "question"'),
    ({"acts": ["thanks", "thanks"]}, "acts", "label", "'thanks' is given twice"),
    ({"ner": ["ORG"]}, "ner[0]", "type", "[label, start, end]"),
    ({"ner": [{"label": "ORG", "start": 4}]}, "ner[0].end", "missing", "a span has label"),
    ({"ner": [["ORG", 4, 11], ["PLAC", 19, 24]]}, "ner[1].label", "label", "did you mean 'PLACE'"),
    ({"ner": [["ORG", 4.0, 11]]}, "ner[0].start", "type", "valid integer, found 4"),
    ({"ner": [["WHEN", 25, 31]]}, "ner[0].end", "span", "31 is outside the text of 30"),
    ({"ner": [["PLACE", 19, 5]]}, "ner[0].end", "span", "not a length"),
    ({"ner": [["ORG", 3, 11]]}, "ner[0].start", "span", "3 puts a blank at the start"),
    ({"ner": [["ORG", 4, 12]]}, "ner[0].end", "span", "12 puts a blank at the end"),
    ({"ner": [["ORG", 4, 15], ["LAW", 12, 18]]}, "ner", "overlap", "ORG 4..15 and LAW 12..18"),
    ({"nre": []}, "nre", "unknown_key", "did you mean 'ner'"),
    ({"sentiment": "Positive"}, "sentiment", "unknown_key", "did you mean 'sa'"),
    ({"audio": None, "file_name": "a.wav"}, "file_name", "unknown_key", "did you mean 'audio'"),
    ({"offset": 2.0}, "offset", "unknown_key", "did you mean 'start'"),
    ({"end_time": 4.0}, "end_time", "unknown_key", "did you mean 'end'"),
    ({"entities": []}, "entities", "unknown_key", "did you mean 'ner'"),
    ({"label": [[4, 11, "ORG"]]}, "label", "unknown_key", "has a list of [label, start, end]"),
    ({"label": "Positive"}, "label", "unknown_key", "is not read; 'sa' is the key of the task"),
    ({"answer": "reject"}, "answer", "unknown_key", "is 'reject'; take the row out"),
    ({"hypotesis": "a"}, "hypotesis", "unknown_key", "did you mean 'hypothesis'"),
    ({"hypothesis": "the [NER] council"}, "hypothesis", "marker", "[NER]"),
]


BAD_LINES: list[tuple[str | bytes, str, str, str]] = [
    ("{'id': 'a'}", "line", "json", "not valid JSON at column 2"),
    ('{"id": "a"} {"id": "b"}', "line", "json", "one JSON object a line"),
    ('["a", "b"]', "line", "json", "expected a JSON object, found list"),
    ('{"id": "a", "text": "b", "ner": [{"label": "ORG", "label": "LAW"}]}', "line", "json",
     "key 'label' is given twice"),
    (b'{"id": "a", "text": "caf\xe9"}', "line", "encoding", "byte 25 is not UTF-8"),
    ("[" * 200_000, "line", "json", "not usable JSON"),
    ('{"id": "a", "end": ' + "9" * 5000 + "}", "line", "json", "not usable JSON"),
]


@pytest.mark.parametrize(("bad", "field", "kind", "message"), [*BAD_ROWS, *BAD_LINES])
def test_a_bad_row_between_good_ones_gives_one_problem(
        tmp_path: Path, bad: dict[str, Any] | str | bytes, field: str, kind: str,
        message: str) -> None:
    path = write(tmp_path, row(id="before"), row(**bad) if isinstance(bad, dict) else bad,
                 row(id="after"))
    rows = list(iter_rows(path, REGISTRY))
    assert [r.utterance.id for r in rows if r.utterance] == ["before", "after"]
    (problem,) = (p for r in rows for p in r.problems)
    assert (problem.field, problem.kind) == (field, kind)
    assert message in problem.message
    assert str(problem) == f"{path}:2: {field}: {problem.message}"


def test_all_problems_are_given_and_ids_are_unique_also_among_bad_rows(tmp_path: Path) -> None:
    spans = [["ORG", 0, 99], ["NOPE", 1, 2]]
    found = problems(tmp_path, row(), row(id="b", text="x ", start=-1, sa="x", ner=spans),
                     row(id="b"), row())
    assert [(p.line, p.field) for p in sorted(found, key=lambda p: (p.line, p.field))] == [
        *((2, field) for field in ("ner[0].end", "ner[1].label", "sa", "start", "text")),
        (3, "id"), (4, "id")]
    assert [p.message for p in found[-2:]] == [
        f"'{name}' is already the id of line {line}; ids must be unique in a manifest"
        for name, line in (("b", 2), ("a", 1))]


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"m\.jsonl: file: the manifest has no rows"):
        read_manifest(write(tmp_path, content), REGISTRY)


def test_missing_audio_is_a_problem_only_when_asked_for(tmp_path: Path) -> None:
    assert problems(tmp_path, row()) == []
    (problem,) = problems(tmp_path, row(), row(id="t", audio=None), check_audio=True)
    assert (problem.line, problem.field, problem.kind) == (1, "audio", "audio_missing")
    assert str(tmp_path / "wav/a.flac") in problem.message


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="manifest does not exist or is no file"):
            read_manifest(path, REGISTRY)


def test_read_manifest_raises_one_error_with_the_first_ten_and_the_count(tmp_path: Path) -> None:
    path = write(tmp_path, *(row(id=f"u{i}", sa="bad") for i in range(13)))
    with pytest.raises(UserError) as caught:
        read_manifest(path, REGISTRY)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{path}: 13 problems")
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{path}:{i}" for i in range(1, 11)]
    assert lines[10:] == ["... and 3 more"]


def test_rows_without_text_are_read_where_a_recogniser_is_to_write_it(tmp_path: Path) -> None:
    spans = [["PLACE", "paris"], {"label": "ORG", "phrase": " the  council"}]
    path = write(tmp_path, row(text=None, ner=spans, sa="Neutral"),
                 row(id="b", text="", ner=[]), row(id="c"))
    found = [r.utterance for r in iter_rows(path, REGISTRY, without_text=True)]
    assert [(u.text, dict(u.labels)) for u in found if u] == [
        ("", {"sa": "Neutral"}), ("", {"ner": ()}), (TEXT, {})]
    assert {p.kind for p in problems(tmp_path, row(text=None, audio=None), without_text=True)} == {
        "missing"}
    bad = row(text=None, ner=[["PLAC", "paris"], ["ORG", 3, 5], {"label": "ORG", "phrase": " "},
                              {"label": "ORG", "start": 3, "end": 5}])
    assert [(p.field, p.kind) for p in problems(tmp_path, bad, without_text=True)] == [
        ("ner[0].label", "label"), ("ner[1]", "type"), ("ner[2].phrase", "value"),
        ("ner[3].phrase", "missing")]


# Size


def test_many_rows_and_many_keys_are_read(tmp_path: Path) -> None:
    rows = [row(id=f"u{i}", ner=[["ORG", 4, 11]], condition="x") for i in range(10_000)]
    keys = [row(id="a", **{f"k{i}": i for i in range(20_000)}),
            row(id=None, text=None, **{f"textt{i}": i for i in range(20_000)})]
    for lines, good in ((rows, 10_000), (keys, 1)):  # in seconds, where pairs took minutes
        path = write(tmp_path, *lines)
        assert sum(r.utterance is not None for r in iter_rows(path, REGISTRY)) == good


# Writing


@st.composite
def utterances(draw: st.DrawFn) -> Utterance:
    """Any utterance that the format can hold."""
    letters = st.characters(exclude_categories=("C", "Z"), exclude_characters="[")
    word_ = st.text(letters, min_size=1).map(lambda word: unicodedata.normalize("NFC", word))
    words = draw(st.lists(word_, min_size=1, max_size=8))
    labels: dict[str, Any] = {}
    if draw(st.booleans()):
        labels["ner"] = tuple(_draw_spans(draw, words))
    if draw(st.booleans()):
        labels["sa"] = draw(st.sampled_from(SA.labels))
    if draw(st.booleans()):
        labels["acts"] = tuple(label for label in ACTS.labels if draw(st.booleans()))
    segments = [{"start": 0.0, "end": 9.5, "text": "the", "ner": [["ORG", 0, 3]]}]
    start = draw(st.just(0.0) | st.floats(0, 1e4))
    end = draw(st.none() | st.floats(0.01, 30).map(lambda length: start + length))
    duration = (end - start if end is not None else  # or it says where the stretch ends
                None if start else draw(st.none() | st.floats(0.01, 30)))
    word = st.none() | st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1)
    names = ["lists/a.wav", "lists/wav/ü b.flac", "other/a.ogg", "/data/a.mp3", "lists/..a"]
    return Utterance(
        id="", audio=draw(st.none() | st.sampled_from(names).map(Path)), text=" ".join(words),
        labels=labels, start=start, end=end, speaker=draw(word), language=draw(word),
        corpus=draw(word) or "default", duration=duration, text_source=draw(word),
        segments=draw(st.none() | st.just(segments)),
        hypothesis=draw(st.none() | st.just("") | st.just(" ".join(words))))


def _draw_spans(draw: st.DrawFn, words: list[str]) -> Iterator[Span]:
    offset = 0
    for word in words:
        if draw(st.booleans()):
            yield Span(draw(st.sampled_from(NER.labels)), offset, offset + len(word))
        offset += len(word) + 1


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(utterances(), min_size=1, max_size=4))
def test_written_manifests_read_back_equal(tmp_path: Path, drawn: list[Utterance]) -> None:
    root = tmp_path.resolve()
    path = root / "lists" / "m.jsonl"
    originals = [replace(u, id=f"u{i}", audio=u.audio and root / u.audio)
                 for i, u in enumerate(drawn)]
    write_manifest(path, originals)
    assert [replace(u, source="") for u in read_manifest(path, REGISTRY)] == originals


def test_written_audio_paths_move_with_the_folder(tmp_path: Path) -> None:
    places = ["lists/a.wav", "wav/b.wav"]
    write_manifest(tmp_path / "old/lists/m.jsonl", [
        Utterance(place, tmp_path / "old" / place, "x") for place in places])
    (tmp_path / "old").rename(tmp_path / "new")
    read = read_manifest(tmp_path / "new/lists/m.jsonl", REGISTRY)
    assert [u.audio for u in read] == [tmp_path / "new" / place for place in places]


def test_only_the_audio_path_of_a_moved_row_changes(tmp_path: Path) -> None:
    content = {"audio": "wav/a.wav", "text": "\u00e9", "meta": {"audio": "b", "half": "\ud800"}}
    line = moved(content, tmp_path, tmp_path / "deep/er")
    assert json.loads(line) == content | {"audio": "../../wav/a.wav"}
    assert "\u00e9" in line.decode()
    assert json.loads(moved(content, tmp_path, tmp_path)) == content
    content["audio"] = "/x.wav"
    assert json.loads(moved(content, tmp_path, tmp_path / "deep")) == content


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, [Utterance("old", None, "x")])
    with pytest.raises(UserError, match="row 'bad' cannot be written"):
        write_manifest(path, [Utterance("new", None, "x"),
                              Utterance("bad", None, "x", end=float("nan"))])
    with pytest.raises(UserError, match="row 'bad' cannot be written"):
        write_manifest(path, [Utterance("bad", None, "x\ud800")])
    assert [u.id for u in read_manifest(path, REGISTRY)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
