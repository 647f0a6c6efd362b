"""What can be mended in rows: offsets that were counted in another way, and odd characters."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from unislu_llm.scoring.text import is_letter
from unislu_llm.tasks import SpanTask, TaskRegistry

Change = Callable[[str, int, int], tuple[int, int]]  # of a text, and start and end of a span


def _counted(encoding: str, size: int, text: str, *span: int) -> Any:
    units = text.encode(encoding, "surrogatepass")
    return tuple(len(units[:at * size].decode(encoding, "ignore"))
                 if 0 <= at * size <= len(units) else -1 for at in span)


from_utf16 = partial(_counted, "utf-16-le", 2)

# How offsets may have been counted, the rarer ways first: they are hardly right by chance.
GUESSES: dict[str, Change] = {
    "offsets count UTF-16 units, in which an emoji is two": from_utf16,
    "offsets count UTF-8 bytes": partial(_counted, "utf-8", 1),
    "offsets count from 1": lambda text, start, end: (start - 1, end - 1),
    "the end is inclusive": lambda text, start, end: (start, end + 1),
    "offsets count from 1 and the end is inclusive": lambda text, start, end: (start - 1, end),
    "a length stands in place of the end": lambda text, start, end: (start, start + end)}

# Joiners (U+200C, U+200D) mean something in Arabic and Indic scripts and between emoji.
_HIDDEN = ("(?:[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
           "|(?<![\u0590-\U0010ffff])[\u200c\u200d])")
HIDDEN = re.compile(_HIDDEN)  # zero width, soft hyphens, byte order, direction
_ALONE = re.compile(rf"(?<!\S){_HIDDEN}+\s?")  # between blanks, of which one goes as well
CURLY = str.maketrans("\u2018\u2019", "''")


def inside_word(text: str, at: int) -> bool:
    # Korean writes particles behind a name without a blank.
    return (0 < at < len(text) and is_letter(text[at - 1]) and is_letter(text[at])
            and not "\uac00" <= text[at - 1] <= "\ud7a3")


def _whole_words(text: str, start: int, end: int) -> bool:
    return (0 <= start < end <= len(text) and text[start:end] == text[start:end].strip()
            and not inside_word(text, start) and not inside_word(text, end))


def misplaced(text: str, start: int, end: int) -> str:
    """What is wrong with a span that begins or ends inside a word, and a guess why; else empty."""
    cut = [verb for verb, at in (("begins", start), ("ends", end)) if inside_word(text, at)]
    guesses = ((why, change(text, start, end)) for why, change in GUESSES.items())
    guess = next((f"'{text[a:b]}' is {a}..{b}, if {why}" for why, (a, b) in guesses
                  if _whole_words(text, a, b)), "move the offsets to whole words")
    said = f"{start}..{end} '{text[start:end]}' {' and '.join(cut)} inside a word; {guess}"
    return said if cut else ""


composed = partial(unicodedata.normalize, "NFC")


def clean(text: str) -> str:
    """A text in Unicode NFC without invisible characters and with straight apostrophes."""
    return composed(HIDDEN.sub("", _ALONE.sub("", text)).translate(CURLY))


def rewrite(row: dict[str, Any], keys: Collection[str], new: Callable[[str], str]) -> Any:
    """A row with other texts under some keys (and in their values), and spans moved along."""
    def follow(text: str, *span: int) -> Any:  # what was outside the text stays there
        return tuple(at - len(text[:max(at, 0)]) + len(new(text[:max(at, 0)])) for at in span)

    return _changed(row, keys, follow, new)


def _changed(value: Any, keys: Collection[str], span: Change,
             text: Callable[[str], str] = str, said: Any = None, depth: int = 0) -> Any:
    """A row, or a part of one whose text is `said`, with its spans and texts changed."""
    change = partial(_changed, keys=keys, span=span, text=text, depth=depth + 1)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list) and depth < 9:  # no annotation is deeper
        if isinstance(said, str) and [type(part) for part in value[1:]] == [int, int]:
            return [value[0], *span(said, *value[1:])]
        return [change(part, said=said) for part in value]
    if not isinstance(value, dict) or depth > 9:
        return value
    if "text" in value or not depth:  # a row or a segment, whose start and end are times
        return {key: change(part, said=value.get("text")) if key in keys else part
                for key, part in value.items()}
    ends: Any = [value.get(key) for key in ("start", "end")]
    if isinstance(said, str) and [type(end) for end in ends] == [int, int]:
        return value | dict(zip(("start", "end"), span(said, *ends), strict=True))
    return {key: change(part, said=said) for key, part in value.items()}


class Mender:
    """Mends the rows of a manifest, and counts them in `mended`; `guess` is the one of `GUESSES` by
    which all spans are whole words, where as written they are not (None: none, or several)."""

    def __init__(self, path: Path, registry: TaskRegistry) -> None:
        self._keys = {"text", "hypothesis", "segments",
                      *(task.name for task in registry if isinstance(task, SpanTask))}
        self.mended, self.guess = Counter[str](), self._guess(path)

    def __call__(self, row: dict[str, Any]) -> Any:
        placed = _changed(row, self._keys, GUESSES[self.guess]) if self.guess else row
        cleaned = rewrite(placed, self._keys, clean)
        self.mended.update({str(self.guess): placed != row, "characters": cleaned != placed})
        return cleaned

    def _guess(self, path: Path) -> str | None:
        right, left = True, dict.fromkeys(GUESSES, 0)

        def weigh(text: str, *span: int) -> Any:
            nonlocal right, left
            right = right and _whole_words(text, *span)
            places = {why: GUESSES[why](text, *span) for why in left}
            # Numbers that tell whether two guesses gave the same places so far.
            left = {why: hash((left[why], place)) for why, place in places.items()
                    if _whole_words(text, *place)}
            return span

        with path.open("rb") as lines:
            for line in lines:
                with suppress(ValueError, RecursionError):  # told when rows are read
                    _changed(json.loads(line.decode("utf-8-sig")), self._keys, weigh)
        return next(iter(left)) if left and not right and len({*left.values()}) == 1 else None
