"""`unislu prepare SOURCE ...`: a corpus to a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.prepare import Conll, Csv, SlueHub, SlueVoxCeleb, SlueVoxPopuli, Source, Voice, prepare
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry


@dataclass(frozen=True)
class Options:
    """What every source takes.

    Args:
        out: The manifest to write, e.g. train.jsonl; audio paths in it are relative to it.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        corpus_name: Name of the corpus in every row; default: the source's.
        max_seconds: Longer utterances are dropped and counted; 0 keeps all.
        exclude: Manifests whose rows are left out, by id and by text: dev and test sets.
        voice: Voice the rows without audio (synthetic speech); a stopped run goes on where it was.
        voices: Names of voice variants; default: all of them.
        voice_mix: Room and noise on voiced clips: mild, multi (3 to 20 dB) or clean.
        voice_seed: Draws voices and conditions.
        voice_workers: Processes that voice.
    """

    out: Path
    tasks_file: Path | None = None
    corpus_name: str | None = None
    max_seconds: float = 30.0
    exclude: tuple[Path, ...] = ()
    voice: bool = False
    voices: tuple[str, ...] = ()
    voice_mix: Literal["mild", "multi", "clean"] = "mild"
    voice_seed: int = 0
    voice_workers: int = 1


def _command(source: type[Any]) -> Any:
    def run(source: Any, options: Options) -> int:
        return _prepare(source, options)

    unnamed = tyro.conf.arg(name="")
    run.__annotations__ = {"source": Annotated[source, unnamed], "options": Annotated[Options, unnamed], "return": int}
    run.__doc__ = (source.__doc__ or "").split(":")[0] + "."
    return run


SOURCES: dict[str, type[Any]] = {"slue-voxpopuli": SlueVoxPopuli, "slue-voxceleb": SlueVoxCeleb, "slue-hub": SlueHub,
                                 "conll": Conll, "csv": Csv}
"""Subcommands."""

COMMANDS: dict[str, Any] = {name: _command(source) for name, source in SOURCES.items()}


def main_prepare(argv: Sequence[str] | None = None) -> int:
    """Run `unislu prepare` on its arguments; returns the exit status, 2 for bad input (one `error:` line on stderr)."""
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=None if argv is None else list(argv), prog="unislu prepare",
            description="Write the manifest of a corpus, with counts of all that was read, dropped and why.",
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return status


def _prepare(source: Source, options: Options) -> int:
    registry = TaskRegistry.from_yaml(options.tasks_file) if options.tasks_file else TaskRegistry()
    if options.voices and not options.voice:
        raise UserError("--voices has no effect without --voice; add it")
    voice = Voice(options.voices, options.voice_mix, options.voice_seed, options.voice_workers) if options.voice else None
    excluded = [u for path in options.exclude for u in read_manifest(path, registry)]
    print(prepare(source, options.out, registry=registry, voice=voice, corpus=options.corpus_name,
                  max_seconds=options.max_seconds, exclude=excluded))
    return 0


if __name__ == "__main__":
    raise SystemExit(main_prepare())
