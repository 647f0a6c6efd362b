"""A few dev examples for people: what was said, what the model makes of it, what is right."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from unislu_llm.io import printable
from unislu_llm.scoring.entities import by_phrase, place
from unislu_llm.scoring.predictions import Prediction, check_predictions
from unislu_llm.scoring.text import normalise_transcript, word_spans
from unislu_llm.scoring.wer import edits
from unislu_llm.tasks import ASR, SpanTask, TaskRegistry

_WIDTH, _LENGTH = 100, 500  # of a line and a text, in characters: nobody reads more of a loop
LEGEND = "*word*: not in the reference, (word): missing"


def choose(predictions: Sequence[Mapping[str, Any]], registry: TaskRegistry) -> list[str]:
    """Keys of three predictions that show something: a right one, one with a wrong transcript, one
    with a wrong output; where there is none of a kind, of tasks that are not among them yet.

    A run chooses at its first validation and keeps them, so that one sees what training changes.
    """
    records = check_predictions(predictions, registry)
    counts = edits(records, "whisper")
    said = {p.key: not row[:3].any() for p, row in zip(records, counts, strict=True)}
    done = {p.key: _outputs(p, registry)[1] for p in records}
    # An utterance in which there are phrases to be found shows more than one without.
    records.sort(key=lambda p: not p.ref or isinstance(p.ref, str))
    kinds = (lambda p: said[p.key] and done[p.key], lambda p: not said[p.key],
             lambda p: not done[p.key], lambda p: True)
    chosen: list[Prediction] = []
    for kind in (*kinds, kinds[-1], kinds[-1]):
        fitting = [p for p in records if p not in chosen and kind(p)]
        seen = {p.task for p in chosen}
        fitting.sort(key=lambda p: p.task in seen)
        chosen += fitting[:1] if len(chosen) < 3 else []
    return [p.key for p in chosen]


def show(predictions: Sequence[Mapping[str, Any]], keys: Sequence[str],
         registry: TaskRegistry) -> dict[str, str]:
    """The predictions of these keys as text; words that differ from the reference are marked."""
    records = {p.key: p for p in check_predictions(predictions, registry)}
    return {key: _show(records[key], registry) for key in keys if key in records}


def _show(p: Prediction, registry: TaskRegistry) -> str:
    read = ("ctc", p.ctc_hypothesis) if p.hypothesis is None else ("hypothesis", p.hypothesis)
    names = {p.ref_text: ["reference"]}  # what is the same is printed once
    for name, text in (read, ("model", p.hyp_text)):
        if text is not None:
            names.setdefault(_marked(p.ref_text, text, p.language), []).append(name)
    lines = [f"{', '.join(some)}: {_short(text)}" for text, some in names.items()]
    if p.task != ASR:
        lines.append(f"{p.task}: {_short(_outputs(p, registry)[0])}")
    return "\n".join(textwrap.fill(line, _WIDTH, initial_indent="    ",
                                   subsequent_indent="      ") for line in lines)


def _outputs(p: Prediction, registry: TaskRegistry) -> tuple[str, bool]:
    """What became of the outputs of a prediction, and whether they are right."""
    if p.task == ASR or p.ref is None:
        return "", True
    if isinstance(registry[p.task], SpanTask):
        ref, hyp = by_phrase(place([p], "whisper"))[0]
        parts = {"right": ref & hyp, "missed": ref - hyp, "invented": hyp - ref}
        told = [f"{name} {', '.join(f'{label} {phrase}' for label, phrase in some.elements())}"
                for name, some in parts.items() if some]
        return "; ".join(told) or "none, right", ref == hyp
    ref_labels, hyp_labels = set(p.ref_labels or ()), p.hyp_labels
    right = hyp_labels is not None and set(hyp_labels) == ref_labels
    answer = "no usable answer" if hyp_labels is None else ", ".join(hyp_labels) or "none"
    return answer + (", right" if right else f", not {', '.join(sorted(ref_labels)) or 'none'}"
                     ), right


def _marked(reference: str, text: str, language: str) -> str:
    """A transcript in which what differs from the reference is marked, as :data:`LEGEND` says."""
    # What is no error of the protocol whose scores are shown is none here.
    same = {normalise_transcript(side, "whisper", language) for side in (reference, text)}
    if len(same) == 1:
        return reference
    sides = [[side[a:b] for a, b in word_spans(side)] for side in (reference, text)]
    ref, hyp = ([word.lower().strip(".,;:?!\"'") for word in words] for words in sides)
    marked: list[str] = []
    for kind, a, b, c, d in SequenceMatcher(None, ref, hyp, autojunk=False).get_opcodes():
        if kind == "equal":
            marked += sides[1][c:d]
        else:
            marked += [*(f"*{word}*" for word in sides[1][c:d]),
                       *(f"({word})" for word in sides[0][a + d - c:b])]
    return " ".join(marked)


def _short(text: str) -> str:
    return (printable(text[:_LENGTH]) + " ..." * (len(text) > _LENGTH)) or "(nothing)"
