"""Hypotheses left out and spoilt: at the asked shares, and from the draw alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unislu_llm.config import Config, TrainConfig
from unislu_llm.data.augment import HypothesisDropout, Key, build_dropout
from unislu_llm.errors import UserError
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance


def example(hypothesis: str | None, audio: str | None = "a.wav") -> Example:
    path = None if audio is None else Path(audio)
    return Example(Utterance("a", path, "x", hypothesis=hypothesis), None)


WORDS = [example("five six"), example("six"), example(None)]
LONG = " ".join(["one two three four"] * 50)


def dropout(share: float, words: float, *examples: Example) -> HypothesisDropout:
    train = TrainConfig(hypothesis_dropout=share, hypothesis_word_dropout=words)
    return HypothesisDropout(train, examples or WORDS)


def left(it: HypothesisDropout, example: Example) -> list[str | None]:
    return [it(example, Key(1, 0, i)).utterance.hypothesis for i in range(400)]


def test_dropout_follows_from_the_draw() -> None:
    spoil = dropout(0.25, 0.4)
    found = left(spoil, example(LONG))
    assert found == left(dropout(0.25, 0.4, *reversed(WORDS)), example(LONG)), "in any order"
    assert 0.15 < found.count(None) / 400 < 0.35
    words = [word for hypothesis in found if hypothesis for word in hypothesis.split()]
    n = 200 * sum(hypothesis is not None for hypothesis in found)
    new = [word for word in words if word in ("five", "six")]
    assert 0.19 < len(new) / n < 0.21  # replaced
    assert 0.19 < 1 - len(words) / n < 0.21  # deleted
    assert 0.6 < new.count("six") / len(new) < 0.73  # as often as in the hypotheses
    keys = [Key(1, 0, 0), Key(1, 0, 0, 1), Key(1, 1, 0), Key(2, 0, 0)]
    assert len({spoil(example(LONG), key).utterance.hypothesis for key in keys}) == 4
    assert spoil(WORDS[2], keys[0]) is WORDS[2]


def test_rows_without_audio_are_spoilt_by_15_percent_at_least() -> None:
    """Their hypotheses are copies of the transcripts."""
    speech, text = example(LONG), example(LONG, audio=None)
    assert left(dropout(0, 0.05), text) == left(dropout(0, 0.15), speech)
    assert left(dropout(0, 0.4), text) == left(dropout(0, 0.4), speech)
    assert left(dropout(0, 0), text) == [LONG] * 400


@pytest.mark.parametrize(("train", "model", "message"), [
    ({"hypothesis_word_dropout": 0.1}, {}, r"set model\.hypothesis"),
    ({"hypothesis_dropout": 0.1}, {"hypothesis": "manifest", "projector": "none"}, "nothing to go"),
])
def test_dropout_that_makes_no_sense_is_refused(train: dict[str, Any], model: dict[str, Any],
                                                message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_dropout(Config.model_validate({"train": train, "model": model}), WORDS)


def test_dropout_is_built_where_it_is_asked_for() -> None:
    reads = {"model": {"hypothesis": "manifest"}}
    assert build_dropout(Config.model_validate(reads), WORDS) is None
    asked = Config.model_validate(reads | {"train": {"hypothesis_dropout": 1.0}})
    built = build_dropout(asked, WORDS)
    assert built is not None
    assert left(built, WORDS[0]) == [None] * 400
