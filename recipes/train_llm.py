"""Train an LLM behind a Whisper encoder, on corpora in the unified format.

    accelerate launch recipes/train_llm.py                              # quick start: mini corpus
    accelerate launch recipes/train_llm.py --data.train a.jsonl --data.dev b.jsonl  # your corpus
    accelerate launch recipes/train_llm.py --llm google/gemma-3-270m    # another LLM, from nothing
    accelerate launch recipes/train_llm.py --config my.yaml --output runs/mine
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/train_llm.py   # two CPU processes

Without --config it goes on from the adapter that ships (recipes/configs/from_adapter.yaml). A flag
that names another LLM, encoder, projector, preset or list of tasks leaves it nothing to go on from:
then recipes/configs/from_scratch.yaml is the config. `--help` lists every setting.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from unislu_llm.errors import reported

HERE = Path(__file__).resolve().parent
PARTS = ("--llm", "--encoder", "--projector", "--adapter", "--data.tasks",
         "--model.llm", "--model.encoder", "--model.projector")
"""Flags that ask for other parts than the adapter's."""


def default_config(argv: Sequence[str]) -> Path:
    """The config without `--config`: the shipped adapter's, or the one that starts from nothing."""
    other = any(word.partition("=")[0] in PARTS for word in argv)
    return HERE / "configs" / ("from_scratch.yaml" if other else "from_adapter.yaml")


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
