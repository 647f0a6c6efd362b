"""Text protocols: what is done to reference and hypothesis before they are compared.

* `whisper`, of UniSLU's authors (arXiv 2507.12951): Whisper's normaliser on both sides, for
  transcripts and for entity phrases; the English one for English, the basic one for all else.
* `slue`, slue-toolkit's: transcripts lose `. ; ? !` (the comma stays) and repeated blanks; entity
  phrases go through :func:`ner_tokens`. Case counts. The toolkit strips the references of VoxPopuli
  alone; here both sides of every corpus lose them, which forgives other systems a full stop.
* `slurp`, of runs with a task `slots`: lower case; clitics of phrases are words, as in SLURP's own.

In all, text is composed first (NFC), and words of languages without blanks are their characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import regex  # type: ignore[import-untyped]
from whisper_normalizer.basic import BasicTextNormalizer  # type: ignore[import-untyped]
from whisper_normalizer.english import EnglishTextNormalizer  # type: ignore[import-untyped]

Protocol = Literal["slue", "whisper", "slurp"]
PROTOCOLS: tuple[Protocol, ...] = ("slue", "whisper")  # of every run

_UNSPACED = {"zh", "cmn", "zho", "yue", "wuu", "nan", "hak", "lzh", "ja", "jpn", "th", "tha", "lo",
             "lao", "my", "mya", "km", "khm", "bo", "bod", "dz", "dzo"}
# Thai to Myanmar, Khmer, and what is written with Han characters and kana.
_SCRIPTS = ("\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
            "\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff")
_PIECES = regex.compile(rf"(?=[{_SCRIPTS}])\X|[^{_SCRIPTS}]+")
without_blanks = re.compile(f"[{_SCRIPTS}\u3000-\u303f\uff00-\uff65]").match
"""Whether a text begins in a script without blanks between words, or with its punctuation."""
# The toolkit's marks, and the same ones as other scripts write them.
_ENDS = ".;?!" "\u3002\uff0e\uff61\uff1b\uff1f\uff01\u061f\u061b\u0964\u0965\u00bf\u00a1"
_CLITIC = re.compile(r"(?<=\w)(?='(?:s|m|d|re|ve|ll)?(?:\s|$)|n't\b)")
_MARKS = frozenset(_ENDS + ",\uff0c\u3001\uff64\u060c")


class Token(NamedTuple):
    """A word of the NER text; `start` and `end` are its place in the characters of the original."""

    text: str
    start: int
    end: int


def written_in_characters(language: str) -> bool:
    """Whether a language (a code such as `ja` or `zh-CN`) is written without blanks."""
    return language_code(language) in _UNSPACED


def is_letter(char: str) -> bool:
    """Whether a character beside another such one is in the same word."""
    # Vowels of many scripts are marks, which `isalnum` does not know.
    mark = unicodedata.category(char)[0] == "M"
    return (mark or char.isalnum() or char == "_") and not without_blanks(char)


def normalise_transcript(text: str, protocol: Protocol, language: str = "") -> str:
    """Transcript as its words are counted, which single blanks separate; English by default."""
    text = unicodedata.normalize("NFC", text)
    if protocol == "whisper":
        return _whisper(text, language_code(language))
    words = (text.lower() if protocol == "slurp" else re.sub(f"[{_ENDS}]", "", text)).split()
    characters = written_in_characters(language)
    return " ".join(regex.findall(r"\X", "".join(words)) if characters else words)


def normalise_phrase(text: str, protocol: Protocol, language: str = "") -> str:
    """Entity phrase as it is compared; empty when nothing but punctuation was there."""
    text = unicodedata.normalize("NFC", text)
    if protocol == "slurp":
        return normalise_transcript(_CLITIC.sub(" ", text.lower()), protocol, language)
    return ner_text(text) if protocol == "slue" else _whisper(text, language_code(language))


def word_spans(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each word; in scripts without blanks of each character with its marks."""
    for match in re.finditer(r"\S+", text):
        yield from ([match.span()] if match.group().isascii() else
                    (piece.span() for piece in _PIECES.finditer(text, *match.span())))


def places_of(phrase: str, text: str) -> Iterator[tuple[int, int]]:
    """Start and end of every place where a phrase stands between words' borders."""
    at = text.find(phrase) if phrase else -1
    while at >= 0:
        end = at + len(phrase)
        if not (at and is_letter(text[at - 1])) and not is_letter(text[end:end + 1] or " "):
            yield at, end
        at = text.find(phrase, at + 1)


def ner_tokens(text: str) -> list[Token]:
    """Words of the toolkit's NER text.

    A word loses `. , ! ? ;` and its trailing apostrophes and is split before its last apostrophe;
    earlier ones split it too and vanish (`o'neil's` gives `o`, `neil`, `'s`).
    """
    tokens = []
    for first, last in word_spans(text):
        kept = [(c, i) for i, c in enumerate(text[first:last], first) if c not in _MARKS]
        # Behind the marks, so that `countries'.` and `countries.'` are the same.
        while kept and kept[-1][0] == "'":
            kept.pop()
        cuts = [i for i, (char, _) in enumerate(kept) if char == "'"]
        # Only the last piece keeps its apostrophe, so the earlier ones start behind theirs.
        starts = [0, *(cut + 1 for cut in cuts[:-1]), *cuts[-1:]]
        pieces = [kept[a:b] for a, b in zip(starts, [*cuts, len(kept)], strict=True)]
        tokens += [Token("".join(c for c, _ in piece), piece[0][1], piece[-1][1] + 1)
                   for piece in pieces if piece]
    return tokens


def ner_text(text: str) -> str:
    """Words of :func:`ner_tokens` separated by single blanks."""
    return " ".join(token.text for token in ner_tokens(text))


def language_code(language: str) -> str:
    """The first part of a code: `zh` of `zh-CN`, `cmn` of `cmn_hans_cn`; English where none is."""
    code = re.split("[-_]", language.lower())[0]
    return "en" if code in ("", "eng", "english") else code


# A transcript is normalised once for each task and report that reads it, and the normaliser takes
# about a millisecond; it is made at the first call, as its table of spellings is slow to read.
@lru_cache(maxsize=65_536)
def _whisper(text: str, code: str) -> str:
    return " ".join(_normaliser(code == "en", code in _UNSPACED)(text).split())


@cache
def _normaliser(english: bool, characters: bool) -> Any:
    # Whisper itself takes marks for blanks, and with them vowels of Thai and Hindi.
    return EnglishTextNormalizer() if english else BasicTextNormalizer(
        split_letters=characters, preserve_marks=True)
