"""Prediction rows: the files that decoding writes and scoring reads, one JSON object a line.

    {"id": "...", "corpus": "mini-entities", "task": "ner", "duration": 3.2,
     "ref_text": "...", "ref": [["ORG", "council", 4, 11]], "hyp_text": "...", "hyp": [["ORG", "council"]],
     "raw": "decoded string", "problems": ["missing_separator"], "n_tokens": 34}

One row an utterance and task. `ref` and `hyp` are entities for a span task, a label for a label task, a list
of labels for a multi-label one; a null `ref` is "not annotated", a null `hyp` "no usable output". Rows of the
task `asr` have neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unislu_llm.data.slue import RAW_TO_COMBINED
from unislu_llm.errors import UserError
from unislu_llm.scoring.sentiment import UNKNOWN, Label
from unislu_llm.tasks import ASR, NER, SpanTask, Task, TaskRegistry

Row = Mapping[str, Any]
_TEXT_FIELDS = ("id", "corpus", "task", "ref_text")


def read_rows(path: str | Path, registry: TaskRegistry) -> list[Row]:
    """Prediction rows of a file.

    Raises:
        UserError: the file is missing, a line is not a JSON object, or :func:`check_row` refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"predictions file {path} does not exist; give the file that prediction wrote")
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg}); write one object a line") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            check_row(row, registry, f"{path}:{number}")
            rows.append(row)
    return rows


def check_rows(rows: Iterable[Row], registry: TaskRegistry) -> None:
    """Refuse rows that cannot be scored.

    Raises:
        UserError: :func:`check_row` refuses a row, or an utterance has a task twice.
    """
    seen: set[tuple[str, str, str]] = set()
    for number, row in enumerate(rows, 1):
        where = f"prediction row {number}"
        check_row(row, registry, where)
        key = (row["corpus"], row["id"], row["task"])
        if key in seen:
            raise UserError(
                f"{where}: utterance '{row['id']}' of corpus '{row['corpus']}' has a row of task "
                f"'{row['task']}' already; score one run at a time"
            )
        seen.add(key)


def check_row(row: Row, registry: TaskRegistry, where: str) -> None:
    """Refuse a row that cannot be scored; `where` names it in the message.

    Raises:
        UserError: a field is missing or of the wrong type, or the task is unknown.
    """
    for field in _TEXT_FIELDS:
        if not isinstance(row.get(field), str):
            raise UserError(f"{where}, field '{field}': expected text, found {row.get(field)!r}")
    if row["task"] == ASR:
        return
    try:
        task = registry[row["task"]]
    except UserError as error:
        raise UserError(f"{where}, field 'task': {error}") from None
    _check_ref(row.get("ref"), task, where)


def combine_labels(rows: Iterable[Row]) -> list[Row]:
    """Rows whose entity labels, in reference and hypothesis, are the seven combined ones of SLUE.

    Raw OntoNotes labels of the task `ner` are mapped or dropped
    (:data:`~unislu_llm.data.slue.RAW_TO_COMBINED`); combined ones stay, and so do the rows of other tasks.
    """
    mapped: list[Row] = []
    for row in rows:
        if row["task"] == NER.name:
            mapped.append({**row, **{side: _combine(row.get(side)) for side in ("ref", "hyp")}})
        else:
            mapped.append(row)
    return mapped


def utterance_key(row: Row) -> str:
    """Names the utterance of a row across systems."""
    return f"{row['corpus']}/{row['id']}"


def transcript_rows(rows: Iterable[Row], registry: TaskRegistry) -> list[Row]:
    """One row an utterance, to count its transcript once.

    An utterance decoded for several tasks has as many transcripts. The one counted is that of its `asr` row
    if it has one, else that of its first task in the order of the registry: a choice that does not depend on
    the order of rows.
    """
    rank = {name: i for i, name in enumerate((ASR, *registry.names))}
    chosen: dict[str, Row] = {}
    for row in rows:
        key = utterance_key(row)
        if key not in chosen or rank[row["task"]] < rank[chosen[key]["task"]]:
            chosen[key] = row
    return list(chosen.values())


def annotated_rows(rows: Iterable[Row], task: Task) -> list[Row]:
    """The rows of a task whose reference is known."""
    return [row for row in rows if row["task"] == task.name and row.get("ref") is not None]


def ref_entities(row: Row) -> list[tuple[str, str]]:
    """Reference entities as (label, phrase)."""
    return [(label, phrase) for label, phrase, *_ in row["ref"]]


def ref_spans(row: Row) -> list[tuple[str, int, int]] | None:
    """Reference entities as (label, start, end); None where a row was written without offsets."""
    if any(len(entity) != 4 for entity in row["ref"]):
        return None
    return [(label, start, end) for label, _, start, end in row["ref"]]


def hyp_entities(row: Row) -> list[tuple[str, str]]:
    """Predicted entities as (label, phrase); none without usable output or if another task was answered."""
    hyp = row.get("hyp")
    if not isinstance(hyp, Sequence) or isinstance(hyp, str) or "wrong_task" in (row.get("problems") or ()):
        return []
    return [(entity[0], entity[1]) for entity in hyp if not isinstance(entity, str)]


def hyp_labels(row: Row) -> Label:
    """Predicted label or labels; the problems named by parsing tell an unknown word from no word."""
    problems = row.get("problems") or ()
    hyp = row.get("hyp")
    if "wrong_task" in problems:
        return None
    if hyp is None or hyp == "":
        return UNKNOWN if "unknown_label" in problems else None
    if not isinstance(hyp, str) and not all(isinstance(label, str) for label in hyp):
        return None
    return hyp if isinstance(hyp, str) else tuple(hyp)


def _combine(entities: Any) -> Any:
    if not isinstance(entities, list | tuple):
        return entities
    named = [(RAW_TO_COMBINED.get(e[0], e[0]), e[1:]) for e in entities if not isinstance(e, str)]
    return [[label, *rest] for label, rest in named if label is not None]


def _check_ref(ref: Any, task: Task, where: str) -> None:
    if ref is None:
        return
    if isinstance(task, SpanTask):
        fits = isinstance(ref, list | tuple) and all(
            isinstance(e, list | tuple)
            and len(e) in (2, 4)
            and isinstance(e[0], str)
            and isinstance(e[1], str)
            for e in ref
        )
        form = "a list of [label, phrase, start, end]"
    elif task.multi:
        fits = isinstance(ref, list | tuple) and all(isinstance(label, str) for label in ref)
        form = "a list of labels"
    else:
        fits, form = isinstance(ref, str), "a label"
    if not fits:
        raise UserError(f"{where}, field 'ref': task '{task.name}' needs {form} or null, found {ref!r}")
