"""Errors of prediction rows by cause: words, entities, labels. Pure functions; the scores are those of the scorers.

An entity is wrong because its words were not recognised, or because recognised words were not labelled. SLUE's multisets of
phrases do not tell these apart, and position F1 (:mod:`unislu_llm.scoring.position`) forgives the first. Here every entity,
of reference and of prediction, has exactly one kind (:data:`REFERENCE_KINDS`, :data:`PREDICTED_KINDS`), and `correct` is what
:func:`~unislu_llm.scoring.ner.entity_f1` counts as right.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jiwer
import numpy as np
from numpy.typing import NDArray

from unislu_llm.scoring.ner import PRF, Entity, prepare
from unislu_llm.scoring.rows import Row, annotated_rows, hyp_entities, hyp_labels, transcript_rows, utterance_key
from unislu_llm.scoring.sentiment import label_scores
from unislu_llm.scoring.text import Protocol, normalise_phrase, normalise_transcript
from unislu_llm.scoring.wer import WER, edit_counts
from unislu_llm.tasks import LabelTask, SpanTask, TaskRegistry

REFERENCE_KINDS: dict[str, str] = {
    "correct": "label and phrase are right",
    "wrong_label": "the phrase was predicted with another label",
    "boundary": "heard, and a predicted entity of the same label overlaps it in the recognised transcript",
    "misheard": "the phrase is not in the recognised transcript (or not as often as needed)",
    "not_tagged": "heard, and none of the above",
}
"""What becomes of a reference entity, in order of precedence but for `boundary` and `misheard`, which exclude each other."""

PREDICTED_KINDS: dict[str, str] = {
    "correct": "label and phrase are right",
    "wrong_label": "the phrase is an entity of another label",
    "boundary": "overlaps a reference entity of the same label that was heard",
    "misheard": "stands where a misheard reference entity of the same label was said",
    "not_an_entity": "in the recognised transcript, and none of the above",
    "hallucinated": "not in the recognised transcript (or not as often), and none of the above",
}
"""What a predicted entity is."""

ALL = "all"
"""Name of the group of all corpora."""
LONG = 2
"""A hypothesis of more than this many times the reference's words is hallucinated."""

_BUCKETS = (("0", 0.0), ("0-20", 20.0), ("20-50", 50.0), (">50", np.inf))
"""Utterance WER in percent: name and upper border, which belongs to the bucket."""
_MANY = 10
"""With more values than this, the numbers in a field's values are left out: `reverb0.36+pink12dB` is `reverb+pink`."""

Fields = Mapping[str, Mapping[str, str]]
"""Values of other fields, by utterance key and name."""
WordSpan = tuple[int, int]


class Aligned(NamedTuple):
    """The words of one utterance, normalised as entity phrases are.

    Args:
        ref, hyp: words. ref_of: the reference word that a hypothesis word matches or replaces, by index.
        wrong: for each reference word, 1 if it was replaced or deleted.
        inserted: words inserted before each reference word; the last entry is behind all.
    """

    ref: list[str]
    hyp: list[str]
    ref_of: dict[int, int]
    wrong: list[int]
    inserted: list[int]


def analyse(rows: Sequence[Row], registry: TaskRegistry, protocol: Protocol, fields: Fields) -> dict[str, Any]:
    """Errors of one system, by corpus, and of :data:`ALL` rows where there are several.

    Returns:
        Plain data: `{corpus: {words: ..., tasks: {name: ...}}}`, see :func:`word_errors`, :func:`entity_errors`,
        :func:`label_errors`. Rates are percent.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["corpus"]].append(row)
    blocks = dict(sorted(groups.items()))
    if len(blocks) > 1:
        blocks[ALL if ALL not in blocks else f"({ALL})"] = list(rows)
    found: dict[str, Any] = {}
    for name, group in blocks.items():
        tasks: dict[str, Any] = {}
        for task in registry:
            known = annotated_rows(group, task)
            if known and isinstance(task, SpanTask):
                tasks[task.name] = entity_errors(known, protocol)
            elif known and isinstance(task, LabelTask) and not task.multi:
                tasks[task.name] = label_errors(known, task, protocol)
        found[name] = {"words": word_errors(transcript_rows(group, registry), protocol, fields), "tasks": tasks}
    return found


def word_errors(rows: Sequence[Row], protocol: Protocol, fields: Fields) -> dict[str, Any]:
    """WER of some utterances (one row each) by kind of error, and of parts of them.

    Returns:
        n, wer, counts (:class:`~unislu_llm.scoring.wer.WER`), `long` and `loop` (utterances, and `hallucinated` those of
        either kind), `without_hallucinated`, `same_answer` (utterances whose hypothesis is also that of an utterance with
        another reference), `by_length` (quartiles of reference words), `by` (field: value: rates).
    """
    counts = row_edits(rows, protocol)
    ref, hyp = counts[:, [0, 1, 3]].sum(axis=1), counts[:, [0, 2, 3]].sum(axis=1)
    long, loop = hyp > LONG * ref, np.array(["loop" in (row.get("problems") or ()) for row in rows], dtype=bool)
    names = {field for row in rows for field in fields.get(utterance_key(row), {})}
    by = {name: _values([fields.get(utterance_key(row), {}).get(name, "unknown") for row in rows]) for name in sorted(names)}
    return {**_rates(counts), "long": int(long.sum()), "loop": int(loop.sum()), "hallucinated": int((long | loop).sum()),
            "without_hallucinated": _rates(counts[~(long | loop)]), "same_answer": _same_answers(rows, protocol),
            "by_length": _grouped(counts, _quartiles(ref)),
            "by": {name: _grouped(counts, values) for name, values in by.items()}}


def row_edits(rows: Sequence[Row], protocol: Protocol) -> NDArray[np.int64]:
    """`(utterances, 4)`: substitutions, deletions, insertions and hits of each row's transcript."""
    return edit_counts([row["ref_text"] for row in rows], [row.get("hyp_text") or "" for row in rows], protocol)


def _rates(counts: NDArray[np.int64]) -> dict[str, Any]:
    subs, dels, ins, hits = (int(n) for n in counts.sum(axis=0))
    return {"n": len(counts), **WER(subs, dels, ins, hits, subs + dels + hits).to_dict()}


def _grouped(counts: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    of = np.array(names)
    return {name: _rates(counts[of == name]) for name in dict.fromkeys(sorted(names, key=_natural))}


def _natural(name: str) -> tuple[float, str]:
    number = re.match(r"\d+", name)
    return (float(number.group()) if number else np.inf, name)


def _quartiles(ref: NDArray[np.int64]) -> list[str]:
    """For each utterance the words that the quarter of utterances it is in has, e.g. `6-9 words`; ties stay together."""
    if not len(ref):
        return []
    index = np.searchsorted(np.quantile(ref, [0.25, 0.5, 0.75]), ref)
    ends = {i: (ref[index == i].min(), ref[index == i].max()) for i in set(index.tolist())}
    names = {i: f"{low} words" if low == high else f"{low}-{high} words" for i, (low, high) in ends.items()}
    return [names[i] for i in index.tolist()]


def _values(values: Sequence[str]) -> Sequence[str]:
    if len(set(values)) <= _MANY:
        return values
    return [re.sub(r"\d+(\.\d+)?(dB)?", "", value) or value for value in values]


def _same_answers(rows: Sequence[Row], protocol: Protocol) -> int:
    refs: dict[str, set[str]] = defaultdict(set)
    hyps = [normalise_transcript(row.get("hyp_text") or "", protocol) for row in rows]
    for row, hyp in zip(rows, hyps, strict=True):
        refs[hyp].add(normalise_transcript(row["ref_text"], protocol))
    return sum(bool(hyp) and len(refs[hyp]) > 1 for hyp in hyps)


def entity_errors(rows: Sequence[Row], protocol: Protocol) -> dict[str, Any]:
    """Every entity by kind, of annotated rows of one span task.

    Returns:
        n, the counts and scores of :class:`~unislu_llm.scoring.ner.PRF`; `reference`, `predicted`: entities by kind;
        `by_label`: the same by label; `heard`: scores without the misheard entities of both sides; `unanswered`: rows without
        usable answer, and the reference entities in them; `words`: rates of reference words `inside` and `outside` entities,
        and `unplaced`, entities that normalisation left at no place in the reference, which count as outside.
    """
    aligned = align([row["ref_text"] for row in rows], [row.get("hyp_text") or "" for row in rows], protocol)
    gold_kinds: Counter[tuple[str, str]] = Counter()
    pred_kinds: Counter[tuple[str, str]] = Counter()
    inside, total, unplaced, lost = np.zeros(2, np.int64), np.zeros(2, np.int64), 0, [0, 0]
    for row, words in zip(rows, aligned, strict=True):
        gold, spans = place_reference(row, words.ref, protocol)
        pred = prepare(hyp_entities(row), protocol)
        of_gold, of_pred = sort_entities(gold, spans, pred, words)
        gold_kinds.update((label, kind) for (label, _), kind in zip(gold, of_gold, strict=True))
        pred_kinds.update((label, kind) for (label, _), kind in zip(pred, of_pred, strict=True))
        inside += entity_words(words, [span for span in spans if span])
        total += (sum(words.wrong) + sum(words.inserted), len(words.ref))
        unplaced += spans.count(None)
        if row.get("hyp") is None or "wrong_task" in (row.get("problems") or ()):
            lost = [lost[0] + 1, lost[1] + len(gold)]
    block = _kinds_block(gold_kinds, pred_kinds)
    labels = sorted({label for label, _ in (*gold_kinds, *pred_kinds)})
    by_label = {label: _kinds_block(_only(gold_kinds, label), _only(pred_kinds, label)) for label in labels}
    return {"n": len(rows), **block, "by_label": by_label, "unanswered": {"rows": lost[0], "reference": lost[1]},
            "words": {"inside": _word_rate(inside), "outside": _word_rate(total - inside), "unplaced": unplaced}}


def _kinds_block(gold: Counter[tuple[str, str]], pred: Counter[tuple[str, str]]) -> dict[str, Any]:
    reference = {kind: sum(n for (_, k), n in gold.items() if k == kind) for kind in REFERENCE_KINDS}
    predicted = {kind: sum(n for (_, k), n in pred.items() if k == kind) for kind in PREDICTED_KINDS}
    tp, n_gold, n_pred = reference["correct"], sum(reference.values()), sum(predicted.values())
    heard = PRF.of(tp, n_gold - reference["misheard"], n_pred - predicted["misheard"])
    return {**asdict(PRF.of(tp, n_gold, n_pred)), "reference": reference, "predicted": predicted, "heard": asdict(heard)}


def _only(kinds: Counter[tuple[str, str]], label: str) -> Counter[tuple[str, str]]:
    return Counter({key: n for key, n in kinds.items() if key[0] == label})


def _word_rate(counts: NDArray[np.int64]) -> dict[str, Any]:
    errors, words = (int(n) for n in counts)
    return {"wer": 100.0 * errors / max(words, 1), "errors": errors, "ref_words": words}


def align(refs: Sequence[str], hyps: Sequence[str], protocol: Protocol) -> list[Aligned]:
    """Align transcripts word by word, normalised as entity phrases are (with `whisper`, as for WER too)."""
    pairs = [[normalise_phrase(text, protocol).split() for text in pair] for pair in zip(refs, hyps, strict=True)]
    found = [Aligned(ref, hyp, {}, [1] * len(ref), [0] * len(ref) + [0 if ref else len(hyp)]) for ref, hyp in pairs]
    both = [words for words in found if words.ref and words.hyp]
    if not both:
        return found
    out = jiwer.process_words([" ".join(w.ref) for w in both], [" ".join(w.hyp) for w in both])
    for words, chunks in zip(both, out.alignments, strict=True):
        for c in chunks:
            if c.type == "insert":
                words.inserted[c.ref_start_idx] += c.hyp_end_idx - c.hyp_start_idx
            elif c.type != "delete":
                places = range(c.ref_start_idx, c.ref_end_idx)
                words.ref_of.update(zip(range(c.hyp_start_idx, c.hyp_end_idx), places, strict=True))
                for i in places:
                    words.wrong[i] = int(c.type == "substitute")
    return found


def place_reference(row: Row, words: Sequence[str], protocol: Protocol) -> tuple[list[Entity], list[WordSpan | None]]:
    """Reference entities as they are compared, and the reference words of each; None where they do not stand as they are."""
    entities: list[Entity] = []
    spans: list[WordSpan | None] = []
    behind = 0
    for entity in row["ref"]:
        for label, phrase in prepare([entity], protocol):
            places = occurrences(phrase, words)
            if len(places) > 1 and len(entity) == 4:  # by the words before it
                behind = len(normalise_phrase(row["ref_text"][: entity[2]], protocol).split())
            span = min(places, key=lambda place: abs(place[0] - behind), default=None)
            behind = span[1] if span else behind
            entities.append((label, phrase))
            spans.append(span)
    return entities, spans


def occurrences(phrase: str, words: Sequence[str]) -> list[WordSpan]:
    """Every place where the words of `phrase` stand one behind another."""
    wanted = phrase.split()
    size = len(wanted)
    return [(i, i + size) for i in range(len(words) - size + 1) if list(words[i : i + size]) == wanted]


def sort_entities(gold: Sequence[Entity], spans: Sequence[WordSpan | None], pred: Sequence[Entity],
                  words: Aligned) -> tuple[list[str], list[str]]:
    """Kind of each reference and of each predicted entity of one utterance, every pair one to one.

    Args:
        gold, pred: as :func:`~unislu_llm.scoring.ner.prepare` makes them. spans: place of `gold` in the reference words.
    """
    of_gold: dict[int, str] = {}
    of_pred: dict[int, str] = {}

    def pair(kind: str, agree: Callable[[int, int], bool]) -> None:
        for i in range(len(gold)):
            free = (j for j in range(len(pred)) if i not in of_gold and j not in of_pred and agree(i, j))
            if (j := next(free, None)) is not None:
                of_gold[i] = of_pred[j] = kind

    pair("correct", lambda i, j: gold[i] == pred[j])
    pair("wrong_label", lambda i, j: gold[i][1] == pred[j][1])
    heard, said = _present(gold, of_gold, words.hyp), _present(pred, of_pred, words.hyp)
    in_hyp = {phrase: occurrences(phrase, words.hyp) for _, phrase in (*gold, *pred)}

    def meets(i: int, j: int) -> bool:
        return any(a < d and c < b for a, b in in_hyp[gold[i][1]] for c, d in in_hyp[pred[j][1]])

    def replaces(i: int, j: int) -> bool:
        span = spans[i] or (0, 0)
        return any(span[0] <= words.ref_of.get(k, -1) < span[1] for place in in_hyp[pred[j][1]] for k in range(*place))

    pair("boundary", lambda i, j: i in heard and j in said and gold[i][0] == pred[j][0] and meets(i, j))
    pair("misheard", lambda i, j: i not in heard and j in said and gold[i][0] == pred[j][0] and replaces(i, j))
    return ([of_gold.get(i, "not_tagged" if i in heard else "misheard") for i in range(len(gold))],
            [of_pred.get(j, "not_an_entity" if j in said else "hallucinated") for j in range(len(pred))])


def _present(entities: Sequence[Entity], done: Mapping[int, str], hyp: Sequence[str]) -> set[int]:
    """The entities not `done` whose phrase the transcript has, as often as entities need it."""
    room = {phrase: len(occurrences(phrase, hyp)) for _, phrase in entities}
    for i in done:
        room[entities[i][1]] -= 1
    found = set()
    for i, (_, phrase) in enumerate(entities):
        if i not in done and room[phrase] > 0:
            room[phrase] -= 1
            found.add(i)
    return found


def entity_words(words: Aligned, spans: Iterable[WordSpan]) -> NDArray[np.int64]:
    """`(2,)`: word errors and reference words inside entities; an insertion is inside between two words of one entity."""
    places = list(spans)
    inside = {i for a, b in places for i in range(a, b)}
    between = {i for a, b in places for i in range(a + 1, b)}
    errors = sum(words.wrong[i] for i in inside) + sum(words.inserted[i] for i in between)
    return np.array([errors, len(inside)], dtype=np.int64)


def label_errors(rows: Sequence[Row], task: LabelTask, protocol: Protocol) -> dict[str, Any]:
    """Confusion matrix of annotated rows of a task with one label, and accuracy by the utterance's WER.

    Returns:
        n, skipped, missing, unknown, accuracy, macro_f1, confusion, confusion_labels of
        :class:`~unislu_llm.scoring.sentiment.LabelScores`; `by_wer`: `{bucket: {n, accuracy}}`.
    """
    counts = row_edits(rows, protocol)
    wer = 100.0 * counts[:, :3].sum(axis=1) / np.maximum(counts[:, [0, 1, 3]].sum(axis=1), 1)
    index = np.searchsorted([border for _, border in _BUCKETS], wer)

    def scores(some: Sequence[Row]) -> dict[str, Any]:
        return label_scores([row["ref"] for row in some], [hyp_labels(row) for row in some], task, protocol).to_dict()

    parts = {name: scores([row for row, k in zip(rows, index, strict=True) if k == i]) for i, (name, _) in enumerate(_BUCKETS)}
    whole = scores(rows)
    kept = ("n", "skipped", "missing", "unknown", "accuracy", "macro_f1", "confusion", "confusion_labels")
    return {key: whole[key] for key in kept} | {
        "by_wer": {name: {"n": part["n"], "accuracy": part["accuracy"] if part["n"] else None} for name, part in parts.items()}}
