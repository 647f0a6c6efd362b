"""What happened to the rows of a source: read, dropped and why, changed and how. Nothing is dropped uncounted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from unislu_llm.tasks import Span

NAMED = 10
"""Places that are kept by name for each reason."""

_OUT_OF_PLACE = re.compile("[\\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass
class Tally:
    """Counts while a source is read.

    Args:
        read: rows of the source.
        dropped: rows left out, by reason.
        spans: spans left out, by reason; their rows stay.
        notes: rows or spans kept but changed or incomplete, by what was done.
        named: the first places of each reason, `file:line (id)`.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    spans: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self._count(self.dropped, reason, where)

    def drop_span(self, reason: str, where: str) -> None:
        """Count a span that is left out."""
        self._count(self.spans, reason, where)

    def note(self, what: str, where: str) -> None:
        """Count a row or span that is kept with a change."""
        self._count(self.notes, what, where)

    def _count(self, counter: Counter[str], reason: str, where: str) -> None:
        counter[reason] += 1
        places = self.named.setdefault(reason, [])
        if len(places) < NAMED:
            places.append(where)


def tidy(text: str, spans: Iterable[Span], tally: Tally, where: str) -> tuple[str, tuple[Span, ...]]:
    """Text with single blanks inside and none outside, and its spans in order, flat, moved along.

    A span outside the text or with nothing in it is dropped; of two that overlap the longer stays (the left one of
    equal ones). A blank at the edge of a span is cut off. All of it is counted.
    """
    kept = []
    for span in spans:
        phrase = text[span.start:span.end] if 0 <= span.start < span.end <= len(text) else ""
        words = _OUT_OF_PLACE.sub(" ", phrase).strip()
        if not words:
            tally.drop_span("span outside the text", f"{where}: {span.label} {span.start}..{span.end}")
            continue
        lead = re.match(_OUT_OF_PLACE, phrase)
        trail = re.search(_OUT_OF_PLACE.pattern + r"\Z", phrase)
        if lead or trail:
            tally.note("blank cut off a span", f"{where}: {span.label} {span.start}..{span.end}")
        kept.append(Span(span.label, span.start + (lead.end() if lead else 0),
                         span.start + (trail.start() if trail else len(phrase))))
    flat = _flatten(kept, tally, where)
    clean, offsets = _single_blanks(text)
    if clean != text:
        tally.note("blanks of the text tidied", where)
    return clean, tuple(Span(s.label, offsets[s.start], offsets[s.end - 1] + 1) for s in flat)


def _flatten(spans: list[Span], tally: Tally, where: str) -> list[Span]:
    flat: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start - s.end, s.start)):  # longest first
        if any(span.start < other.end and other.start < span.end for other in flat):
            tally.drop_span("span inside or across a longer one", f"{where}: {span.label} {span.start}..{span.end}")
        else:
            flat.append(span)
    return sorted(flat, key=lambda s: s.start)


def _single_blanks(text: str) -> tuple[str, list[int]]:
    """Tidy text, and for each character of `text` its place there (for a blank that goes: where it would be)."""
    clean: list[str] = []
    offsets = []
    for i, character in enumerate(text):
        offsets.append(len(clean))
        if not _OUT_OF_PLACE.match(character):
            if clean and _OUT_OF_PLACE.match(text[i - 1]):
                clean.append(" ")
                offsets[-1] += 1
            clean.append(character)
    return "".join(clean), offsets
