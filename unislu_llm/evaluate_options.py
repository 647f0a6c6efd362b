"""The options of `unislu evaluate`, apart from what it runs: its `--help` does not load torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from unislu_llm.config import DecodeConfig
from unislu_llm.flags import refuse_repeats
from unislu_llm.setting_types import Precision


def _flag(name: str, setting: FieldInfo) -> tuple[Any, Any]:
    # A switch is left out by not being given; other values need a None that says so.
    switch = setting.annotation is bool
    kind: Any = bool if switch else setting.annotation | None  # type: ignore[operator]
    if name in ("force_task", "phrases", "phrase_boost"):
        kind = Annotated[kind, tyro.conf.arg(aliases=[f"--{name}".replace("_", "-")])]
    return kind, Field(False if switch else None, description=setting.description)


DecodeFlags = create_model(
    "DecodeFlags", **{name: _flag(name, setting)  # type: ignore[call-overload]
                      for name, setting in DecodeConfig.model_fields.items()})
"""The settings of :class:`~unislu_llm.config.DecodeConfig`, each of which may be left out."""


@dataclass
class Options:
    """What is scored, and how."""

    runs: Annotated[tyro.conf.Positional[list[str]],
                    tyro.conf.arg(metavar="RUN [RUN ...]",
                                  help_behavior_hint="")] = field(default_factory=list)
    """Run folders of the recipes, or saved models: folders, or names on the Hugging Face hub (these
    need --manifest)."""
    manifest: list[Path] = field(default_factory=list)
    """Manifests to score, all of them together; default: the dev manifests of each run."""
    checkpoint: Literal["best", "last"] | None = None
    """Which model of a run; default: best, or last where there is no best."""
    out: Path = Path("eval/results")
    """Folder of the scores, one JSON file a run."""
    label: str = ""
    """Added to the names of runs in tables and files, e.g. to keep --force-task apart."""
    decode: DecodeFlags = field(default_factory=DecodeFlags)  # type: ignore[valid-type]
    """What is not given stays as in the run's config."""
    precision: Precision | None = None
    """Default: what the run was trained in; fp32 for a model folder."""
    limit: int = 0
    """Score at most so many examples of each manifest, evenly spread; 0 means all."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""
    again: bool = False
    """Decode anew even where predictions of this model, manifest and decoding exist."""


def parse_options(args: Sequence[str], description: str, prog: str | None = None) -> Options:
    """Options of a command line; raises UserError: a list flag is there twice."""
    refuse_repeats(args, Options)
    return tyro.cli(Options, args=args, prog=prog, description=description,
                    config=(tyro.conf.FlagCreatePairsOff,))
