"""Every projector: lengths it announces, no trace of padding, as loud as the LLM's embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.errors import UserError
from unislu_llm.models.encoder import valid_mask
from unislu_llm.models.projectors import PROJECTORS, Projector, build_projector

D, H = 32, 24
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"stack": 1}, {"stack": 4}],
    "mlp": [{}, {"stack": 3, "hidden": 40}],
    "conv": [{}, {"strides": [2, 2], "hidden": 16}, {"strides": (3, 1, 2)}],
    "qformer": [{}, {"window": 7, "queries": 2, "layers": 1, "heads": 4, "hidden": 16},
                {"window": 1, "queries": 1}],
}
# `ctc` has a length that depends on what is said, and tests of its own.
KINDS = [(name, options) for name in PROJECTORS if name != "ctc" for options in OPTIONS[name]]
EACH = pytest.mark.parametrize(("name", "options"), KINDS)


def build(name: str, options: dict[str, Any], scale: float = 0.02) -> Projector:
    torch.manual_seed(3)
    return build_projector(name, D, H, scale, options).eval()


def random_frames(lengths: list[int], gain: float = 1.0) -> Tensor:
    """Frames `(batch, T_enc, D)`, zero beyond their lengths."""
    draw = torch.Generator().manual_seed(4)
    frames = gain * torch.randn(len(lengths), max(lengths), D, generator=draw)
    return frames.masked_fill(~valid_mask(lengths, max(lengths))[:, :, None], 0.0)


@EACH
@torch.no_grad()
def test_the_announced_length_is_that_of_the_tensor(name: str, options: dict[str, Any]) -> None:
    projector = build(name, options)
    announced = [projector.output_length(n) for n in range(1, 201)]
    assert all(type(n) is int and n > 0 for n in announced)
    assert announced == sorted(announced)
    for n in range(1, 201):
        speech = projector(random_frames([n]), [n])
        assert speech.embeddings.shape == (1, announced[n - 1], H)
        assert speech.lengths == (announced[n - 1],)


@EACH
@torch.no_grad()
def test_batched_equals_serial(name: str, options: dict[str, Any]) -> None:
    projector, lengths = build(name, options), [200, 1, 37, 50, 16]
    frames = random_frames(lengths)
    speech = projector(frames, lengths)
    assert speech.lengths == tuple(projector.output_length(n) for n in lengths)
    for i, (n, out) in enumerate(zip(lengths, speech.lengths, strict=True)):
        alone = projector(frames[i:i + 1, :n], [n]).embeddings[0]
        torch.testing.assert_close(speech.embeddings[i, :out], alone, rtol=0, atol=1e-6)
        assert not speech.embeddings[i, out:].any(), "zero beyond the length"


@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
@EACH
def test_what_stands_in_the_padding_changes_nothing(name: str, options: dict[str, Any],
                                                    garbage: float) -> None:
    projector, lengths = build(name, options), [60, 1, 37]
    frames, inside = random_frames(lengths), valid_mask(lengths, 60)
    dirty = frames.masked_fill(~inside[:, :, None], garbage).requires_grad_()
    speech = projector(dirty, lengths).embeddings
    assert torch.equal(speech, projector(frames, lengths).embeddings)
    speech.sum().backward()
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[~inside].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("gain", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [0.02, 1.3])
@EACH
@torch.no_grad()
def test_output_starts_as_loud_as_told(name: str, options: dict[str, Any], scale: float,
                                       gain: float) -> None:
    """Whatever the loudness of the encoder's frames."""
    speech = build(name, options, scale)(random_frames([100, 40], gain), [100, 40])
    valid = valid_mask(speech.lengths, speech.embeddings.shape[1])
    rms = speech.embeddings[valid].pow(2).mean().sqrt()
    assert float(rms) == pytest.approx(scale, rel=0.2)


def without_gradient(name: str, options: dict[str, Any]) -> tuple[str, ...]:
    """Parameters of which the output is no function.

    A query that sees one key gives it all of its attention, whatever query and key are: in a
    Q-Former with windows of one frame, whatever only forms the scores of the attention to frames
    has no gradient. What rounding leaves of it differs by processor.
    """
    if name == "qformer" and options.get("window") == 1:
        return ("multihead_attn.in_proj", "norm2")
    return ()


@EACH
def test_gradients_reach_every_parameter_and_every_frame(name: str,
                                                         options: dict[str, Any]) -> None:
    projector, lengths = build(name, options).double().train(), [60, 37]
    frames = random_frames(lengths).double().requires_grad_()
    speech = projector(frames, lengths).embeddings
    weights = torch.randn(speech.shape, generator=torch.Generator().manual_seed(5))
    (speech * weights).sum().backward()
    constant = without_gradient(name, options)
    size = max(float(p.grad.abs().max()) for p in projector.parameters() if p.grad is not None)
    for parameter_name, parameter in projector.named_parameters():
        assert parameter.grad is not None, parameter_name
        if not any(part in parameter_name for part in constant):
            assert float(parameter.grad.abs().max()) > 1e-9 * size, parameter_name
        elif "in_proj" in parameter_name:  # query and key; the last third is the value's
            score, value = parameter.grad.split([2 * D, D])
            assert float(score.abs().max()) < 1e-9 * size
            assert value.any()
    assert frames.grad is not None
    assert frames.grad[valid_mask(lengths, 60)].any(-1).all(), "a frame without influence is lost"


@EACH
@torch.no_grad()
def test_frames_of_a_half_precision_encoder_are_taken(name: str, options: dict[str, Any]) -> None:
    projector, frames = build(name, options), random_frames([60, 37]).bfloat16()
    speech = projector(frames, [60, 37]).embeddings
    assert speech.dtype == torch.float32
    torch.testing.assert_close(speech, projector(frames.float(), [60, 37]).embeddings)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("liner", {}, "unknown projector 'liner'; known: linear, mlp, .*none; did you mean 'linear'"),
    ("linear", {"stak": 3}, "'linear': option stak: unknown key; did you mean 'stack'"),
    ("qformer", {"query": 3}, "'qformer': option query: unknown key; did you mean 'queries'"),
    ("mlp", {"in_dim": 3}, "'mlp': option in_dim: unknown key; known: stack, hidden$"),
    ("linear", {"stack": 0},
     "'linear': option stack: should be greater than or equal to 1, found 0"),
    ("linear", {"stack": "five"}, "'linear': option stack: .*integer.*, found 'five'"),
    ("linear", {"stack": 2.5}, "'linear': option stack: .*integer.*, found 2.5"),
    ("conv", {"strides": []}, "'conv': option strides: .*at least 1 item"),
    ("conv", {"strides": 5}, "'conv': option strides: must be a list, found 5"),
    ("conv", {"strides": [2, 0]},
     r"'conv': option strides\[1\]: should be greater than or equal to 1, found 0"),
    ("qformer", {"heads": 5}, "qformer.*hidden=32.*heads=5"),
    ("ctc", {"blank_bias": "hot"}, "'ctc': option blank_bias: .*number.*, found 'hot'"),
])
def test_bad_names_and_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_projector(name, D, H, 1.0, options)
