"""Train the baseline: Whisper's own decoder on the same data, format, loss and loop.

    accelerate launch recipes/train_whisper.py                               # quick start: mini corpus, Whisper base
    accelerate launch recipes/train_whisper.py --encoder openai/whisper-small --train.loss uniform
    accelerate launch recipes/train_whisper.py --config my.yaml --output runs/mine

`--help` lists every setting; recipes/configs/quickstart_whisper.yaml is the config used without --config.
"""

from __future__ import annotations

from pathlib import Path

from unislu_llm.training.config import load_config
from unislu_llm.training.entry import run_recipe

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Parse the command line and train."""
    config = HERE / "configs" / "quickstart_whisper.yaml"
    run_recipe("whisper_slu", lambda: load_config(None, config, None, str(__doc__)))


if __name__ == "__main__":
    main()
