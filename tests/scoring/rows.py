"""Predictions made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unislu_llm.scoring.predictions import Prediction, check_predictions
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry

ACTS = LabelTask("acts", "[DA]", ("ask", "answer", "thank"), "[A]", "[/A]", multi=True)
REGISTRY = TaskRegistry([NER, SA, ACTS])
Pairs = Sequence[tuple[str, str]]
TEXT = "the bank of england met in paris on monday"
NAMES = [("ORG", "bank of england"), ("PLACE", "paris"), ("WHEN", "monday")]
WRONG = "the tank of england met in paris on sunday"


def row(number: int | str = 0, task: str = "ner", ref_text: str = "", hyp_text: str = "",
        ref: Any = None, hyp: Any = None, corpus: str = "vp", **more: Any) -> dict[str, Any]:
    """A prediction as decoding writes it."""
    return {"id": str(number), "corpus": corpus, "task": task, "duration": 1.0,
            "ref_text": ref_text, "ref": ref, "hyp_text": hyp_text, "hyp": hyp, "raw": "",
            "problems": [], "n_tokens": 5, **more}


def ner(ref_text: str, ref: Pairs, hyp_text: str, hyp: Pairs | None, number: int = 0,
        **more: Any) -> dict[str, Any]:
    """A prediction of entities; the phrases of the reference stand in the text in this order."""
    found, behind = [], 0
    for label, phrase in ref:
        start = ref_text.index(phrase, behind)
        behind = start + len(phrase)
        found.append([label, phrase, start, behind])
    return row(number, "ner", ref_text, hyp_text, found, hyp, **more)


def records(*rows: dict[str, Any]) -> list[Prediction]:
    return check_predictions(rows, REGISTRY)
