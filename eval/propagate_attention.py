"""Where the tokens of a task look: attention to speech, hypothesis, transcript, prompt, by layer.

Of a teacher-forced pass over reference targets, as in training; mean over heads and over all tokens
that foretell a task's outputs. Whisper's decoder has two kinds of attention: that to the speech,
and that to the text before, of which each sums to one. How much each of the two moves the hidden
state is told by the norms of what they add to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.sampler import sorted_batches
from unislu_llm.models.base import SLUModel
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.whisper_slu import WhisperSLU
from unislu_llm.tasks import SEPARATOR
from unislu_llm.tokenizer import Example

PARTS = ("prompt", "speech", "hypothesis", "transcript", "answer")
"""What is before a token: prompt, speech, the hypothesis' words, the transcript up to `[T/L]`, and
the answer: `[T/L]`, the control token and what is written so far."""
_ROWS = 4  # clips at a time: eager attention keeps all weights of all layers


def attention_shares(weights: Tensor, parts: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Attention `(batch, heads, queries, keys)` summed by part of its keys, mean over heads.

    Args:
        weights: which sum to 1 over keys.
        parts: `(batch, keys)`, numbers of :data:`PARTS`, -1 at padding.
        queries: `(batch, queries)` bool, which count.

    Returns:
        Of the queries that count, shares `(n, parts)` and numbers of keys that each can see, by
        part; a key without any weight at all, as a causal mask leaves it, is not seen.
    """
    table = F.one_hot(parts.clamp(min=0), len(PARTS)) * (parts >= 0)[..., None]
    mean = weights.float().mean(1)
    return (mean @ table.float())[queries], ((mean > 0).float() @ table.float())[queries]


def layout(model: SLUModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Part of each position that the decoder reads, `(batch, length)`, -1 at padding; and which of
    them foretell a task's outputs, from its control token on."""
    rows, task = [], []
    speech = model.speech(batch) if isinstance(model, SpeechLLM) else None
    own = len(model.hypothesis_prompt) if isinstance(model, SpeechLLM) else 0
    separator = model.tokenizer.marker_ids[SEPARATOR]
    for i, (ids, n) in enumerate(zip(batch.target_ids.tolist(), batch.target_lengths,
                                     strict=True)):
        read = ids[:n - 1]  # the last token of a target is foretold, never read
        cut = read.index(separator)
        if isinstance(model, SpeechLLM):
            hypothesis = batch.hypothesis_lengths[i] if batch.hypothesis_lengths else 0
            before = [0] * len(model.prefix) + [1] * (speech.lengths[i] if speech else 0)
            # An empty hypothesis may have no prompt either.
            before += [0] * min(own, hypothesis) + [2] * max(0, hypothesis - own)
            before += [0] * len(model.suffix)
        else:
            assert isinstance(model, WhisperSLU)
            before = [0] * len(model.prompt)
        row = [*before, *[3] * cut, *[4] * (n - 1 - cut)]
        rows.append(torch.tensor(row))
        task.append(torch.arange(len(row)) > len(before) + cut)
    return pad_sequence(rows, True, -1), pad_sequence(task, True, False)


@contextmanager
def eager(model: SLUModel) -> Iterator[None]:
    """Let the decoder give its attention weights, which fused kernels never have."""
    before = model.lm.config._attn_implementation
    model.lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.lm.set_attn_implementation(before)


@torch.inference_mode()
def decoder_attention(model: SLUModel, batch: Batch) -> dict[str, list[Any]]:
    """Attention of a teacher-forced pass by layer, `(batch, heads, queries, keys)`.

    `self` of every decoder; `cross` of Whisper's, with `norms`: of what self- and cross-attention
    add, `(batch, queries)` each. Layers without attention are left out.
    """
    found: dict[str, list[Any]] = {"self": [], "cross": [], "norms": []}
    with ExitStack() as stack:
        stack.enter_context(eager(model))
        if isinstance(model, SpeechLLM):
            ask = model.body.register_forward_pre_hook(
                lambda _, args, options: (args, options | {"output_attentions": True}),
                with_kwargs=True)
            keep = model.body.register_forward_hook(lambda _, __, output: found["self"].extend(
                w for w in output.attentions or () if w is not None))
            hooks = [ask, keep]
        else:
            layers = model.lm.model.decoder.layers
            added: dict[str, list[Tensor]] = {"self": [], "cross": []}

            def note(kind: str, output: Any) -> None:
                found[kind].append(output[1])
                added[kind].append(output[0].norm(dim=-1))

            hooks = [getattr(layer, name).register_forward_hook(
                lambda _, __, output, kind=kind: note(kind, output)) for layer in layers
                for kind, name in (("self", "self_attn"), ("cross", "encoder_attn"))]
        for hook in hooks:
            stack.callback(hook.remove)
        model(batch)
        if not isinstance(model, SpeechLLM):
            found["norms"] = list(zip(added["self"], added["cross"], strict=True))
    return found


def attention(model: SLUModel, examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """By task: `tokens`, the mean number of tokens of each part that a task's token sees, and by
    layer the shares of each part (`self`), and for Whisper `cross_weight`, the part of what both
    attentions add (by norm) that comes from the speech. Empty: the decoder shows no attention."""
    found = {}
    for task in model.registry.names:
        some = [e for e in examples if e.task == task]
        if some and (measured := _of_task(model, some)):
            found[task] = measured
    return found


def _of_task(model: SLUModel, examples: Sequence[Example]) -> dict[str, Any]:
    dataset, collator = SpeechDataset(examples, listens=model.listens), model.collator()
    shares: list[list[Tensor]] = []  # by batch and layer (n, parts)
    seen: list[Tensor] = []
    weights: list[list[Tensor]] = []
    for indices in sorted_batches(examples, _ROWS):
        batch = collator([dataset[i, 0] for i in indices]).to(model.device)
        parts, queries = (t.to(model.device) for t in layout(model, batch))
        layers = decoder_attention(model, batch)
        if not layers["self"]:
            return {}
        both = [attention_shares(w, parts, queries) for w in layers["self"]]
        shares.append([share for share, _ in both])
        seen.append(both[0][1])
        weights.append([(cross / (own + cross))[queries] for own, cross in layers["norms"]])
    by_layer = [torch.cat(some).mean(0).tolist() for some in zip(*shares, strict=True)]
    result: dict[str, Any] = {
        "clips": len(examples),
        "tokens": dict(zip(PARTS, _rounded(torch.cat(seen).mean(0).tolist(), 1), strict=True)),
        "self": [dict(zip(PARTS, _rounded(row, 4), strict=True)) for row in by_layer]}
    if isinstance(model, WhisperSLU):
        result["cross_weight"] = _rounded(
            [float(torch.cat(some).mean()) for some in zip(*weights, strict=True)], 4)
    return result


def _rounded(values: Sequence[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]
