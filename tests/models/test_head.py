"""Cross-entropy in chunks: the same values and gradients as all at once, and the logits of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from unislu_llm.models.head import logits_of, token_losses

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5,
                         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PECULIAR: dict[str, Any] = {
    "logits are divided (Granite)": GraniteConfig(**SIZES, logits_scaling=7.0, embedding_multiplier=3.0),
    "logits are multiplied (Cohere)": CohereConfig(**SIZES, logit_scale=0.3),
    "logits are capped (Gemma 2)": Gemma2Config(**SIZES, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@torch.no_grad()
def test_logits_are_those_of_the_models_forward(tiny_llm: Callable[..., Any], arch: str) -> None:
    model = tiny_llm(arch)
    ids = torch.randint(60, (2, 9))
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(logits_of(model, hidden), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PECULIAR)
@torch.no_grad()
def test_logits_of_models_that_scale_or_cap_them(name: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(PECULIAR[name]).eval()
    ids = torch.randint(60, (2, 9))
    hidden = model.base_model(input_ids=ids).last_hidden_state
    logits = logits_of(model, hidden)
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, model.get_output_embeddings()(hidden)), "the peculiarity must show"


def values_and_gradients(model: Any, hidden: torch.Tensor, targets: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    """Losses and the gradients of hidden states and output weights, for losses weighed unequally."""
    hidden = hidden.clone().requires_grad_()
    weight = model.get_output_embeddings().weight
    weight.grad = None
    losses = token_losses(model, hidden, targets, chunk)
    (losses * torch.linspace(0.1, 2.0, len(losses), dtype=losses.dtype)).sum().backward()
    assert hidden.grad is not None
    return [losses.detach(), hidden.grad, weight.grad.clone()]


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 51])
def test_chunked_equals_full(tiny_llm: Callable[..., Any], chunk: int) -> None:
    model = tiny_llm()
    hidden, targets = torch.randn(50, 32), torch.randint(60, (50,))
    own = hidden.clone().requires_grad_()
    full = F.cross_entropy(model.get_output_embeddings()(own), targets, reduction="none")
    model.get_output_embeddings().weight.grad = None
    (full * torch.linspace(0.1, 2.0, 50)).sum().backward()
    expected = [full.detach(), own.grad, model.get_output_embeddings().weight.grad.clone()]
    for got, want in zip(values_and_gradients(model, hidden, targets, chunk), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_chunks_bound_the_logits_that_exist_at_a_time(tiny_llm: Callable[..., Any]) -> None:
    """Also in the backward pass: logits are computed again, never kept."""
    model = tiny_llm()
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: sizes.append(out.shape[0]))
    hidden = torch.randn(50, 32, requires_grad=True)
    losses = token_losses(model, hidden, torch.randint(60, (50,)), chunk=8)
    forward = len(sizes)
    losses.sum().backward()
    assert forward == 7
    assert len(sizes) == 14
    assert max(sizes) == 8


def test_losses_are_fp32_also_in_half_precision(tiny_llm: Callable[..., Any]) -> None:
    model = tiny_llm().to(torch.bfloat16)
    losses = token_losses(model, torch.randn(5, 32, dtype=torch.bfloat16), torch.randint(60, (5,)))
    assert losses.dtype == torch.float32


def test_nothing_supervised_is_no_loss(tiny_llm: Callable[..., Any]) -> None:
    assert token_losses(tiny_llm(), torch.zeros(0, 32), torch.zeros(0, dtype=torch.long)).shape == (0,)
