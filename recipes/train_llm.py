"""Train an LLM behind a Whisper encoder, on corpora in the unified format.

    accelerate launch recipes/train_llm.py                              # quick start: mini corpus
    accelerate launch recipes/train_llm.py --data.train a.jsonl --data.dev b.jsonl  # your corpus
    accelerate launch recipes/train_llm.py --data.tasks t.yaml ...      # labels of your own
    accelerate launch recipes/train_llm.py --llm google/gemma-3-270m    # another LLM, from nothing
    accelerate launch recipes/train_llm.py --config my.yaml --output runs/mine
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/train_llm.py   # two CPU processes

Without --config it goes on from the adapter that ships (recipes/configs/from_adapter.yaml), also
with other tasks. A flag that names another LLM, encoder, projector or preset leaves it nothing to
go on from: then recipes/configs/from_scratch.yaml is the config. `--help` lists every setting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unislu_llm.errors import reported

HERE = Path(__file__).resolve().parent


def default_config(argv: Sequence[str]) -> Path:
    """The config without `--config`: the shipped adapter's, or the one that starts from nothing."""
    from unislu_llm.config_file import config_from_file

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--adapter")
    for part in ("llm", "encoder", "projector"):
        parser.add_argument(f"--{part}", f"--model.{part}", dest=part)
    asked = {key: value for key, value in vars(parser.parse_known_args(argv)[0]).items() if value}
    shipped, scratch = (HERE / "configs" / f"from_{name}.yaml" for name in ("adapter", "scratch"))
    if not asked:
        return shipped
    # The adapter's own parts may be named as well.
    model = config_from_file(shipped).model
    return shipped if all(getattr(model, key, None) == asked[key] for key in asked) else scratch


def main() -> None:
    """Parse the command line and train."""
    with reported():
        from unislu_llm.config_file import load_config

        config = load_config(None, default_config(sys.argv[1:]), HERE.parent / "adapters",
                             str(__doc__))
        # After --help, which should not wait for torch.
        from unislu_llm.training.stages import train

        train("speech_llm", config, Path(__file__).stem)


if __name__ == "__main__":
    main()
