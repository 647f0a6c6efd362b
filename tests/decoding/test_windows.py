"""Long audio: windows cover it and end in pauses, transcripts join, offsets cut phrases, short files stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unislu_llm.decoding import windows as module
from unislu_llm.decoding.generate import DecodeOptions, understand
from unislu_llm.decoding.stitching import Stitched, occurrences
from unislu_llm.decoding.windows import WindowOptions, split, understand_long
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]
RATE = 16_000
ACTS = LabelTask("acts", "[ACT]", ("question", "answer"), "[A]", "[/A]", multi=True)
TASKS = TaskRegistry([NER, SA, ACTS])
OPTIONS = DecodeOptions(max_new_tokens=24)


def speech(seconds: float, pauses: Sequence[tuple[float, float]], noise: float = 0.01) -> torch.Tensor:
    """Loud noise with pauses `(start, end)` of quiet noise."""
    wave = 0.3 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(0))
    for start, end in pauses:
        wave[int(start * RATE):int(end * RATE)] *= noise / 0.3
    return wave


# Cutting


def test_cuts_are_in_the_longest_pause() -> None:
    wave = speech(62.0, [(5, 9), (21.0, 21.4), (23.0, 24.5), (26.0, 26.5), (48.0, 48.3)])
    found = split(wave)
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
    assert found[0][1] / RATE == pytest.approx(23.75, abs=0.1)
    assert found[1][1] / RATE == pytest.approx(48.15, abs=0.1)
    assert found[-1][1] == len(wave)
    for first, last in split(wave, WindowOptions(overlap=2.0))[1:]:
        assert (first, last)[0] / RATE == pytest.approx(21.75 if first < 30 * RATE else 46.15, abs=0.15)


@given(st.floats(0.1, 130.0), st.sampled_from([0.0, 1.5, 10.0]), st.sampled_from(["zero", "noise", "constant", "click"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_windows_cover_anything(seconds: float, overlap: float, kind: str) -> None:
    n = max(1, int(seconds * RATE))
    wave = {"zero": torch.zeros(n), "constant": torch.full((n,), 0.5), "noise": speech(n / RATE + 1, [])[:n],
            "click": torch.zeros(n).index_fill(0, torch.tensor([n // 2]), 1.0)}[kind]
    found = split(wave, WindowOptions(overlap=overlap))
    assert (found[0][0], found[-1][1]) == (0, n)
    assert all(20 * RATE <= last - first <= 28 * RATE for first, last in found[:-1])
    assert 0 < found[-1][1] - found[-1][0] <= 30 * RATE
    for (_, end), (start, _) in pairwise(found):
        assert end - start == int(overlap * RATE)


def test_bad_windows_are_refused() -> None:
    for bad in ({"overlap": -1.0}, {"overlap": 11.0}, {"longest": 31.0}, {"shortest": 28.0}):
        with pytest.raises(UserError):
            WindowOptions(**bad)


# Joining


def test_overlaps_are_joined_where_they_agree() -> None:
    texts = ["the council met in paris on mon", "is on Monday and anna voted", "Anna voted against it"]
    joined = Stitched(texts, [(0.4, 0.3), (0.3, 0.3)])
    assert joined.text == "the council met in paris on mon is on Monday and Anna voted against it"
    texts[0] = "the council met in paris on monday it"
    joined = Stitched(texts, [(0.4, 0.3), (0.3, 0.3)])
    assert joined.text == "the council met in paris on Monday and Anna voted against it"
    assert joined.place(0, 28, 34) == (28, 34)  # `monday` stands as the next window's
    assert joined.place(0, 35, 37) is None  # `it` went
    assert joined.place(1, 0, 2) is None
    assert joined.place(1, 17, 21) == joined.place(2, 0, 4) == (39, 43)
    assert Stitched(["a b", "", "c d"], [(0.1, 0.1), (0.1, 0.1)]).text == "a b c d"
    assert Stitched(["", ""]).text == ""


@given(st.integers(0, 60), st.integers(1, 30), st.integers(0, 8), st.integers(0, 2), st.integers(0, 2))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_one_text_heard_in_windows_comes_back(n: int, step: int, overlap: int, worse_tail: int, worse_head: int) -> None:
    """Words nearest to the edges are misheard; the joined text is still the one that was said, and every word is found."""
    said = [f"w{i}" for i in range(n)]
    parts = [said[i:i + step + overlap] for i in range(0, max(n, 1), step)]
    if overlap >= 2 + worse_head + worse_tail:
        for k, part in enumerate(parts):
            if k + 1 < len(parts) and len(part) == step + overlap and len(parts[k + 1]) >= overlap:
                part[len(part) - worse_tail:] = [f"x{i}" for i in range(worse_tail)]
                parts[k + 1][:worse_head] = [f"y{i}" for i in range(worse_head)]
    if overlap == 1 or any(len(p) < overlap for p in parts) or overlap >= step:
        return  # no two words to agree on
    shares = [(overlap / len(a), overlap / len(b)) if overlap else (0.0, 0.0) for a, b in pairwise(parts)]
    joined = Stitched([" ".join(p) for p in parts], shares)
    assert joined.text.split() == said
    for window, piece in enumerate(joined.pieces):
        for start, end in piece.words:
            place = joined.place(window, start, end)
            assert place is None or joined.text[place[0]:place[1]] == piece.text[start:end]
            assert place or piece.text[start] in "xy"


def test_phrases_are_found_as_words_first() -> None:
    assert occurrences("anna", "hannah and anna, anna") == [(11, 15), (17, 21)]
    assert occurrences("ann", "hannah") == [(1, 4)]
    assert occurrences("", "hannah") == occurrences("x", "hannah") == []


# Answers


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    path = tmp_path / "long.wav"
    soundfile.write(path, speech(50.0, [(24.0, 25.0)]).numpy(), RATE)
    return path


def same(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, probabilities as far as sums in batches of another width are."""
    left, right = answer.pop("probabilities"), expected["probabilities"]
    assert answer == {key: value for key, value in expected.items() if key != "probabilities"}
    assert left["sa"] == pytest.approx(right["sa"], abs=1e-4)


@pytest.mark.parametrize("kind", ["llm", "whisper"])
def test_short_files_are_as_ever_and_long_ones_are_their_windows(
        kind: str, tiny_speech_llm: Build, tiny_whisper_slu: Build, make_utterances: Callable[..., list[Utterance]],
        long_file: Path, tmp_path: Path) -> None:
    model = (tiny_speech_llm if kind == "llm" else tiny_whisper_slu)(tasks=TASKS.to_dict(), whisper_options={"init_std": 0.3})
    short = [u.audio for u in make_utterances(seconds=(0.9, 0.6)) if u.audio]
    names = ["ner", "sa", "acts"]
    found = understand_long(model, [short[0], long_file, short[1]], names, OPTIONS)
    for answer, expected in zip([found[0], found[2]], understand(model, short, names, OPTIONS), strict=True):
        same(answer, expected)
    result = found[1]
    assert result["file"] == str(long_file)
    pieces = []
    for i, window in enumerate(result["windows"]):
        path = tmp_path / f"w{i}.wav"
        wave = soundfile.read(long_file, dtype="float32")[0][int(window["start"] * RATE):int(window["end"] * RATE)]
        soundfile.write(path, wave, RATE, subtype="FLOAT")
        alone = understand(model, [path], names, OPTIONS)[0]
        same({key: window[key] for key in alone if key != "file"}, {k: v for k, v in alone.items() if k != "file"})
        assert result["text"][window["text_start"]:window["text_end"]] == alone["text"]
        pieces.append((torch.from_numpy(wave), alone))
    assert len(pieces) == 2
    each = [list(a["probabilities"]["sa"].values()) for _, a in pieces]
    mean = np.average(each, axis=0, weights=[len(w) for w, _ in pieces])
    assert list(result["probabilities"]["sa"].values()) == pytest.approx(mean.tolist(), abs=1e-4)
    assert result["sa"] == SA.labels[int(mean.argmax())]
    assert set(result["acts"]) == {a for _, answer in pieces for a in answer["acts"]}
    assert result["problems"] == [f"{p} in window {i}" for i, (_, a) in enumerate(pieces) for p in a["problems"]]
    assert not model.training


def test_offsets_cut_the_phrase(tiny_whisper_slu: Build, long_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever windows answer: entities in text cut it, others have no offsets, and the overlap's are named once."""
    model = tiny_whisper_slu()
    answers: list[dict[str, Any]] = [
        {"text": "anna met anna of the council in paris on", "problems": ["loop"],
         "ner": [["PERSON", "anna"], ["PERSON", "anna"], ["PERSON", "anna"], ["ORG", "senate"], ["PLACE", "paris"]]},
        {"text": "council in paris on Monday said anna", "problems": [],
         "ner": [["ORG", "council"], ["PLACE", "paris"], ["WHEN", "Monday"], ["PERSON", "anna"]]}]
    monkeypatch.setattr(module, "understand", lambda _, files, *rest, **more: [
        {"file": str(f), **a} for f, a in zip(files, answers, strict=True)])
    result = understand_long(model, [long_file], ["ner"], windows=WindowOptions(overlap=4.0))[0]
    assert result["text"] == "anna met anna of the council in paris on Monday said anna"
    spans = result["spans"]["ner"]
    assert result["ner"] == [[s["label"], s["phrase"]] for s in spans]
    assert [(s["label"], s["start_char"], s["window"]) for s in spans] == [
        ("PERSON", 0, 0), ("PERSON", 9, 0), ("PERSON", 9, 0), ("ORG", None, 0), ("PLACE", 32, 0), ("ORG", 21, 1),
        ("WHEN", 41, 1), ("PERSON", 53, 1)]
    for s in spans:
        assert s["end_char"] is None if s["start_char"] is None else \
            result["text"][s["start_char"]:s["end_char"]] == s["phrase"]
        assert (s["start_seconds"], s["end_seconds"]) == tuple(result["windows"][s["window"]][k] for k in ("start", "end"))
    assert result["problems"] == ["loop in window 0"]
    answers[0]["ner"] = answers[1]["ner"] = None
    assert understand_long(model, [long_file], ["ner"])[0]["ner"] is None
    with pytest.raises(UserError, match="unknown task 'x'"):
        understand_long(model, [long_file], ["x"])
