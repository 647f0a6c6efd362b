"""Reports as data, made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("whisper-decoder", "llm-reads", "runs/slue/llm-reads-and-listens-s1")
LABELS = {"PLACE": 60, "PERSON": 41, "QUANT": 22}
Values = dict[str, Any]


def spread(value: float, width: float = 4.0, **more: Any) -> Values:
    return {"value": value, "low": value - width, "high": value + width, **more}


def make_report(systems: int = 2) -> Values:
    """A report of two or three systems, of which the last has several seeds."""
    names = NAMES[:systems]
    first, *others = names
    at = {name: 5.0 * i for i, name in enumerate(names)}
    keys = {"wer": ("WER", "lower", 16.4), "ner_f1": ("NER F1", "higher", 38.2),
            "sa_f1": ("SA macro-F1", "higher", 35.5)}

    def score(key: str, name: str, more: float = 0.0) -> Values:
        title, better, start = keys[key]
        return spread(start + more + at[name] * (0.1 if better == "lower" else 1.0))

    return {
        "title": "whisper-decoder and others", "protocol": "whisper", "resamples": 1000,
        "data": {"utterances": 800, "seconds": 4312.5, "corpora": {"voxpopuli": 500, "voxceleb": 300},
                 "tasks": {"ner": {"kind": "span", "labels": list(LABELS), "n": 500},
                           "sa": {"kind": "label", "labels": ["Positive", "Negative"], "n": 300}}},
        "systems": [{"name": name, "baseline": name == first, "decoding": {"beams": 1} if i else None,
                     "seeds": ["s1", "s2"] if i == systems - 1 else ["s1"],
                     "cost": {"parameters": 74_000_000 + i, "trained": None, "train_minutes": 12.5,
                              "rtf": 0.31, "memory_gib": None}} for i, name in enumerate(names)],
        "verdict": [f"{name} understands better and transcribes as well." for name in others],
        "notes": ["whisper-decoder: how it was decoded is not known."],
        "scores": [{"key": key, "title": title, "better": better,
                    "values": {name: score(key, name) for name in names},
                    "differences": {name: spread(at[name] * (0.1 if better == "lower" else 1), 1.5,
                                                 p=0.004) for name in others}}
                   for key, (title, better, _) in keys.items()],
        "words": {name: {"all": {"words": 9000, "errors": 1500 + i, "substitutions": 900 + i,
                                 "deletions": 350, "insertions": 250}, "inside": None}
                  for i, name in enumerate(names)},
        "conditions": [{"by": "speaker", "rows": [
            {"name": f"speaker {i}", "n": 100 + i, "values": {
                key: {name: score(key, name, i) for name in names} for key in keys}}
            for i in range(7)]}],
        "entities": {"ner": {
            "causes": {name: {"right": 58 + 10 * i, "misheard": 31 - 4 * i, "not_tagged": 20 - 4 * i,
                              "wrong_label": 9, "wrong_boundary": 5 - 2 * i, "hallucinated": 13}
                       for i, name in enumerate(names)},
            "by_label": [{"name": label, "n": n, "f1": {name: spread(n / 2 + at[name], 9.0)
                                                        for name in names}}
                         for label, n in LABELS.items()],
            "by_length": [{"name": "1", "n": 90, "f1": {first: spread(41.0), names[1]: None}}],
            "by_rarity": []}},
        "confusion": {"sa": {first: {"labels": ["Positive", "Negative"],
                                     "rows": [[101, 40, 9], [37, 113, 0]]}}},
        "calibration": {"sa": {name: {"ece": 0.08 + 0.01 * i, "bins": [
            {"low": c - 0.05, "high": c + 0.05, "confidence": c, "accuracy": c - 0.1 + 0.03 * i,
             "n": 60} for c in (0.55, 0.65, 0.75, 0.85, 0.95)]} for i, name in enumerate(names)}},
        "lengths": [{"by": by, "edges": [0, 5, 10], "rows": [
            {"name": f"{low}-{low + 5} {unit}", "n": 100, "values": {
                key: {name: score(key, name, low * (0.4 if key == "wer" else -0.6))
                      for name in names} for key in keys}} for low in (0, 5, 10, 15)]}
            for by, unit in (("audio", "s"), ("words", "words"))],
        "curves": {name: [{"step": 10 * n, "minutes": 1.5 * n, "scores": {
            "wer": 30.0 - 2 * n, "ner_f1": 10.0 + 4 * n + at[name]}} for n in range(1, 7)]
            for name in others},
        "examples": [make_example(i, names) for i in range(7)]}


def make_example(number: int, names: tuple[str, ...]) -> Values:
    said = "europe's budget rose by twenty percent said the member from the hague"
    heard = "europe's badge it rose by twenty percent said member from the hague"
    diff = [["equal", "europe's", "europe's"], ["substitute", "budget", "badge"],
            ["insert", "", "it"], ["equal", "rose by twenty percent said", "rose by twenty percent said"],
            ["delete", "the", ""], ["equal", "member from the hague", "member from the hague"]]
    right = {"ner": [["PLACE", "europe"], ["QUANT", "twenty percent"], ["PLACE", "the hague"]],
             "sa": "Positive"}
    off = {"ner": [["PLACE", "europe"], ["PERSON", "the hague"], ["PERSON", "Mr. Smith"]],
           "sa": "Negative"}
    answers: list[Values] = [
        {"transcript": heard, "outputs": off, "diff": diff,
         "wrong": {"ner": ["the hague", "Mr. Smith"], "sa": ["Negative"]}},
        {"transcript": said.capitalize() + ".", "outputs": right, "wrong": {},
         "diff": [["equal", said, said]]}]
    return {"id": f"vp_{number}", "corpus": "voxpopuli", "audio": None, "reference": said,
            "reference_outputs": right, "change": -6.0,
            "systems": {name: answers[i > 0] for i, name in enumerate(names)}}


def lacking(report: Mapping[str, Any]) -> Values:
    """The report of systems of which little is known: nothing optional is there."""
    first, second = (system["name"] for system in report["systems"][:2])
    empty: Values = {key: type(report[key])() for key in (
        "verdict", "notes", "words", "conditions", "entities", "confusion", "calibration",
        "lengths", "curves", "examples")}
    scores = [score | {"values": {first: {"value": 16.4, "low": None, "high": None}, second: None},
                       "differences": {}} for score in report["scores"]]
    return {**report, **empty, "scores": scores}
