"""Copies of the hub's data sets on this machine, as the package `datasets` writes them, become manifests."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.cli_prepare import main_prepare
from unislu_llm.data import audio
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.prepare import SlueHub, prepare
from unislu_llm.data.slue import load_hub
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry

RATE = 16_000
WAVE = (0.5 * np.sin(np.arange(4 * RATE) ** 1.3 / 900)).astype(np.float32)
LAYOUTS = ("saved split", "saved splits", "parquet folder", "parquet of one config", "parquet file")

Make = Callable[[str, str], Path]


def clip() -> dict[str, Any]:
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, RATE, format="FLAC")
    return {"bytes": buffer.getvalue(), "path": "a.flac"}


def rows(corpus: str) -> list[dict[str, Any]]:
    if corpus == "voxceleb":
        return [{"index": i, "id": f"id1_{i}", "audio": clip(), "speaker_id": "id1", "normalized_text": "lovely day",
                 "sentiment": label, "start_second": 0.5 + i, "end_second": 2.25 + i, "local_path": "x"}
                for i, label in enumerate(("Positive", "<mixed>"))]
    entities = [[("GPE", 3, 5), ("EVENT", 9, 3)], []]
    return [{"id": f"v{i}", "audio": clip(), "speaker_id": "7", "normalized_text": "in paris may", "raw_text": "In Paris, May.",
             "normalized_ner": {key: [t[k] for t in found] for k, key in enumerate(("type", "start", "length"))}}
            for i, found in enumerate(entities)]


@pytest.fixture
def copy(tmp_path: Path) -> Make:
    """Factory: a split `validation` of a corpus in a layout, its audio a feature of `datasets`."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def make(corpus: str, layout: str) -> Path:
        text, number = datasets.Value("string"), datasets.Value("int32")
        kinds: dict[type, Any] = {str: text, int: number, float: datasets.Value("float64"),
                                  dict: {"type": datasets.List(text), "start": datasets.List(number),
                                         "length": datasets.List(number)}}
        features = {key: kinds[type(value)] for key, value in rows(corpus)[0].items()}
        features["audio"] = {"bytes": datasets.Value("binary"), "path": text}
        plain = datasets.Dataset.from_list(rows(corpus), features=datasets.Features(features))
        made = plain.cast_column("audio", datasets.Audio(sampling_rate=RATE))
        folder = tmp_path / "copy"
        if layout == "saved split":
            made.save_to_disk(str(folder))
        elif layout == "saved splits":
            datasets.DatasetDict({"train": made.select([0]), "validation": made}).save_to_disk(str(folder))
        else:
            inside = folder / corpus if layout == "parquet folder" else folder
            inside.mkdir(parents=True)
            file = inside / "validation-00000-of-00001.parquet"
            made.to_parquet(str(file))
            return file if layout == "parquet file" else folder
        return folder

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uncropped_sentiment_clips_are_cropped_by_the_manifest(layout: str, copy: Make, tmp_path: Path) -> None:
    done = prepare(SlueHub("voxceleb", "validation", path=copy("voxceleb", layout)), tmp_path / "m.jsonl")
    assert done.tally.dropped == {"sentiment <mixed>": 1}
    (u,) = read_manifest(tmp_path / "m.jsonl", TaskRegistry(), check_audio=True)
    assert (u.id, u.labels, u.start, u.end, u.duration) == ("id1_0", {"sa": "Positive"}, 0.5, 2.25, 1.75)
    assert u.audio is not None
    assert u.audio.read_bytes() == clip()["bytes"], "as it was, neither decoded nor cropped"
    heard = audio.load(u.audio, u.start, u.end)
    np.testing.assert_allclose(heard, WAVE[int(0.5 * RATE):int(2.25 * RATE)], atol=1e-4)


def test_entities_of_a_copy_by_command(copy: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = tmp_path / "m.jsonl", copy("voxpopuli", "saved splits")
    command = ["slue-hub", "--corpus", "voxpopuli", "--split", "validation", "--out", str(out), "--path"]
    assert main_prepare([*command, str(path)]) == 0
    assert [u.labels for u in read_manifest(out, TaskRegistry(), check_audio=True)] == [
        {"ner": (Span("PLACE", 3, 8),)}, {"ner": ()}]
    assert "label EVENT (not scored in SLUE)" in capsys.readouterr().out
    assert main_prepare([*command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "message"), [
    ("saved splits", "has no split 'test'; it has train, validation"),
    ("parquet folder", "no parquet files of voxceleb, split 'test'"),
])
def test_a_split_that_a_copy_lacks_is_named(layout: str, message: str, copy: Make) -> None:
    with pytest.raises(UserError, match=message):
        load_hub("voxceleb", "test", copy("voxceleb", layout))


def test_a_damaged_copy_is_one_error(copy: Make) -> None:
    path = copy("voxceleb", "parquet file")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"parquet.*is it whole"):
        list(load_hub("voxceleb", "validation", path))
