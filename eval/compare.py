"""Compare systems, the baseline first, and write the report: `unislu compare` as a script.

    python eval/compare.py runs/my-baseline runs/my-run                      # verdict and scores
    python eval/compare.py runs/my-baseline runs/my-run --out runs/report    # all of the report

See eval/README.md.
"""

from __future__ import annotations

import sys

from unislu_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["compare", *sys.argv[1:]]))
