"""A whole training run from a configuration file. Started by test_mixed_training.py, alone or by torchrun.

    python mixed_run.py CONFIG.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from unislu_llm.training.config import Config, apply
from unislu_llm.training.loop import Trainer


def main(config_file: str) -> None:
    """Train the speech LLM to the end."""
    config = Config()
    apply(config, yaml.safe_load(Path(config_file).read_text()), config_file)
    Trainer("speech_llm", config).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
