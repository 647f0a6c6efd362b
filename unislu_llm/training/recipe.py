"""From a command line to a run: `unislu train`, and the scripts of `recipes/`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from unislu_llm.config_file import config_from_file, load_config, shipped
from unislu_llm.errors import UserError, hint, launched, quiet_libraries


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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--adapter")
    for part in ("llm", "encoder", "projector"):
        parser.add_argument(f"--{part}", f"--model.{part}", dest=part)
    asked = {key: value for key, value in vars(parser.parse_known_args(argv)[0]).items() if value}
    if not asked:
        return adapter
    # The adapter's own parts may be named as well.
    model = config_from_file(adapter).model
    return adapter if all(getattr(model, key, None) == asked[key] for key in asked) else scratch


def run_recipe(argv: Sequence[str], description: str, prog: str | None = None,
               decoder: str = "") -> Path:
    """Parse a command line and train; returns the run folder.

    Args:
        argv: command line without the program.
        description: shown by `--help`.
        prog: name of the program in `--help`; default: the script's.
        decoder: key of :data:`RECIPES`; empty makes it a flag, `--decoder`.

    Raises UserError: bad flags, configuration or data.
    """
    extra: dict[str, Any] = {}
    if not decoder:
        decoder = _decoder_of(argv)
        extra["decoder"] = (Literal["llm", "whisper"], Field(decoder, description=(
            "An LLM behind Whisper's encoder, or Whisper's own decoder, the baseline.")))
    told: list[str] = []
    config = load_config(argv, default_config(decoder, argv),
                         shipped() / "adapters" if decoder == "llm" else None, description,
                         prog=prog, extra=extra, say=told.append)
    mini = shipped() / "recipes" / "data" / "mini"
    for path in map(Path, (*config.data.train, *config.data.dev)):
        if path.is_relative_to(mini.resolve()) and not path.is_file():
            raise UserError(f"{path}: the mini corpus is not there; give corpora of your own by "
                            "--data.train FILE... --data.dev FILE...")
    quiet_libraries()
    main = os.environ.get("RANK", "0") == "0"
    if main:
        print(*told, sep="\n", flush=True)
    # After --help, which should not wait for torch.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from unislu_llm.training.stages import train

    if not main:  # each process would show the same bars of loading
        disable_progress_bar()
    if (cards := torch.cuda.device_count()) > 1 and not launched():
        print(f"one of {cards} GPUs is used; `accelerate launch -m unislu_llm.cli train ...` uses "
              "them all", flush=True)
    kind, name = RECIPES[decoder]
    return train(kind, config, name)


def _decoder_of(argv: Sequence[str]) -> str:
    """The value of `--decoder`, which chooses the defaults of all other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--decoder", nargs="?", default="llm", const="")
    decoder: str = parser.parse_known_args(argv)[0].decoder
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

    from unislu_llm.data.frame_cache import FrameCache, build_frames, encoder_settings
    from unislu_llm.data.loading import load_examples
    from unislu_llm.models.encoder import SpeechEncoder
    from unislu_llm.training.build import build_registry
    from unislu_llm.weights import from_pretrained, resolve

    run = source / "config.yaml"  # its paths are as the run was given them
    config = config_from_file(run, resolve=False) if run.is_file() else config_from_file(source)
    model, data, precision = config.model, config.data, config.train.precision
    if not (home := folder or data.frame_cache):
        raise UserError(f"{source} names no data.frame_cache; give --folder")
    examples = load_examples(data.train, build_registry(config))
    clips = [example.utterance for example in examples]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whisper: Any = from_pretrained(WhisperModel, resolve(model.encoder).path, dtype=torch.float32,
                                   attn_implementation="sdpa")
    # As the models build their encoders: frames of another dtype would not be found again.
    half = precision == "bf16" and decoder == "llm"
    encoder = SpeechEncoder(whisper.encoder.to(torch.bfloat16 if half else torch.float32),
                            model).eval().to(device)
    return build_frames(FrameCache(home, encoder_settings(encoder, precision)), encoder, clips,
                        device=device, progress="encode")
