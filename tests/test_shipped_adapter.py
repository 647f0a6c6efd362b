"""The adapter that ships: small, with its card, and it understands clips that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unislu_llm.decoding.generate import understand
from unislu_llm.models import load
from unislu_llm.scoring.wer import corpus_wer

ROOT = Path(__file__).parents[1]
ADAPTER, MINI = ROOT / "adapters" / "whisper-base--smollm2-135m", ROOT / "recipes" / "data" / "mini"


def test_the_folder_is_small_and_has_a_card_and_a_licence() -> None:
    files = {path.name: path.stat().st_size for path in ADAPTER.iterdir() if path.is_file()}
    assert {"README.md", "LICENSE", "config.json", "model.safetensors"} <= set(files)
    assert sum(files.values()) < 30e6
    card = (ADAPTER / "README.md").read_text(encoding="utf-8")
    for word in ("synthetic", "CC0", "WER", "licence: apache-2.0"):
        assert word.lower() in card.lower().replace("license", "licence"), word


@pytest.mark.weights
def test_it_transcribes_and_understands_dev_clips() -> None:
    model = load(ADAPTER)
    rows = [json.loads(line) for part in ("sentiment", "entities")
            for line in (MINI / f"{part}_dev.jsonl").read_text(encoding="utf-8").splitlines()[:4]]
    answers = understand(model, [str(MINI / row["audio"]) for row in rows], ["ner", "sa"])
    wer = corpus_wer([row["text"] for row in rows], [answer["text"] for answer in answers], "whisper")
    assert wer.wer < 25, [answer["text"] for answer in answers]
    assert all(answer["sa"] in ("Positive", "Neutral", "Negative") for answer in answers)
    assert any(answer["ner"] for answer in answers)
