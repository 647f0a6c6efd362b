"""Sort the errors of one or more systems by cause, and compare the systems on the same utterances.

    python eval/errors.py runs/a runs/b                                     # predictions of their dev manifests
    python eval/errors.py a.jsonl b.jsonl --out errors.md                   # files of eval/evaluate.py; also errors.json
    python eval/errors.py runs/a runs/b --manifest dev.jsonl --by condition speaker

Reads predictions, no models; see eval/README.md.
"""

from __future__ import annotations

import sys

import tyro

from unislu_llm.analysis.error_options import ErrorOptions


def main() -> int:
    """Parse the command line and report."""
    options = tyro.cli(ErrorOptions, description=str(__doc__), config=(tyro.conf.FlagCreatePairsOff,))
    from unislu_llm.analysis.error_report import report  # after --help, which should not wait for torch

    return report(options, ["eval/errors.py", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
