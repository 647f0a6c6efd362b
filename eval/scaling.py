"""Memory and time of training at the sizes of real backbones, counted from shapes alone.

    python eval/scaling.py    # minutes on one core; writes the table of docs/scaling.md

Micro-batches of 8 clips, with 3.3 text tokens a second, go through Whisper medium (frozen), an
`mlp` projector and an LLM on the device `meta`, as `--plan` does for a config. Nothing of it is a
measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from backbones import write_page
from benchmark import random_model
from tabulate import tabulate

from unislu_llm.errors import reported
from unislu_llm.models.base import SLUModel
from unislu_llm.tokenizer import Example
from unislu_llm.training.plan import BITS, EFFICIENCY, PEAKS, Cost, cost, memory, shapes_alone
from unislu_llm.utterance import Utterance

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
SIZES = (("0.5 B", "qwen2.5-0.5b", "none"), ("7 B", "qwen2.5-7b", "none"),
         ("7 B, 4-bit", "qwen2.5-7b", "4bit"), ("70 B, 4-bit", "llama-70b", "4bit"))
CLIPS, HOURS, GPUS = 8, (27, 1000), (8, 64)
MEAN, LONG = 9.2, 20.0  # seconds of SLUE's clips; batches are of like length


def count(model: SLUModel, seconds: float) -> Cost:
    """Cost of a micro-batch of clips of this length."""
    # The tokenizer of random models spells: a letter and a blank are two tokens.
    text = " ".join("a" * round(1.65 * seconds))
    examples = [Example(Utterance(f"{i}", None, text), None) for i in range(CLIPS)]
    wave = torch.zeros(int(16_000 * seconds))
    return cost(model, model.collator().from_waves(examples, [wave] * CLIPS))


def rows() -> Iterator[list[object]]:
    """A row for each size, with and without gradient checkpointing."""
    for (name, llm, kind), again in product(SIZES, (False, True)):
        with shapes_alone():
            model = random_model("medium", llm, "mlp", "bf16", 0, "meta")
        if again:
            model.enable_gradient_checkpointing()
        usual, largest = count(model, MEAN), count(model, LONG)
        flops = (usual.forward + usual.backward) / (CLIPS * MEAN)  # of a second of audio
        # bitsandbytes' weights are not sharded: each GPU has all of them.
        shared = [memory(model, largest, n) if kind == "none" else None for n in GPUS]
        yield [name, "yes" if again else "no", memory(model, largest, 1, BITS[kind]), *shared,
               *(hours * flops / (PEAKS["H100"] * EFFICIENCY) for hours in HOURS)]


def main() -> None:
    """Write the table."""
    head = ["LLM", "checkpointing", "GiB", *(f"GiB each, FSDP2 on {n}" for n in GPUS),
            *(f"GPU-hours, {h:,} h" for h in HOURS)]
    text = tabulate(list(rows()), head, tablefmt="github", floatfmt=".3g", missingval="-")
    write_page(f"{text}\n", PAGE, "eval/scaling.py")
    print(text)


if __name__ == "__main__":
    with reported():
        main()
