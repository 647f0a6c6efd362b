"""Two systems on the same utterances: who is better where, and whether the difference of scores is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from unislu_llm.analysis.errors import ALL, row_edits
from unislu_llm.analysis.predictions import row_key
from unislu_llm.scoring.bootstrap import compare_counts
from unislu_llm.scoring.rows import Row, transcript_rows, utterance_key
from unislu_llm.scoring.slue import utterance_counts
from unislu_llm.scoring.text import Protocol
from unislu_llm.tasks import TaskRegistry


def compare(first: Sequence[Row], other: Sequence[Row], registry: TaskRegistry, protocol: Protocol, *,
            resamples: int = 1000, seed: int = 0, examples: int = 5) -> dict[str, Any]:
    """A system beside the first one, on the same rows.

    Returns:
        Plain data: `scores`: by name the scores of both and their difference `other - first` with its 95 % interval (paired
        bootstrap, corpora resampled each by itself) and p-value; `utterances`: how many are `better`, `equal` or `worse` by
        word errors, by corpus; `examples`: those with most difference, in word errors.

    Raises:
        UserError: the systems have not the same utterances, or there are no resamples.
    """
    first, other = sorted(first, key=row_key), sorted(other, key=row_key)  # the order of rows decides nothing
    return {"scores": _scores(first, other, registry, protocol, resamples, seed),
            **_utterances(transcript_rows(first, registry), transcript_rows(other, registry), protocol, examples)}


def _scores(first: Sequence[Row], other: Sequence[Row], registry: TaskRegistry, protocol: Protocol,
            resamples: int, seed: int) -> dict[str, Any]:
    corpus = {utterance_key(row): row["corpus"] for row in first}
    ours, theirs = utterance_counts(other, registry, protocol), utterance_counts(first, registry, protocol)
    wanted = {"wer", "slue_score", *(f"wer/{name}" for name in corpus.values()),
              *(f"{task}/{score}" for task in registry.names for score in ("f1", "macro_f1"))}
    found: dict[str, Any] = {}
    for name in [name for name in ours if name in wanted]:
        a, b = ours[name], theirs[name]
        a = a if a.strata is not None else replace(a, strata=tuple(corpus[key] for key in a.keys))
        values = [float(c.statistic(c.matrix.sum(axis=0, keepdims=True).astype(np.float64))[0]) for c in (b, a)]
        interval = asdict(compare_counts(a, b, resamples, seed))
        found[name] = {"first": values[0], "other": values[1], "difference": interval.pop("value"), **interval}
    return found


def _utterances(first: Sequence[Row], other: Sequence[Row], protocol: Protocol, examples: int) -> dict[str, Any]:
    by_key = {utterance_key(row): row for row in other}
    others = [by_key[utterance_key(row)] for row in first]
    before, after = row_edits(first, protocol), row_edits(others, protocol)
    errors = np.stack([before[:, :3].sum(axis=1), after[:, :3].sum(axis=1)], axis=1)
    change = errors[:, 1] - errors[:, 0]
    corpora = np.array([row["corpus"] for row in first])
    groups = {name: change[corpora == name] for name in sorted(set(corpora.tolist()))} | {ALL: change}
    most = sorted(range(len(first)), key=lambda i: (-abs(int(change[i])), utterance_key(first[i])))[:examples]
    return {
        "utterances": {name: {"better": int((part < 0).sum()), "equal": int((part == 0).sum()), "worse": int((part > 0).sum())}
                       for name, part in groups.items()},
        "examples": [{"id": first[i]["id"], "corpus": first[i]["corpus"], "ref": first[i]["ref_text"],
                      "ref_words": int(before[i, [0, 1, 3]].sum()), "errors": errors[i].tolist(),
                      "first": first[i].get("hyp_text") or "", "other": others[i].get("hyp_text") or ""}
                     for i in most if change[i]],
    }
