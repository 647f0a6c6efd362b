"""Rows longer than Whisper's 30 s: cut where the manifest says that a segment ends, or refused.

A long row may carry `segments`, in order, each written like a row of its own, its times in seconds
of the audio file. Neighbours are joined where :func:`_join` can; the row's own text and labels give
way to the segments'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unislu_llm.data.audio import END_SLACK, MAX_SECONDS, SAMPLE_RATE, count_samples
from unislu_llm.data.manifest import first_ten
from unislu_llm.data.row_reader import Problem, RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance

_MAX_GAP = 1.0  # seconds: in a longer gap there may be speech that nobody transcribed
_OVERLAP = 0.05  # seconds by which rounded time stamps of neighbours may overlap
_INHERITED = ("corpus", "speaker", "language")


def handle_long(utterances: Sequence[Utterance], registry: TaskRegistry) -> list[Utterance]:
    """Utterances of at most 30 s, in order, with their durations; longer ones are cut.

    Raises:
        UserError: one for all rows that are too long and cannot be cut; or an unreadable file.
    """
    reader = RowReader(registry)
    out, bad = list[Utterance](), list[str]()
    for u in utterances:
        if u.audio is not None and u.stated_seconds is None:
            u = replace(u, duration=_measured(u, u.audio))
        if u.seconds <= MAX_SECONDS:
            out.append(u)
            continue
        segments, problems = read_segments(u, reader, u.start + u.seconds)
        bad += [f"{u.where}: {p.field}: {p.message}" for p in problems[:1]]
        pieces: list[Utterance] = []
        for segment in segments:
            joined = _join(pieces[-1], segment, registry) if pieces else None
            pieces[-1:] = [joined] if joined else [*pieces[-1:], segment]
        out += [replace(piece, id=f"{u.id}-{i:03d}") for i, piece in enumerate(pieces)]
    if bad:
        raise UserError(f"{len(bad)} row{'s are' if len(bad) > 1 else ' is'} longer than "
                        f"{MAX_SECONDS:g} s and cannot be cut:\n{first_ten(bad)}")
    return out


def _measured(u: Utterance, path: Path) -> float:
    try:
        return count_samples(path, u.start) / SAMPLE_RATE
    except UserError as error:
        raise UserError(f"{u.where}: field 'audio': {error}") from error


def read_segments(u: Utterance, reader: RowReader,
                  end: float) -> tuple[list[Utterance], list[Problem]]:
    """The segments of an utterance whose audio ends at `end` seconds, and what is wrong there."""
    if not u.segments:
        return [], [Problem("segments", "segments", f"is missing; '{u.id}' has {end - u.start:.1f} "
                            "s, and is cut at annotated segments only")]
    # What segments do not say of these is the row's own.
    inherited = {key: value for key in _INHERITED if (value := getattr(u, key)) is not None}
    pieces, problems = list[Utterance](), list[Problem]()
    for i, segment in enumerate(u.segments):
        found, piece = [Problem("", "", "must be an object with start, end and text")], None
        if isinstance(segment, dict):
            # The id is a place-holder: pieces are numbered when it is known which are joined.
            row: dict[str, Any] = {**inherited, **segment, "id": "segment", "audio": str(u.audio)}
            piece, found = reader.read(row, u.source)
            found += [Problem(key, "", "is missing") for key in ("start", "end")
                      if segment.get(key) is None]
        if piece is not None and piece.end is not None and not found:
            length = piece.end - piece.start
            if piece.start < u.start - END_SLACK or piece.end > end + END_SLACK:
                found.append(Problem("", "", f"{piece.start:g} s to {piece.end:g} s is outside the "
                                     f"row, which reaches from {u.start:g} s to {end:g} s"))
            elif length > MAX_SECONDS:
                found.append(Problem("", "", f"has {length:.1f} s, {MAX_SECONDS:g} s is the limit"))
            elif pieces and piece.start < (pieces[-1].end or 0.0) - _OVERLAP:
                found.append(Problem("start", "", f"{piece.start:g} s is before the end of the "
                                     "segment before it"))
            # Its file was named from the working folder, and its length follows from its times.
            pieces.append(replace(piece, audio=u.audio, duration=None))
        problems += [Problem(f"segments[{i}].{p.field}".rstrip("."), "segments", p.message)
                     for p in found]
    return pieces, problems


def _join(left: Utterance, right: Utterance, registry: TaskRegistry) -> Utterance | None:
    """Both as one utterance; None where they are better left apart."""
    gap, length = right.start - (left.end or 0.0), (right.end or 0.0) - left.start
    alike = all(getattr(left, key) == getattr(right, key) for key in _INHERITED)
    # Of a label of the whole utterance, such as a sentiment, there could be only one.
    spans_only = all(isinstance(registry[name], SpanTask) for name in left.labels)
    if (length > MAX_SECONDS or gap > _MAX_GAP or not alike or not spans_only
            or left.labels.keys() != right.labels.keys()):
        return None
    shift = len(left.text) + 1
    labels: dict[str, Any] = {
        name: (*value, *(Span(str(s[0]), int(s[1]) + shift, int(s[2]) + shift)
                         for s in right.labels[name]))
        for name, value in left.labels.items()}
    halves = (left.hypothesis, right.hypothesis)  # one alone would not be of the whole
    return replace(left, text=f"{left.text} {right.text}", labels=labels, end=right.end,
                   hypothesis=None if None in halves else "{} {}".format(*halves).strip())
