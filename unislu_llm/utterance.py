"""One annotated stretch of speech, as the whole library sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unislu_llm.tasks import LabelValue


@dataclass(frozen=True)
class Utterance:
    """Speech, its transcript and the annotations it happens to have.

    Args:
        id: unique within its corpus and split.
        audio: file of any soundfile format; None for a text-only row.
        text: normalised transcript.
        labels: annotation by task name. A missing task is "not annotated", `()` is "annotated, and there is none".
        start, end: crop of the audio file, seconds; `end` None means to the end.
        speaker, language, corpus: free-form; `corpus` groups scores.
        duration: length after the crop, seconds, where the manifest gives it.
        source: `file:line` of the manifest row, for messages.
        draft: a recogniser's transcript, for models that read one beside the speech; `""` where it heard nothing, None where
            there is none.
        text_source: recogniser that wrote `text` (a pseudo-transcript); None where people did.
        segments: the row's `segments` as written, where it has them (:mod:`unislu_llm.data.long_audio`).
    """

    id: str
    audio: Path | None
    text: str
    labels: Mapping[str, LabelValue] = field(default_factory=dict)
    start: float = 0.0
    end: float | None = None
    speaker: str | None = None
    language: str | None = None
    corpus: str = "default"
    duration: float | None = None
    source: str = ""
    segments: Sequence[Any] | None = None
    draft: str | None = None
    text_source: str | None = None
