"""Train an LLM behind a Whisper encoder, on corpora in the unified format.

    accelerate launch recipes/train_llm.py                              # quick start: mini corpus
    accelerate launch recipes/train_llm.py --data.train a.jsonl --data.dev b.jsonl  # your corpus
    accelerate launch recipes/train_llm.py --data.tasks t.yaml ...      # labels of your own
    accelerate launch recipes/train_llm.py --llm google/gemma-3-270m    # another LLM, from nothing
    accelerate launch recipes/train_llm.py --config my.yaml --output runs/mine
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/train_llm.py   # two CPU processes

Without --config it goes on from the adapter that ships (recipes/configs/from_adapter.yaml), also
with other tasks. A flag that names another LLM, encoder, projector or preset leaves it nothing to
go on from: then recipes/configs/from_scratch.yaml is the config. `--help` lists the common
settings, `--help-all` every one. `unislu train` is the same without accelerate's launcher.
"""

from __future__ import annotations

import sys

from unislu_llm.errors import reported

if __name__ == "__main__":
    with reported():
        from unislu_llm.training.recipe import run_recipe

        run_recipe(sys.argv[1:], str(__doc__), decoder="llm")
