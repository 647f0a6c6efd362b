"""Rows longer than Whisper's 30 s: refuse them all at once, or cut them where the manifest says that a segment ends.

A long row may carry `segments`, in order, each written like a row of its own, its times in seconds of the audio file:

    {"id": "talk", "audio": "talk.flac", "text": "...", "segments": [
        {"start": 0.0, "end": 12.4, "text": "the council met", "ner": [{"label": "ORG", "start": 4, "end": 11}]},
        {"start": 12.4, "end": 31.0, "text": "it was late", "ner": []}]}

Neighbours are joined as long as they fit into the limit, have the same tasks annotated, none of them a label of the whole
utterance, the same speaker, and no more than a second between them; spans move along. The row's own text and labels give way
to the segments'. `segments` is metadata everywhere else, and rows that are short enough are left alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from unislu_llm.data.audio import END_SLACK
from unislu_llm.data.batching import seconds
from unislu_llm.data.rows import Fault, RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import LabelValue, Span, SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance

LongAudio = Literal["refuse", "cut"]

_SHOWN = 10
_MAX_GAP = 1.0  # seconds: in a longer gap there may be speech that nobody transcribed
_OVERLAP = 0.05  # seconds by which rounded time stamps of neighbours may overlap
_INHERITED = ("audio", "corpus", "speaker", "language")


def handle_long(utterances: Sequence[Utterance], registry: TaskRegistry, max_seconds: float,
                mode: LongAudio = "refuse") -> list[Utterance]:
    """Utterances of at most `max_seconds`, in order; the others refused or cut.

    Args:
        utterances: as read from manifests; `source` leads back to the row. registry: tasks that are read.

    Raises:
        UserError: one for all rows that are too long and cannot be cut, the first ten named; or a file cannot be read.
    """
    lengths = [seconds(utterance) for utterance in utterances]
    rows = _rows_of([u for u, n in zip(utterances, lengths, strict=True) if n > max_seconds]) if mode == "cut" else {}
    out: list[Utterance] = []
    bad: list[str] = []
    for utterance, length in zip(utterances, lengths, strict=True):
        if length <= max_seconds:
            measured = utterance.audio is not None and utterance.duration is None and utterance.end is None
            out.append(dataclasses.replace(utterance, duration=length) if measured else utterance)
        elif mode == "refuse":
            bad.append(f"{utterance.source or utterance.id}: '{utterance.id}' has {length:.1f} s")
        else:
            try:
                out += cut(utterance, rows.get(utterance.source, {}).get("segments") or [], registry, max_seconds)
            except UserError as error:
                bad.append(str(error))
    if bad:
        how = "" if mode == "cut" else ("; cut them with `start` and `end`, or give them `segments` and set data.long_audio to "
                                        "cut, or drop them")
        listed = "\n".join(bad[:_SHOWN]) + (f"\n... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
        count = f"{len(bad)} row{'s are' if len(bad) > 1 else ' is'} longer than {max_seconds:g} s"
        raise UserError(f"{count}{' and cannot be cut' if mode == 'cut' else ''}{how}:\n{listed}")
    return out


def _rows_of(utterances: Sequence[Utterance]) -> dict[str, dict[str, Any]]:
    """The manifest rows that utterances were read from, by `source`; each manifest is read once."""
    wanted: dict[str, set[int]] = {}
    for utterance in utterances:
        path, _, line = utterance.source.rpartition(":")
        if path and line.isdigit():
            wanted.setdefault(path, set()).add(int(line))
    rows: dict[str, dict[str, Any]] = {}
    for path, lines in wanted.items():
        with Path(path).open("rb") as handle:
            rows |= {f"{path}:{n}": json.loads(raw.decode("utf-8-sig")) for n, raw in enumerate(handle, 1) if n in lines}
    return rows


def cut(utterance: Utterance, segments: Any, registry: TaskRegistry, max_seconds: float) -> list[Utterance]:
    """Cut an utterance at the borders of its segments into utterances of at most `max_seconds`.

    Args:
        segments: plain rows, see the head of this module; what they do not say of corpus, speaker and language is the row's.

    Returns:
        Utterances `<id>-000`, `<id>-001`, ...

    Raises:
        UserError: there are no segments, one is faulty or too long, or two overlap.
    """
    where = utterance.source or utterance.id
    if not isinstance(segments, list | tuple):
        raise UserError(f"{where}: segments: must be a list, found {type(segments).__name__}")
    if not segments:
        raise UserError(f"{where}: segments: is missing; '{utterance.id}' is longer than {max_seconds:g} s and is cut only "
                        "at annotated segments")
    pieces: list[Utterance] = []
    for i, segment in enumerate(_read(utterance, segments, registry)):
        length = (segment.end or 0.0) - segment.start
        if length > max_seconds:
            raise UserError(f"{where}: segments[{i}]: has {length:.1f} s; {max_seconds:g} s is the limit, split it")
        if pieces and segment.start < (pieces[-1].end or 0.0) - _OVERLAP:
            raise UserError(f"{where}: segments[{i}].start: {segment.start:g} s is before the end of the segment before it")
        joined = _join(pieces[-1], segment, registry, max_seconds) if pieces else None
        if joined is not None:
            pieces[-1] = joined
        else:
            pieces.append(segment)
    return [dataclasses.replace(piece, id=f"{utterance.id}-{i:03d}") for i, piece in enumerate(pieces)]


def _read(utterance: Utterance, segments: Sequence[Any], registry: TaskRegistry) -> list[Utterance]:
    reader = RowReader(registry, Path(), utterance.corpus, False)
    where = utterance.source or utterance.id
    read: list[Utterance] = []
    for i, segment in enumerate(segments):
        if not isinstance(segment, dict):
            raise UserError(f"{where}: segments[{i}]: must be an object, found {type(segment).__name__}")
        missing = [key for key in ("start", "end", "text") if segment.get(key) is None]
        if missing:
            raise UserError(f"{where}: segments[{i}].{missing[0]}: is missing")
        inherited = {key: value for key in _INHERITED if (value := getattr(utterance, key)) is not None}
        faults: list[Fault] = []
        piece = reader.read({**inherited, **segment, "id": "segment", "audio": str(utterance.audio)}, where, faults)
        if piece is None:
            raise UserError(f"{where}: segments[{i}].{faults[0].field}: {faults[0].message}")
        end = utterance.end if utterance.end is not None else utterance.start + seconds(utterance)
        if piece.start < utterance.start - END_SLACK or (piece.end or 0.0) > end + END_SLACK:
            raise UserError(f"{where}: segments[{i}]: {piece.start:g} s to {piece.end:g} s is outside the row, which reaches "
                            f"from {utterance.start:g} s to {end:g} s; times are seconds of the audio file")
        read.append(dataclasses.replace(piece, audio=utterance.audio, duration=None))
    return read


def _join(left: Utterance, right: Utterance, registry: TaskRegistry, max_seconds: float) -> Utterance | None:
    """Both as one utterance; None where they are better left apart."""
    gap, length = right.start - (left.end or 0.0), (right.end or 0.0) - left.start
    spans_only = all(isinstance(registry[name], SpanTask) for name in left.labels)
    if length > max_seconds or gap > _MAX_GAP or left.labels.keys() != right.labels.keys() or not spans_only \
            or (left.speaker, left.corpus, left.language) != (right.speaker, right.corpus, right.language):
        return None
    shift = len(left.text) + 1
    labels: dict[str, LabelValue] = {}
    for name, value in left.labels.items():
        moved = [Span(s[0], int(s[1]) + shift, int(s[2]) + shift) for s in right.labels[name]]
        labels[name] = (*value, *moved)  # type: ignore[assignment]
    drafts = [draft for draft in (left.draft, right.draft) if draft is not None]
    return dataclasses.replace(left, text=f"{left.text} {right.text}", labels=labels, end=right.end,
                               draft=" ".join(drafts).strip() if len(drafts) == 2 else None)
