"""Whole lists: each example beside its reference, what one utterance is asked decoded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.decoding.common import REGISTRY, Build
from unislu_llm.config import DecodeConfig
from unislu_llm.decoding.answer import Answer, prediction
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.predict import predict, understand
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span
from unislu_llm.tokenizer import Example, make_examples
from unislu_llm.utterance import Utterance

Write = Callable[..., list[Utterance]]
KINDS = pytest.mark.parametrize("kind", ["llm", "whisper"])


@KINDS
@pytest.mark.parametrize("forced", [False, True])
def test_examples_of_one_utterance_are_decoded_together(kind: str, forced: bool, build: Build,
                                                        make_utterances: Write,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    model, spans = build(kind), (Span("PLACE", 19, 24),)
    utterances = [replace(u, labels={"ner": spans, "sa": "Neutral"} if i % 2 else u.labels)
                  for i, u in enumerate(make_utterances(seconds=(0.9, 1.6, 0.6, 1.2, 0.7)))]
    examples = make_examples(utterances, REGISTRY)
    options = DecodeConfig(grammar=forced, force_task=forced, batch_size=2, max_new_tokens=40)
    asked: list[int] = []
    answer = Engine.answer

    def count(self: Engine, batch: Any, tasks: Any, **more: Any) -> list[Answer]:
        asked.append(len(batch))
        return answer(self, batch, tasks, **more)

    monkeypatch.setattr(Engine, "answer", count)
    finished: list[dict[str, Any]] = []
    together = predict(model, examples, options, on_predictions=finished.extend)
    assert asked == [2, 2, 1]
    assert sorted(r["id"] + r["task"] for r in finished) == sorted(
        r["id"] + r["task"] for r in together)
    for example, row in zip(examples, together, strict=True):
        alone, = predict(model, [example], options)
        assert {k: v for k, v in row.items() if k != "probabilities"} \
            == {k: v for k, v in alone.items() if k != "probabilities"}
        u = example.utterance
        assert (row["id"], row["corpus"], row["task"]) == (u.id, "tiny", example.task or "asr")
        assert row["duration"] == pytest.approx(u.seconds, abs=1e-3)
        assert ("probabilities" in row) == (forced and example.task == "sa")
    assert not model.training


def test_a_prediction_is_plain_data() -> None:
    u = Utterance("a", None, "anna met bob", {"ner": (Span("PERSON", 9, 12), Span("PERSON", 0, 4)),
                                              "sa": "Neutral", "acts": ("answer",)}, corpus="c")
    raw = {"ner": "anna met[T/L][NER][PERSON]anna[/PERSON]", "sa": "ana[T/L][SA]", "asr": "anna"}
    answer = Answer("anna met", 1.23456, {"ner": (("PERSON", "anna"),), "sa": None},
                    {"ner": (), "sa": ("missing_label",), "asr": ("no_end",)}, raw,
                    {"ner": 7, "sa": 4, "asr": 1}, hypothesis="")
    assert prediction(Example(u, "ner"), answer, REGISTRY) == {
        "id": "a", "corpus": "c", "task": "ner", "duration": 1.235, "ref_text": "anna met bob",
        "ref": [["PERSON", "anna", 0, 4], ["PERSON", "bob", 9, 12]], "hyp_text": "anna met",
        "hyp": [["PERSON", "anna"]], "raw": raw["ner"], "problems": [], "n_tokens": 7,
        "hypothesis": ""}
    sa = prediction(Example(u, "sa"), answer, REGISTRY)
    assert (sa["ref"], sa["hyp"], sa["hyp_text"], sa["problems"]) == (
        "Neutral", None, "ana", ["missing_label"])
    asr = prediction(Example(u, None), answer, REGISTRY)
    assert (asr["ref"], asr["hyp"], asr["problems"]) == (None, None, ["no_end"])
    assert answer.to_dict() == {"text": "anna met", "ner": [["PERSON", "anna"]], "sa": None,
                                "problems": ["missing_label", "no_end"], "hypothesis": ""}


def test_the_grammar_is_on_in_use_and_off_in_validation(build: Build,
                                                        make_utterances: Write) -> None:
    model, utterances = build("llm", seed=1), make_utterances(seconds=(0.5, 0.8))
    assert any(row["problems"] for row in predict(model, [Example(u, "ner") for u in utterances]))
    files = [u.audio for u in utterances if u.audio]
    for answer in understand(model, files):
        assert list(answer.outputs) == list(REGISTRY.names)
        assert {p for some in answer.problems.values() for p in some} <= {"loop"}
    off = understand(model, files, ["sa"], DecodeConfig(grammar=False))
    assert any(answer.problems["sa"] for answer in off)
    assert [a.outputs for a in understand(model, files, [])] == [{}, {}]
    for task, message in (("x", "unknown task 'x'"), ("sa", r"nowhere\.wav")):
        with pytest.raises(UserError, match=message):
            understand(model, ["nowhere.wav"], [task])
