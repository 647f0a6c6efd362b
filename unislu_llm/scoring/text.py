"""Text protocols: what is done to reference and hypothesis before they are compared.

* `whisper`, of UniSLU's authors (arXiv 2507.12951): Whisper's English normaliser on both sides, for
  transcripts and for entity phrases.
* `slue`, slue-toolkit's: transcripts lose `. ; ? !` (the comma stays) and repeated blanks; entity
  phrases go through :func:`ner_tokens`. Case counts. The toolkit strips the references of VoxPopuli
  alone, as its own models write no marks; here both sides of every corpus lose them, which changes
  nothing for the toolkit's outputs and forgives other systems a full stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

from whisper_normalizer.english import EnglishTextNormalizer  # type: ignore[import-untyped]

Protocol = Literal["slue", "whisper"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


class Token(NamedTuple):
    """A word of the NER text; `start` and `end` are its place in the characters of the original."""

    text: str
    start: int
    end: int


def normalise_transcript(text: str, protocol: Protocol) -> str:
    """Transcript as its words are counted, which single blanks separate."""
    return _NORMALISERS[protocol][0](text)


def normalise_phrase(text: str, protocol: Protocol) -> str:
    """Entity phrase as it is compared; empty when nothing but punctuation was there."""
    return _NORMALISERS[protocol][1](text)


def ner_tokens(text: str) -> list[Token]:
    """Words of the toolkit's NER text.

    A word loses `. , ! ? ;` and its trailing apostrophes and is split before its last apostrophe:
    `europe's` gives `europe`, `'s`. Earlier apostrophes of a word split it too and vanish
    (`o'neil's` gives `o`, `neil`, `'s`). Applying it to its own result changes nothing.
    """
    tokens = []
    for match in re.finditer(r"\S+", text):
        kept = [(c, i) for i, c in enumerate(match.group(), match.start()) if c not in ".,!?;"]
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


def _unmarked(text: str) -> str:
    return " ".join(re.sub("[.;?!]", "", text).split())


# A transcript is normalised once for each task and report that reads it, and the normaliser takes
# about a millisecond; it is made at the first call, as its table of spellings is slow to read.
@lru_cache(maxsize=65_536)
def _whisper(text: str) -> str:
    return " ".join(_normaliser()(text).split())


_normaliser = cache(EnglishTextNormalizer)

# Of transcripts and of phrases.
_NORMALISERS: dict[Protocol, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "slue": (_unmarked, ner_text), "whisper": (_whisper, _whisper)}
