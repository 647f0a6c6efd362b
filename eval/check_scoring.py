"""Check the scorers on real references: gold against gold is perfect, known corruptions give the counts known beforehand.

    python eval/check_scoring.py --tsv slue-voxpopuli_dev.tsv      # the annotation file of SLUE-VoxPopuli; no audio

What was expected and found goes to eval/results/check-scoring.json; the exit status is 1 if anything differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro


def check(tsv: Path, k: int = 200, seed: int = 0, out: Path = Path("eval/results/check-scoring.json")) -> int:
    """Parse the command line and check.

    Args:
        tsv: Annotation file of SLUE-VoxPopuli.
        k: Corruptions of each kind.
        seed: Draws what is corrupted.
        out: File of the results.
    """
    from unislu_llm.analysis.check_scoring import run_check  # after --help, which should not wait for torch

    return run_check(tsv, k, seed, out, ["eval/check_scoring.py", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(tyro.cli(check, description=str(__doc__)))
