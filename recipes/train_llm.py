"""Train a Whisper encoder with an LLM decoder on corpora in the unified format.

    accelerate launch recipes/train_llm.py                                   # quick start: mini corpus, SmolLM2-135M
    accelerate launch recipes/train_llm.py --llm google/gemma-3-270m         # another backbone, its preset from adapters/
    accelerate launch recipes/train_llm.py --projector qformer --train.epochs 20
    accelerate launch recipes/train_llm.py --config my.yaml --output runs/mine
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/train_llm.py # two processes on a CPU

`--help` lists every setting; recipes/configs/quickstart_llm.yaml is the config used without --config.
"""

from __future__ import annotations

from pathlib import Path

from unislu_llm.training.config import load_config
from unislu_llm.training.entry import run_recipe

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Parse the command line and train."""
    config = HERE / "configs" / "quickstart_llm.yaml"
    run_recipe("speech_llm", lambda: load_config(None, config, HERE.parent / "adapters", str(__doc__)))


if __name__ == "__main__":
    main()
