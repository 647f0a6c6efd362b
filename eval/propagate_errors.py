"""Word errors as a model makes them, put into reference transcripts; and entities that survive.

A word is changed the likelier the more often the model has it wrong (on these clips, smoothed by
its overall error rate), in the kinds and by the words of its own errors. Where it never had a word
wrong, one of the five words of the corpus that are nearest in spelling stands for it.
"""

from __future__ import annotations

import math
import random
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from unislu_llm.errors import UserError
from unislu_llm.scoring.bootstrap import Counts
from unislu_llm.scoring.entities import Placement, occurrences, place
from unislu_llm.scoring.predictions import Prediction
from unislu_llm.scoring.text import (
    Protocol,
    normalise_transcript,
    word_spans,
    written_in_characters,
)
from unislu_llm.scoring.wer import align, edit_counts

KINDS = ("substitution", "deletion", "insertion")
_NEAREST = 5
Edits = dict[int, tuple[str, str]]  # by word: kind of error, and the new word


@dataclass
class Confusions:
    """What a model makes of words, counted over normalised transcripts."""

    seen: Counter[str] = field(default_factory=Counter)  # reference words
    pairs: dict[str, Counter[str]] = field(default_factory=dict)  # what was written for a word
    deleted: Counter[str] = field(default_factory=Counter)
    inserted: Counter[str] = field(default_factory=Counter)
    vocabulary: list[str] = field(default_factory=list)  # words of both sides

    @classmethod
    def of(cls, spoken: Sequence[Prediction], protocol: Protocol) -> Confusions:
        """Of one prediction an utterance."""
        sides = [[normalise_transcript(text, protocol, p.language) for p, text in
                  zip(spoken, texts, strict=True)] for texts in
                 ([p.ref_text for p in spoken], [p.hyp_text for p in spoken])]
        found, words = cls(), set[str]()
        for ref, hyp, chunks in zip(*sides, align(*sides), strict=True):
            said, written = ref.split(), hyp.split()
            found.seen.update(said)
            words.update(said, written)
            for c in chunks:
                old, new = (said[c.ref_start_idx:c.ref_end_idx],
                            written[c.hyp_start_idx:c.hyp_end_idx])
                if c.type == "substitute":
                    for a, b in zip(old, new, strict=True):
                        found.pairs.setdefault(a, Counter())[b] += 1
                elif c.type != "equal":
                    found.deleted.update(old)
                    found.inserted.update(new)
        found.vocabulary = sorted(words)
        return found

    def kinds(self) -> dict[str, int]:
        """Errors by kind."""
        substituted = sum(c.total() for c in self.pairs.values())
        return dict(zip(KINDS, (substituted, self.deleted.total(), self.inserted.total()),
                        strict=True))

    def weight(self, word: str) -> float:
        """How likely a word is wrong, as far as can be told."""
        errors = self.pairs.get(word, Counter()).total() + self.deleted[word]
        kinds = self.kinds()
        overall = (1 + kinds[KINDS[0]] + kinds[KINDS[1]]) / (1 + self.seen.total())
        return (errors + overall) / (self.seen[word] + 1)

    def draw(self, word: str, draw: random.Random) -> tuple[str, str, str]:
        """Kind of error of a word, the new word, and what it is from: `own` errors, or else."""
        # Of a model without errors nothing is known but that most errors are substitutions.
        kinds = self.kinds() if any(self.kinds().values()) else {"substitution": 1}
        substituted = self.pairs.get(word, Counter())
        mine = {"substitution": substituted.total(), "deletion": self.deleted[word]}
        # The word's own errors, and as if there were one more of the kinds that all words have.
        kind = draw.choices(KINDS, [mine.get(k, 0) + kinds.get(k, 0) / sum(kinds.values())
                                    for k in KINDS])[0]
        if kind == "deletion":
            return kind, "", "own" if self.deleted[word] else "any word"
        own = substituted if kind == "substitution" else self.inserted
        if own:
            return kind, draw.choices(list(own), list(own.values()))[0], "own"
        others = [w for w in self.vocabulary if w != word] or [f"{word}s"]
        near = process.extract(word, others, scorer=Levenshtein.distance, limit=_NEAREST)
        return kind, draw.choice(near)[0], "spelling"


@dataclass(frozen=True)
class Injected:
    """Transcripts with errors."""

    texts: list[str]
    errors: int  # as the scorer counts them
    words: int  # of the references
    sources: dict[str, int]  # errors by kind and what they were drawn from


def inject(texts: Sequence[str], rates: Sequence[float], confusions: Confusions,
           protocol: Protocol, languages: Sequence[str], seed: int = 0) -> list[Injected]:
    """Texts with word errors at each of some rates (shares of 1), ascending.

    The scorer counts exactly as many errors as are asked for: an error that it counts as none or as
    two (inside a number, say) is not made. Those of a lower rate are among those of a higher one.

    Raises UserError: there are not enough words for a rate.
    """
    draw, clips = random.Random(seed), [list(word_spans(text)) for text in texts]
    words = int(edit_counts(texts, texts, protocol, languages)[:, 3].sum())
    places = _places(texts, clips, confusions, protocol, languages, draw)
    edits: list[Edits] = [{} for _ in texts]
    counts, done, sources = [0] * len(texts), list(texts), Counter[str]()
    found = []
    for rate in sorted(rates):
        wanted = round(rate * words)
        while sum(counts) < wanted:
            i, j, word = next(places, (-1, -1, ""))
            if i < 0:
                raise UserError(f"--rates {rate:g}: the {words} words of the references do not "
                                f"hold {wanted} errors; give lower rates")
            kind, new, source = confusions.draw(word, draw)
            tried = edited(texts[i], clips[i], edits[i] | {j: (kind, new)}, languages[i])
            row = edit_counts([texts[i]], [tried], protocol, [languages[i]])
            if int(row[0, :3].sum()) == counts[i] + 1:
                edits[i][j], counts[i], done[i] = (kind, new), counts[i] + 1, tried
                sources[f"{kind}, {source}"] += 1
        found.append(Injected(list(done), sum(counts), words, dict(sorted(sources.items()))))
    return found


def _places(texts: Sequence[str], clips: Sequence[Sequence[tuple[int, int]]],
            confusions: Confusions, protocol: Protocol, languages: Sequence[str],
            draw: random.Random) -> Iterator[tuple[int, int, str]]:
    """Clip, word and normalised word of all places, in the order in which they get errors."""
    # Weighted sampling without replacement (Efraimidis and Spirakis 2006): by exponential keys.
    keyed = []
    for i, spans in enumerate(clips):
        for j, (a, b) in enumerate(spans):
            word = normalise_transcript(texts[i][a:b], protocol, languages[i])
            keyed.append((-math.log(1 - draw.random()) / confusions.weight(word), i, j, word))
    return ((i, j, word) for _, i, j, word in sorted(keyed) if word)


def edited(text: str, spans: Sequence[tuple[int, int]], edits: Mapping[int, tuple[str, str]],
           language: str = "") -> str:
    """A text with some of its words changed; capitals and punctuation stay where they can."""
    pieces, behind, blank = list[str](), 0, "" if written_in_characters(language) else " "
    for j, (a, b) in enumerate(spans):
        word, (kind, new) = text[a:b], edits.get(j, ("", ""))
        core = word.strip(string.punctuation) or word
        if core[:1].isupper():
            new = new.capitalize()
        changed = {"": word, "deletion": "", "insertion": new + blank + word,
                   "substitution": word.replace(core, new, 1)}
        pieces += [text[behind:a], changed[kind]]
        behind = b
    return " ".join("".join([*pieces, text[behind:]]).split())


def repairs(known: Sequence[Prediction], protocol: Protocol) -> Counts:
    """What became of entities whose words are wrong in the transcript, of annotated predictions of
    a span task: by utterance how many there are, and are right in the answer all the same; then how
    many have right words, and are right in the answer."""
    matrix = np.array([_repaired(placed) for placed in place(known, protocol)], dtype=np.int64)
    return Counts(tuple(p.utterance for p in known), matrix.reshape(-1, 4),
                  lambda sums: 100.0 * sums[:, 1] / np.maximum(sums[:, 0], 1.0))


def _repaired(placed: Placement) -> tuple[int, int, int, int]:
    transcript, gold, pred = placed
    ref, hyp = (Counter(e[:2] for e in side) for side in (gold, pred))
    right, spoken = Counter[str](), Counter(e.phrase for e in gold)
    for (_, phrase), n in (ref & hyp).items():
        right[phrase] += n
    # A phrase that is in the transcript once has the words of one entity.
    there = {phrase: min(n, len(occurrences(phrase, transcript))) for phrase, n in spoken.items()}
    present, found = sum(there.values()), sum(min(right[p], n) for p, n in there.items())
    return spoken.total() - present, right.total() - found, present, found
