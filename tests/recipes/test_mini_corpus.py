"""The mini corpus reads as a manifest, and its builder chooses as described."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import soundfile

from unislu_llm.data.manifest import read_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry

MINI = Path(__file__).parents[2] / "recipes" / "data" / "mini"
NAMES = ("entities_train", "entities_dev", "sentiment_train", "sentiment_dev")

Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    lines = (MINI / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def maker(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("make_mini")


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_reads_and_its_audio_is_as_long_as_it_says(name: str) -> None:
    utterances = read_manifest(MINI / f"{name}.jsonl", TaskRegistry(), check_audio=True)
    assert len(utterances) == (110 if name.endswith("train") else 40)
    task = "ner" if name.startswith("entities") else "sa"
    for u in utterances:
        assert (bool(u.hypothesis), list(u.labels)) == (True, [task])
        info = soundfile.info(str(u.audio))
        assert (info.samplerate, info.channels) == (16_000, 1)
        assert info.duration == pytest.approx(u.seconds, abs=0.001)


def test_readme_and_lines_agree_with_the_manifests(maker: ModuleType) -> None:
    """And dev shares no text with train."""
    readme = (MINI / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert maker.summary(f"{name}.jsonl", rows_of(name)) in readme
    lines = maker.read_lines(MINI / "sentiment_lines.tsv")
    for split in ("train", "dev"):
        assert [(row["text"], row["sa"]) for row in rows_of(f"sentiment_{split}")] == [
            (line["text"], line["label"]) for line in lines if line["split"] == split]
    for part in ("entities", "sentiment"):
        train, dev = ({" ".join(re.findall(r"[a-z']+", row["text"])) for row in rows_of(name)}
                      for name in (f"{part}_train", f"{part}_dev"))
        assert train.isdisjoint(dev)


def test_builder_prefers_rare_labels_and_skips_what_does_not_fit(maker: ModuleType) -> None:
    rows: list[Row] = [
        {"id": f"{i}", "text": f"text {i}", "duration": 3.0, "condition": "clean",
         "ner": [{"label": "PLACE", "start": 0, "end": 4}] if i < 40 else []} for i in range(54)]
    for row, label in zip(rows[49:], ("LAW", "ORG", "PERSON", "PERSON", "WHEN"), strict=True):
        row["ner"] = [{"label": label, "start": 0, "end": 4}]
    rows[51]["text"], rows[52]["duration"], rows[53]["condition"] = "taken", 8.5, "pink14dB"
    chosen = maker.choose_entities(rows, 20, 0, {"taken"})
    labels = {span["label"] for row in chosen for span in row["ner"]}
    assert (len(chosen), sum(not row["ner"] for row in chosen)) == (20, 3)
    assert labels == {"PLACE", "LAW", "ORG"}
    assert maker.choose_entities(rows[::-1], 20, 0, {"taken"}) == chosen
    with pytest.raises(UserError, match="larger voiced corpus"):
        maker.choose_entities(rows, 60, 0, set())


def test_builder_refuses_lines_it_cannot_use(maker: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "lines.tsv"
    for line in ("hello\tHappy\ttrain", "hello\tPositive\ttest", "twice\tNeutral\tdev"):
        path.write_text(f"text\tlabel\tsplit\ntwice\tNeutral\ttrain\n{line}\n")
        with pytest.raises(UserError, match=r"lines\.tsv:3"):
            maker.read_lines(path)
