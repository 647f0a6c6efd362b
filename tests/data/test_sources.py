"""Every source reads a file in the shape in which its tool or its authors publish it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import soundfile

from unislu_llm.cli import main
from unislu_llm.data.corpora import SOURCES, prepare
from unislu_llm.data.corpora.own_data import Conll, Hub, Table, save_clip
from unislu_llm.data.corpora.source import Source, read_objects, tidy
from unislu_llm.data.manifest import iter_rows, read_manifest
from unislu_llm.data.validate import validate
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry

TASKS = Path(__file__).parents[2] / "recipes" / "configs" / "tasks_slurp.yaml"
ORG = (Span("ORG", 4, 11),)


def write(path: Path, *rows: Any) -> Path:
    """A file of lines: text as it is, and JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows), "utf-8")
    return path


def clips(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        soundfile.write(folder / name, [0.1, -0.1] * 40_000, 16_000)
    return folder


def made(source: Source, tasks: Path | None = None, **options: Any) -> tuple[list[Any], str]:
    """What is in the manifest of a source, and the page."""
    base = getattr(source, "file", None) or getattr(source, "folder", None) or getattr(
        source, "tsv", None) or Path(source.name)  # type: ignore[attr-defined]
    out = Path(base).parent / "made" / "m.jsonl"
    page = prepare(source, out, tasks_file=tasks, **options)
    return read_manifest(out, TaskRegistry.from_yaml(tasks), check_audio=True), page


# ---- keys of other tools; those that change the meaning of a row are in test_manifest.py


def test_other_keys_that_nothing_reads_are_named_once(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"so it is {i}", "offset": 0, "lang": "de", "answer": "accept",
             "labels": [], "condition": "clean"} for i in range(3)]
    report = validate([write(tmp_path / "m.jsonl", *rows)])
    assert {p.field: p.message.rpartition("; ")[2] for p in report.problems} == {
        "offset": "'start' is one", "lang": "'language' is one",
        **dict.fromkeys(("answer", "labels"), "if it is one, --tasks-file FILE names it")}
    assert all(p.warning and p.line == 1 for p in report.problems)


@pytest.mark.parametrize("text", ['[{"id": "a"},\n{"id": "b"}]', '[\n {\n  "id": "a"\n }\n]'])
def test_a_json_array_is_one_message(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", text)
    (problem,) = [p for row in iter_rows(path, TaskRegistry()) for p in row.problems]
    assert str(problem).startswith(f"{path}: file: is one JSON array; write one object a line")


# ---- reading


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    clips(tmp_path, "a.flac", "b.flac", "c.flac", "d.flac")
    path = write(tmp_path / "rows.tsv", "id\taudio\ttext", '1\ta.flac\t"the council met',
                 "2\tb.flac\tin paris today", '3\tc.flac\tit was  late"', "4\td.flac\tgood bye")
    assert main(["prepare", "csv", "--file", str(path), "--out", str(tmp_path / "o.jsonl")]) == 0
    assert [u.text for u in read_manifest(tmp_path / "o.jsonl", TaskRegistry())] == [
        '"the council met', "in paris today", 'it was late"', "good bye"]


def test_json_is_read_with_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", "[", '{"a": 1,', ' "b": "]"},', '{"c": 2}]')
    assert list(read_objects(path)) == [(f"{path}:2", {"a": 1, "b": "]"}), (f"{path}:4", {"c": 2})]
    big = [{"text": "x" * 5_000, "n": i} for i in range(600)]  # over several blocks
    assert [row for _, row in read_objects(write(path, *big))] == big
    assert [row for _, row in read_objects(write(path, big))] == big
    for lines, line in ((["[", '{"a": 1}'], 3), (['{"a": 1}', '{"b": '], 3), (['{"a": 1}', "7"], 2),
                        (['{"a": 1}', "{a}"], 2)):
        with pytest.raises(UserError, match=rf"a\.json:{line}: expected"):
            list(read_objects(write(path, *lines)))


def test_blanks_are_tidied_and_spans_move_along() -> None:
    text = " the  council\nmet  "
    assert tidy(text, [("ORG", 5, 14), ("X", 14, 40)]) == (
        "the council met", [["ORG", 4, 11], ["X", 14, 40]])


def test_columns_of_a_table(tmp_path: Path) -> None:
    clips(tmp_path, "a.wav")
    table = write(tmp_path / "t.csv", "path,sentence,mood,votes", "a.wav,so it is,Positive,3")
    rows = write(tmp_path / "t.json", [{"path": "a.wav", "sentence": "so it is",
                                        "mood": "Positive", "votes": 3}])
    columns = ("audio=path", "text=sentence", "sa=mood")
    for file in (table, rows):
        (u,), page = made(Table(file, columns=columns), language="de")
        assert (u.id, u.text, u.labels, u.language) == ("t-1", "so it is", {"sa": "Positive"}, "de")
        assert "1 values of 'votes' not read" in page
        for wrong, message in ((["sb=mood"], "mean 'sa'"), (["sa=mod"], "'mod'"), (["x"], "KEY=C")):
            with pytest.raises(UserError, match=message):
                made(Table(file, columns=("text=sentence", *wrong)))


def test_schemes_of_tags_and_blanks(tmp_path: Path) -> None:
    path = write(tmp_path / "zh.conll", "北 B-PLACE", "京 E-PLACE", "很 O", "大 S-QUANT", "",
                 "中 B-ORG", "华 M-ORG", "社 E-ORG")
    a, b = made(Conll(path, no_blanks=True))[0]
    assert (a.text, a.labels["ner"]) == ("北京很大", (Span("PLACE", 0, 2), Span("QUANT", 3, 4)))
    assert (b.text, b.labels["ner"]) == ("中华社", (Span("ORG", 0, 3),))
    path = write(tmp_path / "x.conll", "the\tO\t_", "council\tB-ORG\tSpaceAfter=No", ".\tO\t_")
    (u,), _ = made(Conll(path, tag_column=1))
    assert (u.text, u.labels["ner"]) == ("the council.", ORG)


@pytest.mark.parametrize("how", ["csv", "jsonl", "saved", "parquet"])
def test_data_sets_in_folders(how: str, tmp_path: Path) -> None:
    clips(tmp_path / "set", "a.wav")
    row = {"file_name": "a.wav", "sentence": "so it is", "sa": "Positive"}
    if how == "csv":
        with (tmp_path / "set/metadata.csv").open("w") as handle:
            csv.writer(handle).writerows([row.keys(), row.values()])
    elif how == "jsonl":
        write(tmp_path / "set/metadata.jsonl", row)
    else:
        data = datasets.Dataset.from_dict({
            "audio": [{"bytes": (tmp_path / "set/a.wav").read_bytes(), "path": "a.wav"}],
            "sentence": ["so it is"], "sa": ["Positive"]}).class_encode_column("sa")
        data = data.cast_column("audio", datasets.Audio())
        if how == "saved":
            datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "data"))
        else:
            data.to_parquet(str(tmp_path / "data/train-0.parquet"))
    name = tmp_path / ("set" if how in ("csv", "jsonl") else "data")
    (u,), _ = made(Hub(str(name), columns=("text=sentence",)))
    assert (u.text, u.labels, u.seconds) == ("so it is", {"sa": "Positive"}, 5.0)


def test_splits_of_a_folder_with_one_table(tmp_path: Path) -> None:
    for split in ("train", "test"):
        clips(tmp_path / "set" / split, "a.wav")
    write(tmp_path / "set/metadata.jsonl", *({"file_name": f"{split}/a.wav", "text": f"in {split}"}
                                             for split in ("train", "test")))
    for split in ("train", "test"):
        assert [u.text for u in made(Hub(str(tmp_path / "set"), split))[0]] == [f"in {split}"]
    with pytest.raises(UserError, match="of one split, 'train'"):
        made(Hub(str(tmp_path / "set"), "dev"))


def test_a_clip_of_the_hub_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Ids may look alike in a file name, and come again; sizes may be equal."""
    for first, second in (("東京 1", "北京 1"), ("a/1", "a-1"), ("7", "7")):
        files = {save_clip({"bytes": content, "path": "x.wav"}, tmp_path, name)
                 for name, content in ((first, b"one"), (second, b"two"))}
        assert sorted(Path(str(file)).read_bytes() for file in files) == [b"one", b"two"]


def test_a_data_set_of_the_hub_is_streamed_by_its_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips(tmp_path / "wav", "a.wav")
    rows = [{"audio": {"bytes": (tmp_path / "wav/a.wav").read_bytes(), "path": "x/a.wav"},
             "transcription": "so  it is", "sa": n, "votes": 3} for n in (2, -1)]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio()).cast_column(
        "sa", datasets.ClassLabel(names=["Negative", "Neutral", "Positive"]))
    asked: list[Any] = []

    def load_dataset(name: str, *given: Any, **options: Any) -> datasets.IterableDataset:
        asked.append((name, *given, options))
        return data.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.Audio, "decode_example", None)  # it needs another package
    monkeypatch.chdir(tmp_path)
    found, page = made(Hub("owner/set", "test", "de_de", ("text=transcription",)))
    assert asked == [("owner/set", "de_de", {"split": "test", "streaming": True})]
    assert [(u.id, u.text, u.labels, u.seconds) for u in found] == [
        ("test-0", "so it is", {"sa": "Positive"}, 5.0), ("test-1", "so it is", {}, 5.0)]
    assert found[0].audio.read_bytes() == rows[0]["audio"]["bytes"]
    assert "2 values of 'votes' not read" in page


# ---- published shapes


def source(name: str, *args: Any, **fields: Any) -> Source:
    return SOURCES[name](*args, **fields)


def test_kaldi(tmp_path: Path) -> None:
    clips(tmp_path, "r.flac")
    write(tmp_path / "d/text", "u1 the council  met", "u2 in paris")
    write(tmp_path / "d/segments", "u1 r 0.5 2.0", "u2 r 2.0 -1", "u3 r 3 4")
    write(tmp_path / "d/utt2spk", "u1 anna")
    wav = write(tmp_path / "d/wav.scp", "r flac -c -d -s r.flac |")
    write(tmp_path / "d/utt2lang", "u1 de")
    rows, page = made(source("kaldi", tmp_path / "d", tmp_path), language="en")
    assert [(u.text, u.start, u.end, u.speaker, u.language) for u in rows] == [
        ("the council met", 0.5, 2.0, "anna", "de"), ("in paris", 2.0, 5.0, None, "en")]
    assert f"1 row dropped: no line in text\n           {tmp_path}/d/segments:3" in page
    write(wav, "r sox r.flac -t wav - |")
    with pytest.raises(UserError, match=r"wav\.scp:1: a command is not run"):
        made(source("kaldi", tmp_path / "d", tmp_path))
    write(tmp_path / "d/segments", "u1 q 0.5 2.0")
    with pytest.raises(UserError, match=r"segments:1: 'u1' needs a recording"):
        made(source("kaldi", tmp_path / "d", tmp_path))


def test_nemo_common_voice_and_librispeech(tmp_path: Path) -> None:
    clips(tmp_path, "a.wav", "c_1.mp3")
    file = write(tmp_path / "n.json", {"audio_filepath": "a.wav", "duration": 2.0, "offset": 1.5,
                                       "text": "so it is", "lang": "en"},
                 {"audio_filepath": "a.wav", "duration": 5.0, "text": "all", "pred_text": "al"},
                 {"audio_filepath": "a.wav", "duration": 2.0, "offset": 0.0, "text": "so"})
    a, b, c = made(source("nemo", file))[0]
    assert (c.start, c.end, c.seconds) == (0.0, 2.0, 2.0)
    assert (a.id, a.start, a.end, a.language) == ("n-1", 1.5, 3.5, "en")
    assert (b.start, b.end, b.hypothesis) == (0.0, None, "al")
    file = write(tmp_path / "cv/dev.tsv", "client_id\tpath\tsentence\tup_votes\tlocale",
                 'ab\tc_1.mp3\t"So ist es\t2\tde', "ab\tgone.mp3\tNein\t2\tde")
    with pytest.raises(UserError, match="2 rows dropped: missing audio file"):
        made(source("common-voice", file))
    clips(tmp_path / "cv/clips", "c_1.mp3")
    assert made(source("common-voice", file))[0][0].audio == tmp_path / "cv/clips/c_1.mp3"
    (u,), page = made(source("common-voice", file, tmp_path))
    assert (u.id, u.text, u.speaker, u.language) == ("c_1.mp3", '"So ist es', "ab", "de")
    assert "1 row dropped: missing audio file" in page
    folder = clips(tmp_path / "libri/84/121", "84-121-0000.flac")
    write(folder / "84-121.trans.txt", "84-121-0000 GO DO YOU HEAR")
    (u,), _ = made(source("librispeech", tmp_path / "libri"))
    assert (u.id, u.text, u.speaker) == ("84-121-0000", "go do you hear", "84")


def test_annotation_tools(tmp_path: Path) -> None:
    clips(tmp_path / "wav", "1.wav", "talk.wav", "a.wav")
    text = "\U0001f600 the council met"  # Label Studio counts the emoji as two
    span = {"start": 7, "end": 14, "text": "council", "labels": ["ORG"]}
    file = write(tmp_path / "ls.json", [
        {"id": 1, "data": {"text": text, "audio": "/data/upload/1/0a1b2c3d-talk.wav"},
         "annotations": [{"result": [
             {"type": "labels", "value": span}, {"type": "relation", "from_id": "x"},
             {"type": "choices", "value": {"choices": ["Positive"]}}]}]},
        {"id": 2, "data": {"text": "no"}, "annotations": [{"was_cancelled": True, "result": []}]}])
    (u,), page = made(source("label-studio", file, tmp_path / "wav"))
    assert u.labels == {"ner": (Span("ORG", 6, 13),), "sa": "Positive"}
    assert u.audio.name == "talk.wav"
    assert "1 row dropped: not annotated" in page
    assert "'relation' is no span" in page
    # JSON-MIN: a choice stands under its name. HTML: offsets do not count tags.
    file = write(tmp_path / "min.json", [
        {"id": 1, "sentence": text, "label": [span], "sentiment": "Positive", "annotator": 1},
        {"id": 2, "utterance": "fine", "sentiment": {"choices": ["Neutral"]}, "lead_time": 3.1}])
    assert [u.labels for u in made(source("label-studio", file))[0]] == [
        {"ner": (Span("ORG", 6, 13),), "sa": "Positive"}, {"sa": "Neutral"}]
    # Where nothing but transcripts was asked for, nobody looked for spans.
    said = {"type": "textarea", "value": {"text": ["hello there"]}}
    file = write(tmp_path / "asr.json", [{"data": {"audio": "a.wav"},
                                          "annotations": [{"result": [said]}]}])
    assert [(u.text, u.labels) for u in made(source("label-studio", file))[0]] == [
        ("hello there", {})]
    region = {"type": "hypertextlabels", "value": {
        "start": "/p[1]/text()[1]", "text": "council", "hypertextlabels": ["ORG"],
        "globalOffsets": {"start": 9, "end": 16}}}
    file = write(tmp_path / "html.json", [{"data": {"html": "<p>so &amp; <b>the council</b></p>"},
                                           "annotations": [{"result": [region]}]}])
    (u,), _ = made(source("label-studio", file))
    assert (u.text, u.labels) == ("so & the council", {"ner": (Span("ORG", 9, 16),)})
    spans = [{"start": 4, "end": 11, "label": "ORG", "token_start": 1}]
    file = write(tmp_path / "p.jsonl", {"text": "the council met", "spans": spans,
                                        "_task_hash": 7, "answer": "accept"},
                 {"text": "no", "spans": [], "answer": "reject"},
                 {"text": "fine", "accept": ["Positive"], "options": [], "answer": "accept"})
    rows, page = made(source("prodigy", file))
    assert [u.labels for u in rows] == [{"ner": ORG}, {"sa": "Positive"}]
    assert "1 row dropped: answer: reject" in page
    for shape in ({"label": [[4, 11, "ORG"]]}, {"entities": [
            {"id": 3, "label": "ORG", "start_offset": 4, "end_offset": 11}], "relations": []}):
        file = write(tmp_path / "d.jsonl", {"id": 1, "text": "the council met"} | shape,
                     {"id": 2, "text": "none"} | {key: [] for key in shape})
        assert [u.labels for u in made(source("doccano", file))[0]] == [{"ner": ORG}, {"ner": ()}]
    file = write(file, {"id": 1, "text": "fine", "label": []},
                 {"id": 2, "text": "good", "label": ["Positive"]})
    assert [u.labels for u in made(source("doccano", file))[0]] == [{}, {"sa": "Positive"}]
    write(tmp_path / "brat/a.txt", "it is late", "the council met")
    note = write(tmp_path / "brat/a.ann", "T1\tORG 15 22\tcouncil", "A1 Sure T1",
                 "T2\tORG 0 2;6 10\tit late")
    rows, page = made(source("brat", tmp_path / "brat"))
    assert [(u.id, u.labels["ner"]) for u in rows] == [("a-1", ()), ("a-2", ORG)]
    assert "brat's 'A'" in page
    write(note, "T1\tORG 15 22\tboard")
    with pytest.raises(UserError, match=r"a\.ann:1: expected .* a\.txt has there"):
        made(source("brat", tmp_path / "brat"))


def test_slurp_speech_massive_and_msner(tmp_path: Path) -> None:
    clips(tmp_path / "2018", "x-de_1_4.ogg")
    clips(tmp_path, "audio-1.flac", "audio-1-headset.flac")
    file = write(tmp_path / "devel.jsonl", {
        "slurp_id": 9, "sentence": "wake me at nine", "intent": "alarm", "scenario": "alarm",
        "sentence_annotation": "wake me at [time : Nine]", "action": "set", "tokens": [],
        "recordings": [{"file": "audio-1.flac"}, {"file": "audio-1-headset.flac"}]})
    understood = {"intent": "alarm_set", "slots": (Span("time", 11, 15),)}
    rows, _ = made(source("slurp", file, tmp_path), TASKS)
    assert [(u.id, u.labels) for u in rows] == [("audio-1", understood),
                                                ("audio-1-headset", understood)]
    with pytest.raises(UserError, match=r"--tasks-file recipes/configs/tasks_slurp\.yaml"):
        made(source("slurp", file))
    with pytest.raises(UserError, match=r"devel\.jsonl:1: not in the shape .*sentence"):
        made(source("slurp", write(file, {"slurp_id": 9})), TASKS)
    wave = {"bytes": (tmp_path / "audio-1.flac").read_bytes(), "path": "train/2b.flac"}
    data = datasets.Dataset.from_list([{
        "id": "7", "locale": "de-DE", "utt": "weck mich um neun", "speaker_id": "s", "audio": wave,
        "annot_utt": "weck mich um [time : neun]", "intent_str": "alarm_set"}])
    data.cast_column("audio", datasets.Audio()).to_parquet(str(tmp_path / "sm/validation.parquet"))
    (u,), _ = made(source("speech-massive", str(tmp_path / "sm"), "validation"), TASKS)
    assert (u.id, u.language, u.labels) == ("de-DE-7", "de", {
        "intent": "alarm_set", "slots": (Span("time", 13, 17),)})
    file = write(tmp_path / "t.jsonl", {"id": "2018-x-de_1_4", "input": ["Der", " Rat", "."],
                 "annotation": [{"type": "organization", "entity": [" Rat"], "position": [1]},
                                {"type": "event", "entity": ["."], "position": [2]}]})
    (u,), page = made(source("msner", file))
    assert (u.text, u.labels["ner"], u.language) == ("Der Rat.", (Span("ORG", 4, 7),), "de")
    assert "label EVENT (not scored in SLUE)" in page


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "validate"])
def test_a_hundred_thousand_rows_need_30_seconds_and_400_mb(command: str, tmp_path: Path) -> None:
    clips(tmp_path, "a.flac")
    row = {"audio_filepath" if command == "prepare" else "audio": "a.flac", "duration": 5.0,
           "ner": [["ORG", 4, 11]]}
    file = write(tmp_path / "n.json", *(row | {"text": f"the council met {i}", "id": str(i)}
                                        for i in range(100_000)))
    args = {"prepare": ["nemo", "--file", file, "--out", tmp_path / "m.jsonl"],
            "validate": [file]}[command]
    # Of the processor, and of this program: what else runs here is not counted.
    code = ("import sys, time; from pathlib import Path; from unislu_llm.cli import main; "
            "main(sys.argv[1:]); print(*[line for line in Path('/proc/self/status').open() "
            "if 'VmHWM' in line], time.process_time())")
    done = subprocess.run([sys.executable, "-c", code, command, *args], check=True,
                          capture_output=True, text=True)
    assert "rows            100000 (0" in done.stdout
    _, kilobytes, _, seconds = done.stdout.split()[-4:]
    print(f"{seconds} s, {kilobytes} kB")
    assert (float(seconds) < 30, int(kilobytes) < 400_000) == (True, True)
