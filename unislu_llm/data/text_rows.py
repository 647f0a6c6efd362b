"""Rows without audio as training samples: of a `ctc` model, which has posteriors simulated from their transcripts (docs/ctc.md),
or of a model without speech, which reads their drafts alone (docs/drafts.md).

What is simulated for a sample follows from (seed, epoch, sample, how often the epoch has drawn it before) alone, as in
:mod:`unislu_llm.data.augment`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from unislu_llm.data.augment import Key
from unislu_llm.data.simulate import SimulationOptions, SparsePosteriors, simulate_sparse
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError, hint

SIMULATION_FILE = "simulation.json"
_SIMULATE = 208  # last word of a seed, beside those of augment.py and draft_dropout.py
_CHARACTERS_PER_SECOND = 15.0  # a guess at speech; it only decides which samples share a batch


class TextSimulator:
    """Posteriors of samples without audio.

    Args:
        options: rates. classes: of a transcript, in the projector's vocabulary. size: of that vocabulary.
        frame_seconds: length of a CTC frame.
    """

    def __init__(self, options: SimulationOptions, classes: Callable[[str], list[int]], size: int, frame_seconds: float) -> None:
        self.options, self.classes, self.size, self.frame_seconds = options, classes, size, frame_seconds

    def __call__(self, sample: Sample, key: Key) -> SparsePosteriors:
        """Drawn anew for each key."""
        generator = torch.Generator().manual_seed(int(key.rng(_SIMULATE).integers(2**63)))
        return simulate_sparse(self.classes(sample.utterance.text), self.size, self.options, generator)

    def seconds(self, sample: Sample) -> float:
        """Audio that a sample stands for, as its expected number of frames."""
        return self.frame_seconds * self.options.expected_frames(len(self.classes(sample.utterance.text)))


class DraftsAlone:
    """In place of a :class:`TextSimulator` for a model that does not listen: nothing stands for the audio of its samples."""

    def __call__(self, sample: Sample, key: Key) -> None:
        """Nothing."""

    def seconds(self, sample: Sample) -> float:
        """Audio that a sample is sorted by, among those that have some."""
        return len(sample.utterance.text) / _CHARACTERS_PER_SECOND


class WithText(Dataset[tuple[Any, ...]]):
    """A data set in which items without audio have simulated posteriors. It is asked for `(index, times drawn before)`.

    Args:
        dataset: the samples' audio; asked for an index, or with `draws` for the pair itself, and gives the pair's key then.
        samples: all. simulator: of those without audio; what it gives stands for audio. seed, epoch: source of randomness.
    """

    def __init__(self, dataset: Any, samples: Sequence[Sample], simulator: TextSimulator | DraftsAlone, seed: int,
                 epoch: int, *, draws: bool = False) -> None:
        self.dataset, self.samples, self.simulator = dataset, samples, simulator
        self.seed, self.epoch, self.draws = seed, epoch, draws

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Any, ...]:
        sample = self.samples[draw[0]]
        if sample.utterance.audio is not None:
            return tuple(self.dataset[draw if self.draws else draw[0]])
        key = Key(self.seed, self.epoch, *draw)
        return (sample, self.simulator(sample, key), key) if self.draws else (sample, self.simulator(sample, key))


def save_simulation(options: SimulationOptions, folder: Path) -> None:
    """Write `simulation.json` into a folder."""
    (folder / SIMULATION_FILE).write_text(json.dumps(dataclasses.asdict(options), indent=1) + "\n", encoding="utf-8")


def read_simulation(path: Path) -> SimulationOptions:
    """What :func:`save_simulation` wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["confusions"] = {int(c): {int(k): int(n) for k, n in table.items()}
                                for c, table in values.get("confusions", {}).items()}
        return SimulationOptions(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a simulation: {error}; run the ctc stage again") from error


def with_options(fitted: SimulationOptions | None, given: dict[str, Any]) -> SimulationOptions:
    """Fitted rates (default: those of :class:`SimulationOptions`) with `data.simulate` laid over them.

    Args:
        given: rates by name, and `error_rate`, the token error rate that their errors are scaled to.

    Raises:
        UserError: an unknown or wrong option.
    """
    known = [f.name for f in dataclasses.fields(SimulationOptions) if f.name != "confusions"]
    for name, value in given.items():
        if name not in (*known, "error_rate"):
            raise UserError(f"data.simulate: unknown option '{name}'; known: {', '.join((*known, 'error_rate'))}"
                            f"{hint(name, [*known, 'error_rate'])}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"data.simulate: {name}={value!r} must be a number")
    rates: dict[str, Any] = {name: float(value) for name, value in given.items() if name != "error_rate"}
    options = dataclasses.replace(fitted or SimulationOptions(), **rates)
    return options.at_error_rate(float(given["error_rate"])) if "error_rate" in given else options
