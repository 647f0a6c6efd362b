"""Measure speed and memory.

    python eval/benchmark.py decode --model runs/my-run      # decoding, beside transformers' own generate
    python eval/benchmark.py train                           # training, beside the speech LLM classes of transformers
    python eval/benchmark.py cache                           # losses and time of training with and without the encoder cache

Results go to eval/results; see eval/README.md.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import tyro

from unislu_llm.analysis.benchmark_options import CacheBenchmark, DecodeBenchmark, TrainBenchmark

SUBCOMMANDS: dict[str, Any] = {"decode": DecodeBenchmark, "train": TrainBenchmark,
                               "cache": CacheBenchmark}
"""Name to settings; `unislu_llm.analysis.benchmark_<name>` has `run(options, command) -> exit status`."""


def main() -> int:
    """Parse the command line and run one benchmark."""
    options = tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, description=str(__doc__),
                                                   config=(tyro.conf.FlagCreatePairsOff,))
    name = next(name for name, kind in SUBCOMMANDS.items() if isinstance(options, kind))
    # After --help, which should not wait for torch.
    return importlib.import_module(f"unislu_llm.analysis.benchmark_{name}").run(options, ["eval/benchmark.py", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
