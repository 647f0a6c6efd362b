"""Manifests get hypotheses or pseudo-labels; a stopped call goes on, rows stay as they were."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from torch import Tensor

from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.decoding.recogniser import Transcript
from unislu_llm.decoding.transcribe import Report, write_copies
from unislu_llm.errors import UserError
from unislu_llm.tasks import LabelTask, Span, SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance

Write = Callable[..., list[Utterance]]
REGISTRY = TaskRegistry([SpanTask("slots", "[SLOTS]", ("size", "drink")),
                         LabelTask("intent", "[INTENT]", ("order", "cancel"), "[I]", "[/I]"),
                         LabelTask("moods", "[MOOD]", ("glad", "sad"), "[M]", "[/M]", multi=True)])


class Stopped(Exception):  # noqa: N818
    """A call is killed."""


class Says:
    """A recogniser that knows clips by their length in hundredths of a second."""

    def __init__(self, fail_after: int = 1000, **texts: str) -> None:
        self.texts = {int(key[1:]): text for key, text in texts.items()}
        self.asked: list[int] = []
        self.fail_after = fail_after

    def __call__(self, waves: Sequence[Tensor], language: str) -> list[Transcript]:
        lengths = [len(wave) // 160 for wave in waves]
        if len(self.asked) + len(lengths) > self.fail_after:
            raise Stopped
        self.asked += lengths
        texts = [self.texts.get(n, f"Heard {n} {language}") for n in lengths]
        return [Transcript(text, text.startswith("loop")) for text in texts]


def run(manifest: Path, says: Says, out: Path, registry: Any = None, **options: Any) -> Report:
    """Copies of a manifest, made in batches of two."""
    options = {"settings": ["a"], "batch_size": 2} | options
    return write_copies(lambda: says, [manifest], out, registry or REGISTRY, **options)[0]


def fill(manifest: Path, says: Says, out: Path) -> Report:
    return run(manifest, says, out, text_source="a/checkpoint")


def test_a_stopped_call_goes_on_and_rows_stay(make_utterances: Write, tmp_path: Path) -> None:
    manifest, out, registry = tmp_path / "in" / "train.jsonl", tmp_path / "out", TaskRegistry()
    utterances = make_utterances(seconds=(0.9, 1.6, 0.6, 1.2, 0.7))
    utterances[2] = dataclasses.replace(utterances[2], start=0.1, end=0.5, language="de-DE",
                                        duration=None)
    write_manifest(manifest, [*utterances, Utterance("text", None, "No audio"),
                              Utterance("own", None, "own", hypothesis="kept")])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0] |= {"extra": {"audio": "metadata"}}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(Stopped):
        run(manifest, Says(fail_after=3), out, registry=registry)
    assert not (out / "train.jsonl").exists()
    kept, = out.iterdir()
    kept.write_bytes(kept.read_bytes() + b'{"id": "torn')  # killed as it wrote
    says = Says()
    report = run(manifest, says, out, registry=registry)
    assert len(says.asked) == 2, "one German clip and two English ones were kept"
    assert report.counts == {"rows": 7, "made": 2, "known": 3, "looped": 0, "no_speech": 0,
                             "mute": 1}
    written = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    ignored = ("hypothesis", "audio")
    assert [{k: v for k, v in row.items() if k not in ignored} for row in written] \
        == [{k: v for k, v in row.items() if k not in ignored} for row in rows]
    again = read_manifest(out / "train.jsonl", registry, check_audio=True)
    assert [u.audio.resolve() for u in again if u.audio] == [u.audio for u in utterances]
    said = [f"heard {n}" for n in ("90 en", "160 en", "40 de", "120 en", "70 en")]
    assert [u.hypothesis for u in again] == [*said, None, "kept"]
    assert report.pairs == [(u.text, text, u.language or "")
                            for u, text in zip(utterances, said, strict=True)]
    assert list(out.iterdir()) == [out / "train.jsonl"]
    with pytest.raises(UserError, match="exists; remove it"):
        run(manifest, Says(), out, registry=registry)
    with pytest.raises(UserError, match="one file name"):
        write_copies(Says, [manifest, tmp_path / "train.jsonl"], out, registry, settings=[])
    copied = run(manifest, Says(), tmp_path / "copied", registry=registry, copy_text=True)
    assert (copied.counts["copied"], copied.counts["mute"]) == (1, 0)
    texts = [u.hypothesis for u in read_manifest(copied.copy, registry)][-2:]
    assert texts == ["no audio", "kept"]


def test_a_call_that_was_stopped_between_manifests_goes_on(tmp_path: Path) -> None:
    first = corpus(tmp_path / "a", {"n": 50, "text": "one"})
    second = corpus(tmp_path / "b", {"n": 60, "text": "two"}).rename(tmp_path / "b" / "n.jsonl")
    for says, seen in ((Says(fail_after=1), [50]), (Says(), [60])):
        try:
            write_copies(partial(copy, says), [first, second], tmp_path / "out", REGISTRY,
                         settings=["a"])
        except Stopped:
            assert [p.name for p in (tmp_path / "out").glob("*.jsonl")] == ["m.jsonl"]
        assert says.asked == seen
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m.jsonl", "n.jsonl"]
    (tmp_path / "out" / "n.jsonl").unlink()
    with pytest.raises(UserError, match="exists and differs"):
        write_copies(lambda: Says(_50="other"), [first, second], tmp_path / "out", REGISTRY,
                     settings=["a"])


def corpus(folder: Path, *rows: dict[str, Any]) -> Path:
    """A manifest of rows whose `n` is the length of their audio in hundredths of a second."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, row in enumerate(rows):
        n = row.pop("n", None)
        if n is not None:
            noise = np.random.default_rng(n).normal(0, 0.1, n * 160)
            soundfile.write(folder / f"{n}.wav", noise, 16_000)
        written.append({"id": f"r{i}"} | ({"audio": f"{n}.wav"} if n else {}) | row)
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return folder / "m.jsonl"


def test_rows_without_text_get_one_and_spans_their_places(tmp_path: Path) -> None:
    slots = [{"label": "size", "phrase": " twelve  ounce "}, ["drink", "Mocha"]]
    manifest = corpus(
        tmp_path / "in",
        {"n": 90, "text": "Given, kept", "slots": [["drink", 0, 5]], "metadata": 1},
        {"n": 50, "slots": slots, "intent": "order", "moods": []},
        {"n": 60, "text": None, "slots": [["drink", "tea"], ["drink", "mocha"]], "far": 1,
         "moods": ["sad"]},
        {"n": 70, "text": "", "slots": []}, {"n": 72, "slots": {"drink": "espresso"},
                                             "intent": "cancel"},
        {"n": 80, "intent": "order"}, {"n": 81, "intent": "order"}, {"n": 51, "duration": 30.5},
        {"text": "no audio"})
    before = manifest.read_text()
    says = Says(_50="A 12-ounce, um, mocha.", _60="Mocha and tea",
                _70="Nothing\nordered [SLOTS]", _72="A press oh", _80=" ", _81="loop and loop")
    report = fill(manifest, says, tmp_path / "out")
    assert manifest.read_text() == before
    assert sorted(says.asked) == [50, 60, 70, 72, 80, 81], "none with a text, none too long"
    assert report.counts == {"rows": 9, "made": 6, "known": 0, "looped": 1, "no_speech": 0,
                             "filled": 4}
    assert {why: len(some) for why, some in report.left_out.items()} == {
        "is empty": 1, "repeats itself": 1, "over 30 s": 1, "slots": 1}
    assert report.left_out["slots"] == [f"{manifest}:5 (r4)"]
    read = {u.id: u for u in read_manifest(report.copy, REGISTRY, check_audio=True)}
    assert {name: (u.text, u.text_source, u.labels) for name, u in read.items()} == {
        "r0": ("Given, kept", None, {"slots": (Span("drink", 0, 5),)}),
        "r1": ("a 12-ounce, um, mocha.", "a/checkpoint",
               {"slots": (Span("size", 2, 10), Span("drink", 16, 21)), "intent": "order",
                "moods": ()}),
        "r2": ("mocha and tea", "a/checkpoint",
               {"slots": (Span("drink", 0, 5), Span("drink", 10, 13)), "moods": ("sad",)}),
        "r3": ("nothing ordered", "a/checkpoint", {"slots": ()}),
        # The phrase is not found: unknown, not absent.
        "r4": ("a press oh", "a/checkpoint", {"intent": "cancel"}),
        "r8": ("no audio", None, {})}
    assert json.loads(report.copy.read_text().splitlines()[2])["far"] == 1


def test_what_leaves_no_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row is left \(1 is empty\)"):
        fill(corpus(tmp_path / "in", {"n": 50}), Says(_50=""), tmp_path / "out")
    assert not (tmp_path / "out" / "m.jsonl").exists()
    with pytest.raises(UserError, match="1 problem; correct the manifest"):
        fill(corpus(tmp_path / "in", {"n": 50, "slots": [["sise", "large"]]}), Says(),
             tmp_path / "out")
