"""One annotated stretch of speech, as the whole library sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile

from unislu_llm.errors import UserError
from unislu_llm.tasks import LabelValue

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Utterance:
    """Speech, its transcript and the annotations that it happens to have."""

    id: str  # unique within its corpus and split
    audio: Path | None  # any format that soundfile reads; None for a row of text alone
    text: str  # normalised transcript
    # By task name. A missing task is "not annotated", an empty tuple "annotated, there is none".
    labels: Mapping[str, LabelValue] = field(default_factory=dict)
    start: float = 0.0  # where the crop of the audio file begins, seconds
    end: float | None = None  # where it ends, seconds; None is the end of the file
    speaker: str | None = None
    language: str | None = None  # code, e.g. `en`
    corpus: str = "default"  # groups scores and the mixture of training data
    duration: float | None = None  # after the crop, seconds, where the manifest gives it
    source: str = ""  # `file:line` of the manifest row, for messages
    hypothesis: str | None = None  # a recogniser's transcript; "" where it recognised nothing
    text_source: str | None = None  # recogniser that wrote `text` (a pseudo-label); None: people
    segments: Sequence[Any] | None = None  # as written: where a long recording may be cut
    # (samples,) at 16 kHz of audio in memory; `audio` is then what messages call it.
    samples: Tensor | None = field(default=None, compare=False, repr=False)
    # decoding.no_speech.Evidence of the recogniser that made the hypothesis.
    evidence: Any = field(default=None, compare=False, repr=False)

    @cached_property
    def seconds(self) -> float:
        """Length after the crop, the manifest's or the header's; raises UserError: unreadable."""
        if self.stated_seconds is not None:
            return self.stated_seconds
        if self.audio is None:
            return 0.0
        try:
            return float(soundfile.info(str(self.audio)).duration) - self.start
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.where}: field 'audio': cannot read {self.audio}: {error}"
                            ) from error

    @property
    def stated_seconds(self) -> float | None:
        """Length that the manifest gives; None where it does not."""
        if self.duration is not None:
            return self.duration
        return None if self.end is None else self.end - self.start

    @property
    def where(self) -> str:
        """What messages call this utterance: `file:line`, or its id where there is no file."""
        return self.source or self.id
