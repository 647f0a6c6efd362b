"""The commands of `unislu` that train, score and compare runs, and its version."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unislu_llm.errors import UserError
from unislu_llm.serve import Serving


def version() -> str:
    """Version, and the revision of a checkout."""
    from importlib import metadata

    from unislu_llm.io import git_revision

    try:
        number = metadata.version("unislu_llm")
    except metadata.PackageNotFoundError:  # run from its source tree
        number = "(not installed)"
    revision = git_revision()
    return f"unislu_llm {number}" + f" (git {revision})" * bool(revision)


def train(args: Sequence[str] = ()) -> int:
    """Train an LLM behind a Whisper encoder, or Whisper's own decoder (--decoder whisper).

        unislu train                                               # quick start: mini corpus
        unislu train --data.train a.jsonl --data.dev b.jsonl       # your corpus
        unislu train --llm google/gemma-3-270m                     # another LLM, from nothing
        unislu train --decoder whisper --encoder openai/whisper-small
        accelerate launch -m unislu_llm.cli train                  # several processes

    Without --config it goes on from the adapter that ships, where that is there (an installed
    package has none), also with other tasks. A flag that names another LLM, encoder, projector or
    preset leaves it nothing to go on from: then from_scratch.yaml is the config. Whisper's:
    whisper.yaml.
    """
    from unislu_llm.training.recipe import run_recipe

    run_recipe(args, str(inspect.getdoc(train)), "unislu train")
    return 0


def evaluate(args: Sequence[str] = (), prog: str = "unislu evaluate") -> int:
    """Decode and score trained models under each protocol.

        unislu evaluate runs/my-run                          # its dev manifests, its best model
        unislu evaluate runs/a runs/b --manifest test.jsonl  # several runs, one table
        unislu evaluate runs/a --checkpoint last --force-task --decode.grammar

    Predictions go to the run folder, scores to the folder --out.
    """
    from unislu_llm.evaluate_options import parse_options

    options = parse_options(args, str(inspect.getdoc(evaluate)), prog)
    from unislu_llm.evaluate import evaluate as score

    return score(options)


def compare(systems: Annotated[list[Path], tyro.conf.arg(metavar="SYSTEM [SYSTEM ...]",
                                                         help_behavior_hint="")], /,
            out: Path | None = None,
            protocol: Literal["whisper", "slue", "slurp"] = "whisper", resamples: int = 1000,
            tasks_file: Path | None = None, common: bool = False, examples: int = 10) -> None:
    """Say what other systems score more than the first, and with --out why.

    Differences have 95 % intervals (paired bootstrap). What a run has not decoded yet is decoded.
    Runs NAME-s1, NAME-s2, ... that differ in their seed alone are one system. Systems that were
    scored on other data are refused; another decoding is named.

    Args:
        systems: The baseline first: run folders (their dev manifests, by `unislu evaluate` or the
            validation of their best), score files (.json), or prediction files (.jsonl).
        out: Folder of the report: a page, tables in Markdown and LaTeX, numbers in JSON.
        protocol: How transcripts and phrases are normalised before they are compared.
        resamples: Of the bootstrap.
        tasks_file: YAML list of tasks (data.tasks of a config), where no run folder says them.
        common: Compare what all systems have; without it, other data are refused.
        examples: Utterances that differ most, in the report.
    """
    from unislu_llm.report.compare import compare

    print(compare(systems, protocol, resamples, tasks_file, common=common, examples=examples,
                  out=out))


def cache(source: Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CONFIG")], /,
          folder: Path | None = None, decoder: Literal["llm", "whisper"] = "llm") -> None:
    """Store the encoder frames of a run's training clips, which training would compute first.

    It can be stopped and started again, and runs where the training's GPU is not needed yet.

    Args:
        source: Run folder, or config file of a recipe.
        folder: Of the cache; default: data.frame_cache of the config.
        decoder: It is for; with bf16 alone, LLM and Whisper runs have other frames.
    """
    from unislu_llm.training.recipe import fill_cache

    print(f"{fill_cache(source, folder, decoder)} clips stored")


def serve(model: Annotated[str, tyro.conf.arg(metavar="MODEL", help="as of `unislu predict`")], /,
          server: Serving) -> None:
    """Answer over HTTP: /v1/audio/transcriptions as OpenAI does, /v1/understand with the tasks."""
    if min(server.batch_size, server.max_requests, server.max_mb, server.max_seconds) < 1:
        raise UserError("--batch-size and what begins with --max- must be 1 or more")
    try:
        from unislu_llm.serve import app
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'unislu_llm[serve]'") from None
    app.serve(model, server)
