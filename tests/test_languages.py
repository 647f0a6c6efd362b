"""Other languages than English: normalisers, characters as words, a corpus of two languages from
manifest to scores."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.report.test_compare import rewrite, row_of
from tests.scoring.rows import REGISTRY, ner
from tests.test_evaluate import options
from unislu_llm.cli import main
from unislu_llm.data.loading import load_examples
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.phrases import place_phrases
from unislu_llm.decoding.answer import Answer
from unislu_llm.decoding.long_form import join, occurrences
from unislu_llm.errors import UserError
from unislu_llm.evaluate import evaluate
from unislu_llm.io import read_json_lines
from unislu_llm.report.compare import compare
from unislu_llm.scoring.score import score_predictions
from unislu_llm.scoring.text import PROTOCOLS, normalise_phrase, normalise_transcript
from unislu_llm.tasks import Span
from unislu_llm.utterance import Utterance

ZH, DE = "我在北京工作。", "um zwölf Uhr wohnt Änne in Zürich"
ROWS = [("zh", "zh-CN", ZH, [["PLACE", 2, 4]]), ("zh", "zh", "你好世界", []),
        ("de", "de", DE, [["PERSON", 19, 23], ["PLACE", 27, 33]]), ("de", "de", "ja, gut", [])]


def test_a_language_has_its_normaliser() -> None:
    for language, text, words in (
            ("", "Um, it's colour 21", "it is color 21"), ("en-GB", "colour", "color"),
            ("de", "Um zwölf, ÄNNE (hm)!", "um zwölf änne"), ("zh-CN", ZH, "我 在 北 京 工 作"),
            ("ja", "GDPが 増えた", "g d p が 増 え た"), ("th", "ที่นี่", "ที่ นี่"),
            ("hi", "हिन्दी, है", "हिन्दी है")):
        assert normalise_transcript(text, "whisper", language) == words
    assert normalise_transcript("Ja. Gut, Änne!", "slue", "de") == "Ja Gut, Änne"
    assert normalise_phrase("北京,GDP！", "slue", "zh") == "北 京 GDP"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_composed_and_decomposed_text_are_the_same(protocol: str) -> None:
    text = "we met in zürich"
    other = unicodedata.normalize("NFD", text)
    row = ner(text, [("PLACE", "zürich")], other, [("PLACE", other[10:])])
    got = score_predictions([row], REGISTRY)
    block = got["protocols"][protocol]
    assert (block["wer"]["overall"]["errors"], block["tasks"]["ner"]["entity"]["f1"]) == (0, 100)
    assert got["position"]["ner"]["f1"] == 100


def test_entities_of_characters_have_places() -> None:
    row = ner("我在北京和上海", [("PLACE", "北京"), ("PLACE", "上海")], "我在北京和商海",
              [("PLACE", "北京"), ("PLACE", "商海")], language="zh")
    got = score_predictions([row], REGISTRY)
    block = got["protocols"]["whisper"]["tasks"]["ner"]
    assert (block["entity"]["f1"], block["errors"]["reference"]["misheard"]) == (50, 1)
    assert got["position"]["ner"]["f1"] == 100, "the right characters were labelled"


def test_phrases_are_characters_and_of_the_rows_language(tmp_path: Path) -> None:
    assert place_phrases("我爱北京。北京，很大", [("PLACE", "北京")] * 2)[0] == [
        Span("PLACE", 2, 4), Span("PLACE", 5, 7)]
    assert not place_phrases("ที่นี่", [("PLACE", "ท")])[0], "a letter without its mark is another"
    assert place_phrases(DE, [("WHEN", "Zwölf!")], language="de") == ([Span("WHEN", 3, 8)], {})
    path = tmp_path / "m.jsonl"
    decomposed = unicodedata.normalize("NFD", DE)
    at = decomposed.index("in Z") + 3
    path.write_text(json.dumps({"id": "a", "text": decomposed, "language": "de",
                                "ner": [["PLACE", at, len(decomposed)]]}))
    row, = read_manifest(path, REGISTRY)
    assert (row.text, row.labels["ner"]) == (DE, (Span("PLACE", 27, 33),))
    # Of a row that names no language the setting's counts: English alone drops marks of letters.
    path.write_text(json.dumps({"id": "a", "text": DE, "ner": [["PLACE", "Zurich"]]}))
    assert load_examples([str(path)], REGISTRY)
    with pytest.raises(UserError, match="'Zurich' is not in the text"):
        load_examples([str(path)], REGISTRY, language="de")


def test_windows_of_characters_are_joined() -> None:
    answers = [Answer(said, 20.0, {"ner": ()}) for said in ("他来了。", "我走了", "ok", "", "ja")]
    parts = [Utterance("a", None, "", end=20.0)] * len(answers)
    assert join(REGISTRY, parts, answers).transcript == "他来了。我走了 ok ja"
    assert occurrences("北京", "北京。我爱北京人") == [(0, 2), (5, 7)]


def test_intents_and_slots_from_the_corpus_to_scores(
        tmp_path: Path, tiny_checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    items = [{"slurp_id": i, "sentence": "wake me at nine", "scenario": "alarm", "action": "set",
              "sentence_annotation": "wake me at [time : nine]",
              "recordings": [{"file": u.audio and u.audio.name}]}
             for i, u in enumerate(tiny.write_utterances(Path("wav")))]
    Path("devel.jsonl").write_text("\n".join(map(json.dumps, items)))
    tasks = Path(__file__).parents[1] / "recipes" / "configs" / "tasks_slurp.yaml"
    assert main(["prepare", "slurp", "--file", "devel.jsonl", "--audio", "wav", "--out",
                 "rows.jsonl", "--tasks-file", str(tasks)]) == 0
    tiny.train_tiny_run("speech_llm", tmp_path, tiny_checkpoints, Path("rows.jsonl"), tasks)
    assert evaluate(options(Path("runs/tiny"))) == 0
    table = capsys.readouterr().out.partition("Protocol: slurp")[2]
    assert all(f" {name} " in table for name in ("intent_accuracy", "slots_f1", "slots_slu_f1"))
    assert compare([Path("runs/tiny"), Path("results/tiny.json")], "slurp")


def test_two_languages_from_manifest_to_scores(
        tmp_path: Path, tiny_checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    clips = [str(u.audio) for u in tiny.write_utterances(tmp_path / "corpus" / "audio")]
    Path("rows.jsonl").write_text("".join(json.dumps({
        "id": f"u{i}", "audio": clip, "corpus": corpus, "language": language, "text": text,
        "ner": spans}) + "\n"
        for i, (clip, (corpus, language, text, spans)) in enumerate(zip(clips, ROWS, strict=True))))
    tiny.train_tiny_run("speech_llm", tmp_path, tiny_checkpoints, Path("rows.jsonl"))
    assert evaluate(options(Path("runs/tiny"))) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in (" cer_zh ", " wer_de ", " wer ", " cer "))
    file = Path("runs/tiny/predictions/best-dev.jsonl")
    rows = read_json_lines(file)
    assert [row["language"] for row in rows] == ["zh-CN", "zh", "de", "de"]
    assert rows[2]["ref"] == [["PERSON", "Änne", 19, 23], ["PLACE", "Zürich", 27, 33]]
    # What a better model might have said: one wrong character of ten, one wrong word of nine.
    said: dict[str, dict[str, Any]] = {
        "u0": {"hyp_text": "我在东京工作", "hyp": [["PLACE", "东京"]]},
        "u2": {"hyp_text": unicodedata.normalize("NFD", "Um 12 Uhr wohnt Änne in Zürich"),
               "hyp": [["PERSON", "änne"], ["PLACE", "Zürich."]]}}
    other = Path("better.jsonl")
    other.write_bytes(file.read_bytes())
    rewrite(other, lambda row: {"problems": [], "hyp": [], "hyp_text": row["ref_text"]}
            | said.get(row["id"], {}))
    text = compare([file, other])
    assert row_of(text, "cer_zh")[2] == "10.00"
    assert row_of(text, "wer_de")[2] == f"{100 / 9:.2f}"
    assert row_of(text, "wer")[2] == f"{200 / 19:.2f}"
    assert row_of(text, "ner_f1")[2] == f"{200 / 3:.2f}", "two of three are right"
    # `zwölf` is five characters, two in their place: two substitutions, three deletions.
    assert row_of(text, "cer")[2] == f"{100 * (1 + 5) / (10 + 39):.2f}"
