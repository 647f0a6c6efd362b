"""The console command `unislu`. Subcommands import what they need themselves, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from unislu_llm.cli_draft import draft
from unislu_llm.cli_export import export
from unislu_llm.cli_predict import predict
from unislu_llm.cli_validate import validate
from unislu_llm.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 2 for bad input (an `error:` on stderr), else the subcommand's."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["prepare"]:  # has subcommands of its own
        from unislu_llm.cli_prepare import main_prepare

        return main_prepare(args[1:])
    if args[:1] == ["cache"]:
        from unislu_llm.cli_cache import main_cache

        return main_cache(args[1:])
    commands: dict[str, Any] = {"predict": predict, "validate": validate, "prepare": prepare, "cache": cache, "draft": draft,
                                "export": export}
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            commands, args=args, prog="unislu", config=(tyro.conf.FlagCreatePairsOff,),
            description="Unified spoken language understanding: transcript, entities and labels from speech.")
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # `unislu ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def prepare() -> int:
    """Write the manifest of a corpus: slue-voxpopuli, slue-voxceleb, slue-hub, conll, csv."""
    from unislu_llm.cli_prepare import main_prepare

    return main_prepare(["--help"])


def cache() -> int:
    """Keep the frames of a frozen encoder for training: build, info, clear."""
    from unislu_llm.cli_cache import main_cache

    return main_cache(["--help"])


def _fail(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
