"""Labelled phrases without offsets: where in a transcript they are said.

Words are those of SLUE's NER text, case aside; where they differ, stretches of words that Whisper's
normaliser of the language makes equal count too (`12-ounce` and `twelve ounce`).
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from unislu_llm.errors import hint, shorten
from unislu_llm.scoring.text import Token, ner_tokens, normalise_phrase, without_blanks
from unislu_llm.tasks import Span

_MORE_WORDS = 2  # that a phrase may have in the transcript: `a 100` is `one hundred`
_LONG_PHRASE = 20  # words, over which a phrase is looked for as it is spelt alone
_HINTS = 10  # phrases of a row of which the nearest words are looked for, which takes a while
_LONG = 500  # words from which a text is searched for equal words alone: normalising takes a while


def place_phrases(text: str, phrases: Sequence[tuple[str, str]], spans: Iterable[Span] = (), *,
                  first: bool = False, language: str = "",
                  ) -> tuple[list[Span], dict[int, str]]:
    """Spans of `(label, phrase)`, in order of their places and without overlap; and by its index
    why a phrase has none: it is said less often than it is given, or more often, which is unclear.
    `spans` are taken places; with `first` a phrase that is said more often takes the first ones."""
    said, placed, why = _Transcript(text, language), list(spans), dict[int, str]()
    taken = bytearray(len(text))
    for span in placed:
        taken[span.start:span.end] = b"\1" * (span.end - span.start)
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, (_, phrase) in enumerate(phrases):
        alike[_words(phrase)].append(i)
    # Long phrases first: they have fewer places, and a short one must not take their words.
    for words, given in sorted(alike.items(), key=lambda item: -len(item[0])):
        phrase, places = phrases[given[0]][1], list[tuple[int, int]]()
        for start, end in said.find(phrase, words, taken):
            if taken.find(1, start, end) < 0 and not (places and start < places[-1][1]):
                places.append((start, end))
        labels = sorted({phrases[i][0] for i in given})
        if len(places) < len(given):
            why |= dict.fromkeys(given, said.lacks(
                phrase, words, len(places), len(given), len(why) < _HINTS))
        elif not first and (len(places) > len(given) or len(labels) > 1):
            as_what = f" as {' and as '.join(labels)}" if len(labels) > 1 else ""
            why |= dict.fromkeys(given, f"'{shorten(phrase)}' is in the text "
                                 f"{_times(len(places))} and given {_times(len(given))}{as_what}; "
                                 "give start and end in place of the phrase")
        else:
            for i, (start, end) in zip(given, places, strict=False):
                placed.append(Span(phrases[i][0], start, end))
                taken[start:end] = b"\1" * (end - start)
    return sorted(placed, key=lambda span: span[1:]), why


class _Transcript:
    """A text in which many phrases are looked for, each in the time of its few places."""

    def __init__(self, text: str, language: str = "") -> None:
        self._text, self._tokens = text, ner_tokens(text)
        # English loses its marks, which are vowels of Thai.
        self._language = language or ("zh" if any(map(without_blanks, text)) else "")
        self._words = [_word(token) for token in self._tokens]
        self._joined = "".join(f"{word}\n" for word in self._words)
        self._at = list(accumulate((len(word) + 1 for word in self._words), initial=0))
        self._index: dict[str, list[int]] = defaultdict(list)
        for i, word in enumerate(self._words):
            self._index[word].append(i)
        self._normal: dict[int, list[str]] = {}  # normalised stretches, by their number of words

    def find(self, phrase: str, words: tuple[str, ...],
             taken: bytes | bytearray = b"") -> list[tuple[int, int]]:
        """Places, none of which overlaps another; of words as they are spelt also none `taken`."""
        n, places = len(words), list(self._equal(words, taken))
        rare = 0 < n <= _LONG_PHRASE and len(self._tokens) <= _LONG and not places
        if rare and not (taken and any(self._equal(words))) and (
                wanted := normalise_phrase(phrase, "whisper", self._language)):
            equal = [(i, i + k) for k in range(1, n + _MORE_WORDS + 1)
                     for i, stretch in enumerate(self._stretches(k)) if stretch == wanted]
            # The normaliser drops `um`: the shortest of stretches inside one another is the phrase.
            places = sorted(p for p in equal if not any(
                q != p and p[0] <= q[0] and q[1] <= p[1] for q in equal))
        return [(self._tokens[i].start, self._tokens[j - 1].end) for i, j in places]

    def _equal(self, words: tuple[str, ...],
               taken: bytes | bytearray = b"") -> Iterator[tuple[int, int]]:
        # By their rarest word, and compared as strings: a text of one word has many places.
        n, last, wanted = len(words), 0, "\n".join(words) + "\n"
        k = min(range(n), key=lambda k: len(self._index.get(words[k], ())), default=0)
        for i in (j - k for j in self._index.get(words[k], ())) if words else ():
            if i >= last and self._joined.startswith(wanted, self._at[i]) and taken.find(
                    1, self._tokens[i].start, self._tokens[i + n - 1].end) < 0:
                yield i, (last := i + n)

    def _stretches(self, n: int) -> list[str]:
        if n not in self._normal:
            self._normal[n] = [
                normalise_phrase(self._text[a.start:b.end], "whisper", self._language)
                for a, b in zip(self._tokens, self._tokens[n - 1:], strict=False)]
        return self._normal[n]

    def lacks(self, phrase: str, words: tuple[str, ...], there: int, given: int,
              hints: bool = True) -> str:
        """Why a phrase that is given so many times has fewer places."""
        if there:
            return (f"'{shorten(phrase)}' is given {_times(given)} and is in the text "
                    f"{_times(there)}; spans do not overlap")
        if self.find(phrase, words):
            return f"'{shorten(phrase)}' is in the text only where another span is"
        n, searched = len(words), min(len(self._words), _LONG)
        near = {" ".join(self._words[i:i + n]) for i in range(searched - n + 1)
                if hints and 0 < n <= _LONG_PHRASE}
        return (f"'{shorten(phrase)}' is not in the text as whole words"
                f"{hint(phrase, near) or '; correct the phrase or the text'}")


def _words(phrase: str) -> tuple[str, ...]:
    return tuple(map(_word, ner_tokens(phrase)))


def _word(token: Token) -> str:
    # `ü` may be one character or two: which one depends on who typed it.
    return unicodedata.normalize("NFC", token.text).lower()


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
