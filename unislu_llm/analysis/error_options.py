"""Settings of `eval/errors.py`. Apart from the rest, so that `--help` does not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class ErrorOptions:
    """Which systems' errors are sorted, and how."""

    systems: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="SYSTEM [SYSTEM ...]")] = field(
        default_factory=list)
    """Prediction files of eval/evaluate.py, or run folders (their predictions of the dev manifests). The others are compared
    to the first."""
    protocol: Literal["whisper", "slue"] = "whisper"
    """How transcripts and phrases are normalised before they are compared."""
    out: Path | None = None
    """Markdown report, with its figures as FILE.json beside it; default: the report is printed."""
    manifest: list[Path] = field(default_factory=list)
    """Manifests that the rows came from, for the fields of --by."""
    by: list[str] = field(default_factory=lambda: ["condition", "noise"])
    """Fields of the prediction or manifest rows by which WER is split, where rows have them."""
    common: bool = False
    """Compare the rows that all systems have; without it, systems with unequal rows are refused."""
    tasks: Path | None = None
    """Task file (YAML), where the predictions are of other tasks and do not lie in their run's folder."""
    resamples: int = 1000
    """Of the paired bootstrap."""
    seed: int = 0
    """Of the paired bootstrap."""
    examples: int = 5
    """Utterances with the largest difference that are shown for each pair."""
