"""SLUE in both layouts: the same rows give the same utterances, and nothing goes missing uncounted."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.data.slue import DIALOGUE_ACTS, RAW_TO_COMBINED, entities, load_hub, read_hub, read_voxceleb, read_voxpopuli
from unislu_llm.data.tally import Tally, tidy
from unislu_llm.errors import UserError
from unislu_llm.scoring import ner
from unislu_llm.tasks import NER, LabelTask, Span, TaskRegistry
from unislu_llm.unified import encode, parse, render
from unislu_llm.utterance import Utterance

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
VP_COLUMNS = ("id", "raw_text", "normalized_text", "speaker_id", "split", "raw_ner", "normalized_ner")
VP_ROWS = [  # (id, raw, normalised, speaker, split, entities of both, the right-most first)
    ("20:01_0", "In Paris, \"we\" met in May.", "in paris \"we\" met in may.", "119", "dev", "[['DATE', 22, 3], ['GPE', 3, 5]]",
     "[['DATE', 21, 3], ['GPE', 3, 5]]"),
    ("20:01_1", "", "nobody spoke.", "None", "dev", "[]", "None"),
    ("20:01_2", "The Euro 2000 was fun.", "the euro two thousand was fun.", "7", "dev", "[['EVENT', 4, 9]]",
     "[['EVENT', 4, 17]]"),
]
VC_COLUMNS = ("id", "normalized_text", "speaker_id", "split", "sentiment", "start_second", "end_second")


def write_tsv(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]), encoding="utf-8")
    return path


@pytest.fixture
def voxpopuli(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "vp.tsv", VP_COLUMNS, VP_ROWS)


def hub_rows() -> list[dict[str, Any]]:
    rows = []
    for name, raw, normalized, speaker, _, raw_ner, normalized_ner in VP_ROWS:
        row: dict[str, Any] = {"id": name, "raw_text": raw, "normalized_text": normalized, "speaker_id": speaker}
        for kind, text in (("raw", raw_ner), ("normalized", normalized_ner)):
            triples = entities(text, "") or []
            combined = [(c, s.start, s.end - s.start) for s in triples if (c := RAW_TO_COMBINED[s.label])]
            row[f"{kind}_ner"] = listed([(s.label, s.start, s.end - s.start) for s in triples])
            row[f"{kind}_combined_ner"] = listed(combined)
        rows.append(row)
    return rows


def listed(triples: list[tuple[str, int, int]]) -> dict[str, list[Any]]:
    return {key: [t[i] for t in triples] for i, key in enumerate(("type", "start", "length"))}


def wav(seconds: float = 1.0, rate: int = 16_000, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(np.arange(int(seconds * rate)) / 9), rate, format=kind)
    return buffer.getvalue()


def phrases(u: Utterance, task: str = "ner") -> list[tuple[str, str]]:
    return [(s.label, u.text[s.start:s.end]) for s in u.labels[task] if isinstance(s, Span)]


def test_spans_cut_the_words_from_left_to_right(voxpopuli: Path) -> None:
    tally = Tally()
    rows = list(read_voxpopuli(voxpopuli, None, tally))
    assert phrases(rows[0]) == [("PLACE", "paris"), ("WHEN", "may")]
    assert rows[0].text == 'in paris "we" met in may.'  # quotes are text
    assert [u.speaker for u in rows] == ["119", None, "7"]
    assert rows[1].labels == {"ner": ()}
    assert tally.read == 3
    assert not tally.dropped


def test_types_that_are_not_scored_are_counted_and_named(voxpopuli: Path) -> None:
    tally = Tally()
    rows = list(read_voxpopuli(voxpopuli, None, tally))
    assert rows[2].labels == {"ner": ()}
    assert tally.spans == {"label EVENT (not scored in SLUE)": 1}
    assert "vp.tsv:4 (20:01_2)" in tally.named["label EVENT (not scored in SLUE)"][0]


def test_raw_pair_of_text_and_entities(voxpopuli: Path) -> None:
    tally = Tally()
    rows = list(read_voxpopuli(voxpopuli, None, tally, text="raw", labels="raw"))
    assert [phrases(u) for u in rows] == [[("GPE", "Paris"), ("DATE", "May")], [("EVENT", "Euro 2000")]]
    assert tally.dropped == {"empty transcript": 1}
    registry = TaskRegistry.from_yaml(CONFIGS / "tasks_ontonotes.yaml")
    assert set(registry["ner"].labels) == set(RAW_TO_COMBINED)
    assert render(encode(rows[1], registry["ner"])).endswith("[NER][EVENT]Euro 2000[/EVENT]")


@pytest.mark.parametrize("labels", ["combined", "raw"])
@pytest.mark.parametrize("text", ["normalized", "raw"])
def test_hub_rows_and_tsv_agree(voxpopuli: Path, text: Any, labels: Any) -> None:
    from_tsv = list(read_voxpopuli(voxpopuli, None, Tally(), text=text, labels=labels))
    from_hub = list(read_hub(hub_rows(), "voxpopuli", Tally(), text=text, labels=labels))
    assert [(u.id, u.text, u.labels, u.speaker) for u in from_hub] == [(u.id, u.text, u.labels, u.speaker) for u in from_tsv]


def test_combined_columns_are_taken_where_the_file_has_them(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "x.tsv", ("id", "normalized_text", "normalized_ner", "normalized_combined_ner"),
                     [("a", "in paris", "None", "[['PLACE', 3, 5]]")])
    assert phrases(next(read_voxpopuli(path, None, Tally()))) == [("PLACE", "paris")]


def test_a_blind_split_is_not_annotated(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "x.tsv", ("id", "normalized_text"), [("a", "in paris")])
    tally = Tally()
    assert next(read_voxpopuli(path, None, tally)).labels == {}
    assert tally.notes == {"no entity annotation": 1}


@pytest.mark.parametrize(("rows", "message"), [
    ([("a", "in paris", "[['GPE', 3]]")], "x.tsv:2 .a.: normalized_ner: entities"),
    ([("a", "in paris", "[['CITY', 3, 5]]")], "x.tsv:2 .a.: 'CITY' is neither"),
    ([("a", "in paris")], "x.tsv:2: another number of columns"),
])
def test_what_cannot_be_read_is_named(tmp_path: Path, rows: list[tuple[str, ...]], message: str) -> None:
    path = write_tsv(tmp_path / "x.tsv", ("id", "normalized_text", "normalized_ner"), rows)
    with pytest.raises(UserError, match=message):
        list(read_voxpopuli(path, None, Tally()))


def test_audio_of_both_folder_layouts(voxpopuli: Path, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "20:01_0.ogg").touch()
    (tmp_path / "20:01_1.ogg").touch()
    found = [u.audio for u in read_voxpopuli(voxpopuli, tmp_path, Tally())]
    assert found == [tmp_path / "dev" / "20:01_0.ogg", tmp_path / "20:01_1.ogg", tmp_path / "dev" / "20:01_2.ogg"]


def test_voxceleb_crops_and_drops_what_has_no_class(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "vc.tsv", VC_COLUMNS, [
        ("id1_0", "lovely day", "id1", "dev", "Positive", "1.25", "3.5"),
        ("id1_1", "well", "id1", "dev", "Disagreement", "0", "1"),
        ("id1_2", "so", "id1", "dev", "<mixed>", "0", "1"),
        ("id1_3", "hm", "id1", "dev", "Neutral", "2", "2"),
    ])
    tally = Tally()
    (utterance,) = read_voxceleb(path, tmp_path, tally)
    assert (utterance.labels, utterance.start, utterance.end) == ({"sa": "Positive"}, 1.25, 3.5)
    assert utterance.audio == tmp_path / "dev_raw" / "id1_0.flac"
    assert tally.dropped == {"sentiment Disagreement": 1, "sentiment <mixed>": 1, "start_second or end_second out of range": 1}
    (text_only,) = read_voxceleb(path, None, Tally())
    assert (text_only.start, text_only.end) == (0.0, None)


@pytest.mark.parametrize(("kind", "suffix"), [("WAV", ".wav"), ("FLAC", ".flac")])
def test_hub_audio_is_written_as_it_is_and_cropped_by_the_manifest(tmp_path: Path, kind: str, suffix: str) -> None:
    data = wav(4.0, kind=kind)
    row = {"index": 0, "id": "id1/x y", "audio": {"bytes": data, "path": "x.flac"}, "speaker_id": "id1",
           "normalized_text": "good", "sentiment": "Negative", "start_second": 0.5, "end_second": 2.0, "local_path": "x"}
    (utterance,) = read_hub([row], "voxceleb", Tally(), clips=tmp_path / "clips")
    assert utterance.audio == tmp_path / "clips" / f"id1-x-y{suffix}"
    assert utterance.audio.read_bytes() == data
    assert (utterance.start, utterance.end) == (0.5, 2.0)
    before = utterance.audio.stat().st_mtime_ns
    list(read_hub([row], "voxceleb", Tally(), clips=tmp_path / "clips"))
    assert utterance.audio.stat().st_mtime_ns == before


def test_decoded_audio_is_refused(tmp_path: Path) -> None:
    row = {"id": "a", "normalized_text": "x", "audio": {"array": np.zeros(3), "sampling_rate": 16_000}}
    with pytest.raises(UserError, match="decoded already"):
        list(read_hub([row], "voxpopuli", Tally(), clips=tmp_path))


def test_dialogue_acts_are_a_task_of_the_registry_alone(tmp_path: Path) -> None:
    registry = TaskRegistry.from_yaml(CONFIGS / "tasks_hvb.yaml")
    task = registry["da"]
    assert isinstance(task, LabelTask)
    assert task.multi
    assert task.labels == DIALOGUE_ACTS
    assert len(DIALOGUE_ACTS) == 18
    rows = [{"audio": {"bytes": wav(), "path": "c0ffee_100_900.wav"}, "speaker_id": "4", "text": "thanks bye", "channel": 1,
             "dialog_acts": ["thanks", "statement_close", "thanks"]},
            {"audio": {"bytes": wav(), "path": "c0ffee_900_990.wav"}, "speaker_id": "4", "text": "mm", "dialog_acts": []}]
    tally = Tally()
    found = list(read_hub(rows, "hvb", tally, clips=tmp_path / "clips"))
    assert [u.id for u in found] == ["c0ffee_100_900", "c0ffee_900_990"]
    assert [u.labels["da"] for u in found] == [("statement_close", "thanks"), ()]
    assert tally.notes == {"dialogue act given twice": 1}
    text = render(encode(found[0], task))
    assert text == "thanks bye[T/L][DA][A]statement_close[/A][A]thanks[/A]"
    assert parse(text, registry, "da").outputs == ("statement_close", "thanks")
    write_manifest(tmp_path / "m.jsonl", found)
    assert [u.labels for u in read_manifest(tmp_path / "m.jsonl", registry)] == [u.labels for u in found]
    with pytest.raises(UserError, match="dialog_acts"):
        list(read_hub([{**rows[0], "dialog_acts": ["thanks", "shout"]}], "hvb", Tally()))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'unislu_llm\[hub\]'"):
        load_hub("voxpopuli", "train")


def test_hub_is_asked_for_undecoded_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Loaded:
        def cast_column(self, column: str, feature: Any) -> list[str]:
            asked[column] = feature
            return ["row"]

    class Fake:
        Audio = dict

        @staticmethod
        def load_dataset(*names: str, split: str) -> Loaded:
            asked["names"] = (*names, split)
            return Loaded()

    monkeypatch.setitem(sys.modules, "datasets", Fake)  # type: ignore[arg-type]
    assert load_hub("hvb", "test") == ["row"]
    assert asked == {"names": ("asapp/slue-phase-2", "hvb", "test"), "audio": {"decode": False}}


def test_one_label_mapping() -> None:
    assert ner.RAW_TO_COMBINED is RAW_TO_COMBINED
    assert set(RAW_TO_COMBINED.values()) - {None} == set(NER.labels)


@pytest.mark.parametrize(("text", "spans", "clean", "words"), [
    ("  in  New   York ,now ", [("A", 6, 16), ("B", 18, 22)], "in New York ,now", ["New York", "now"]),
    ("a\tb\u00a0c", [("A", 2, 3)], "a b c", ["b"]),
    ("one two", [("A", 3, 7)], "one two", ["two"]),
    ("plain", [], "plain", []),
])
def test_tidy_moves_offsets_along(text: str, spans: list[tuple[str, int, int]], clean: str, words: list[str]) -> None:
    got, moved = tidy(text, [Span(*s) for s in spans], Tally(), "x")
    assert got == clean
    assert [got[s.start:s.end] for s in moved] == words


def test_tidy_counts_what_does_not_fit_and_keeps_the_longer_of_two() -> None:
    tally = Tally()
    _, kept = tidy("bank of england", [Span("ORG", 0, 15), Span("PLACE", 8, 15), Span("LAW", 12, 99)], tally, "row")
    assert kept == (Span("ORG", 0, 15),)
    assert tally.spans == {"span inside or across a longer one": 1, "span outside the text": 1}
