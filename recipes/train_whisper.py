"""Train the baseline: Whisper's own decoder, on the same data, in the same format and loss.

    accelerate launch recipes/train_whisper.py                            # quick start: mini corpus
    accelerate launch recipes/train_whisper.py --encoder openai/whisper-small --train.loss uniform
    accelerate launch recipes/train_whisper.py --config my.yaml --output runs/mine

`--help` lists every setting; recipes/configs/whisper.yaml is the config without --config.
"""

from __future__ import annotations

from pathlib import Path

from unislu_llm.errors import reported

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Parse the command line and train."""
    with reported():
        from unislu_llm.config_file import load_config

        config = load_config(None, HERE / "configs" / "whisper.yaml", None, str(__doc__))
        # After --help, which should not wait for torch.
        from unislu_llm.training.stages import train

        train("whisper_slu", config, Path(__file__).stem)


if __name__ == "__main__":
    main()
