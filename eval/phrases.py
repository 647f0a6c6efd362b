"""Measure what phrase lists do: names found, names invented, and the words around them.

    python eval/phrases.py dev.jsonl --others train.jsonl --out eval/results/phrases.json

Listed are the names (phrases of a span task) of each group of up to 8 clips, and distractors from
other texts to make 10, 100 and 1,000 phrases: names first, then rare words. Names that are
recognised without a list are no evidence: recall is that of the others. Clips come two with names
to one without, evenly spread over the manifest. Clear ones are those of which at most a quarter of
the words is wrong without a list: where noise hides the words, no list can help.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from tabulate import tabulate
from tqdm import tqdm

from unislu_llm.config import DecodeConfig
from unislu_llm.data.frame_cache import load_clip
from unislu_llm.data.manifest import read_manifest
from unislu_llm.decoding.hypotheses import load_recogniser
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.errors import reported
from unislu_llm.io import portable, write_json
from unislu_llm.run_folder import versions
from unislu_llm.scoring.text import normalise_phrase, places_of
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.utterance import Utterance

GROUP = 8  # clips at one time, which have a list in common


@dataclass
class Options:
    """What is measured."""

    manifest: tyro.conf.Positional[Path]
    """Annotated clips."""
    others: list[Path] = field(default_factory=list)
    """Manifests whose names and words are distractors, besides the first one's other names."""
    model: str = "openai/whisper-base"
    """A Whisper or saved model."""
    task: str = "ner"
    """The span task whose phrases are names."""
    labels: list[str] = field(default_factory=lambda: ["PLACE", "ORG", "PERSON", "NORP", "LAW"])
    """Of these labels."""
    sizes: list[int] = field(default_factory=lambda: [10, 100, 1000])
    """Phrases of a list."""
    boosts: list[float] = field(default_factory=lambda: [DecodeConfig().phrase_boost])
    """Nats a token."""
    limit: int = 150
    """Clips at most."""
    out: Path | None = None
    """File of the result."""


@dataclass
class Count:
    """What came of clips with lists of one size."""
    missed: int = 0  # names that are not recognised without a list
    found: int = 0  # of those
    lost: int = 0  # names that are recognised without a list alone
    clips: int = 0
    words: int = 0  # that are said
    audio: float = 0.0  # seconds
    false: int = 0  # listed phrases that come out oftener than they are said
    before: int = 0  # the same without a list
    seconds: float = 0.0  # of the processor
    references: list[str] = field(default_factory=list)  # without listed names
    texts: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """For the table; shares in percent."""
        kept = ("clips", "words", "missed", "found", "lost", "false", "before")
        return {**{name: getattr(self, name) for name in kept},
                "recall": 100 * self.found / max(self.missed, 1),
                "false_per_100_clips": 100 * self.false / self.clips,
                "false_per_100_words": 100 * self.false / self.words,
                "wer_rest": corpus_wer(self.references, self.texts, "whisper").wer,
                "rtf": self.seconds / self.audio}


def plain(text: str) -> str:
    """As names are compared."""
    return normalise_phrase(text, "whisper")


def count(phrase: str, text: str) -> int:
    """How often a phrase stands in a text, both :func:`plain`."""
    return len([*places_of(phrase, text)])


def names_of(u: Utterance, options: Options) -> list[str]:
    """Its names, as they are written."""
    return list(dict.fromkeys(u.text[s.start:s.end] for s in u.labels.get(options.task, ())
                              if isinstance(s, Span) and s.label in options.labels))


def chosen(options: Options) -> tuple[list[Utterance], list[str], list[str]]:
    """Clips by length, and distractors: names, and words that come once."""
    registry = TaskRegistry()
    rows = read_manifest(options.manifest, registry)
    others = [u for path in options.others for u in read_manifest(path, registry)]
    named = [u for u in rows if u.audio and names_of(u, options)]
    rest = [u for u in rows if u.audio and not names_of(u, options)]
    most = 2 * options.limit // 3
    clips = [some[i * len(some) // n] for some, n in (
        (named, min(most, len(named))), (rest, min(options.limit - most, len(rest))))
        for i in range(n)]
    words = Counter(w for u in others for w in u.text.split() if w.isalpha() and len(w) > 4)
    names = {name for u in [*rows, *others] for name in names_of(u, options)}
    return (sorted(clips, key=lambda u: u.seconds), sorted(names),
            sorted(word for word, n in words.items() if n == 1))


def listed(own: Sequence[str], said: Sequence[str], pools: Sequence[Sequence[str]],
           size: int, seed: int) -> list[str]:
    """A list of a size for clips in which this is said: their own names, and distractors."""
    rng, found = random.Random(seed), [*own]
    for pool in pools:
        free = [p for p in pool if not any(count(plain(p), text) for text in said)]
        found += rng.sample(free, min(len(free), max(0, size - len(found))))
    return found


def measure(options: Options) -> dict[str, Any]:
    """Rows of the table by name."""
    clips, *pools = chosen(options)
    recogniser: Any = load_recogniser(options.model)
    found: dict[str, Count] = {}
    ways = [(0, 0.0), *((size, boost) for boost in options.boosts for size in options.sizes)]
    for start in tqdm(range(0, len(clips), GROUP), unit="group"):
        some = clips[start:start + GROUP]
        waves, said = [load_clip(u) for u in some], [plain(u.text) for u in some]
        own = list(dict.fromkeys(name for u in some for name in names_of(u, options)))
        first: list[str] = []
        for size, boost in ways:
            phrases = listed(own, said, pools, size, start) if size else []
            clock = time.process_time()
            made = recogniser(waves, "en", Phrases.of(phrases, boost))
            texts = [plain(t.text) for t in made]
            first = first or texts
            spent, name = time.process_time() - clock, f"{size} at {boost:g}" if size else "none"
            for row in zip(some, said, first, texts, strict=True):
                clear = corpus_wer([row[1]], [row[2]], "whisper").wer <= 25
                for kind in ("all", "clear")[:1 + clear]:
                    counts = found.setdefault(f"{kind} clips, {name}", Count())
                    counts.seconds += spent / len(some)
                    score(counts, {plain(p) for p in phrases or own}, options, *row)
    return {name: counts.row() for name, counts in sorted(found.items())}


def score(counts: Count, phrases: set[str], options: Options, u: Utterance, said: str, first: str,
          text: str) -> None:
    """Count in what is said, recognised without a list, and with one."""
    own = {plain(name) for name in names_of(u, options)}
    for name in own:
        n, before, now = (count(name, t) for t in (said, first, text))
        counts.missed += max(0, n - before)
        counts.found += max(0, min(n, now) - min(n, before))
        counts.lost += max(0, min(n, before) - now)
    counts.clips += 1
    counts.words += len(said.split())
    counts.audio += u.seconds
    counts.false += sum(count(p, text) > count(p, said) for p in phrases)
    counts.before += sum(count(p, first) > count(p, said) for p in phrases)
    names = "|".join(map(re.escape, sorted(own, key=len, reverse=True))) or "(?!)"
    for texts, whole in ((counts.references, said), (counts.texts, text)):
        texts.append(re.sub(rf"\b({names})\b", "", whole))


def main(options: Options) -> None:
    """Print a table, and write the result."""
    table = measure(options)
    rows = [{"list": name, **row} for name, row in table.items()]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    if options.out:
        write_json(options.out, {
            "model": portable(options.model) if Path(options.model).exists() else options.model,
            "manifest": portable(options.manifest),
            "lists": table, "command": "python eval/phrases.py " + " ".join(
                portable(a) if Path(a).exists() else a for a in sys.argv[1:]),
            "versions": {k: v for k, v in versions().items() if k != "command"}})


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Options, description=__doc__))
