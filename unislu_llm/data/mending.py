"""What can be mended in rows: offsets that were counted in another way, and characters that look
like others or like nothing."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from unislu_llm.scoring.text import is_letter
from unislu_llm.tasks import SpanTask, TaskRegistry

Change = Callable[[str, int, int], tuple[int, int]]
"""Of a text and the start and end of a span, where it should be."""


def _counted(encoding: str, size: int) -> Change:
    def at(text: str, offset: int) -> int:
        units = text.encode(encoding, "surrogatepass")
        inside = 0 <= offset * size <= len(units)
        return len(units[:offset * size].decode(encoding, "ignore")) if inside else -1

    return lambda text, start, end: (at(text, start), at(text, end))


# The rarer ones first: they change few rows, and are hardly right by chance.
GUESSES: dict[str, Change] = {
    "offsets count UTF-16 units, in which an emoji is two": _counted("utf-16-le", 2),
    "offsets count UTF-8 bytes": _counted("utf-8", 1),
    "offsets count from 1": lambda text, start, end: (start - 1, end - 1),
    "the end is inclusive": lambda text, start, end: (start, end + 1),
    "offsets count from 1 and the end is inclusive": lambda text, start, end: (start - 1, end),
    "a length stands in place of the end": lambda text, start, end: (start, start + end),
}
"""How offsets may have been counted, and how they become characters with an exclusive end."""

# Joiners (U+200C, U+200D) mean something in Arabic and Indic scripts and between emoji.
_HIDDEN = ("(?:[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
           "|(?<![\u0590-\U0010ffff])[\u200c\u200d])")
HIDDEN = re.compile(_HIDDEN)
"""What nobody sees or says: zero width, soft hyphens, byte order, direction."""
_ALONE = re.compile(rf"(?<!\S){_HIDDEN}+\s?")  # between blanks, of which one goes as well
CURLY = str.maketrans("\u2018\u2019", "''")


def inside_word(text: str, at: int) -> bool:
    """Whether a place between two characters is inside a word."""
    # Korean writes particles behind a name without a blank.
    return (0 < at < len(text) and is_letter(text[at - 1]) and is_letter(text[at])
            and not "\uac00" <= text[at - 1] <= "\ud7a3")


def whole_words(text: str, start: int, end: int) -> bool:
    return (0 <= start < end <= len(text) and text[start:end] == text[start:end].strip()
            and not inside_word(text, start) and not inside_word(text, end))


def misplaced(text: str, start: int, end: int) -> str:
    """What is wrong with a span that begins or ends inside a word, and a guess why; else empty."""
    def word(low: int, high: int) -> str:
        while inside_word(text, low):
            low -= 1
        while inside_word(text, high):
            high += 1
        return text[low:high]

    cut = [f"{verb} inside the word '{word(at, at)}'"
           for verb, at in (("begins", start), ("ends", end)) if inside_word(text, at)]
    guesses = ((why, change(text, start, end)) for why, change in GUESSES.items())
    guess = next((f"'{text[a:b]}' is {a}..{b}, if {why}" for why, (a, b) in guesses
                  if whole_words(text, a, b)), "move the offsets to the word's")
    said = f"{start}..{end} '{text[start:end]}' {' and '.join(cut)}; {guess}"
    return said if cut else ""


def clean(text: str) -> str:
    """A text in Unicode NFC without invisible characters and with straight apostrophes."""
    return text if text.isascii() else unicodedata.normalize(
        "NFC", HIDDEN.sub("", _ALONE.sub("", text)).translate(CURLY))


class Mender:
    """Mends the rows of a manifest; `mended` counts them by what was done.

    Attributes:
        guess: the one of :data:`GUESSES` by which all spans of the manifest are whole words, where
            they are not as written; None: there is none, or several that say different things.
    """

    def __init__(self, path: Path, registry: TaskRegistry) -> None:
        self._keys = {"text", "hypothesis", "segments",
                      *(task.name for task in registry if isinstance(task, SpanTask))}
        self.mended, self.guess = Counter[str](), self._guess(path)

    def __call__(self, row: dict[str, Any]) -> Any:
        placed = self._changed(row, GUESSES[self.guess]) if self.guess else row
        cleaned = self._changed(placed, _followed, lambda text: (
            text if text == (new := clean(text)) else new.strip()))
        self.mended[str(self.guess)] += placed != row
        self.mended["characters"] += cleaned != placed
        return cleaned

    def _guess(self, path: Path) -> str | None:
        right, left = True, dict.fromkeys(GUESSES, 0)

        def weigh(text: str, start: int, end: int) -> tuple[int, int]:
            nonlocal right, left
            right = right and whole_words(text, start, end)
            places = {why: GUESSES[why](text, start, end) for why in left}
            # Numbers that tell whether two guesses gave the same places so far.
            left = {why: hash((left[why], place)) for why, place in places.items()
                    if whole_words(text, *place)}
            return start, end

        with path.open("rb") as lines:
            for line in lines:
                with suppress(ValueError, RecursionError):  # told when rows are read
                    self._changed(json.loads(line.decode("utf-8-sig")), weigh)
                if not left:
                    return None
        return next(iter(left)) if not right and len({*left.values()}) == 1 else None

    def _changed(self, value: Any, span: Change, text: Callable[[str], str] = lambda text: text,
                 said: Any = None) -> Any:
        """A row, or a part of one whose text is `said`, with its spans and texts changed."""
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list):
            if isinstance(said, str) and [type(part) for part in value[1:]] == [int, int]:
                return [value[0], *span(said, *value[1:])]
            return [self._changed(part, span, text, said) for part in value]
        if not isinstance(value, dict):
            return value
        row = "text" in value  # or a segment, whose start and end are times
        places = [value.get(key) for key in ("start", "end")]
        if isinstance(said, str) and not row and [type(place) for place in places] == [int, int]:
            return value | dict(zip(("start", "end"), span(said, *places), strict=True))
        return {key: self._changed(part, span, text, value["text"] if row else said)
                if key in self._keys or not row else part for key, part in value.items()}


def _followed(text: str, start: int, end: int) -> tuple[int, int]:
    """Where a span is in the clean text; what was outside the text stays there."""
    lost = [len(before) - len(clean(before)) for before in (text[:max(start, 0)], text[:end])]
    return start - lost[0], end - lost[1]
