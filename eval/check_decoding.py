"""Check what decoding promises: no malformed answer with the grammar, and batches that change nothing.

    python eval/check_decoding.py malformed                                      # random models, no download
    python eval/check_decoding.py batching --model runs/my-run runs/my-other-run   # trained models, real clips

Results go to eval/results; see eval/README.md.
"""

from __future__ import annotations

import sys

import tyro

from unislu_llm.analysis.benchmark_options import CheckBatching, CheckMalformed


def main() -> int:
    """Parse the command line and run one check."""
    options = tyro.extras.subcommand_cli_from_dict({"malformed": CheckMalformed, "batching": CheckBatching},
                                                   description=str(__doc__), config=(tyro.conf.FlagCreatePairsOff,))
    from unislu_llm.analysis.check_decoding import run  # after --help, which should not wait for torch

    return run(options, ["eval/check_decoding.py", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
