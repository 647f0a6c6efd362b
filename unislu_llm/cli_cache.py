"""`unislu cache build|info|clear`: the frames of a frozen encoder, stored before training. See docs/cache.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from unislu_llm.errors import UserError

if TYPE_CHECKING:
    from unislu_llm.models.encoder import SpeechEncoder
    from unislu_llm.training.config import Config
    from unislu_llm.utterance import Utterance


def build(source: Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CONFIG")],
          manifests: Annotated[list[Path], tyro.conf.arg(metavar="[MANIFEST ...]")] = [], /,  # noqa: B006
          folder: Path | None = None, dtype: Literal["fp16", "bf16", "fp32"] | None = None, gib: float | None = None,
          encoder: str | None = None, precision: Literal["fp32", "bf16"] | None = None,
          kind: Literal["speech_llm", "whisper_slu"] = "speech_llm", batch_size: int = 16, threads: int = 0) -> int:
    """Compute and store the frames of all clips. It can be stopped and started again, also several at once.

    Args:
        source: Run folder, or config file of a recipe: says encoder, precision, manifests and cache.
        manifests: JSON-lines files; default: data.train of the config.
        folder: Of the cache; default: data.encoder_cache of the config.
        dtype: How frames are kept; default: data.cache_dtype of the config.
        gib: Size of the folder at most; default: data.cache_gib of the config.
        encoder: Whisper checkpoint; default: model.encoder of the config.
        precision: That training computes in; default: train.precision of the config.
        kind: Decoder it is for; with bf16 alone, LLM and Whisper runs have other frames.
        batch_size: Clips encoded at one time.
        threads: CPU threads; 0 takes all cores this process may use.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, found {batch_size}")
    import torch

    from unislu_llm.models import frames
    from unislu_llm.training.plan import use_threads

    config = _config(source)
    config.data.encoder_cache = str(folder or config.data.encoder_cache)
    if not config.data.encoder_cache:
        raise UserError(f"{source} names no data.encoder_cache; give --folder")
    config.data.cache_dtype = dtype or config.data.cache_dtype
    config.data.cache_gib = config.data.cache_gib if gib is None else gib
    config.model.encoder = encoder or config.model.encoder
    config.train.precision = precision or config.train.precision
    use_threads(threads)
    utterances = _utterances(config, [str(path) for path in manifests])
    module = _encoder(config, torch.bfloat16 if config.train.precision == "bf16" and kind == "speech_llm" else torch.float32)
    cache = frames.open_cache(config.data.encoder_cache, module, config.train.precision, config.data.cache_dtype,
                              config.data.cache_gib, config.model.encoder)
    new, known = frames.build(cache, module, utterances, batch_size=batch_size)
    print(f"{new} clips stored, {known} were there")
    return info(cache.folder)


def info(folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")], /) -> int:
    """Print what a cache folder holds, a line for each encoder and its settings.

    Args:
        folder: Of the cache.
    """
    from tabulate import tabulate

    from unislu_llm.data.cache import describe_folder

    rows = [{"key": row["folder"], "encoder": row["encoder"], "precision": row["precision"], "30 s": row["pad_to_30s"],
             "stored as": row["dtype"], "clips": row["clips"], "hours": f"{row['hours']:.2f}", "GiB": f"{row['gib']:.3f}"}
            for row in describe_folder(folder)]
    print(tabulate(rows, headers="keys", disable_numparse=True))
    return 0


def clear(folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")], /, key: str = "") -> int:
    """Delete the frames in a cache folder. Nothing else in it is touched; what a running process needs is computed again.

    Args:
        folder: Of the cache.
        key: Of one encoder, or its beginning, as `unislu cache info` prints it; default: all.
    """
    from unislu_llm.data.cache import clear_folder

    print(f"{clear_folder(folder, key) / 2**30:.3f} GiB freed")
    return 0


COMMANDS: dict[str, Any] = {"build": build, "info": info, "clear": clear}
"""Subcommands."""


def main_cache(argv: Sequence[str] | None = None) -> int:
    """Run `unislu cache` on its arguments; returns the exit status, 2 for bad input (one `error:` line on stderr)."""
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=None if argv is None else list(argv), prog="unislu cache", config=(tyro.conf.FlagCreatePairsOff,),
            description="Keep the frames of a frozen encoder, so that training does not compute them in every epoch.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return status


def _config(source: Path) -> Config:
    from unislu_llm.training.config import Config, apply, apply_file, read_yaml

    config = Config()
    run = source / "config.yaml"
    if run.is_file():  # paths in it are as the run was given them
        apply(config, read_yaml(run), str(run))
    elif source.is_dir():
        raise UserError(f"{source}: no run folder (it has no config.yaml)")
    else:
        apply_file(config, source)
    return config


def _utterances(config: Config, manifests: list[str]) -> list[Utterance]:
    """Each utterance once, though it may be several samples."""
    from unislu_llm.training.build import build_registry, load_samples

    registry, data = build_registry(config), config.data
    samples = load_samples(manifests or data.train, registry, max_seconds=data.max_seconds, long_audio=data.long_audio)
    return list({id(s.utterance): s.utterance for s in samples}.values())


def _encoder(config: Config, dtype: Any) -> SpeechEncoder:
    """The encoder as training has it, on the GPU where there is one, without its decoder."""
    import torch
    from transformers import WhisperModel
    from transformers.utils.logging import disable_progress_bar

    from unislu_llm.models import weights
    from unislu_llm.models.encoder import SpeechEncoder

    disable_progress_bar()
    if config.model.encoder_mode != "frozen":
        raise UserError(f"model.encoder_mode is '{config.model.encoder_mode}': only a frozen encoder's frames can be kept")
    path = weights.resolve(config.model.encoder).path
    whisper: Any = WhisperModel.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").encoder
    encoder = SpeechEncoder(whisper.to(dtype), "frozen", pad_to_30s=config.model.pad_to_30s).eval()
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    raise SystemExit(main_cache())
