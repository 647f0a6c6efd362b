"""Names for what goes wrong in unified training, said when it happens.

They are the failure signatures of arXiv 2507.12951 (loss imbalance: entities stand still while the
transcript improves; missing delimiter; one class only), and no end, not listening, forgetting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from unislu_llm.tasks import LabelTask, SpanTask, Task, TaskRegistry

STALL = 3  # validations that a trend must last to be named
_LEARNT = 50.0  # F1 from which on a task may stand still: it has been learnt
_DEAF = 90.0  # WER over which a model writes from what it knows of texts, not from what it hears
_FEW = 10  # fewer answers than these may be alike by chance

Scores = Mapping[str, float]
Predictions = Sequence[Mapping[str, Any]]


def validation_warnings(history: Sequence[Scores], predictions: Predictions,
                        registry: TaskRegistry) -> list[str]:
    """Warnings after a validation, from its `predictions` and the scores of all so far."""
    found: list[str] = []
    asked = [p for p in predictions if p["task"] in registry]
    # The first validation is of a model that has learnt nothing yet.
    trained = len(history) > 1
    missing = sum("missing_separator" in p["problems"] for p in asked)
    if trained and missing > 0.5 * len(asked):
        found.append(f"missing delimiter: {missing} of {len(asked)} answers have no [T/L]; the "
                     "model transcribes and stops (train longer, or raise train.lr.markers)")
    for task in registry:
        mine = [p for p in asked if p["task"] == task.name and p["hyp"] is not None]
        found += _one_class(task, mine) * trained + _stalled(task, history)
    if trained and (signs := _not_listening(history[-1], predictions)):
        found.append(f"not listening: {signs} (a projector takes 100 hours of speech; let the LLM "
                     "read, model.hypothesis manifest, or train a ctc projector first; if it was "
                     "better before, lower train.lr)")
    endless = sum("no_end" in p["problems"] for p in predictions)
    if trained and endless > 0.2 * len(predictions):
        found.append(f"no end: {endless} of {len(predictions)} answers ran into the token "
                     "bound (train longer; for fast speech raise decode.tokens_per_second)")
    return found


def forgetting(history: Sequence[Scores], limit: float) -> str:
    """Why a run stops whose guard set may lose `limit` points of WER; empty: it goes on."""
    if not limit:
        return ""
    first, now = (scores["guard_wer"] for scores in (history[0], history[-1]))
    return (f"forgetting: the guard set's WER went from {first:.1f} to {now:.1f}, and train."
            f"guard_limit is {limit:g} (lower train.lr, mix such speech into data.train, or raise "
            "the limit)") if now - first > limit else ""


def _not_listening(scores: Scores, predictions: Predictions) -> str:
    spoken = {(p["corpus"], p["id"]): p for p in predictions}.values()
    text, n = Counter(p["hyp_text"] for p in spoken).most_common(1)[0]
    said = len({p["ref_text"] for p in spoken if p["hyp_text"] == text})
    # Commands and silence are alike with good reason: counted is what should not be.
    if len(spoken) >= _FEW and min(n, 2 * said) > 0.5 * len(spoken):
        return f"{n} of {len(spoken)} utterances have one transcript"
    wer = scores.get("wer", scores.get("cer", 0.0))
    return f"hardly a word is right (WER {wer:.1f})" if wer > _DEAF else ""


def _one_class(task: Task, mine: Predictions) -> list[str]:
    if not isinstance(task, LabelTask) or task.multi or len(mine) < _FEW:
        return []
    # A corpus of one label is answered so with good reason.
    label, count = Counter(p["hyp"] for p in mine).most_common(1)[0]
    if count < len(mine) or len({p["ref"] for p in mine}) == 1:
        return []
    return [f"one class only: every {task.name} answer is '{label}' (train longer, or give its "
            "corpus a larger share by data.weights)"]


def _stalled(task: Task, history: Sequence[Scores]) -> list[str]:
    if not isinstance(task, SpanTask) or len(history) < STALL:
        return []
    wer = [scores.get("wer", scores.get("cer", 100.0)) for scores in history[-STALL:]]
    f1 = [scores.get(f"{task.name}_f1", 0.0) for scores in history[-STALL:]]
    # While the transcript is no better either, training as a whole stands still: no news of a task.
    if wer[-1] >= wer[0] - 1.0 or f1[-1] > f1[0] or f1[-1] >= _LEARNT:
        return []
    return [f"loss imbalance: the transcript improves (WER {wer[0]:.1f} to {wer[-1]:.1f}) while "
            f"{task.name} stalls (F1 {f1[0]:.1f} to {f1[-1]:.1f}) over {STALL} validations (train."
            "loss dynamic, a larger share of its corpus by data.weights, or text injection)"]
