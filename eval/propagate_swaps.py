"""Clips that exchange their speech or their hypothesis, and what is answered otherwise then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unislu_llm.errors import UserError
from unislu_llm.scoring.predictions import Prediction, spoken_once
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance


def partners(clips: Sequence[Utterance]) -> list[int]:
    """For each clip another one of the same tasks, the next longer one; the longest has the
    shortest. Raises UserError: a clip is alone."""
    groups: dict[frozenset[str], list[int]] = {}
    for i in sorted(range(len(clips)), key=lambda i: (clips[i].seconds, i)):
        groups.setdefault(frozenset(clips[i].labels), []).append(i)
    chosen = [0] * len(clips)
    for group in groups.values():
        if len(group) == 1:
            raise UserError(f"{clips[group[0]].where}: no other clip is annotated for the same "
                            "tasks, to be swapped with; take two or more")
        for i, j in zip(group, [*group[1:], group[0]], strict=True):
            chosen[i] = j
    return chosen


def swapped(clips: Sequence[Utterance], others: Sequence[int], what: str) -> list[Utterance]:
    """Clips with the `speech` or the `hypothesis` of others, given by number."""
    fields = {"speech": ("audio", "start", "end", "duration", "samples"),
              "hypothesis": ("hypothesis", "evidence")}[what]
    return [replace(u, **{name: getattr(clips[j], name) for name in fields})
            for u, j in zip(clips, others, strict=True)]


def changes(before: Sequence[Prediction], after: Sequence[Prediction],
            registry: TaskRegistry) -> dict[str, Any]:
    """How many transcripts and answers differ, by task."""
    pairs = list(zip(spoken_once(before, registry), spoken_once(after, registry), strict=True))
    both = list(zip(before, after, strict=True))
    tasks = dict.fromkeys(p.task for p in before)
    return {"clips": len(pairs),
            "transcripts_changed": sum(a.hyp_text != b.hyp_text for a, b in pairs),
            "answers": {t: sum(a.task == t for a, _ in both) for t in tasks},
            "answers_changed": {t: sum(a.task == t and a.hyp != b.hyp for a, b in both)
                                for t in tasks}}
