"""Rows laid end to end give each sample the losses and gradients that it has in a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unislu_llm.data.collate import Batch, SpeechDataset
from unislu_llm.data.targets import make_samples
from unislu_llm.models.speech_llm import SpeechLLM


def batch_of(model: SpeechLLM, utterances: Any) -> Batch:
    """All samples of some utterances."""
    dataset = SpeechDataset(make_samples(utterances, model.codec.registry))
    return model.collator()([dataset[i] for i in range(len(dataset))])


def run(model: SpeechLLM, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses, and the gradients of their mean."""
    model.zero_grad()
    losses = model.losses(batch)
    losses.mean().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("arch", "options"), [
    ("llama", {}), ("llama", {"prompt_prefix": "the council", "prompt_suffix": "in paris"}),
    ("gemma3_text", {}),  # its sliding window is shorter than the rows
    ("qwen3", {})])
def test_packed_is_padded(arch: str, options: dict[str, str], tiny_speech_llm: Callable[..., SpeechLLM],
                          make_utterances: Callable[..., Any]) -> None:
    model = tiny_speech_llm(arch=arch, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:  # B starts at zero: adapters would have no say
                p.normal_(0.0, 0.3)
    batch = batch_of(model, make_utterances(seconds=(0.9, 3.1, 0.6, 1.2, 2.0)))
    padded, gradients = run(model, batch)
    model.packing = True
    seen: list[torch.Size] = []
    handle = model.llm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape), with_kwargs=True)
    packed, own = run(model, batch)
    handle.remove()
    sizes = [sum(model.token_counts(int(n) * 160, int((p >= 0).sum())))
             for n, p in zip(batch.mel_lengths, batch.target_parts, strict=True)]
    assert [tuple(s) for s in seen] == [(1, sum(sizes), model.llm.config.hidden_size)], "one row, no padding"
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_rows_do_not_see_each_other(tiny_speech_llm: Callable[..., SpeechLLM],
                                           make_utterances: Callable[..., Any]) -> None:
    model = tiny_speech_llm()
    model.packing = True
    batch = batch_of(model, make_utterances(seconds=(0.9, 3.1, 0.6, 1.2)))
    with torch.no_grad():
        before = model.losses(batch)
        batch.mel[1] += 1.0
        after = model.losses(batch)
    others = [0, 2, 3]
    torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=1e-5)
    assert (after[1] - before[1]).abs().max() > 1e-3
