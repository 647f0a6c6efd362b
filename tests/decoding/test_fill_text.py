"""Audio without transcripts: rows get what is heard, spans their places, doubtful rows are left out; and it is told later."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unislu_llm.cli import main
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.rows import Phrase
from unislu_llm.decoding import drafts
from unislu_llm.decoding.draft_files import write_drafts
from unislu_llm.decoding.drafts import Drafter
from unislu_llm.decoding.fill_text import EMPTY, LONG, LOOPS, FillReport, fill_text, find_phrase, place_phrases
from unislu_llm.errors import UserError
from unislu_llm.models.tiny import make_whisper
from unislu_llm.tasks import LabelTask, Span, SpanTask, TaskRegistry
from unislu_llm.training.build import load_samples

REGISTRY = TaskRegistry([SpanTask("slots", "[SLOTS]", ("size", "drink")),
                         LabelTask("intent", "[INTENT]", ("order", "cancel"), "[I]", "[/I]"),
                         LabelTask("moods", "[MOOD]", ("glad", "sad"), "[M]", "[/M]", multi=True)])


class Says:
    """A recogniser that knows clips by their length in hundredths of a second."""

    def __init__(self, **texts: str) -> None:
        self.texts = {int(key[1:]): text for key, text in texts.items()}
        self.looped: list[bool] = []
        self.heard: list[int] = []

    def __call__(self, waves: Sequence[Tensor], language: str) -> list[str]:
        lengths = [len(wave) // 160 for wave in waves]
        self.heard += lengths
        self.looped = [self.texts[n].startswith("loop") for n in lengths]
        return [self.texts[n] for n in lengths]


def corpus(folder: Path, *rows: dict[str, Any]) -> Path:
    """A manifest of rows whose `n` is the length of their audio in hundredths of a second."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, row in enumerate(rows):
        n = row.pop("n", None)
        if n is not None:
            soundfile.write(folder / f"{n}.wav", np.random.default_rng(n).normal(0, 0.1, n * 160), 16_000)
        written.append({"id": f"r{i}"} | ({"audio": f"{n}.wav"} if n else {}) | row)
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return folder / "m.jsonl"


def fill(manifest: Path, says: Says, out: Path) -> FillReport:
    return fill_text(Drafter(says, REGISTRY, batch_size=2), {}, [manifest], out, REGISTRY, "a/checkpoint", progress=False)[0]


def test_rows_without_text_get_what_is_heard_and_spans_their_places(tmp_path: Path) -> None:
    slots = [{"label": "size", "phrase": " twelve  ounce "}, ["drink", "Mocha"]]
    given_row = {"n": 90, "text": "Given, kept", "slots": [["drink", 0, 5]], "metadata": 1}
    manifest = corpus(
        tmp_path / "in", given_row,
        {"n": 50, "slots": slots, "intent": "order", "moods": []},
        {"n": 60, "text": None, "slots": {"drink": ["tea", "mocha"]}, "moods": ["sad"], "condition": "far"},
        {"n": 70, "text": "", "slots": []}, {"n": 72, "slots": {"drink": "espresso"}, "intent": "cancel"},
        {"n": 80, "intent": "order"}, {"n": 81, "intent": "order"}, {"n": 51, "duration": 30.5}, {"text": "no audio"})
    before = manifest.read_text()
    says = Says(_50="A 12-ounce, um, mocha.", _60="Mocha and tea", _70="Nothing\nordered [SLOTS]", _72="A press oh",
                _80=" ", _81="loop and loop")
    report = fill(manifest, says, tmp_path / "out")
    assert manifest.read_text() == before
    assert sorted(says.heard) == [50, 60, 70, 72, 80, 81]  # no row that has a transcript, none that is too long
    assert (report.given, report.filled, report.made) == (2, 4, 6)
    assert report.tally.dropped == {EMPTY: 1, LOOPS: 1, LONG: 1}
    assert report.tally.notes == {"slots": 1}
    assert report.tally.named["slots"] == [f"{manifest}:5 (r4)"]
    read = {u.id: u for u in read_manifest(report.copy, REGISTRY, check_audio=True)}
    assert {name: (u.text, u.text_source, u.labels) for name, u in read.items()} == {
        "r0": ("Given, kept", None, {"slots": (Span("drink", 0, 5),)}),
        "r1": ("a 12-ounce, um, mocha.", "a/checkpoint",
               {"slots": (Span("size", 2, 10), Span("drink", 16, 21)), "intent": "order", "moods": ()}),
        "r2": ("mocha and tea", "a/checkpoint", {"slots": (Span("drink", 0, 5), Span("drink", 10, 13)), "moods": ("sad",)}),
        "r3": ("nothing ordered", "a/checkpoint", {"slots": ()}),
        "r4": ("a press oh", "a/checkpoint", {"intent": "cancel"}),  # the phrase is not found: unknown, not absent
        "r8": ("no audio", None, {})}
    assert json.loads(report.copy.read_text().splitlines()[2])["condition"] == "far"
    again = fill(manifest, Says(), tmp_path / "out")  # asks nobody anything, and loops are still known
    assert (again.made, again.tally) == (0, report.tally)


def test_drafts_of_older_calls_that_do_not_tell_loops_are_heard_again(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "in", {"n": 50, "text": "said"}, {"n": 60, "text": "said too"})
    write_drafts(Drafter(Says(_50="loop", _60="well"), REGISTRY), {}, [manifest], tmp_path / "out", REGISTRY, progress=False)
    (tmp_path / "out" / "m.jsonl").unlink()
    bare = corpus(tmp_path / "in", {"n": 50}, {"n": 60})
    report = fill(bare, Says(), tmp_path / "out")  # told apart by what the drafts' file says
    assert (report.filled, report.tally.dropped) == (1, {LOOPS: 1})
    (kept,) = (tmp_path / "out" / ".drafts").rglob("*.jsonl")
    kept.write_text("".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "loop"}) + "\n"
                            for line in kept.read_text().splitlines()))
    says = Says(_50="loop", _60="well")
    assert fill(bare, says, tmp_path / "out").tally == report.tally
    assert sorted(says.heard) == [50, 60]


@pytest.mark.parametrize(("row", "message"), [
    ({"n": 50, "slots": [{"label": "size", "start": 0, "end": 3}]}, r"slots\[0\]: the row has no text that offsets"),
    ({"n": 50, "slots": [["size", 0, 3]]}, r"slots\[0\]: the row has no text"),
    ({"n": 50, "slots": {"sise": "large"}}, r"slots.sise: 'sise' is not a label of 'slots'; did you mean 'size'"),
    ({"n": 50, "slots": "large"}, "slots: must be a list of spans"),
    ({"n": 50, "intent": "ordr"}, "intent: 'ordr' is not a label"),
    ({"n": 50, "transcript": "it is there"}, "text: is missing; .* rename 'transcript'"),
    ({"text": ""}, "text: is empty"),
    ({"n": 50, "text": " "}, "text: starts or ends with a blank"),
])
def test_what_cannot_be_filled_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"m\.jsonl:1: {message}"):
        fill(corpus(tmp_path / "in", row), Says(), tmp_path / "out")
    with pytest.raises(UserError, match="no row is left"):
        fill(corpus(tmp_path / "in", {"n": 50}), Says(_50=""), tmp_path / "out")
    assert not (tmp_path / "out" / "m.jsonl").exists()


def test_phrases_are_found_as_words() -> None:
    def said(text: str, phrase: str) -> list[str]:
        return [text[a:b] for a, b in find_phrase(text, phrase)]

    assert said("a latte, then a LATTE!", "latte") == ["latte", "LATTE"]
    assert said("platters", "latte") == []
    assert said("some Light-Roast mocha", "light roast") == ["Light-Roast"]
    assert said("twenty, um, ounces of um milk", "20 ounces") == ["twenty, um, ounces"]
    assert said("20 ounces", "twenty ounces") == ["20 ounces"]
    assert said("some text", "...") == []
    milk, almond = Phrase("drink", "milk"), Phrase("size", "almond milk")
    both = [Span("size", 0, 11), Span("drink", 16, 20)]
    assert place_phrases("almond milk and milk", [milk, almond]) == both  # the long one first: nothing overlaps
    assert place_phrases("almond milk", [milk, almond]) is None
    assert place_phrases("milk", [milk, milk]) is None  # said once, given twice
    assert place_phrases("anything", []) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["milk", "almond", "a", "latte,", "20", "twenty-one", "don't", "Large."]), max_size=9), st.data())
def test_places_fit_the_text(words: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words)))
    phrase = " ".join(words[start:start + 3])
    text = " ".join(words)
    spans = place_phrases(text, [Phrase("size", phrase)]) if phrase else []
    assert spans is not None  # what was cut out of the text is found in it
    for _, low, high in spans:
        assert text[low:high] == text[low:high].strip() != ""
        assert find_phrase(text[low:high], phrase)


def test_the_command_and_what_comes_after(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_whisper(init_std=0.3)
    model.save_pretrained(tmp_path / "tiny-whisper")
    tokenizer.save_pretrained(tmp_path / "tiny-whisper")
    monkeypatch.setattr(drafts, "has_loop", lambda ids: False)  # random weights repeat themselves
    manifest = corpus(tmp_path / "in", {"n": 90, "sa": "Neutral"}, {"n": 120, "text": "it was said", "sa": "Positive"})
    assert main(["validate", str(manifest)]) == 1
    told = "unislu draft --fill-text"
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match=told):
        read_manifest(manifest, TaskRegistry())
    whisper, out = str(tmp_path / "tiny-whisper"), str(tmp_path / "out")
    call = ["draft", whisper, str(manifest), "--out", out, "--threads", "1", "--fill-text"]
    assert main([*call, "--text-rows", "copy"]) == 2
    assert main(call) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "out/m.jsonl" in line)
    assert row[1:] == ["2", "1", "1", "1", "0"]
    copy = tmp_path / "out" / "m.jsonl"
    assert [u.text_source for u in read_manifest(copy, TaskRegistry())] == ["tiny-whisper", None]
    main(["validate", str(copy)])
    assert "pseudo text     1 rows" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        load_samples([str(copy)], TaskRegistry())
        assert not caplog.messages  # training
        for _ in range(2):
            load_samples([str(copy)], TaskRegistry(), 0, "manifest")
    (message,) = caplog.messages
    assert "1 of 2 rows" in message


def test_a_text_source_is_kept(tmp_path: Path) -> None:
    from unislu_llm.data.manifest import write_manifest

    manifest = corpus(tmp_path, {"text": "heard", "text_source": "a/b"})
    write_manifest(tmp_path / "copy.jsonl", read_manifest(manifest, REGISTRY))
    assert json.loads((tmp_path / "copy.jsonl").read_text())["text_source"] == "a/b"
