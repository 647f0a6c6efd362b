"""From a command line to a run: `unislu train`, and the scripts of `recipes/`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from pydantic import Field

from unislu_llm.config_file import (
    config_from_file,
    config_of_run,
    first_flags,
    load_config,
    resumed_run,
    shipped,
)
from unislu_llm.errors import UserError, hint, launched, quiet_libraries
from unislu_llm.io import RUN_CONFIG, kind_of_run


class Recipe(NamedTuple):
    """What a decoder's runs are called."""

    kind: str  # of the model
    name: str  # start of the default run folder's name


RECIPES = {"llm": Recipe("speech_llm", "train_llm"), "whisper": Recipe("whisper_slu",
                                                                       "train_whisper")}
"""By decoder: an LLM behind Whisper's encoder, or Whisper's own, the baseline."""


def default_config(decoder: str, argv: Sequence[str]) -> Path:
    """The config without `--config`: the shipped adapter's, or one that starts from nothing."""
    configs = shipped() / "recipes" / "configs"
    if decoder == "whisper":
        return configs / "whisper.yaml"
    # An installed package has no adapters: they are larger than all the rest of it.
    adapter, scratch = (configs / f"from_{name}.yaml" for name in ("adapter", "scratch"))
    if not (shipped() / "adapters" / "whisper-base--smollm2-135m").is_dir():
        return scratch
    asked = {key: value for key in ("adapter", "llm", "encoder", "projector")
             if (value := getattr(first_flags(argv), key))}
    if not asked:
        return adapter
    # The adapter's own parts may be named as well.
    model = config_from_file(adapter).model
    return adapter if all(getattr(model, key, None) == asked[key] for key in asked) else scratch


def run_recipe(argv: Sequence[str], description: str, prog: str | None = None,
               decoder: str = "") -> Path:
    """Parse a command line and train; returns the run folder, which `--plan` does not make.

    Args:
        argv: command line without the program.
        description: shown by `--help`.
        prog: name of the program in `--help`; default: the script's.
        decoder: key of :data:`RECIPES`; empty makes it a flag, `--decoder`.

    Raises UserError: bad flags, configuration or data.
    """
    extra: dict[str, Any] = {"plan": (tyro.conf.FlagCreatePairsOff[bool], Field(
        False, description="Print what the run would take (memory, time), and train nothing."))}
    resumed = resumed_run(argv)
    if not decoder:
        decoder = _decoder_of(argv, kind_of_run(resumed) if resumed else "")
        extra["decoder"] = (Literal["llm", "whisper"], Field(decoder, description=(
            "An LLM behind Whisper's encoder, or Whisper's own decoder, the baseline.")))
    told: list[str] = []
    default = resumed / RUN_CONFIG if resumed else default_config(decoder, argv)
    config = load_config(argv, default, shipped() / "adapters" if decoder == "llm" else None,
                         description, prog=prog, extra=extra, say=told.append)
    mini = shipped() / "recipes" / "data" / "mini"
    for path in map(Path, (*config.data.train, *config.data.dev, *config.data.guard)):
        if path.is_relative_to(mini.resolve()) and not path.is_file():
            raise UserError(f"{path}: the mini corpus is not there; give corpora of your own by "
                            "--data.train FILE... --data.dev FILE...")
    quiet_libraries()
    if os.environ.get("RANK", "0") == "0":
        print(*told, sep="\n", flush=True)
    # After --help, which should not wait for torch.
    import torch

    kind, name = RECIPES[decoder]
    if "--plan" in argv:
        from unislu_llm.training.plan import plan

        print(plan(kind, config))
        return Path(config.output)
    from unislu_llm.training.stages import train

    if (cards := torch.cuda.device_count()) > 1 and not launched():
        print(f"one of {cards} GPUs is used; `accelerate launch -m unislu_llm.cli train ...` uses "
              "them all", flush=True)
    return train(kind, config, name)


def _decoder_of(argv: Sequence[str], kind: str) -> str:
    """The value of `--decoder`, which chooses the defaults of all other flags; default: the one of
    the `kind` of the run that is resumed."""
    own = next((name for name, recipe in RECIPES.items() if recipe.kind == kind), "llm")
    given = first_flags(argv).decoder
    decoder: str = own if given is None else given
    if decoder not in RECIPES:
        raise UserError(f"--decoder: '{decoder}' is not one of {', '.join(RECIPES)}"
                        f"{hint(decoder, RECIPES)}")
    return decoder


def fill_cache(source: Path, folder: Path | None, decoder: str) -> int:
    """Store encoder frames of the training clips of a run or config; returns how many were made.

    Raises UserError: no such config, no folder for the cache, an encoder that trains, bad audio.
    """
    import torch
    from transformers import WhisperModel
    from transformers.utils.logging import disable_progress_bar

    from unislu_llm.data.frame_cache import FrameCache, build_frames, encoder_settings
    from unislu_llm.data.loading import load_examples
    from unislu_llm.models.encoder import SpeechEncoder
    from unislu_llm.training.build import build_registry
    from unislu_llm.weights import from_pretrained, resolve

    run = (source / RUN_CONFIG).is_file()
    config = config_of_run(source) if run else config_from_file(source)
    model, data, precision = config.model, config.data, config.train.precision
    if not (home := folder or data.frame_cache):
        raise UserError(f"{source} names no data.frame_cache; give --folder")
    examples = load_examples(data.train, build_registry(config), language=model.language)
    clips = [example.utterance for example in examples]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_progress_bar()  # of the checkpoint's tensors
    whisper: Any = from_pretrained(WhisperModel, resolve(model.encoder).path, dtype=torch.float32,
                                   attn_implementation="sdpa")
    # As the models build their encoders: frames of another dtype would not be found again.
    half = precision == "bf16" and decoder == "llm"
    encoder = SpeechEncoder(whisper.encoder.to(torch.bfloat16 if half else torch.float32),
                            model).eval().to(device)
    return build_frames(FrameCache(home, encoder_settings(encoder, precision)), encoder, clips,
                        device=device, progress="encode")
