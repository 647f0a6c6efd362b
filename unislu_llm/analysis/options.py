"""Settings of `eval/evaluate.py`. Apart from the rest, so that `--help` does not wait for torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass
class DecodeFlags:
    """How to decode; what is not given stays as in the run's config."""

    batch_size: int | None = None
    """Utterances decoded at one time."""
    max_new_tokens: int | None = None
    """Upper bound for any answer."""
    tokens_per_second: float | None = None
    """Bound by audio length: this many new tokens a second of audio..."""
    extra_tokens: int | None = None
    """...plus this many."""
    num_beams: int | None = None
    """Beams; 1 is greedy."""
    grammar: bool = False
    """Let only well-formed answers be decoded."""
    grounded: bool = False
    """With the grammar: phrases of span tasks are whole words of the transcript just decoded."""
    draft_bias: float | None = None
    """Nats by which a transcript is drawn to its draft, else to the ctc projector's text; default: as the model says."""
    static_cache: bool = False
    """Keys and values in tensors of one size, for a GPU."""
    compile: bool = False
    """With the static cache, compile the decoder's forward (GPU)."""

    def given(self) -> dict[str, Any]:
        """The values that were given."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}


@dataclass
class EvalOptions:
    """What is scored, and how."""

    runs: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="RUN [RUN ...]")] = field(
        default_factory=list)
    """Run folders of the training recipes, or folders of saved models (these need --manifest)."""
    manifest: list[Path] = field(default_factory=list)
    """Manifests to score, all of them together; default: the dev manifests of each run's config."""
    checkpoint: Literal["best", "last"] | None = None
    """Which model of a run; default: best, or last where there is no best."""
    out: Path = Path("eval/results")
    """Folder of the scores, one JSON file a run."""
    label: str = ""
    """Added to the names of runs in the table and of score files, e.g. to keep --force-task apart."""
    force_task: bool = False
    """Force the control token of the task that is scored."""
    probabilities: bool = False
    """Also give every label of tasks with one label an utterance its probability, and score and plot their calibration."""
    decode: DecodeFlags = field(default_factory=DecodeFlags)
    precision: Literal["fp32", "bf16"] | None = None
    """Default: what the run was trained in; fp32 for a model folder."""
    limit: int = 0
    """Score at most this many samples of each manifest, evenly spread; 0 means all."""
    threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""
    again: bool = False
    """Decode anew even where predictions of exactly this model, manifest and decoding exist."""
