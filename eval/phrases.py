"""Measure what phrase lists do: names found, names invented, and the words around them.

    python eval/phrases.py dev.jsonl --others train.jsonl --out eval/results/phrases.json

Listed are the names (phrases of a span task) of each group of up to 8 clips, and distractors from
other texts to make 10, 100 and 1,000 phrases: names first, then rare words. Names that are
recognised without a list are no evidence: recall is that of the others. Clips come two with names
to one without, evenly spread over the manifest.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from tabulate import tabulate

from unislu_llm.config import DecodeConfig
from unislu_llm.data.frame_cache import load_clip
from unislu_llm.data.manifest import read_manifest
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.recogniser import fast_type, load_recogniser
from unislu_llm.errors import UserError, reported
from unislu_llm.io import portable, write_text
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
    """What came of the clips with lists of one size."""

    missed: int = 0  # names that are not recognised without a list
    found: int = 0  # of those
    lost: int = 0  # names that are recognised without a list alone
    false: int = 0  # listed phrases that come out oftener than they are said
    before: int = 0  # the same without a list
    seconds: float = 0.0  # of the processor
    references: list[str] = field(default_factory=list)  # without listed names
    texts: list[str] = field(default_factory=list)

    def row(self, clips: int, words: int, audio: float) -> dict[str, Any]:
        """For the table; shares in percent."""
        return {"recall": 100 * self.found / max(self.missed, 1), "found": self.found,
                "missed": self.missed, "lost": self.lost, "false": self.false,
                "false_without_list": self.before,
                "false_per_100_clips": 100 * self.false / clips,
                "false_per_100_words": 100 * self.false / words,
                "wer_rest": corpus_wer(self.references, self.texts, "whisper").wer,
                "rtf": self.seconds / audio}


def plain(text: str) -> str:
    """As names are compared."""
    return normalise_phrase(text, "whisper")


def count(phrase: str, text: str) -> int:
    """How often a phrase stands in a text, both :func:`plain`."""
    return len([*places_of(phrase, text)])


def without(names: Sequence[str], text: str) -> str:
    """A plain text without these names."""
    for name in sorted(names, key=len, reverse=True):
        for start, end in reversed([*places_of(name, text)]):
            text = text[:start] + text[end:]
    return text


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
    if not named:
        raise UserError(f"{options.manifest}: no clip has a phrase of --labels and --task")
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
    rng, found = random.Random(seed), list(own)
    for pool in pools:
        free = [p for p in pool if not any(count(plain(p), text) for text in said)]
        found += rng.sample(free, min(len(free), max(0, size - len(found))))
    return found


def measure(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of the table by name, and what they were measured on."""
    clips, *pools = chosen(options)
    recogniser: Any = load_recogniser(options.model, dtype=fast_type(torch.device("cpu")))
    found: dict[str, Count] = {}
    ways = [(0, 0.0), *((size, boost) for boost in options.boosts for size in options.sizes)]
    for start in range(0, len(clips), GROUP):
        some = clips[start:start + GROUP]
        waves, said = [load_clip(u) for u in some], [plain(u.text) for u in some]
        own = list(dict.fromkeys(name for u in some for name in names_of(u, options)))
        first: list[str] = []
        for size, boost in ways:
            phrases = listed(own, said, pools, size, start) if size else []
            clock = time.process_time()
            made = recogniser(waves, "en", *filter(None, [Phrases.of(phrases, boost)]))
            texts = [plain(t.text) for t in made]
            first = first or texts
            counts = found.setdefault(f"{size} at {boost:g}" if size else "no list", Count())
            counts.seconds += time.process_time() - clock
            score(counts, [plain(p) for p in phrases or own], some, options,
                  list(zip(said, first, texts, strict=True)))
        print(f"{start + len(some)} of {len(clips)} clips", file=sys.stderr, flush=True)
    words = sum(len(plain(u.text).split()) for u in clips)
    seconds = sum(u.seconds for u in clips)
    return ({name: c.row(len(clips), words, seconds) for name, c in found.items()},
            {"clips": len(clips), "words": words, "seconds": round(seconds, 1)})


def score(counts: Count, phrases: Sequence[str], some: Sequence[Utterance], options: Options,
          rows: Sequence[tuple[str, str, str]]) -> None:
    """Count in rows of what is said, recognised without a list, and with one."""
    for u, (said, first, text) in zip(some, rows, strict=True):
        own = [plain(name) for name in names_of(u, options)]
        for name in dict.fromkeys(own):
            n, before, now = (count(name, t) for t in (said, first, text))
            counts.missed += max(0, n - before)
            counts.found += max(0, min(n, now) - min(n, before))
            counts.lost += max(0, min(n, before) - now)
        counts.false += sum(count(p, text) > count(p, said) for p in set(phrases))
        counts.before += sum(count(p, first) > count(p, said) for p in set(phrases))
        counts.references.append(without(own, said))
        counts.texts.append(without(own, text))


def main(options: Options) -> None:
    """Print a table, and write the result."""
    table, about = measure(options)
    print(tabulate([{"list": name, **row} for name, row in table.items()], headers="keys",
                   tablefmt="github", floatfmt=".2f"))
    if options.out:
        write_text(options.out, json.dumps({
            "model": options.model, "manifest": portable(options.manifest), **about,
            "lists": table, "command": "python eval/phrases.py " + " ".join(
                portable(a) if Path(a).exists() else a for a in sys.argv[1:]),
            "versions": {k: v for k, v in versions().items() if k != "command"}}, indent=1) + "\n")


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Options, description=__doc__))
