"""Long audio: windows cover it and end in pauses, transcripts join, offsets cut phrases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.common import REGISTRY, Build
from unislu_llm.config import DecodeConfig
from unislu_llm.decoding.answer import Answer
from unislu_llm.decoding.long_form import join, occurrences, split
from unislu_llm.decoding.predict import understand
from unislu_llm.tasks import SA
from unislu_llm.utterance import Utterance

RATE = 16_000
OPTIONS = DecodeConfig(max_new_tokens=24)


def speech(seconds: float, pauses: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Loud noise with pauses `(start, end)` of quiet noise."""
    wave = 0.3 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(0))
    for start, end in pauses:
        wave[int(start * RATE):int(end * RATE)] *= 0.03
    return wave


def test_cuts_are_in_the_longest_pause() -> None:
    wave = speech(62.0, [(5, 9), (21.0, 21.4), (23.0, 24.5), (26.0, 26.5), (48.0, 48.3)])
    found = split(wave)
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
    assert [last / RATE for _, last in found] == pytest.approx([23.75, 48.15, 62.0], abs=0.1)


@given(st.floats(0.1, 130.0), st.sampled_from(["zero", "noise", "constant", "click"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_windows_cover_anything(seconds: float, kind: str) -> None:
    n = max(1, int(seconds * RATE))
    wave = {"zero": torch.zeros(n), "constant": torch.full((n,), 0.5),
            "noise": speech(n / RATE + 1, [])[:n],
            "click": torch.zeros(n).index_fill(0, torch.tensor([n // 2]), 1.0)}[kind]
    found = split(wave)
    assert (found[0][0], found[-1][1]) == (0, n)
    assert all(20 * RATE <= last - first <= 28 * RATE for first, last in found[:-1])
    assert 0 < found[-1][1] - found[-1][0] <= 30 * RATE
    assert all(end == start for (_, end), (start, _) in pairwise(found))


def test_phrases_are_found_as_words_first() -> None:
    assert occurrences("anna", "hannah and anna, anna") == [(11, 15), (17, 21)]
    assert occurrences("ann", "hannah") == [(1, 4)]
    assert occurrences("", "hannah") == occurrences("x", "hannah") == []


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    path = tmp_path / "long.wav"
    soundfile.write(path, speech(50.0, [(24.0, 25.0)]).numpy(), RATE, subtype="FLOAT")
    return path


def plain(answer: Answer) -> dict[str, Any]:
    """Without numbers, which sums in batches of another width change."""
    return {k: v for k, v in answer.to_dict().items() if k not in ("probabilities", "confidence")}


@pytest.mark.parametrize("kind", ["llm", "whisper"])
def test_short_files_are_as_ever_and_long_ones_are_their_windows(
        kind: str, build: Build, make_utterances: Callable[..., list[Utterance]], long_file: Path,
        tmp_path: Path) -> None:
    model, names = build(kind, separator=2.0), ["ner", "sa", "acts"]
    short = [u.audio for u in make_utterances(seconds=(0.9, 0.6)) if u.audio]
    first, result, last = understand(model, [short[0], long_file, short[1]], names, OPTIONS,
                                     long_form=True)
    assert [plain(first), plain(last)] == [plain(a) for a in understand(model, short, names,
                                                                        OPTIONS)]
    wave, pieces = soundfile.read(long_file, dtype="float32")[0], []
    for i, window in enumerate(result.windows):
        path, (start, end) = tmp_path / f"w{i}.wav", (window["start"], window["end"])
        soundfile.write(path, wave[round(start * RATE):round(end * RATE)], RATE, subtype="FLOAT")
        alone, = understand(model, [path], names, OPTIONS)
        assert {key: window[key] for key in plain(alone)} == plain(alone)
        assert result.transcript[window["text_start"]:window["text_end"]] == alone.transcript
        pieces.append((end - start, alone))
    assert len(pieces) == 2
    each = [list(a.probabilities["sa"].values()) for _, a in pieces]
    mean = np.average(each, axis=0, weights=[seconds for seconds, _ in pieces])
    assert list(result.probabilities["sa"].values()) == pytest.approx(mean.tolist(), abs=1e-4)
    assert result.outputs["sa"] == SA.labels[int(mean.argmax())]
    said = {act for _, a in pieces for act in a.outputs["acts"] or ()}
    assert set(result.outputs["acts"] or ()) == said
    assert list(result.problems["ner"]) == [f"{p} in window {i}" for i, (_, a) in enumerate(pieces)
                                            for p in a.problems["ner"]]


def test_offsets_cut_the_phrase() -> None:
    """Entities in the text cut it, others have no offsets."""
    parts = [Utterance("a", None, "", start=s, end=s + 24.0) for s in (0.0, 24.0)]
    first = (("PERSON", "anna"), ("PERSON", "anna"), ("PERSON", "anna"), ("ORG", "senate"),
             ("PLACE", "paris"))
    second = (("ORG", "council"), ("WHEN", "Monday"), ("PERSON", "anna"))
    answers = [
        Answer("anna met anna of the council in paris", 24.0, {"ner": first, "sa": "Neutral"},
               {"ner": ("loop",)}, n_tokens={"ner": 4}),
        Answer("on Monday said anna of the council", 24.0, {"ner": second, "sa": "Positive"},
               {"ner": ()}, n_tokens={"ner": 5},
               probabilities={"sa": dict(zip(SA.labels, (0.6, 0.3, 0.1), strict=True))})]
    answer = join(REGISTRY, parts, answers)
    assert answer.transcript == " ".join(a.transcript for a in answers)
    spans = answer.spans["ner"]
    assert answer.outputs["ner"] == tuple((s["label"], s["phrase"]) for s in spans)
    assert [(s["label"], s["start_char"], s["window"]) for s in spans] == [
        ("PERSON", 0, 0), ("PERSON", 9, 0), ("PERSON", 9, 0), ("ORG", None, 0), ("PLACE", 32, 0),
        ("ORG", 65, 1), ("WHEN", 41, 1), ("PERSON", 53, 1)]
    for s in spans:
        place = s["start_char"], s["end_char"]
        assert place == (None, None) or answer.transcript[slice(*place)] == s["phrase"]
        assert (s["start_seconds"], s["end_seconds"]) == [(0.0, 24.0), (24.0, 48.0)][s["window"]]
    assert answer.problems == {"ner": ("loop in window 0",)}
    assert (answer.n_tokens, answer.seconds) == ({"ner": 9}, 48.0)
    assert answer.outputs["sa"] == "Neutral", "a window without probabilities counts as sure"
    assert answer.probabilities == {}
    quiet = replace(answers[1], transcript="", outputs={"ner": (), "sa": None}, no_speech=True,
                    warnings=())
    half = join(REGISTRY, parts, [replace(answers[0], warnings=("sounds like German",)), quiet])
    assert (half.transcript, half.outputs["sa"]) == (answers[0].transcript, "Neutral")
    assert half.warnings == ("sounds like German in window 0", "no speech in window 1")
    assert join(REGISTRY, parts, [quiet, quiet]).outputs == {"ner": (), "sa": None}
    nothing = [replace(a, outputs={"ner": None, "sa": None}) for a in answers]
    assert join(REGISTRY, parts, nothing).outputs == {"ner": None, "sa": None}
