"""Predictions: what decoding writes and scoring reads, one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from unislu_llm.errors import UserError, dotted, explain
from unislu_llm.tasks import ASR, SpanTask, Task, TaskRegistry

Entity = tuple[str, str]  # label and phrase, or whatever else says which entity it is
_SPANS = TypeAdapter(list[tuple[str, str, int, int] | tuple[str, str]])
_LABELS, _LABEL = TypeAdapter(list[str]), TypeAdapter(str)


class Prediction(BaseModel):
    """What a system made of one utterance for one task."""

    # Files may hold more than scoring reads (seconds, tokens, the decoded string).
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str  # of the utterance, unique within its corpus
    corpus: str
    task: str  # or `asr`, which has neither `ref` nor `hyp`
    ref_text: str
    hyp_text: str
    # Spans `[label, phrase, start, end]` or without offsets, a label, or labels; None: unannotated.
    ref: Any = None
    # Spans `[label, phrase]`, or labels, of whatever task was answered; None: no usable answer.
    hyp: Any = None
    problems: tuple[str, ...] = ()  # kinds of malformation, see unislu_llm.unified.PROBLEMS
    probabilities: dict[str, float] | None = None  # of every label of a task with one an utterance
    hypothesis: str | None = None  # that the model was given
    ctc_hypothesis: str | None = None  # greedy text of a ctc projector
    no_speech: bool = False  # whether use would answer nothing
    language: str = ""  # code; English where there is none
    duration: float | None = None  # seconds of audio

    @field_validator("hyp")
    @classmethod
    def _answers(cls, value: Any) -> Any:
        for part in value if isinstance(value, list | tuple) else [value]:
            pair = part[:2] if isinstance(part, list | tuple) and len(part) > 1 else [part or ""]
            if not all(isinstance(each, str) for each in pair):
                raise ValueError("must be a list of [label, phrase], a list of labels, a label or "
                                 "null")
        return value

    @property
    def utterance(self) -> tuple[str, str]:
        """Names the utterance across systems."""
        return self.corpus, self.id

    @property
    def key(self) -> str:
        """Names the example across systems, as :attr:`unislu_llm.tokenizer.Example.key`."""
        return f"{self.corpus}/{self.id}#{self.task}"

    @property
    def hyp_entities(self) -> list[Entity]:
        """Predicted entities; none where another task was answered."""
        named = [] if "wrong_task" in self.problems else self.hyp or ()
        return [(e[0], e[1]) for e in named if not isinstance(e, str)]

    @property
    def ref_labels(self) -> tuple[str, ...] | None:
        return _labels(self.ref)

    @property
    def hyp_labels(self) -> tuple[str, ...] | None:
        """Predicted labels; None is no answer of this task, empty that none of them holds."""
        if "wrong_task" in self.problems:
            return None
        # A null output has lost the word that was no label; its problem still tells of it.
        lost = self.hyp in (None, "") and "unknown_label" in self.problems
        return ("<unknown>",) if lost else _labels(self.hyp)


def check_predictions(predictions: Iterable[Prediction | Mapping[str, Any]],
                      registry: TaskRegistry) -> list[Prediction]:
    """Predictions as typed records, of plain data or of records. Raises UserError: a field is
    missing or of the wrong type, an unknown task, or a task twice."""
    found: dict[str, Prediction] = {}
    for number, row in enumerate(predictions, 1):
        where = f"prediction {number}"
        p = row if isinstance(row, Prediction) else _check(row, registry, where)
        if p.key in found:
            raise UserError(f"{where}: utterance '{p.id}' of corpus '{p.corpus}' has a prediction "
                            f"of task '{p.task}' already; score one run at a time")
        found[p.key] = p
    return list(found.values())


def spoken_once(predictions: Iterable[Prediction], registry: TaskRegistry) -> list[Prediction]:
    """One prediction an utterance, to count its transcript once."""
    # A transcript that no task follows is what a recogniser would give, so it comes first.
    rank = (ASR, *registry.names)
    chosen: dict[tuple[str, str], Prediction] = {}
    for p in predictions:
        chosen[p.utterance] = min(chosen.get(p.utterance, p), p, key=lambda p: rank.index(p.task))
    return list(chosen.values())


def annotated(predictions: Iterable[Prediction], task: Task) -> list[Prediction]:
    """The predictions of a task whose reference is known."""
    return [p for p in predictions if p.task == task.name and p.ref is not None]


def _labels(value: Any) -> tuple[str, ...] | None:
    labels = [value] if isinstance(value, str) else value
    if labels is None or not all(isinstance(label, str) for label in labels):
        return None
    labels = tuple(label.strip() for label in labels)
    return None if labels == ("",) else labels


def _check(row: Mapping[str, Any], registry: TaskRegistry, where: str) -> Prediction:
    try:
        found = Prediction.model_validate(row)
        task = None if found.task == ASR else registry[found.task]
    except ValidationError as error:
        raise explain(error, Prediction, lambda at: f"{where}, field '{dotted(at)}'") from None
    except UserError as error:
        raise UserError(f"{where}, field 'task': {error}") from None
    if task is None or found.ref is None:
        return found
    # What a reference must be depends on the task, which the record's type cannot know.
    adapter, form = ((_SPANS, "a list of [label, phrase, start, end]") if isinstance(task, SpanTask)
                     else (_LABELS, "a list of labels") if task.multi else (_LABEL, "a label"))
    try:
        return found.model_copy(update={"ref": adapter.validate_python(found.ref)})
    except ValidationError:
        raise UserError(f"{where}, field 'ref': task '{task.name}' needs {form} or null, found "
                        f"{found.ref!r}") from None
