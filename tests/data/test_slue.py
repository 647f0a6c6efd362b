"""SLUE in every layout: the same rows give the same utterances; nothing goes missing uncounted."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.data import audio
from unislu_llm.data.corpora import slue
from unislu_llm.data.corpora.slue import SlueHub, SlueVoxCeleb, SlueVoxPopuli, load_hub
from unislu_llm.data.corpora.source import Dropped
from unislu_llm.data.row_reader import RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import RAW_TO_COMBINED, Span, TaskRegistry
from unislu_llm.unified import encode, render
from unislu_llm.utterance import Utterance

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
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
RATE = 16_000
WAVE = (0.5 * np.sin(np.arange(4 * RATE) ** 1.3 / 900)).astype(np.float32)


def write_tsv(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    lines = ["\t".join(row) + "\n" for row in [columns, *rows]]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def voxpopuli(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "vp.tsv", VP_COLUMNS, VP_ROWS)


def read(source: Any, dropped: Dropped | None = None, clips: Path = Path(),
         registry: TaskRegistry | None = None) -> list[Utterance]:
    """Utterances of a source; kinds of problems of the other rows are among the reasons."""
    registry, dropped = registry or TaskRegistry(), Dropped(list) if dropped is None else dropped
    reader, found = RowReader(registry), []
    for where, row in source.rows(registry, dropped, clips):
        u, problems = reader.read(row, where)
        found += [u] if u else []
        if problems:
            dropped[problems[0].kind].append(where)
    return found


def phrases(u: Utterance) -> list[tuple[str, str]]:
    return [(s.label, u.text[s.start:s.end]) for s in u.labels["ner"] if isinstance(s, Span)]


def listed(triples: Iterable[tuple[str, int, int]]) -> dict[str, list[Any]]:
    return {key: [t[i] for t in triples] for i, key in enumerate(("type", "start", "length"))}


def wav(wave: np.ndarray = WAVE, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format=kind)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[Mapping[str, Any]]], None]:
    """Let the hub have these rows."""
    return lambda rows: monkeypatch.setattr(slue, "load_hub", lambda *names: rows)


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
    target = render(encode(rows[2], registry["ner"]))
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
    assert (read(SlueVoxCeleb(path))[0].start, read(SlueVoxCeleb(path))[0].end) == (0.0, None)


def test_hub_audio_is_written_as_it_is(tmp_path: Path, hub: Any) -> None:
    data = wav(kind="FLAC")
    hub([{"index": 0, "id": "id1/x y", "audio": {"bytes": data, "path": "x.flac"},
          "speaker_id": "id1", "normalized_text": "good", "sentiment": "Negative",
          "start_second": 0.5, "end_second": 2.0}])
    (u,) = read(SlueHub("voxceleb", "dev"), clips=tmp_path / "clips")
    assert u.audio == tmp_path / "clips" / "id1-x-y.flac"
    assert u.audio.read_bytes() == data
    assert (u.start, u.end) == (0.5, 2.0)  # the manifest crops
    before = u.audio.stat().st_mtime_ns
    read(SlueHub("voxceleb", "dev"), clips=tmp_path / "clips")
    assert u.audio.stat().st_mtime_ns == before
    hub([{"id": "a", "audio": {"path": "a.wav"}}])
    with pytest.raises(UserError, match=r"voxpopuli\[0\]: no field 'normalized_text'"):
        read(SlueHub("voxpopuli", "dev"), clips=tmp_path)


def test_dialogue_acts_are_a_task_of_the_registry_alone(tmp_path: Path, hub: Any) -> None:
    registry = TaskRegistry.from_yaml(CONFIGS / "tasks_hvb.yaml")
    rows = [{"audio": {"bytes": wav(), "path": "c0ffee_100_900.wav"}, "speaker_id": "4",
             "text": "thanks bye", "dialog_acts": ["thanks", "statement_close", "thanks"]},
            {"audio": {"bytes": wav(), "path": "c0ffee_900_990.wav"}, "text": "mm",
             "dialog_acts": []}]
    hub(rows)
    dropped = Dropped(list)
    found = read(SlueHub("hvb", "dev"), dropped, tmp_path / "clips", registry)
    assert [u.id for u in found] == ["c0ffee_100_900", "c0ffee_900_990"]
    assert [u.labels["da"] for u in found] == [("statement_close", "thanks"), ()]
    assert not dropped
    assert render(encode(found[0], registry["da"])) == (
        "thanks bye[T/L][DA][A]statement_close[/A][A]thanks[/A]")
    rows[0]["dialog_acts"] = ["thanks", "shout"]
    assert len(read(SlueHub("hvb", "dev", with_audio=False), dropped, registry=registry)) == 1
    assert dropped == {"label": ["hvb[0]"]}
    with pytest.raises(UserError, match="'da'"):
        read(SlueHub("hvb", "dev", with_audio=False))


# Copies of the hub's data sets on this machine


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The split `validation` of VoxCeleb as parquet, its audio a feature of `datasets`."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    clip = {"bytes": wav(kind="FLAC"), "path": "a.flac"}
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


def test_a_copy_without_the_split_missing_or_damaged_is_one_error(
        copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        load_hub("voxceleb", "validation", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"split 'test': .*test.*; is the copy whole"):
        load_hub("voxceleb", "test", copy)
    (file,) = copy.rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is the copy whole"):
        list(load_hub("voxceleb", "validation", copy))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'unislu_llm\[hub\]'"):
        load_hub("voxpopuli", "train")
