"""The shipped mini corpus is what its README says, and its builder chooses as described."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.data.voicing import write_opus
from unislu_llm.errors import UserError
from unislu_llm.tasks import NER, SA

ROOT = Path(__file__).parents[1]
MINI = ROOT / "recipes" / "data" / "mini"
COUNTS = {"entities_train": 110, "entities_dev": 40, "sentiment_train": 110, "sentiment_dev": 40}
FIELDS = {"id", "audio", "text", "duration", "corpus", "condition"}

Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (MINI / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def all_rows() -> list[Row]:
    return [row for name in COUNTS for row in rows_of(name)]


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_mini", ROOT / "recipes" / "prepare_mini.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_fields(name: str) -> None:
    rows = rows_of(name)
    extra = {"ner", "draft"} if name.startswith("entities") else {"sa", "speaker", "draft"}
    assert len(rows) == COUNTS[name]
    assert all(set(row) == FIELDS | extra for row in rows)
    assert {row["corpus"] for row in rows} == {f"mini-{name.split('_')[0]}"}


def test_ids_and_files_are_unique_portable_and_complete() -> None:
    rows = all_rows()
    assert len({row["id"].lower() for row in rows}) == len(rows)
    assert all(re.fullmatch(r"audio/[a-z0-9_-]{1,40}\.opus", row["audio"]) for row in rows)
    on_disk = {f"audio/{path.name}" for path in (MINI / "audio").iterdir()}
    assert {row["audio"] for row in rows} == on_disk


@pytest.mark.parametrize("part", ["entities", "sentiment"])
def test_dev_shares_no_text_with_train(part: str) -> None:
    def words(name: str) -> list[str]:
        return [" ".join(re.findall(r"[a-z']+", row["text"])) for row in rows_of(name)]

    train, dev = words(f"{part}_train"), words(f"{part}_dev")
    assert set(train).isdisjoint(dev)
    assert len(set(train)) == len(train)
    assert len(set(dev)) == len(dev)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_spans_are_whole_words_in_order_and_every_label_occurs(split: str) -> None:
    rows = rows_of(f"entities_{split}")
    for row in rows:
        text, end = row["text"], 0
        for span in row["ner"]:
            phrase = text[span["start"] : span["end"]]
            assert end <= span["start"] < span["end"] <= len(text), row["id"]
            assert re.fullmatch(r"\w.*\w|\w", phrase), row["id"]
            assert not re.search(r"\w$", text[: span["start"]]), row["id"]
            assert not re.match(r"\w", text[span["end"] :]), row["id"]
            end = span["end"]
    assert {span["label"] for row in rows for span in row["ner"]} == set(NER.labels)
    assert np.mean([bool(row["ner"]) for row in rows]) == pytest.approx(0.85, abs=0.01)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_sentiment_is_balanced_and_equals_the_lines(split: str) -> None:
    rows = rows_of(f"sentiment_{split}")
    counts = Counter(row["sa"] for row in rows)
    assert set(counts) == set(SA.labels)
    assert max(counts.values()) - min(counts.values()) <= 1
    with (MINI / "sentiment_lines.tsv").open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file, delimiter="\t") if line["split"] == split]
    assert [(row["text"], row["sa"]) for row in rows] == [(line["text"], line["label"]) for line in lines]
    assert all(re.fullmatch(r"[a-z']+( [a-z']+){7,19}", row["text"]) for row in rows)


def test_audio_decodes_at_16_khz_is_not_silent_and_as_long_as_the_manifest_says() -> None:
    for row in all_rows():
        samples, rate = soundfile.read(MINI / row["audio"], dtype="float32")
        assert (rate, samples.ndim) == (16_000, 1), row["id"]
        assert len(samples) / rate == pytest.approx(row["duration"], abs=0.001), row["id"]
        assert 2.0 <= row["duration"] < 8.1, row["id"]
        assert np.sqrt(np.mean(samples**2)) > 0.01, row["id"]
        # Between 1.5 and 6 words a second: the file holds this text and not another, as far as length can tell.
        assert 1.5 < len(row["text"].split()) / row["duration"] < 6, row["id"]


def test_no_clip_is_below_15_db() -> None:
    for row in all_rows():
        snr = re.search(r"([\d.]+)dB", row["condition"])
        assert (row["condition"] == "clean") == (snr is None)
        assert snr is None or float(snr.group(1)) >= 15, row["id"]


def test_the_corpus_is_small_and_carries_its_licences() -> None:
    assert sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file()) < 8_000_000
    assert "CC0 1.0" in (MINI / "LICENSE").read_text(encoding="utf-8")
    assert "Carnegie Mellon University" in (MINI / "LICENSE-flite.txt").read_text(encoding="utf-8")


def test_readme_table_agrees_with_the_manifests() -> None:
    recipe = load_recipe()
    readme = (MINI / "README.md").read_text(encoding="utf-8")
    for name in COUNTS:
        assert recipe.summary(f"{name}.jsonl", rows_of(name)) in readme


def voiced_row(number: int, text: str, label: str | None = None, **changes: Any) -> Row:
    spans = [{"label": label, "start": 0, "end": 3}] if label else []
    return {"id": f"en_2020-10.0{number}_1", "audio": f"audio/{number}.opus", "text": text, "ner": spans,
            "duration": 3.0, "condition": "clean", **changes}


def test_builder_prefers_rare_labels_and_skips_what_does_not_fit() -> None:
    recipe = load_recipe()
    rows = [voiced_row(i, f"place {i}", "PLACE") for i in range(40)]
    rows += [voiced_row(40 + i, f"nothing {i}") for i in range(9)]
    rows += [voiced_row(50, "law", "LAW"), voiced_row(51, "org", "ORG"), voiced_row(52, "taken", "PERSON"),
             voiced_row(53, "long", "PERSON", duration=8.5), voiced_row(54, "loud", "WHEN", condition="pink14dB")]
    taken = {"taken"}
    chosen = recipe.choose_entities(rows, 20, 0, taken)
    labels = Counter(span["label"] for row in chosen for span in row["ner"])
    assert len(chosen) == 20
    assert sum(not row["ner"] for row in chosen) == 3
    assert set(labels) == {"PLACE", "LAW", "ORG"}
    assert {row["text"] for row in chosen} <= taken
    assert recipe.choose_entities(rows[::-1], 20, 0, {"taken"}) == chosen
    with pytest.raises(UserError, match="larger voiced corpus"):
        recipe.choose_entities(rows, 60, 0, set())


def test_builder_copies_clips_under_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe()
    monkeypatch.setattr(recipe, "COUNTS", {"train": 1, "dev": 1})
    voiced, out = tmp_path / "voiced", tmp_path / "out"
    (voiced / "audio").mkdir(parents=True)
    (out / "audio").mkdir(parents=True)
    for number, split in enumerate(("train", "dev")):
        row = voiced_row(number, f"text of {split}", "ORG")
        (voiced / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        write_opus(voiced / row["audio"], np.full(40_000, 0.1, np.float32))
    part = recipe.entity_part(voiced, out, seed=0)
    row, = part["train"]
    assert (row["id"], row["audio"], row["duration"]) == ("vp_2020-1000_1", "audio/vp_2020-1000_1.opus", 2.5)
    assert soundfile.info(out / row["audio"]).frames == 40_000


@pytest.mark.parametrize("line", ["hello\tHappy\ttrain", "hello\tPositive\ttest", "twice\tNeutral\tdev"])
def test_builder_refuses_a_line_it_cannot_use(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lines.tsv"
    path.write_text(f"text\tlabel\tsplit\ntwice\tNeutral\ttrain\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"lines\.tsv:3"):
        load_recipe().read_lines(path)
