"""Why scores are what they are: words, entities by cause and group, what systems differ in."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from unislu_llm.report.systems import Key, Member, Predictions
from unislu_llm.scoring import entities
from unislu_llm.scoring.bootstrap import Counts, bootstrap, micro_f1
from unislu_llm.scoring.labels import indicators
from unislu_llm.scoring.predictions import Entity, annotated, spoken_once
from unislu_llm.scoring.text import Protocol, normalise_phrase, normalise_transcript
from unislu_llm.scoring.wer import align
from unislu_llm.tasks import SpanTask, TaskRegistry

Systems = Mapping[str, Sequence[Predictions]]
"""Predictions of each seed, by system, the baseline first; of the same examples in one order."""
Phrases = Mapping[str, Counter[str]]
"""How often an entity's phrase is in the training data, by task and normalised phrase."""

_LENGTHS = ("1 word", "2 words", "3 words", "4 words or more")
_RARITY = {0: "never", 4: "1-4 times", 19: "5-19 times", 10**9: "20 times or more"}


def interval(span: Mapping[str, float]) -> dict[str, float]:
    return {key: span[key] for key in ("value", "low", "high")}


def word_errors(seeds: Sequence[Predictions], registry: TaskRegistry,
                protocol: Protocol) -> dict[str, Any]:
    """Word errors of `all` utterances; and, of those that are annotated with entities, `inside` and
    `outside` the entities of the reference. Counts of several seeds are summed."""
    counts = {group: Counter[str]() for group in ("all", "inside", "outside")}
    for predictions in seeds:
        spoken, tagged = spoken_once(predictions, registry), dict[Key, Predictions]()
        for p in predictions:
            if p.ref is not None and isinstance(registry[p.task], SpanTask):
                tagged.setdefault(p.utterance, []).append(p)
        refs, hyps = ([normalise_transcript(getattr(p, side), protocol, p.language)
                       for p in spoken] for side in ("ref_text", "hyp_text"))
        for p, ref, chunks in zip(spoken, refs, align(refs, hyps), strict=True):
            form = partial(normalise_transcript, protocol=protocol, language=p.language)
            spans = [e.span for q in tagged.get(p.utterance, ())
                     for e in entities.place_reference(q, ref, form) if e.span]
            words = {i for start, end in spans for i in range(start, end)}
            # What is inserted between two words of an entity is inside of it.
            gaps = {i for start, end in spans for i in range(start + 1, end)}
            for c in chunks:
                ours = range(c.ref_start_idx, c.ref_end_idx)
                here = [i in words for i in ours] or (
                    [c.ref_start_idx in gaps] * (c.hyp_end_idx - c.hyp_start_idx))
                for inside in here:
                    counts["all"][c.type] += 1
                    if p.utterance in tagged:
                        counts["inside" if inside else "outside"][c.type] += 1
    return {group: {"words": n.total() - n["insert"], "errors": n.total() - n["equal"],
                    "substitutions": n["substitute"], "deletions": n["delete"],
                    "insertions": n["insert"]} for group, n in counts.items()}


def span_details(systems: Systems, task: SpanTask, protocol: Protocol, resamples: int,
                 phrases: Phrases | None) -> dict[str, Any]:
    """Entities by cause (counts of several seeds are summed), and F1 by `by_label`, `by_length`
    (words) and `by_rarity` (times in training; empty where that is not known)."""
    placed = {name: [entities.place(annotated(some, task), protocol) for some in seeds]
              for name, seeds in systems.items()}
    sides = {name: [entities.by_phrase(some) for some in seeds] for name, seeds in placed.items()}
    utterances = tuple(p.utterance for p in annotated(next(iter(systems.values()))[0], task))

    def rows(group_of: Callable[[Entity], str], order: Sequence[str]) -> list[dict[str, Any]]:
        def counts(both: entities.Sides, group: str) -> Counts:
            # A right entity is the reference's, label and phrase, so that both are in one group.
            own = [[Counter({e: n for e, n in side.items() if group_of(e) == group})
                    for side in pair] for pair in both]
            return Counts(utterances, entities.span_counts([(a, b) for a, b in own]), micro_f1)

        found = Counter(group_of(e) for gold, _ in next(iter(sides.values()))[0]
                        for e in gold.elements())
        return [{"name": group, "n": found[group], "f1": {
            name: interval(bootstrap([counts(both, group) for both in seeds], resamples=resamples))
            for name, seeds in sides.items()}}
            for group in dict.fromkeys((*order, *found)) if found[group]]

    times = Counter[str]() if phrases is None else phrases.get(task.name, Counter())
    causes = {name: entities.entity_errors(chain(*seeds)) for name, seeds in placed.items()}
    return {
        "causes": {name: found["reference"] | {"hallucinated": found["predicted"]["hallucinated"]}
                   for name, found in causes.items()},
        "by_label": rows(lambda e: e[0], task.labels),
        "by_length": rows(lambda e: _LENGTHS[min(len(e[1].split()), 4) - 1], _LENGTHS),
        "by_rarity": [] if phrases is None else rows(
            lambda e: next(name for most, name in _RARITY.items() if times[e[1]] <= most),
            list(_RARITY.values()))}


def training_phrases(member: Member, registry: TaskRegistry, protocol: Protocol) -> Phrases | None:
    """Entities of the training manifests of a run; None where these are not known or not here."""
    phrases: dict[str, Counter[str]] = {}
    for u, _ in member.rows("train", registry):
        for task in registry:
            spans: Any = u.labels.get(task.name, ()) if isinstance(task, SpanTask) else ()
            phrases.setdefault(task.name, Counter()).update(
                normalise_phrase(u.text[start:end], protocol, u.language or "")
                for _, start, end in spans)
    return phrases or None


def most_different(systems: Systems, registry: TaskRegistry, protocol: Protocol, number: int,
                   facts: Mapping[Key, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The utterances with the largest `change`: by how many word errors and wrong entities and
    labels another system is over the baseline, of the one that differs most (of one system alone
    its own). Of several seeds the first is shown."""
    rows: dict[Key, dict[str, Predictions]] = {}
    for name, seeds in systems.items():
        for p in seeds[0]:
            rows.setdefault(p.utterance, {}).setdefault(name, []).append(p)
    answers = {key: {name: _answer(some, registry, protocol) for name, some in own.items()}
               for key, own in rows.items()}
    changes = {}
    for key, own in answers.items():
        first, *others = (errors for errors, _ in own.values())
        changes[key] = max((other - first for other in others), key=abs, default=first)
    most = sorted(filter(changes.__getitem__, rows), key=lambda key: (-abs(changes[key]), key))
    return [{"id": key[1], "corpus": key[0], "reference": baseline[0].ref_text,
             # A report is shared: the way to a folder of this machine is none of it.
             "audio": (audio := facts.get(key, {}).get("audio")) and os.path.relpath(audio),
             "crop": [facts.get(key, {}).get("start", 0.0), facts.get(key, {}).get("end")],
             "reference_outputs": {p.task: p.ref if isinstance(p.ref, str) else [
                 e if isinstance(e, str) else list(e[:2]) for e in p.ref]
                 for p in baseline if p.ref is not None},
             "change": float(changes[key]),
             "systems": {name: answer for name, (_, answer) in answers[key].items()}}
            for key in most[:number] for baseline in [next(iter(rows[key].values()))]]


def _answer(rows: Predictions, registry: TaskRegistry, protocol: Protocol) -> tuple[int, Any]:
    """Word errors and wrong entities and labels of an utterance, and what was made of it."""
    [p] = spoken_once(rows, registry)
    ref, hyp = (normalise_transcript(text, protocol, p.language) for text in
                (p.ref_text, p.hyp_text))
    (chunks,), ours, theirs = align([ref], [hyp]), ref.split(), hyp.split()
    diff = [(c.type, ours[c.ref_start_idx:c.ref_end_idx], theirs[c.hyp_start_idx:c.hyp_end_idx])
            for c in chunks]
    errors = sum(max(len(a), len(b)) for kind, a, b in diff if kind != "equal")
    wrong, known = dict[str, list[str]](), [q for q in rows if q.ref is not None]
    for q in known:
        if isinstance(task := registry[q.task], SpanTask):
            kinds = entities.name_kinds(entities.place([q], protocol)[0])
            # One that is taken for another is one error, not two.
            errors += max(len(side) - side.count("right") for side in kinds)
            said = [e for _, e in q.hyp_entities if normalise_phrase(e, protocol, q.language)]
            wrong[q.task] = [e for e, kind in zip(said, kinds[1], strict=True) if kind != "right"]
        else:
            gold, answer, kept = indicators([q], task, protocol)
            bad = bool((gold != answer).any() and kept.all())
            errors, wrong[q.task] = errors + bad, list(q.hyp_labels or ()) * bad
    return errors, {"transcript": p.hyp_text, "outputs": {q.task: q.hyp for q in known},
                    "diff": [[kind, " ".join(a), " ".join(b)] for kind, a, b in diff],
                    "wrong": wrong}
