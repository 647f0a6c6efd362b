"""The adapters that ship: small, with a card and a licence, and they give the answers they gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unislu_llm import load, understand
from unislu_llm.config import DecodeConfig
from unislu_llm.data.manifest import read_manifest
from unislu_llm.decoding.predict import predict
from unislu_llm.io import RECOGNISER, find_model
from unislu_llm.models.saved import Description
from unislu_llm.tokenizer import Example

ROOT = Path(__file__).parents[1]
ADAPTERS, MINI = ROOT / "adapters", ROOT / "recipes" / "data" / "mini"
ANSWERS = json.loads((ROOT / "tests/data_files/shipped_answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_folder_is_small_and_complete(name: str) -> None:
    files = {p.relative_to(ADAPTERS / name).as_posix(): p.stat().st_size
             for p in (ADAPTERS / name).rglob("*") if p.is_file()}
    assert {"README.md", "LICENSE", "config.json", "model.safetensors"} <= set(files)
    assert sum(files.values()) < 30e6
    saved = Description.read(ADAPTERS / name)
    assert saved.model.hypothesis == "manifest"
    assert set(saved.bases) == {"encoder", "llm"}
    if saved.model.recogniser:
        assert find_model(Path(saved.model.recogniser)) == ADAPTERS / name / RECOGNISER
        assert {f"{RECOGNISER}/{file}" for file in ("README.md", "model.safetensors")} <= set(files)
    assert (saved.ctc_tokens is not None) == (saved.model.projector == "ctc")


@pytest.mark.weights
@pytest.mark.parametrize("name", ANSWERS)
def test_it_gives_the_answers_that_it_gave(name: str) -> None:
    """With the hypotheses that they had, which they then rewrote."""
    wanted, model = ANSWERS[name], load(ADAPTERS / name)
    said = {u.audio.relative_to(MINI).as_posix(): u for corpus in ("entities", "sentiment")
            for u in read_manifest(MINI / f"{corpus}_dev.jsonl", model.registry) if u.audio}
    examples = [Example(said[audio], task) for audio in wanted for task in ("ner", "sa")]
    rows = predict(model, examples, DecodeConfig(grammar=True, force_task=True,
                                                 transcript="rewrite"))
    found = [[ner["hyp_text"], ner["hyp"], sa["hyp"]]
             for ner, sa in zip(rows[::2], rows[1::2], strict=True)]
    # Another processor may tip one close call.
    other = [(a, b) for a, b in zip(found, wanted.values(), strict=True) if a != b]
    assert len(other) <= 1, other
    assert not any(row["problems"] for row in rows)


@pytest.mark.weights
@pytest.mark.parametrize("name", ANSWERS)
def test_it_keeps_what_the_recogniser_hears(name: str) -> None:
    answer, = understand(load(ADAPTERS / name), [MINI / "audio" / "iv_dev_001.opus"])
    assert answer.transcript == answer.hypothesis
    assert answer.outputs == {"ner": (), "sa": "Positive"}
