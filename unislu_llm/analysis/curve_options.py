"""Settings of `eval/curves.py`. Apart from the rest, so that `--help` does not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class CurveOptions:
    """Which runs' learning curves are drawn, and how."""

    runs: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="RUN [RUN ...]")] = field(default_factory=list)
    """Run folders of the training recipes; finished or not."""
    out: Path = Path("eval/results/curves.svg")
    """Picture (.svg, .png or .pdf), with its points as FILE.json beside it."""
    score: str = "wer"
    """Dev score, by its name in the runs' metrics.jsonl: wer, wer_<corpus>, ner_f1, sa_f1, slue, malformed, score..."""
    x: Literal["step", "minutes"] = "step"
    """Optimizer steps of the LLM, or minutes of training (validation not counted)."""
    names: list[str] = field(default_factory=list)
    """Names for the legend, one a run; default: the folders' names."""
    reach: str = ""
    """Name of a run: also print when each run first reaches the best value of this one."""
