"""Phrase lists: names and terms that are raised where words are chosen (contextual biasing).

Shallow fusion with a trie of their tokens: what continues a phrase from a word's start gains a
bonus, which is taken back where the phrase is not completed, as along the failure arcs of an
Aho-Corasick automaton (icefall's context graph). A long list would raise what nobody said: only
phrases are raised that look or sound like something in a first pass without them, or that the
decoder itself might have begun somewhere in it.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from rapidfuzz import fuzz, process
from torch import Tensor

from unislu_llm.decoding.vocabulary import BROKEN, texts_of
from unislu_llm.errors import UserError, shorten
from unislu_llm.scoring.text import is_letter, word_spans
from unislu_llm.text_files import read_text

MOST, LONGEST = 10_000, 200  # phrases of a list, characters of a phrase
_SIMILAR = 60.0  # percent from which a phrase may be what was said
_KEPT = 30  # phrases of an utterance that are raised at most as the most similar ones
_BEGUN, _RARE = 60, -6.0  # and as the likeliest to begin, with this log-probability at least
_WORDS = 8  # of a stretch that is compared; longer phrases still have most of it
_FREE = 4  # words of a phrase up to which each may have a capital or none, by itself
_END = -1  # key of a node at which a phrase ends
# How English sounds consonants, vowels aside; applied in turn.
_SOUNDS = [(re.compile(written), sound) for written, sound in (
    ("ph", "f"), ("t?s?ch|sh|j|g(?=[eiy])", "s"), ("c(?=[eiy])|z", "s"), ("c?k|q|c|g", "k"),
    ("x", "ks"), ("d", "t"), ("[vw]", "f"), ("b", "p"), ("(?<!^)[aeiouyh]", ""),
    (r"(.)\1+", r"\1"))]
Node = dict[int, Any]  # of a trie: the next one by token


class Phrases(NamedTuple):
    """A list of phrases, and the nats by which each of their tokens is raised."""

    texts: tuple[str, ...]
    boost: float

    @classmethod
    def of(cls, given: Iterable[str] | os.PathLike[str] | None, boost: float) -> Phrases | None:
        """Of phrases, or of a file (a path, also as one string) with one a line, without empty
        lines and those that begin with `#`; None: there is none. Raises UserError: over 10,000, one
        over 200 characters or without a letter or digit, no file to read."""
        if not 0 <= boost <= 1e6:
            raise UserError(f"--phrase-boost: must be at least 0 nats, found {boost:g}")
        if given and isinstance(given, (str, os.PathLike)):
            lines = read_text(given, MOST * LONGEST * 4).removeprefix("\ufeff").split("\n")
            found = {f"{given}:{n}": line.strip() for n, line in enumerate(lines, 1)
                     if line.strip() and not line.lstrip().startswith("#")}
            if not found:
                raise UserError(f"{given}: names no phrase; write one a line")
        else:
            found = {f"phrases[{n}]": str(text) for n, text in enumerate(cast(Any, given) or ())}
        for n, (place, text) in enumerate(found.items()):
            if n == MOST:
                raise UserError(f"{place}: more than {MOST:,} phrases; keep what may be said")
            # Of half characters (surrogates) a tokenizer takes none.
            if len(text) > LONGEST or not re.match(r"(?s)(?!.*[\ud800-\udfff]).*[^\W_]", text):
                raise UserError(f"{place}: a phrase has a letter or digit, at most {LONGEST} "
                                f"characters and no half ones, found {shorten(repr(text))}")
        texts = tuple(dict.fromkeys(" ".join(text.split()) for text in found.values()))
        return cls(texts, boost) if texts else None

    def like(self, hypothesis: str) -> tuple[str, ...]:
        """The phrases that resemble some stretch of a hypothesis, the most similar ones first:
        by letters and, half as much, by consonants; blanks aside (`lat via`)."""
        words = [hypothesis[a:b] for a, b in word_spans(hypothesis)]
        said = [_key("".join(words[i:i + n])) for n in range(1, _WORDS + 1)
                for i in range(len(words) - n + 1)]
        if not said:
            return ()
        keys = [_key(text) for text in self.texts]
        letters, sounds = (torch.from_numpy(process.cdist(*some, scorer=fuzz.ratio)) for some in
                           zip(zip(*keys, strict=True), zip(*said, strict=True), strict=True))
        best, order = ((2 * letters + sounds) / 3).amax(1).sort(descending=True, stable=True)
        return tuple(self.texts[i] for i, share in zip(order[:_KEPT].tolist(), best.tolist(),
                                                       strict=False) if share >= _SIMILAR)

    def maybe_said(self, base: Any, texts: Sequence[str], lengths: Sequence[int],
                   logits: Iterable[Tensor]) -> list[tuple[str, ...]]:
        """Of each row the phrases that its text is :meth:`like`, and those that the decoder might
        have begun: what is heard as words that nothing resembles may still have been considered.

        Args:
            base: tokenizer of the decoder.
            texts: what it said.
            lengths: their tokens.
            logits: `(rows, vocabulary)` at the first place, and behind each token.
        """
        best, ends = torch.tensor(float("-inf")), torch.tensor(lengths)[:, None]
        for place, some in enumerate(logits):
            known = some.float().log_softmax(-1).masked_fill(ends.to(some.device) < place, -1e9)
            best = torch.maximum(best.to(some.device), known)
        begun = best[:, _firsts(base, self.texts).to(best.device)].amax(-1)
        values, order = begun.topk(min(_BEGUN, len(self.texts)))
        return [tuple(dict.fromkeys((*self.like(text), *(
            self.texts[i] for i, value in zip(*row, strict=True) if value >= _RARE))))
            for text, *row in zip(texts, order.tolist(), values.tolist(), strict=True)]


@lru_cache(maxsize=1 << 16)
def _key(text: str) -> tuple[str, str]:
    """Letters and digits of a text without marks, and how they sound."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    letters = sounds = "".join(c for c in plain if c.isalnum())
    for written, sound in _SOUNDS:
        sounds = written.sub(sound, sounds)
    return letters, sounds if len(sounds) > 1 else letters


class _Place(NamedTuple):
    """Where a text stands in a trie; counts of tokens."""

    open: tuple[tuple[Node, int], ...] = ()  # phrases that it may be in, with their tokens so far
    kept: int = 0  # in complete phrases
    since: int = 0  # behind the last of those
    total: int = 0  # `kept`, and what the longest open phrase would add
    letter: bool = False  # whether the text ends in a word

    def complete(self) -> int:
        """Tokens in complete phrases where a word ends here."""
        return self.kept + max((min(n, self.since) for node, n in self.open if _END in node),
                               default=0)


class PhraseBias:
    """Processor that raises the tokens of each row's phrases by `boost` nats each.

    What it adds to the scores of a text sums up to `boost` for each token that stands in a complete
    phrase, or in one that may still be completed. Phrases begin and end at words' borders. Rows
    without phrases stay bit for bit as they are, and so does all behind the ids `ends`; `base` is
    a tokenizer."""

    def __init__(self, base: Any, phrases: Sequence[Sequence[str]], boost: float,
                 ends: Iterable[int] = ()) -> None:
        self._boost, self._ends = boost, frozenset(ends)
        self._inside, self._begins, self._stops = _letters(base, len(base))
        self._rows = [(_trie(base, tuple(some)) if some else {}, _Place()) for some in phrases]

    def reorder(self, rows: Tensor) -> None:
        self._rows = [self._rows[i] for i in rows.tolist()]

    def advance(self, tokens: Tensor) -> None:
        for i, ids in enumerate(tokens.tolist()):
            for token in ids:
                trie, place = self._rows[i]
                if trie and 0 <= token < len(self._begins):
                    self._rows[i] = ({}, place) if token in self._ends else (
                        trie, self._step(trie, place, token))

    def _step(self, trie: Node, place: _Place, token: int) -> _Place:
        inside, kept, since = place.letter and self._begins[token], place.kept, place.since
        if not inside and place.complete() > kept:
            kept, since = place.complete(), 0
        going = [(node[token], n + 1) for node, n in place.open if token in node]
        if not inside and token in trie:
            going.append((trie[token], 1))
        total = kept + max((min(n, since + 1) for _, n in going), default=0)
        return _Place(tuple(going), kept, since + 1, total, self._stops[token])

    def __call__(self, scores: Tensor) -> Tensor:
        out, size = scores.clone(), min(len(self._begins), scores.shape[1])
        going_on = self._inside[:size].to(scores.device)
        for row, (trie, place) in enumerate(self._rows):
            if not trie:
                continue
            # Most tokens are in no phrase: what they take back depends on whether a word goes on.
            border, inside = place.complete() - place.total, place.kept - place.complete()
            out[row] += self._boost * border
            out[row, :size] += self._boost * inside * (going_on & place.letter)
            ids = sorted({*trie, *(t for node, _ in place.open for t in node)} - {_END})
            gains = [self._step(trie, place, token).total - place.total for token in ids]
            out[row, ids] = scores[row, ids] + self._boost * torch.tensor(gains).to(scores)
        return out

    def gains(self) -> list[float]:
        """What each row's text has gained where it ends here."""
        return [self._boost * place.complete() for _, place in self._rows]


@lru_cache(maxsize=4)
def _letters(base: Any, size: int) -> tuple[Tensor, list[bool], list[bool]]:
    """Whether each token begins with a letter, as a tensor as well, and whether it ends so."""
    begins, ends = ([c == BROKEN or is_letter(c or " ") for c in some] for some in zip(
        *((text[:1], text[-1:]) for text in texts_of(base, size)), strict=True))
    return torch.tensor(begins), begins, ends


@lru_cache(maxsize=256)
def _trie(base: Any, phrases: tuple[str, ...]) -> Node:
    trie, texts = Node(), [text for phrase in phrases for text in _spellings(phrase)]
    for ids in base(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
        node = trie
        for token in ids:
            node = node.setdefault(token, {})
        node[_END] = True
    return trie


@lru_cache(maxsize=16)
def _firsts(base: Any, phrases: tuple[str, ...]) -> Tensor:
    """Ids `(phrases, ways)` of tokens with which each may begin."""
    ways = [[*_spellings(phrase.replace("[", "").split()[0])] for phrase in phrases]
    found = iter(base([text for some in ways for text in some], add_special_tokens=False,
                      split_special_tokens=True)["input_ids"])
    ids = [[(next(found) or [0])[0] for _ in some] for some in ways]
    most = max(map(len, ids))
    return torch.tensor([[*some, *some[:1] * (most - len(some))] for some in ids])


def _spellings(phrase: str) -> Iterator[str]:
    """A phrase as it may be written: with capitals or none, inside a text or at its start."""
    words = phrase.replace("[", "").split()  # markers begin with it
    free = [{w, w.lower(), w.title()} if len(words) <= _FREE else {w} for w in words]
    texts = {*map(" ".join, product(*free)),
             *(way(" ".join(words)) for way in (str.lower, str.upper, str.title))}
    yield from (lead + text for text in sorted(texts) for lead in (" ", ""))
