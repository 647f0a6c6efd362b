"""Plot a dev score of runs over their training, from their logs, and tell when each reaches the best of one of them.

    python eval/curves.py runs/a runs/b --out eval/results/curves.svg       # WER by step; points go to curves.json
    python eval/curves.py runs/a runs/b --score ner_f1 --x minutes
    python eval/curves.py runs/mlp runs/ctc --reach mlp                     # in what share of its steps

Reads logs, no models; see eval/README.md.
"""

from __future__ import annotations

import sys

import tyro

from unislu_llm.analysis.curve_options import CurveOptions


def main() -> int:
    """Parse the command line and report."""
    options = tyro.cli(CurveOptions, description=str(__doc__), config=(tyro.conf.FlagCreatePairsOff,))
    from unislu_llm.analysis.curve_report import report  # after --help, which should not wait for torch

    return report(options, ["eval/curves.py", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
