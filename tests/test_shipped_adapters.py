"""The adapters that ship: small, with a card and a licence, and they give the answers they gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unislu_llm import load, understand
from unislu_llm.models.saved import Description

ROOT = Path(__file__).parents[1]
ADAPTERS, MINI = ROOT / "adapters", ROOT / "recipes" / "data" / "mini"
ANSWERS = json.loads((ROOT / "tests/data_files/shipped_answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_folder_is_small_and_complete(name: str) -> None:
    files = {p.name: p.stat().st_size for p in (ADAPTERS / name).iterdir() if p.is_file()}
    assert {"README.md", "LICENSE", "config.json", "model.safetensors"} <= set(files)
    assert sum(files.values()) < 30e6
    saved = Description.read(ADAPTERS / name)
    assert saved.model.hypothesis == "manifest"
    assert set(saved.bases) == {"encoder", "llm"}
    assert (saved.ctc_tokens is not None) == (saved.model.projector == "ctc")


@pytest.mark.weights
@pytest.mark.parametrize("name", ANSWERS)
def test_it_gives_the_answers_that_it_gave(name: str) -> None:
    wanted = ANSWERS[name]
    answers = understand(load(ADAPTERS / name), [MINI / audio for audio in wanted])
    found = [[a.transcript, [list(pair) for pair in a.outputs["ner"] or ()], a.outputs["sa"]]
             for a in answers]
    # Another processor may tip one close call.
    other = [(a, b) for a, b in zip(found, wanted.values(), strict=True) if a != b]
    assert len(other) <= 1, other
    assert not any(kinds for a in answers for kinds in a.problems.values())
