"""Marker rows beside a frozen vocabulary: where they start, what trains, their columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from unislu_llm.models.markers import MarkerEmbedding, MarkerHead, install_markers
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer

REGISTRY = TaskRegistry()
N = len(REGISTRY.markers)
Installed = tuple[Any, UnifiedTokenizer, MarkerEmbedding, MarkerHead]
Install = Callable[..., Installed]


@pytest.fixture
def install(tiny_tokenizer: Callable[..., Any], tiny_llm: Callable[..., Any]) -> Install:
    def build(arch: str = "llama", tied: bool = True, extra_rows: int = 0,
              gap: int = 0) -> Installed:
        base = tiny_tokenizer()
        model = tiny_llm(arch, base, tied=tied, vocab_size=len(base) + extra_rows)
        base.add_tokens([f"unused{i}" for i in range(gap)])
        model.requires_grad_(False)
        tokenizer = UnifiedTokenizer(base, REGISTRY)
        install_markers(model, tokenizer)
        return model, tokenizer, model.get_input_embeddings(), model.get_output_embeddings()

    return build


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_rows_start_at_the_mean_of_their_words(install: Install, tied: bool) -> None:
    _, tokenizer, embedding, head = install(tied=tied)
    for wrapped in (embedding, head):
        for i, marker in enumerate(REGISTRY.markers):
            words = tokenizer.text_ids(REGISTRY.meaning(marker))
            expected = torch.stack([wrapped.base.weight[w] for w in words]).mean(0)
            torch.testing.assert_close(wrapped.rows[i], expected)
    assert embedding.first == head.first == tokenizer.marker_ids["[T/L]"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_base_stays_tied(install: Install, tied: bool) -> None:
    model, _, embedding, head = install(tied=tied)
    assert (head.base.weight is embedding.base.weight) == tied
    assert (head.rows is embedding.rows) == tied
    rows = [name for name, _ in model.named_parameters() if name.endswith(".rows")]
    assert len(rows) == (1 if tied else 2)
    assert head.weight is head.base.weight
    assert embedding.weight is embedding.base.weight


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_train_and_the_base_does_not(install: Install, arch: str, tied: bool) -> None:
    model, tokenizer, embedding, head = install(arch, tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.shape == (N, 32) for p in trained), "gradients have the size of the rows"
    ids = torch.tensor([[5, *tokenizer.marker_ids.values(), 9]])
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    losses = []
    for _ in range(5):
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.endswith(".rows"), name
        assert (parameter.grad is not None) == name.endswith(".rows"), name
    assert embedding.rows.grad is not None
    assert embedding.rows.grad.any(-1).all(), "every marker learns"
    assert head.base.weight.grad is None


# (rows of the base beyond the tokenizer, tokens between the base's last row and the first marker)
LAYOUTS = {"right after": (0, 0), "inside padding": (N + 6, 0), "half inside": (7, 0),
           "with a gap": (0, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_have_the_right_columns(install: Install, layout: str, tied: bool) -> None:
    extra, gap = LAYOUTS[layout]
    model, tokenizer, embedding, head = install(tied=tied, extra_rows=extra, gap=gap)
    rows_of_base = head.base.weight.shape[0]
    first, last = head.first, head.first + N
    assert list(tokenizer.marker_ids.values()) == list(range(first, last)), "one id a marker"
    hidden = torch.randn(2, 3, 32)
    logits, plain = head(hidden), hidden @ head.base.weight.T
    assert logits.shape == (2, 3, max(rows_of_base, last))
    assert model.config.vocab_size == logits.shape[-1]
    torch.testing.assert_close(logits[..., first:last], hidden @ head.rows.T)
    torch.testing.assert_close(logits[..., :min(first, rows_of_base)], plain[..., :first])
    torch.testing.assert_close(logits[..., last:], plain[..., last:])
    nobody = logits[..., rows_of_base:first]
    assert nobody.shape[-1] == gap
    assert (logits.softmax(-1)[..., rows_of_base:first] == 0).all()
    assert logits.isfinite().all()

    ids = torch.tensor([[1, first, 4, last - 1, rows_of_base - 1 if last < rows_of_base else 7]])
    embedded = embedding(ids)
    torch.testing.assert_close(embedded[0, [0, 2, 4]], embedding.base.weight[ids[0, [0, 2, 4]]])
    torch.testing.assert_close(embedded[0, [1, 3]], embedding.rows[[0, N - 1]])
    assert model(input_ids=ids).logits.shape[-1] == logits.shape[-1]


@torch.no_grad()
def test_scaled_embeddings_scale_the_markers_as_well(install: Install) -> None:
    _, tokenizer, embedding, _ = install("gemma3_text")
    ids = torch.tensor(list(tokenizer.marker_ids.values()))
    assert embedding.scale == pytest.approx(32**0.5, rel=1e-5)
    torch.testing.assert_close(embedding(ids), embedding.rows * 32**0.5)
    words = tokenizer.text_ids(REGISTRY.meaning("[NER]"))
    torch.testing.assert_close(embedding(ids[1]), embedding(torch.tensor(words)).mean(0))


@torch.no_grad()
def test_the_scale_does_not_hang_on_one_row() -> None:
    """A row of zeros is common: an unused or padding token."""
    for zeros in ([0], [7], list(range(16))):
        base = torch.nn.Embedding(100, 8)
        base.weight[zeros] = 0.0
        embedding = MarkerEmbedding(base, torch.nn.Parameter(torch.ones(2, 8)), 100)
        torch.testing.assert_close(embedding(torch.tensor([100])), torch.ones(1, 8))
