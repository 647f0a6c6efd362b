"""Decode and score trained models under both protocols: `unislu evaluate` as a script.

    python eval/evaluate.py runs/my-run                          # its dev manifests, its best model
    python eval/evaluate.py runs/a runs/b --manifest test.jsonl  # several runs, one table

Predictions go to the run folder, scores to eval/results; see eval/README.md.
"""

from __future__ import annotations

import sys

from unislu_llm.errors import reported
from unislu_llm.run_commands import evaluate

if __name__ == "__main__":
    with reported():
        raise SystemExit(evaluate(sys.argv[1:], "eval/evaluate.py"))
