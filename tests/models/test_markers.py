"""Marker rows beside a frozen vocabulary: where they start, what trains, their columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import make_llm, make_tokenizer
from unislu_llm.models.markers import MarkerEmbedding, MarkerHead, install_markers
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer

REGISTRY = TaskRegistry()
N = len(REGISTRY.markers)


def install(arch: str = "llama", tied: bool = True, extra: int = 0, gap: int = 0,
            ) -> tuple[Any, UnifiedTokenizer, MarkerEmbedding, MarkerHead]:
    """With rows of the base beyond the tokenizer, tokens between its last row and the markers."""
    base = make_tokenizer()
    model = make_llm(arch, base, tied=tied, vocab_size=len(base) + extra)
    base.add_tokens([f"unused{i}" for i in range(gap)])
    model.requires_grad_(False)
    tokenizer = UnifiedTokenizer(base, REGISTRY)
    install_markers(model, tokenizer)
    return model, tokenizer, model.get_input_embeddings(), model.get_output_embeddings()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_rows_start_at_the_mean_of_their_words_and_tied_stay_tied(tied: bool) -> None:
    _, tokenizer, embedding, head = install(tied=tied)
    for wrapped in (embedding, head):
        for i, marker in enumerate(REGISTRY.markers):
            words = tokenizer.text_ids(REGISTRY.meaning(marker))
            torch.testing.assert_close(wrapped.rows[i], wrapped.base.weight[words].mean(0))
        assert wrapped.first == tokenizer.marker_ids["[T/L]"]
        assert wrapped.weight is wrapped.base.weight
    assert (head.base.weight is embedding.base.weight) == tied
    assert (head.rows is embedding.rows) == tied


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_get_gradients_and_the_base_does_not(arch: str, tied: bool) -> None:
    model, tokenizer, embedding, _ = install(arch, tied)
    ids = torch.tensor([[5, *tokenizer.marker_ids.values(), 9]])
    F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(name.endswith(".rows") for name in found)
    assert [g.shape for g in found.values()] == [(N, 32)] * (1 if tied else 2), "they are small"
    assert embedding.rows.grad is not None
    assert embedding.rows.grad.any(-1).all(), "every marker learns"


LAYOUTS = {"right after": (0, 0), "inside padding": (N + 6, 0), "half inside": (7, 0),
           "with a gap": (0, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_have_the_right_columns(layout: str) -> None:
    extra, gap = LAYOUTS[layout]
    model, tokenizer, embedding, head = install(tied=False, extra=extra, gap=gap)
    rows_of_base, first, last = len(head.base.weight), head.first, head.first + N
    assert list(tokenizer.marker_ids.values()) == list(range(first, last)), "one id a marker"
    hidden = torch.randn(2, 3, 32)
    logits, plain = head(hidden), hidden @ head.base.weight.T
    assert logits.shape == (2, 3, max(rows_of_base, last))
    assert model.config.vocab_size == logits.shape[-1]
    torch.testing.assert_close(logits[..., first:last], hidden @ head.rows.T)
    torch.testing.assert_close(logits[..., :min(first, rows_of_base)], plain[..., :first])
    torch.testing.assert_close(logits[..., last:], plain[..., last:])
    assert logits[..., rows_of_base:first].shape[-1] == gap
    assert (logits.softmax(-1)[..., rows_of_base:first] == 0).all(), "nobody's"
    assert logits.isfinite().all()
    ids = torch.tensor([[1, first, 4, last - 1, rows_of_base - 1 if last < rows_of_base else 7]])
    embedded = embedding(ids)
    torch.testing.assert_close(embedded[0, [0, 2, 4]], embedding.base.weight[ids[0, [0, 2, 4]]])
    torch.testing.assert_close(embedded[0, [1, 3]], embedding.rows[[0, N - 1]])
    assert model(input_ids=ids).logits.shape[-1] == logits.shape[-1]


@torch.no_grad()
def test_scaled_embeddings_scale_the_markers_as_well() -> None:
    _, tokenizer, embedding, _ = install("gemma3_text")
    ids = torch.tensor(list(tokenizer.marker_ids.values()))
    torch.testing.assert_close(embedding(ids), embedding.rows * 32**0.5)
    words = tokenizer.text_ids(REGISTRY.meaning("[NER]"))
    torch.testing.assert_close(embedding(ids[1]), embedding(torch.tensor(words)).mean(0))
    base = torch.nn.Embedding(100, 8)
    base.weight[:16] = 0.0  # a row of zeros is common: an unused or padding token
    plain = MarkerEmbedding(base, torch.nn.Parameter(torch.ones(2, 8)), 100)
    torch.testing.assert_close(plain(torch.tensor([100])), torch.ones(1, 8))
