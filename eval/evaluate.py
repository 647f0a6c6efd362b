"""Decode and score trained models under both protocols.

    python eval/evaluate.py runs/my-run                                    # its dev manifests, its best checkpoint
    python eval/evaluate.py runs/a runs/b --manifest test.jsonl            # several runs, one table
    python eval/evaluate.py runs/a --checkpoint last --force-task --decode.batch-size 32

Predictions go to the run folder, scores to eval/results; see eval/README.md.
"""

from __future__ import annotations

import sys

import tyro

from unislu_llm.analysis.options import EvalOptions


def main() -> int:
    """Parse the command line and evaluate."""
    options = tyro.cli(EvalOptions, description=str(__doc__), config=(tyro.conf.FlagCreatePairsOff,))
    from unislu_llm.analysis.evaluate import evaluate  # after --help, which should not wait for torch

    return evaluate(options, ["eval/evaluate.py", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
