"""What the tests of models share: examples with noise as audio, and greedy decoding by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unislu_llm.data.batch import Batch
from unislu_llm.loss import weighted_loss
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import Span
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
SPREAD = {"init_std": 0.3}
"""Whisper's usual 0.02 makes a random model say one thing to everything."""
Row = tuple[float, str, dict[str, Any], str | None]
ROWS: list[Row] = [  # seconds, text, labels, task
    (0.5, "yes", {"sa": "Positive"}, "sa"),
    (20.0, "anna voted against the law of two thousand and four in paris and we thank the council",
     {"ner": (Span("PERSON", 0, 4), Span("WHEN", 30, 51), Span("PLACE", 55, 60))}, "ner"),
    (3.37, "it was a bad evening", {"ner": ()}, "ner"),
    (0.83, "the council met", {}, None),
]
SHORT = [ROWS[0], *ROWS[2:]]
"""Without the 20 seconds."""


def inputs(rows: Sequence[Row] = ROWS, seed: int = 11,
           hypotheses: Sequence[str | None] | None = None) -> tuple[list[Example], list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    sizes = [int(row[0] * 16_000) for row in rows]
    waves = [0.2 * torch.randn(n, generator=draw) * torch.linspace(0.1, 1, n) for n in sizes]
    return [Example(Utterance(str(i), None, text, labels, hypothesis=hypothesis), task)
            for i, ((_, text, labels, task), hypothesis)
            in enumerate(zip(rows, hypotheses or [None] * len(rows), strict=True))], waves


def make_batch(model: SLUModel, rows: Sequence[Row] = ROWS, **options: Any) -> Batch:
    """All rows in one batch."""
    return model.collator().from_waves(*inputs(rows, **options))


def singles(model: SLUModel, rows: Sequence[Row] = ROWS, **options: Any) -> list[Batch]:
    """Each row in a batch of its own."""
    collator = model.collator()
    return [collator.from_waves([example], [wave])
            for example, wave in zip(*inputs(rows, **options), strict=True)]


def losses_and_gradients(model: SLUModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = model.losses(batch)
    weighted_loss(losses, batch.target_parts, "dynamic").backward()
    named = model.named_parameters()
    return losses.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


@torch.no_grad()
def greedy(model: SLUModel, batch: Batch, bound: int) -> list[list[int]]:
    """Ids of each row up to its end of text, at most `bound`, by prefill and step alone."""
    state = model.prefill(batch)
    hidden, answers, end = state.hidden, [[] for _ in range(len(batch))], model.tokenizer.eos_id
    live = [True] * len(batch)
    for _ in range(bound):
        ids = model.logits(hidden).float().argmax(-1)
        for i, token in enumerate(ids.tolist()):
            if live[i]:
                answers[i].append(token)
        live = [alive and answer[-1] != end for alive, answer in zip(live, answers, strict=True)]
        valid = torch.tensor(live)
        hidden = model.step(state, ids.masked_fill(~valid, model.tokenizer.pad_id)[:, None],
                            valid[:, None])[:, -1]
    return answers
