"""Train the baseline: Whisper's own decoder, on the same data, in the same format and loss.

    accelerate launch recipes/train_whisper.py                            # quick start: mini corpus
    accelerate launch recipes/train_whisper.py --encoder openai/whisper-small --train.loss uniform
    accelerate launch recipes/train_whisper.py --config my.yaml --output runs/mine

`--help` lists the common settings, `--help-all` every one; recipes/configs/whisper.yaml is the
config without --config. `unislu train --decoder whisper` is the same without accelerate's launcher.
"""

from __future__ import annotations

import sys

from unislu_llm.errors import reported

if __name__ == "__main__":
    with reported():
        from unislu_llm.training.recipe import run_recipe

        run_recipe(sys.argv[1:], str(__doc__), decoder="whisper")
