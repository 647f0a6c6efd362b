"""Every projector: lengths it announces, no trace of padding, as loud as the LLM's embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.errors import UserError
from unislu_llm.models.encoder import valid_mask, zero_beyond
from unislu_llm.models.projectors import PROJECTORS, Projector, build_projector

D, H = 32, 24
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("linear", {"stack": 1}), ("mlp", {}), ("mlp", {"stack": 3, "hidden": 40}),
    ("conv", {}), ("conv", {"strides": [2, 2], "hidden": 16}), ("conv", {"strides": (3, 1, 2)}),
    ("qformer", {}),
    ("qformer", {"window": 7, "queries": 2, "layers": 1, "heads": 4, "hidden": 16}),
]
EACH = pytest.mark.parametrize(("name", "options"), KINDS)


def build(name: str, options: dict[str, Any], scale: float = 0.02) -> Projector:
    torch.manual_seed(3)
    return build_projector(name, D, H, scale, options).eval()


def random_frames(lengths: list[int], gain: float = 1.0) -> Tensor:
    """Frames `(batch, T_enc, D)`, zero beyond their lengths."""
    draw = torch.Generator().manual_seed(4)
    return zero_beyond(gain * torch.randn(len(lengths), max(lengths), D, generator=draw), lengths)


def test_each_is_tested() -> None:
    """`ctc` and `decoder` have lengths that depend on what is said, and tests of their own."""
    assert {name for name, _ in KINDS} == set(PROJECTORS) - {"ctc", "decoder"}


@EACH
@torch.no_grad()
def test_the_announced_length_is_that_of_the_tensor(name: str, options: dict[str, Any]) -> None:
    projector = build(name, options)
    announced = [projector.output_length(n) for n in range(1, 101)]
    assert all(type(n) is int and n > 0 for n in announced)
    assert announced == sorted(announced)
    for n, length in enumerate(announced, 1):
        speech = projector(random_frames([n]), [n])
        assert speech.embeddings.shape == (1, length, H)
        assert speech.lengths == (length,)


@EACH
def test_batched_equals_serial_whatever_stands_in_the_padding(name: str,
                                                              options: dict[str, Any]) -> None:
    projector, lengths = build(name, options), [200, 1, 37, 50, 16]
    frames, inside = random_frames(lengths), valid_mask(lengths, 200)
    speech = projector(frames, lengths)
    for i, (n, out) in enumerate(zip(lengths, speech.lengths, strict=True)):
        assert out == projector.output_length(n)
        alone = projector(frames[i:i + 1, :n], [n]).embeddings[0]
        torch.testing.assert_close(speech.embeddings[i, :out], alone, rtol=0, atol=1e-6)
        assert not speech.embeddings[i, out:].any(), "zero beyond the length"
    for garbage in (1e4, float("inf"), float("nan")):
        dirty = frames.masked_fill(~inside[:, :, None], garbage).requires_grad_()
        again = projector(dirty, lengths).embeddings
        assert torch.equal(again, speech.embeddings)
        again.sum().backward()
        assert dirty.grad is not None
        assert dirty.grad.isfinite().all()
        assert not dirty.grad[~inside].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("scale", [0.02, 1.3])
@EACH
@torch.no_grad()
def test_output_starts_as_loud_as_told(name: str, options: dict[str, Any], scale: float) -> None:
    """Whatever the loudness of the encoder's frames, and their precision."""
    projector = build(name, options, scale)
    for gain in (0.1, 1.0, 10.0):
        speech = projector(random_frames([100, 40], gain).bfloat16(), [100, 40])
        valid = speech.embeddings[valid_mask(speech.lengths, speech.embeddings.shape[1])]
        assert speech.embeddings.dtype == torch.float32
        assert float(valid.pow(2).mean().sqrt()) == pytest.approx(scale, rel=0.2)


@EACH
def test_gradients_reach_every_parameter_and_every_frame(name: str,
                                                         options: dict[str, Any]) -> None:
    projector, lengths = build(name, options).double().train(), [60, 37]
    frames = random_frames(lengths).double().requires_grad_()
    speech = projector(frames, lengths).embeddings
    weights = torch.randn(speech.shape, generator=torch.Generator().manual_seed(5))
    (speech * weights).sum().backward()
    for parameter_name, parameter in projector.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name
    assert frames.grad is not None
    assert frames.grad[valid_mask(lengths, 60)].any(-1).all(), "a frame without influence is lost"


@pytest.mark.parametrize(("name", "options", "message"), [
    ("liner", {}, "unknown projector 'liner'; known: linear, mlp, .*none; did you mean 'linear'"),
    ("linear", {"stak": 3}, "'linear': option stak: unknown key; did you mean 'stack'"),
    ("mlp", {"in_dim": 3}, "'mlp': option in_dim: unknown key; known: stack, hidden$"),
    ("linear", {"stack": 0}, "'linear': option stack: must be at least 1, found 0"),
    ("linear", {"stack": "five"}, "'linear': option stack: .*whole number.*, found 'five'"),
    ("conv", {"strides": []}, "'conv': option strides: .*at least 1 item"),
    ("conv", {"strides": [2, 0]}, r"'conv': option strides\[1\]: must be at least 1, found 0"),
    ("qformer", {"heads": 5}, "qformer.*hidden=32.*heads=5"),
    ("ctc", {"heads": 5}, "ctc.*hidden=32.*heads=5"),
    ("ctc", {"blank_bias": "hot"}, "'ctc': option blank_bias: .*number.*, found 'hot'"),
])
def test_bad_names_and_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_projector(name, D, H, 1.0, options)
