"""Decode and score trained models under both protocols.

    python eval/evaluate.py runs/my-run                          # its dev manifests, its best model
    python eval/evaluate.py runs/a runs/b --manifest test.jsonl  # several runs, one table
    python eval/evaluate.py runs/a --checkpoint last --force-task --decode.grammar

Predictions go to the run folder, scores to eval/results; see eval/README.md.
"""

from __future__ import annotations

import tyro

from unislu_llm.evaluate import Options, evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate(tyro.cli(Options, description=str(__doc__),
                                       config=(tyro.conf.FlagCreatePairsOff,))))
