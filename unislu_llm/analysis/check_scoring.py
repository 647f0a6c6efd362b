"""The scorers against references: gold is perfect, and corruptions give the counts that are known by construction.

What a corruption does to the counts is added up here while it is made, by rules of arithmetic and without any function of
`unislu_llm.scoring`; then the scorers have to find the same in every single row. The rules hold because the places are
chosen for it:

* A dropped, changed or added entity never meets another: new words are words that no text has, a new label is one that its
  utterance does not have.
* An utterance's transcript is corrupted in one way only, so that k edits are k errors at the least distance (a deletion beside
  an insertion would be one substitution).
* Only common words among common words (:data:`PLAIN`) are edited, which Whisper's normaliser leaves alone: a number is
  respelled as a whole, and a contraction is two words.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unislu_llm.analysis.benchmarking import environment, shown, write
from unislu_llm.analysis.runs import file_hash
from unislu_llm.data.slue import read_voxpopuli
from unislu_llm.data.tally import Tally
from unislu_llm.errors import UserError
from unislu_llm.scoring.ner import entity_counts
from unislu_llm.scoring.position import PositionItem, position_counts
from unislu_llm.scoring.slue import score_rows
from unislu_llm.scoring.text import PROTOCOLS
from unislu_llm.scoring.wer import edit_counts
from unislu_llm.tasks import NER, Span, TaskRegistry
from unislu_llm.utterance import Utterance

PLAIN = frozenset((
    "the", "of", "to", "in", "that", "is", "this", "we", "for", "on", "with", "be", "have", "are", "not", "it", "as", "will",
    "our", "by", "you", "from", "which", "can", "your", "at", "all", "there", "has", "but", "they", "their", "would", "also",
    "been", "should", "more", "very", "what", "who", "these", "commission", "european", "parliament", "council", "president",
    "members", "citizens", "people", "states", "countries", "policy", "report", "debate", "question", "agreement", "rights",
    "work", "today", "important", "member"))
"""Words on which no rule of Whisper's normaliser acts."""

ENTITY_KINDS = ("drop entity", "change label", "change phrase word", "add entity")
WORD_KINDS = ("drop word", "substitute word", "insert word")

Integers = NDArray[np.int64]


@dataclass
class Corrupted:
    """An utterance's prediction, at first the reference itself, and the counts that it must get.

    Args:
        ref: reference. words: decoded ones, "" where one was dropped. entities: decoded ones, None where one was dropped.
        entity, label: true positives, references, predictions. edits: substitutions, deletions, insertions.
        edited: kind of the transcript's corruptions. used: entities and words that are corrupted, (kind of place, index).
    """

    ref: Utterance
    words: list[str]
    entities: list[tuple[str, str] | None]
    entity: Integers
    label: Integers
    edits: Integers = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    edited: str = ""
    used: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def of(cls, ref: Utterance) -> Corrupted:
        """The reference as the prediction."""
        entities: list[tuple[str, str] | None] = [(s.label, ref.text[s.start:s.end]) for s in _spans(ref)]
        n = len(entities)
        return cls(ref, ref.text.split(" "), entities, np.array([n, n, n]), np.array([n, n, n]))

    @property
    def unused_labels(self) -> list[str]:
        """Labels that the reference does not have."""
        return [label for label in NER.labels if label not in {s.label for s in _spans(self.ref)}]

    @property
    def pred(self) -> list[tuple[str, str]]:
        """Decoded entities."""
        return [entity for entity in self.entities if entity is not None]

    @property
    def text(self) -> str:
        """Decoded transcript."""
        return " ".join(word for word in self.words if word)

    def row(self) -> dict[str, Any]:
        """As a prediction row."""
        gold = [[s.label, self.ref.text[s.start:s.end], s.start, s.end] for s in _spans(self.ref)]
        return {"id": self.ref.id, "corpus": self.ref.corpus, "task": NER.name, "ref_text": self.ref.text, "ref": gold,
                "hyp_text": self.text, "hyp": [list(e) for e in self.pred], "problems": []}

    def places(self, kind: str) -> list[int]:
        """Entities or words that a kind may change; for an added entity, the place behind the last."""
        if kind == "add entity":
            return [len(self.entities)] if self.unused_labels else []
        if kind in ENTITY_KINDS:
            return list(range(len(self.entities))) if kind != "change label" or self.unused_labels else []
        if set("()[]<>") & set(self.ref.text):  # Whisper's normaliser drops what stands in brackets
            return []
        plain = [word in PLAIN for word in self.words]
        return [i for i in range(1, len(plain) - 1) if all(plain[i - 1:i + 2])]

    def corrupt(self, kind: str, i: int, rng: random.Random, new: Iterator[str]) -> bool:
        """Corrupt one place and book what it costs; False where an earlier corruption made it unfit."""
        if kind in WORD_KINDS:
            return self._corrupt_word(kind, i, new)
        if ("entity", i) in self.used:
            return False
        self.used.add(("entity", i))
        if kind == "add entity":
            self.entities.append((rng.choice(self.unused_labels), next(new)))
            self.entity += (0, 0, 1)
            self.label += (0, 0, 1)
            return True
        label, phrase = self.entities[i] or ("", "")
        if kind == "drop entity":
            self.entities[i] = None
            self.entity -= (1, 0, 1)
            self.label -= (1, 0, 1)
        elif kind == "change label":
            self.entities[i] = (rng.choice(self.unused_labels), phrase)
            self.entity -= (1, 0, 0)
            self.label -= (1, 0, 0)
        else:
            words = phrase.split(" ")
            words[rng.randrange(len(words))] = next(new)
            self.entities[i] = (label, " ".join(words))
            self.entity -= (1, 0, 0)
        return True

    def _corrupt_word(self, kind: str, i: int, new: Iterator[str]) -> bool:
        # A neighbour that is gone or new is no common word any more.
        if self.edited not in ("", kind) or {("word", j) for j in (i - 1, i, i + 1)} & self.used:
            return False
        self.edited = kind
        self.used.add(("word", i))
        if kind == "drop word":
            self.words[i] = ""
        else:
            self.words[i] = next(new) if kind == "substitute word" else f"{self.words[i]} {next(new)}"
        self.edits[("substitute word", "drop word", "insert word").index(kind)] += 1
        return True


def corrupt(utterances: Sequence[Utterance], kinds: Sequence[str], k: int, seed: int) -> list[Corrupted]:
    """Predictions with `k` corruptions of each kind, at places drawn by `seed`.

    Raises:
        UserError: there are not `k` places for a kind.
    """
    rng = random.Random(f"{seed} {' '.join(kinds)}")
    corrupted = [Corrupted.of(u) for u in utterances]
    new = _new_words(utterances)
    for kind in kinds:
        places = [(c, i) for c in corrupted for i in c.places(kind)]
        rng.shuffle(places)
        left = k
        for c, i in places:
            left -= bool(left) and c.corrupt(kind, i, rng, new)
        if left:
            raise UserError(f"only {k - left} places for '{kind}' in {len(utterances)} rows; give --k {k - left} or less")
    return corrupted


def compare(corrupted: Sequence[Corrupted]) -> dict[str, Any]:
    """What the counts must be and what the scorers find, summed; and in how many rows they differ."""
    golds = [[(s.label, c.ref.text[s.start:s.end]) for s in _spans(c.ref)] for c in corrupted]
    preds, refs, hyps = [c.pred for c in corrupted], [c.ref.text for c in corrupted], [c.text for c in corrupted]
    must = {name: np.array([getattr(c, name) for c in corrupted]) for name in ("entity", "label", "edits")}
    found: dict[str, Any] = {}
    for p in PROTOCOLS:
        edits = edit_counts(refs, hyps, p)
        found[p] = {"entity": _entities(must["entity"], entity_counts(golds, preds, p)),
                    "label": _entities(must["label"], entity_counts(golds, preds, p, labels_only=True)),
                    "edits": _difference(("substitutions", "deletions", "insertions"), must["edits"], edits[:, :3])}
        if p == "slue":  # what Whisper's normaliser makes of a text has no simple number of words
            words = np.array([[sum(bool(word.strip(".;?!")) for word in ref.split())] for ref in refs])
            found[p]["words"] = _difference(("ref_words",), words, edits[:, [0, 1, 3]].sum(axis=1, keepdims=True))
    if not must["edits"].any():  # a position in another transcript is not known by construction
        items = [PositionItem(c.ref.text, [(s.label, s.start, s.end) for s in _spans(c.ref)], c.text, c.pred)
                 for c in corrupted]
        found["position"] = {"entity": _entities(must["entity"], position_counts(items))}
    return found


def reported(corrupted: Sequence[Corrupted]) -> dict[str, Any]:
    """The rates that an evaluation reports of these rows, and whether they are those of the counts, by `equal`."""
    scores = score_rows([c.row() for c in corrupted], TaskRegistry())
    tp, n_gold, n_pred = np.sum([c.entity for c in corrupted], axis=0).tolist()
    label_tp = sum(int(c.label[0]) for c in corrupted)
    errors = int(np.sum([c.edits for c in corrupted]))
    rates: dict[str, Any] = {}
    for p, block in scores["protocols"].items():
        wer, ner = block["wer"]["overall"], block["tasks"][NER.name]
        rates[p] = {"wer": wer["wer"], "ner_f1": ner["entity"]["f1"], "ner_label_f1": ner["label"]["f1"]}
        must = (100 * errors / wer["ref_words"], 200 * tp / (n_gold + n_pred), 200 * label_tp / (n_gold + n_pred))
        rates[p]["equal"] = bool(np.allclose(list(rates[p].values()), must, rtol=0, atol=1e-9))
    if not errors:
        f1 = scores["position"][NER.name]["f1"]
        rates["position"] = {"f1": f1, "equal": abs(f1 - 200 * tp / (n_gold + n_pred)) < 1e-9}
    return rates


def check_all(utterances: Sequence[Utterance], k: int, seed: int = 0) -> dict[str, Any]:
    """Gold against gold, each kind of corruption by itself, and all of them at once.

    Returns:
        By name `{corruptions, rows, counts, rates, equal}`: how many corruptions in how many rows, :func:`compare`,
        :func:`reported`, and whether everything is as it must be.

    Raises:
        UserError: not enough places for `k` corruptions, or no entity at all.
    """
    if k < 1:
        raise UserError(f"--k must be 1 or more, found {k}")
    if not any(_spans(u) for u in utterances):
        raise UserError(f"none of {len(utterances)} rows has an entity; give an annotated split")
    kinds = (*ENTITY_KINDS, *WORD_KINDS)
    results: dict[str, Any] = {}
    for name, chosen in {"gold": (), **{kind: (kind,) for kind in kinds}, "all at once": kinds}.items():
        corrupted = corrupt(utterances, chosen, k, seed)
        counts, rates = compare(corrupted), reported(corrupted)
        same = all(not part["rows_that_differ"] for block in counts.values() for part in block.values())
        results[name] = {"corruptions": k * len(chosen), "rows": sum(bool(c.used) for c in corrupted), "counts": counts,
                         "rates": rates, "equal": same and all(block["equal"] for block in rates.values())}
    return results


def run_check(tsv: Path, k: int, seed: int, out: Path, command: Sequence[str] = ()) -> int:
    """Check the scorers on a SLUE-VoxPopuli file, write `out`, print a line a scenario.

    Returns:
        Exit status: 0, 1 if anything differs, 2 for bad input.
    """
    try:
        utterances = list(read_voxpopuli(tsv, None, Tally()))
        results = check_all(utterances, k, seed)
        parts = [part for flag in command for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
        result = {"command": shown(parts), "tsv": {"file": tsv.name, "sha256": file_hash(tsv)},
                  "rows": len(utterances), "entities": sum(len(_spans(u)) for u in utterances), "k": k, "seed": seed,
                  "equal": all(r["equal"] for r in results.values()), "scenarios": results, "versions": environment()}
        write(result, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{tsv.name}: {len(utterances)} rows, {result['entities']} entities, {k} corruptions of each kind")
    for name, r in results.items():
        rates = "; ".join(f"{p}: " + ", ".join(f"{key} {v:.2f}" for key, v in block.items() if key != "equal")
                          for p, block in r["rates"].items())
        print(f"{'equal' if r['equal'] else 'DIFFERS':<8} {name}: {rates}")
    print(f"results: {out}")
    return 0 if result["equal"] else 1


def _entities(must: Integers, found: Integers) -> dict[str, Any]:
    """Counts of a scorer, (true positives, references, predictions), as true and false positives and false negatives."""
    to_errors = np.array([[1, -1, -1], [0, 0, 1], [0, 1, 0]])  # tp, pred - tp, gold - tp
    return _difference(("tp", "fp", "fn"), must @ to_errors, found @ to_errors)


def _difference(names: Sequence[str], must: Integers, found: Integers) -> dict[str, Any]:
    return {"expected": dict(zip(names, must.sum(axis=0).tolist(), strict=True)),
            "found": dict(zip(names, found.sum(axis=0).tolist(), strict=True)),
            "rows_that_differ": int((must != found).any(axis=1).sum())}


def _new_words(utterances: Sequence[Utterance]) -> Iterator[str]:
    """Words that stand in no text: letters alone, each another one."""
    known = {word for u in utterances for word in u.text.split()}
    letters = "bcdfghjk"
    for n in itertools.count(len(letters) ** 3):
        word = "zx" + "".join(letters[n // len(letters) ** i % len(letters)] for i in range(6))
        if word not in known:
            yield word


def _spans(u: Utterance) -> list[Span]:
    return [span for span in u.labels.get(NER.name) or () if isinstance(span, Span)]
