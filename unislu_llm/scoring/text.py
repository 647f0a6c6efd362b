"""Text protocols: what is done to reference and hypothesis before they are compared.

Two protocols, never to be mixed: the authors' figures and the benchmark's leaderboard are two scorings.

* `whisper`, the authors' of UniSLU (arXiv 2507.12951): Whisper's English normaliser on both sides, for
  transcripts and for entity phrases.
* `slue`, slue-toolkit's: transcripts lose `. ; ? !` (the comma stays) and repeated blanks; entity phrases go
  through the toolkit's NER text preparation (:func:`ner_tokens`). Case is kept, and strings are compared
  exactly.

Two choices in `slue` that the toolkit never had to make:

* *Both sides.* The toolkit strips the references when it writes its manifests, and the vocabulary of its
  models is read from these, so its hypotheses cannot contain the marks. A system trained on unstripped
  transcripts emits them, so the rule is applied to both sides; on the toolkit's own outputs that changes
  nothing.
* *Every corpus.* The toolkit strips VoxPopuli and takes VoxCeleb as it is, because VoxCeleb's transcripts
  have none of the marks. The rule is therefore harmless for their references and is applied to all corpora,
  whatever their name; a full stop that a system puts behind a VoxCeleb utterance is forgiven.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

from whisper_normalizer.english import EnglishTextNormalizer  # type: ignore[import-untyped,unused-ignore]

from unislu_llm.errors import UserError

Protocol = Literal["slue", "whisper"]

PROTOCOLS: tuple[Protocol, ...] = ("slue", "whisper")
"""Every text protocol; reports give all of them."""

_SLUE_MARKS = re.compile(r"[.;?!]")
_NER_MARKS = frozenset(".,!?;")
_WORD = re.compile(r"\S+")


class Token(NamedTuple):
    """A word of the NER text; `start`, `end` are the character offsets of its place in the original text."""

    text: str
    start: int
    end: int


def check_protocol(protocol: str) -> None:
    """Refuse a protocol that does not exist.

    Raises:
        UserError: `protocol` is not one of :data:`PROTOCOLS`.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown scoring protocol '{protocol}'; choose from {', '.join(PROTOCOLS)}")


def normalise_transcript(text: str, protocol: Protocol) -> str:
    """Transcript as its words are counted under `protocol`; words are separated by single blanks."""
    check_protocol(protocol)
    if protocol == "whisper":
        return _whisper(text)
    return " ".join(_SLUE_MARKS.sub("", text).split())


def normalise_phrase(text: str, protocol: Protocol) -> str:
    """Entity phrase as it is compared under `protocol`; empty when nothing but punctuation was there."""
    check_protocol(protocol)
    return _whisper(text) if protocol == "whisper" else ner_text(text)


def ner_tokens(text: str) -> list[Token]:
    """Words of the toolkit's NER text, with their places in `text`.

    A word loses `. , ! ? ;` and its trailing apostrophes and is split before its last apostrophe: `europe's`
    gives `europe`, `'s` and `don't` gives `don`, `'t`. Earlier apostrophes of a word split it too and vanish
    (`o'neil's` gives `o`, `neil`, `'s`), as in the toolkit. Words of which nothing is left vanish. Applying
    it to its own result changes nothing.
    """
    tokens = []
    for match in _WORD.finditer(text):
        kept = [(char, i) for i, char in enumerate(match.group(), match.start()) if char not in _NER_MARKS]
        while kept and kept[-1][0] == "'":
            kept.pop()
        tokens += _split_apostrophes(kept)
    return tokens


def ner_text(text: str) -> str:
    """Words of :func:`ner_tokens` separated by single blanks."""
    return " ".join(token.text for token in ner_tokens(text))


def _split_apostrophes(chars: list[tuple[str, int]]) -> list[Token]:
    cuts = [i for i, (char, _) in enumerate(chars) if char == "'"]
    # Only the last piece keeps its apostrophe, so the earlier ones start behind theirs.
    starts = [0, *(cut + 1 for cut in cuts[:-1]), *cuts[-1:]]
    pieces = [chars[start:end] for start, end in zip(starts, [*cuts, len(chars)], strict=True)]
    return [Token("".join(char for char, _ in p), p[0][1], p[-1][1] + 1) for p in pieces if p]


@lru_cache(maxsize=1)
def _normaliser() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


# A transcript is normalised once for each task and report that reads it; the normaliser takes about a
# millisecond.
@lru_cache(maxsize=65_536)
def _whisper(text: str) -> str:
    return " ".join(_normaliser()(text).split())
