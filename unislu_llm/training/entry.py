"""Entry of the training recipes: errors that a user can act on are printed without a traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from unislu_llm.errors import UserError
from unislu_llm.training.config import Config


def run_recipe(kind: str, configure: Callable[[], Config]) -> None:
    """Configure, train and print the result; exits with status 2 on bad input.

    Args:
        kind: speech_llm or whisper_slu. configure: makes the configuration from the command line.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    try:
        config = configure()
        from unislu_llm.training.stages import train_run, train_stages  # after --help, which should not wait for torch

        name = Path(sys.argv[0]).stem
        if config.stages:
            run = train_stages(kind, config, name)
            if os.environ.get("RANK", "0") == "0":
                print(f"best of the last stage: {run / 'best'}")
        else:
            run = train_run(kind, config, name)
        if os.environ.get("RANK", "0") == "0":
            print(f"score it with: python eval/evaluate.py {run}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
