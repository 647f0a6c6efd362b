"""The unified format `transcript[T/L][task]outputs` (UniSLU, arXiv 2507.12951): encode and parse.

A target is made of pieces; each is a marker (one token id) or plain text. Tokenizers see the
pieces and never the joined string, so that no token straddles a marker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unislu_llm.errors import UserError
from unislu_llm.tasks import ASR, SEPARATOR, LabelTask, Span, SpanTask, Task, TaskRegistry
from unislu_llm.utterance import Utterance

Output = tuple[tuple[str, str], ...] | tuple[str, ...] | str
"""Outputs of one task: `(label, phrase)` pairs, labels of a multi-label task, or one label."""

PROBLEMS: dict[str, str] = {
    "missing_separator": "no [T/L]: the output is a bare transcript although a task was asked for",
    "missing_task": "[T/L] is not followed by a task-control token",
    "wrong_task": "another task was answered than the one asked for",
    "marker_in_transcript": "a marker other than [T/L] stands in the transcript",
    "repeated_separator": "[T/L] or a control token stands in the task part",
    "foreign_marker": "a marker of another task stands in the task part",
    "unclosed_tag": "an opening marker has no closing one",
    "stray_close": "a closing marker has no opening one",
    "mismatched_close": "a phrase is closed by the marker of another label",
    "text_outside": "text stands between the markers of the task part",
    "empty_phrase": "there is nothing between an opening and a closing marker",
    "unknown_label": "the text between the markers is not a label of the task",
    "missing_label": "a label task has no label",
    "extra_label": "a single-label task has several labels",
    "repeated_label": "a multi-label task has one label twice",
    "no_end": "the token budget ran out before the end",
    "loop": "the decoder repeated itself and was cut",
}
"""Every kind of malformed output and its meaning; reports count them by kind."""


class Piece(NamedTuple):
    """A stretch of the target: a marker, or plain text."""

    text: str
    part: Literal["asr", "task"]  # decides its weight in the loss
    marker: bool


@dataclass(frozen=True)
class Parsed:
    """What a decoded string says."""

    transcript: str  # before `[T/L]`
    task: str | None = None  # name of the task answered; None for a bare transcript
    outputs: Output | None = None  # None where there is no task part or no usable label
    problems: tuple[str, ...] = ()  # kinds of PROBLEMS, one entry an occurrence, in order


def encode(utterance: Utterance, task: Task | None) -> list[Piece]:
    """Pieces of the target of `utterance` for one annotated task, or for its transcript alone.
    Raises UserError: the task is not annotated, a span does not fit the text, or an unknown
    label."""
    pieces = [Piece(utterance.text, "asr", False)] if utterance.text else []
    if task is None:
        return pieces
    # As in the authors' loss: which task is asked for is known once the transcript ends, so
    # `[T/L]` and the control token weigh as it does.
    pieces += [Piece(SEPARATOR, "asr", True), Piece(task.marker, "asr", True)]
    if task.name not in utterance.labels:
        raise UserError(f"{utterance.where}: '{task.name}' is not annotated")
    for opening, text, closing in _groups(utterance, task):
        pieces += [Piece(opening, "task", True), Piece(text, "task", False),
                   Piece(closing, "task", True)]
    return pieces


def reference_output(utterance: Utterance, task: Task) -> Output:
    """Reference annotation without offsets, in the order in which the target spells it."""
    groups = list(_groups(utterance, task))
    if isinstance(task, SpanTask):
        return tuple((opening[1:-1], text) for opening, text, _ in groups)
    labels = tuple(text for _, text, _ in groups)
    return labels if task.multi else labels[0]


def find_marker(text: str, registry: TaskRegistry) -> str | None:
    """The first marker that a text holds, where it could not be told from a real one."""
    return next((m for m in registry.markers if m in text), None)


def _groups(utterance: Utterance, task: Task) -> Iterator[tuple[str, str, str]]:
    """Opening marker, text and closing marker of every output."""
    where, value = f"{utterance.where}: {task.name}", utterance.labels[task.name]
    if isinstance(task, LabelTask):
        labels = [value] if isinstance(value, str) else [*map(str, value)]
        if len({*labels} & {*task.labels}) < len(labels) or (not task.multi and len(labels) != 1):
            raise UserError(f"{where}: {labels} must be {'labels' if task.multi else 'one label'} "
                            f"of {', '.join(task.labels)}, none twice")
        yield from ((task.open, label, task.close) for label in task.labels if label in labels)
        return
    # From left to right, as the transcript was just spoken: the order of an annotation file would
    # be one that no model can foresee.
    for label, start, end in sorted((Span(*span) for span in value), key=lambda s: s[1:]):
        if label not in task.labels:
            raise UserError(f"{where}: label '{label}' is not one of {', '.join(task.labels)}")
        inside = 0 <= start < end <= len(utterance.text)
        phrase = utterance.text[start:end].strip() if inside else ""
        if not phrase:
            raise UserError(f"{where}: span {start}..{end} does not fit the text of "
                            f"{len(utterance.text)} characters")
        yield task.open_of(label), phrase, task.close_of(label)


def parse(text: str, registry: TaskRegistry, task: str | None = None) -> Parsed:
    """Read a decoded string, its end-of-text token removed. Never raises: every malformation is
    named, the rest is kept. None or `asr` for `task` accepts a bare transcript and any task."""
    asked = None if task in (None, ASR) else task
    stream, problems, words = _stream(text, registry), list[str](), list[str]()
    for chunk, is_marker in stream:
        if is_marker and chunk == SEPARATOR:
            break
        if is_marker:
            problems.append("marker_in_transcript")
        else:
            words.append(chunk)
    else:
        problems += ["missing_separator"] if asked else []
        return Parsed(" ".join(words), problems=tuple(problems))
    transcript, first = " ".join(words), next(stream, None)
    spec = next((t for t in registry if first == (t.marker, True)), None)
    if spec is None:
        return Parsed(transcript, problems=(*problems, "missing_task"))
    if asked and spec.name != asked:
        problems.append("wrong_task")
    groups = list(_read_groups(stream, spec, registry, problems))
    outputs: Output | None = (tuple((opening[1:-1], phrase) for opening, phrase in groups)
                              if isinstance(spec, SpanTask)
                              else _labels(spec, [text for _, text in groups], problems))
    return Parsed(transcript, spec.name, outputs, tuple(problems))


def _stream(text: str, registry: TaskRegistry) -> Iterator[tuple[str, bool]]:
    """Stretches of a string, each with whether it is a marker."""
    # A marker may be the start of another where a task file names odd ones.
    longest_first = sorted(registry.markers, key=len, reverse=True)
    # Split at a group, which keeps what it splits at: every second stretch is a marker.
    for i, chunk in enumerate(re.split(f"({'|'.join(map(re.escape, longest_first))})", text)):
        if i % 2:
            yield chunk, True
        elif chunk.strip():
            yield chunk.strip(), False


def _read_groups(stream: Iterator[tuple[str, bool]], task: Task, registry: TaskRegistry,
                 problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yield `(opening marker, text)` of every closed group; name what does not fit."""
    controls = {SEPARATOR, *(t.marker for t in registry)}
    opening: str | None = None
    words: list[str] = []
    for chunk, is_marker in stream:
        if not is_marker:
            words.append(chunk)
            problems += ["text_outside"] * (opening is None)
        elif chunk in task.pairs:
            problems += ["unclosed_tag"] * (opening is not None)
            opening, words = chunk, []
        elif chunk in task.pairs.values():
            if opening is None:
                problems.append("stray_close")
            elif task.pairs[opening] != chunk:
                problems.append("mismatched_close")
            elif not words:
                problems.append("empty_phrase")
            else:
                yield opening, " ".join(words)
            opening = None
        else:
            problems.append("repeated_separator" if chunk in controls else "foreign_marker")
    problems += ["unclosed_tag"] * (opening is not None)


def _labels(task: LabelTask, texts: list[str], problems: list[str]) -> Output | None:
    known = [text for text in texts if text in task.labels]
    problems += ["unknown_label"] * (len(texts) - len(known))
    if task.multi:
        labels = tuple(label for label in task.labels if label in known)
        problems += ["repeated_label"] * (len(known) - len(labels))
        return labels
    problems += ["extra_label"] * (len(known) - 1) if known else ["missing_label"]
    return known[0] if known else None
