"""Which folder holds what, and how a result names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.errors import UserError
from unislu_llm.io import find_model
from unislu_llm.run_folder import BEST, LAST, MODEL, find_run, load_model, read_finished, versions


def test_a_run_is_found_by_its_folder_or_a_checkpoint(tiny_run: Callable[..., Path]) -> None:
    run = tiny_run()
    found = find_run(run)
    assert (found.name, found.label, found.checkpoint) == ("tiny", "tiny", BEST)
    assert found.model == run / BEST
    assert found.config is not None
    assert found.config.train.max_steps == found.step() == 2
    assert set(found.versions()["packages"]) >= {"torch", "transformers"}
    assert found.registry().names == ("ner", "sa")
    assert find_run(run / LAST) == find_run(run, LAST)
    assert find_run(run, LAST).label == "tiny-last"
    assert read_finished(run)["step"] == 2
    model = load_model(found)
    assert not model.training
    assert find_model(run) == run / BEST


def test_a_model_folder_stands_for_itself(tiny_run: Callable[..., Path]) -> None:
    shutil.copytree(tiny_run() / BEST, "mine")
    found = find_run("mine")
    assert (found.name, found.checkpoint, found.config) == ("mine", MODEL, None)
    assert found.versions() == {}
    assert find_model("mine") == Path("mine")


@pytest.mark.parametrize(("path", "checkpoint", "message"), [
    ("nowhere", None, "there is no such folder"),
    ("corpus/dev.jsonl", None, "there is no such folder"),
    ("corpus", None, "neither a run folder"),
    ("runs/tiny/best", "last", "drop one"),
    ("runs/tiny", "middle", "no checkpoint 'middle'"),
])
def test_what_is_no_run_is_named(path: str, checkpoint: Any, message: str,
                                 tiny_run: Callable[..., Path]) -> None:
    tiny_run()
    with pytest.raises(UserError, match=message):
        find_run(path, checkpoint)


def test_a_run_without_best_or_without_anything(tiny_run: Callable[..., Path]) -> None:
    run = tiny_run()
    shutil.rmtree(run / BEST)
    assert find_run(run).checkpoint == find_model(run).name == LAST  # type: ignore[union-attr]
    shutil.rmtree(run / LAST)
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_run(run)


def test_the_revision_is_a_commit_or_unknown() -> None:
    revision = versions()["git"]
    assert revision == "unknown" or len(revision.removesuffix("+dirty")) == 40
