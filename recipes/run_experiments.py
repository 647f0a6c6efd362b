"""Run what is missing of an experiment file and rewrite its table.

    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA          # all that is missing
    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA --only whisper-dynamic
    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA --size full   # on a GPU
    python recipes/run_experiments.py recipes/experiments/slue_voiced.yaml --data DATA --status

Run it from the project's folder. A stopped run goes on with the same command; runs are logged in the output folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Options:
    """What is run."""

    experiment: Annotated[Path, tyro.conf.Positional]
    """Experiment file."""
    data: str = ""
    """Folder of the corpora: what ${data} in the file stands for."""
    size: str = ""
    """One of the file's sizes; default: as the file is, small."""
    only: list[str] = field(default_factory=list)
    """Names of systems; default: all."""
    status: bool = False
    """Say what is finished, and run nothing."""


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    options = tyro.cli(Options, description=str(__doc__), config=(tyro.conf.FlagCreatePairsOff,))
    from unislu_llm.analysis.experiments import read_experiment  # after --help, which should not wait for torch
    from unislu_llm.analysis.runner import run_experiment, status
    from unislu_llm.errors import UserError

    try:
        experiment = read_experiment(options.experiment, options.data, options.size)
        if options.status:
            print("\n".join(f"{name:<40} {text}" for name, text in status(experiment)))
            return 0
        return run_experiment(experiment, options.only)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
