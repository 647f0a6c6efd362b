"""Recall of spoken slot values, on speech that is annotated with values and has no transcripts.

    python eval/values_said.py orders.jsonl --models openai/whisper-base runs/recogniser

A guard for recognisers: what tuning on one domain costs elsewhere. A row names its `audio` and
`slots`, a value each as it was said; a value is found where its words stand in the transcript, both
under Whisper's normaliser. Differences are to the first model, intervals over clips, paired.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tabulate import tabulate

from unislu_llm.decoding.hypotheses import load_recogniser, recognise
from unislu_llm.errors import reported
from unislu_llm.io import portable, read_json_lines, write_json
from unislu_llm.run_folder import versions
from unislu_llm.scoring.bootstrap import Counts, bootstrap, error_rate
from unislu_llm.scoring.text import normalise_phrase, places_of
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance
from unislu_llm.weights import fast_type


@dataclass
class Options:
    """What is measured."""

    manifest: tyro.conf.Positional[Path]
    """JSON lines with `id`, `audio` and `slots`."""
    models: list[str]
    """Recognisers: Whisper, or saved models."""
    limit: int = 0
    """Clips at most, evenly spread; 0: all."""
    out: Path | None = None
    """File of the result."""


def counts(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> Counts:
    """Values found and said, `(clips, 2)`; the score is their ratio in percent, as WER's is."""
    matrix = []
    for row, text in zip(rows, texts, strict=True):
        values = [normalise_phrase(value, "whisper") for value in row["slots"].values()]
        said = normalise_phrase(text, "whisper")
        matrix.append([sum(any(places_of(value, said)) for value in values), len(values)])
    return Counts(tuple(("", str(row["id"])) for row in rows), np.array(matrix), error_rate)


def transcripts(name: str, clips: Sequence[Utterance]) -> list[str]:
    """What a recogniser makes of clips."""
    dtype = fast_type(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        made = dict(recognise(load_recogniser(name, dtype=dtype), clips, TaskRegistry(),
                              batch_size=16, progress=name))
    return [made[i].text for i in range(len(clips))]


def measure(options: Options) -> list[dict[str, Any]]:
    """A row a model."""
    rows = list(read_json_lines(options.manifest))
    rows = rows[::math.ceil(len(rows) / (options.limit or len(rows)))]
    clips = [Utterance(str(row["id"]), options.manifest.parent / row["audio"], "") for row in rows]
    found = {name: counts(rows, transcripts(name, clips)) for name in options.models}
    first = found[options.models[0]]
    return [{"model": portable(name) if Path(name).exists() else name, "clips": len(rows),
             "values": int(own.matrix[:, 1].sum()), "recall": bootstrap(own),
             "difference": bootstrap(own, [first])}
            for name, own in found.items()]


def main(options: Options) -> None:
    """Print a table, and write the result."""
    table = measure(options)
    if options.out:
        write_json(options.out, {
            "manifest": portable(options.manifest), "rows": table,
            "command": "python eval/values_said.py " + " ".join(
                portable(a) if Path(a).exists() else a for a in sys.argv[1:]),
            "versions": {k: v for k, v in versions().items() if k != "command"}})
    print(tabulate([{key: "{value:.1f} [{low:.1f}, {high:.1f}]".format_map(cell)
                     if isinstance(cell, dict) else cell for key, cell in row.items()}
                    for row in table], headers="keys", tablefmt="github"))


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Options, description=__doc__))
