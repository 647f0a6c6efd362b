"""How sure a decoder is of what it wrote: the probabilities that it gives to the tokens of its own answer.

They are the model's, before any grammar: a token that the grammar forced can be an unlikely one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from unislu_llm.data.targets import TextCodec
from unislu_llm.decoding.probabilities import padded
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.models.base import SLUModel
from unislu_llm.models.head import token_losses
from unislu_llm.models.state import Encoded
from unislu_llm.tasks import SEPARATOR, LabelTask


@torch.inference_mode()
def token_probabilities(model: SLUModel, encoded: Encoded, answers: Sequence[Sequence[int]],
                        rows: Sequence[int]) -> list[list[float]]:
    """Probability of each token of each answer, given speech and the tokens before it, in one teacher-forced pass.

    Args:
        encoded: speech, read once a row. answers: ids. rows: which row of the speech each answer is of.
    """
    codec, device = model.codec, encoded.frames.device
    state, first = model.begin(encoded)
    index = torch.tensor(list(rows), device=device)
    ids, valid = padded(answers, codec.pad_id, device)
    hidden = first[index][:, None]
    if ids.shape[1] > 1:
        hidden = torch.cat([hidden, model.extend(state.take(index), ids[:, :-1], valid[:, 1:])], dim=1)
    losses = token_losses(model.lm, hidden[valid], ids[valid])
    return [row.exp().tolist() for row in (-losses).cpu().split([len(a) for a in answers])]


def score(codec: TextCodec, ids: Sequence[int], probabilities: Sequence[float], forced: bool) -> float:
    """Geometric mean of the token probabilities of a whole answer, without the control token where it was forced."""
    controls = {codec.marker_ids[task.marker] for task in codec.registry} if forced else set()
    return geometric_mean([p for i, p in zip(ids, probabilities, strict=True) if i not in controls])


def confidence(codec: TextCodec, ids: Sequence[int], probabilities: Sequence[float], task: str | None) -> dict[str, Any]:
    """Confidence in the parts of one answer.

    Args:
        ids: of the answer. probabilities: of its tokens. task: that it answers; None for a transcript alone.

    Returns:
        * `text`: geometric mean over the tokens of the transcript and the one that ends it.
        * `tokens`: `[[characters, probability], ...]` of the transcript.
        * the task's name: of each entity or label the product over opening marker, tokens and closing marker, which is the
          probability that the decoder writes just this one at this place. A task with one label has one number, None
          where there is none, others a list in the order in which they were written.
    """
    ends = {codec.eos_id, codec.marker_ids[SEPARATOR]}
    cut = next((n for n, i in enumerate(ids) if i in ends), len(ids))
    texts = vocabulary_of(codec).texts
    found: dict[str, Any] = {
        "text": _rounded(geometric_mean(probabilities[:cut + 1])),
        "tokens": [[texts[i] if i < len(texts) else "", _rounded(p)] for i, p in zip(ids[:cut], probabilities, strict=False)]}
    if task is not None:
        found[task] = _outputs(codec, ids[cut + 1:], probabilities[cut + 1:], task)
    return found


def _outputs(codec: TextCodec, ids: Sequence[int], probabilities: Sequence[float], name: str) -> Any:
    """Product of the probabilities from each opening marker to the closing one."""
    task = codec.registry[name]
    if isinstance(task, LabelTask):
        pairs = [(task.open, task.close)]
    else:
        pairs = [(task.open_of(label), task.close_of(label)) for label in task.labels]
    closing = {codec.marker_ids[a]: codec.marker_ids[b] for a, b in pairs}
    outputs: list[float] = []
    start, wanted = -1, -1
    for n, i in enumerate(ids[1:], 1):
        if wanted < 0 and i in closing:
            start, wanted = n, closing[i]
        elif wanted >= 0 and i == wanted:
            outputs.append(_rounded(math.prod(probabilities[start:n + 1])))
            wanted = -1
    if isinstance(task, LabelTask) and not task.multi:
        return outputs[0] if outputs else None
    return outputs


def geometric_mean(probabilities: Sequence[float]) -> float:
    """0 where one is 0 or there is none."""
    if not probabilities or min(probabilities) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, probabilities)) / len(probabilities))


def _rounded(value: float) -> float:
    return round(value, 6)
