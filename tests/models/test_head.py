"""Cross-entropy in chunks: the same as all at once, by the logits of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from tests.tiny import make_llm
from unislu_llm.models.head import logits_of, token_losses

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PECULIAR: dict[str, Any] = {
    "logits are divided (Granite)": GraniteConfig(**SIZES, logits_scaling=7.0),
    "logits are multiplied (Cohere)": CohereConfig(**SIZES, logit_scale=0.3),
    "logits are capped (Gemma 2)": Gemma2Config(**SIZES, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("name", PECULIAR)
@torch.no_grad()
def test_logits_of_models_that_scale_or_cap_them(name: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(PECULIAR[name]).eval()
    ids = torch.randint(60, (2, 9))
    hidden = model.base_model(input_ids=ids).last_hidden_state
    logits = logits_of(model, hidden)
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    plain = model.get_output_embeddings()(hidden)
    assert not torch.allclose(logits, plain), "the peculiarity must show"


@pytest.mark.parametrize("chunk", [1, 7, 49, 50])
def test_chunked_equals_full(chunk: int) -> None:
    """Values, and gradients of hidden states and output weights, for losses weighed unequally."""
    model = make_llm()
    head, hidden, targets = model.get_output_embeddings(), torch.randn(50, 32), torch.arange(50)

    def results(losses_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        own = hidden.clone().requires_grad_()
        head.weight.grad = None
        losses = losses_of(own)
        (losses * torch.linspace(0.1, 2.0, 50)).sum().backward()
        assert own.grad is not None
        return [losses.detach(), own.grad, head.weight.grad.clone()]

    full = results(lambda own: F.cross_entropy(head(own), targets, reduction="none"))
    chunked = results(lambda own: token_losses(model, own, targets, chunk))
    for got, want in zip(chunked, full, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_losses_are_fp32_and_may_be_none() -> None:
    model, hidden = make_llm().bfloat16(), torch.randn(5, 32, dtype=torch.bfloat16)
    assert token_losses(model, hidden, torch.randint(60, (5,))).dtype == torch.float32
    losses = token_losses(model, hidden[:0].requires_grad_(), torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,)
    losses.sum().backward()
