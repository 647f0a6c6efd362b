"""Names for what goes wrong in unified training, said when it happens (the failure signatures of arXiv 2507.12951)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry

STALL = 3
"""Validations that a trend must last to be named."""


def validation_warnings(history: Sequence[Mapping[str, float]], rows: Sequence[Mapping[str, Any]],
                        registry: TaskRegistry) -> list[str]:
    """Warnings after a validation.

    Args:
        history: flat scores of all validations so far, oldest first; keys as :func:`flat_scores` gives them.
        rows: prediction rows of the last one.
        registry: tasks.
    """
    found: list[str] = []
    asked = [r for r in rows if r["task"] != "asr"]
    missing = sum("missing_separator" in r["problems"] for r in asked)
    if len(history) > 1 and asked and missing > 0.5 * len(asked):
        found.append(f"missing delimiter: {missing} of {len(asked)} answers have no [T/L]; "
                     "the model transcribes and stops (train longer, or raise lr.markers)")
    for task in registry:
        mine = [r for r in asked if r["task"] == task.name and r["hyp"] is not None]
        if isinstance(task, LabelTask) and not task.multi and len(mine) >= 10:
            label, count = Counter(r["hyp"] for r in mine).most_common(1)[0]
            if count == len(mine) and len({r["ref"] for r in mine}) > 1:
                found.append(f"one class only: every {task.name} answer is '{label}'")
        if isinstance(task, SpanTask) and len(history) >= STALL:
            recent = history[-STALL:]
            wer = [h.get("wer", 100.0) for h in recent]
            f1 = [h.get(f"{task.name}_f1", 0.0) for h in recent]
            if wer[-1] < wer[0] - 1.0 and f1[-1] <= f1[0]:
                found.append(f"transcript improves (WER {wer[0]:.1f} to {wer[-1]:.1f}) while {task.name} stalls "
                             f"(F1 {f1[0]:.1f} to {f1[-1]:.1f}) over {STALL} validations")
    loops = sum("no_end" in r["problems"] for r in rows)
    if len(history) > 1 and rows and loops > 0.2 * len(rows):
        found.append(f"no end: {loops} of {len(rows)} answers ran into the token bound")
    return found


def flat_scores(results: Mapping[str, Any], registry: TaskRegistry, protocol: str = "whisper") -> dict[str, float]:
    """Headline figures of a score report, in percent: `wer`, `wer_<corpus>`, `<task>_f1`, `slue`, `malformed`, `score`.

    `score` picks the best checkpoint: the SLUE score where both its tasks were scored, else the mean of word accuracy and
    the F1 of the tasks at hand.
    """
    block = results["protocols"][protocol]
    flat = {"wer": block["wer"]["overall"]["wer"], "malformed": results["malformed"]["share"]}
    flat |= {f"wer_{corpus}": values["wer"] for corpus, values in block["wer"]["by_corpus"].items()}
    for task in registry:
        values = block["tasks"].get(task.name)
        if values is not None:
            flat[f"{task.name}_f1"] = values["entity"]["f1"] if isinstance(task, SpanTask) else values["macro_f1"]
            if isinstance(task, SpanTask):
                flat[f"{task.name}_label_f1"] = values["label"]["f1"]
    f1s = [v for k, v in flat.items() if k in {f"{t.name}_f1" for t in registry}]
    mean = (100.0 - flat["wer"] + sum(f1s)) / (1 + len(f1s))
    slue = block.get("slue_score")
    if slue is not None:
        flat["slue"] = slue
    flat["score"] = mean if slue is None else slue
    return flat


def loss_summary(metrics: Path) -> str:
    """Mean loss of each part (nats a token) over the first and the last tenth of the logged training steps, as one line."""
    rows = [r for r in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()) if r["part"] == "train"]
    names = sorted({k for r in rows for k in r if k == "loss" or k.startswith("loss_")})
    tenth = max(1, len(rows) // 10)

    def mean(part: list[dict[str, float]], name: str) -> float:
        values = [r[name] for r in part if name in r]
        return sum(values) / len(values) if values else float("nan")

    return "losses, first and last tenth of the steps: " + ", ".join(
        f"{name} {mean(rows[:tenth], name):.3f} -> {mean(rows[-tenth:], name):.3f}" for name in names)
