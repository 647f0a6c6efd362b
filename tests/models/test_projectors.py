"""Every projector: lengths it announces, nothing of the padding, output as loud as the LLM's embeddings."""

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
    "qformer": [{}, {"window": 7, "queries": 2, "layers": 1, "heads": 4, "hidden": 16}, {"window": 1, "queries": 1}],
}
# `ctc` has a length that depends on what is said, and tests of its own.
KINDS = [(name, options) for name in PROJECTORS if name != "ctc" for options in OPTIONS.get(name, [{}])]


def build(name: str, options: dict[str, Any], scale: float = 0.02) -> Projector:
    torch.manual_seed(3)
    return build_projector(name, D, H, scale, options).eval()


def random_frames(lengths: list[int], gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Frames `(batch, T_enc, D)`, zero beyond their lengths `(batch,)`."""
    n = torch.tensor(lengths)
    frames = gain * torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(4))
    return frames.masked_fill(~valid_mask(n, max(lengths))[:, :, None], 0.0), n


@pytest.mark.parametrize(("name", "options"), KINDS)
@torch.no_grad()
def test_the_announced_length_is_that_of_the_tensor(name: str, options: dict[str, Any]) -> None:
    projector = build(name, options)
    announced = [projector.output_length(n) for n in range(1, 201)]
    assert all(type(n) is int and n > 0 for n in announced)
    assert projector.output_length(torch.arange(1, 201)).tolist() == announced
    assert announced == sorted(announced)
    for n in range(1, 201):
        frames, lengths = random_frames([n])
        speech, out = projector(frames, lengths)
        assert speech.shape == (1, announced[n - 1], H)
        assert out.tolist() == [announced[n - 1]]


@pytest.mark.parametrize(("name", "options"), KINDS)
@torch.no_grad()
def test_batched_equals_serial(name: str, options: dict[str, Any]) -> None:
    projector = build(name, options)
    frames, lengths = random_frames([200, 1, 37, 50, 16])
    speech, out = projector(frames, lengths)
    assert out.tolist() == [projector.output_length(n) for n in lengths.tolist()]
    for i, n in enumerate(lengths.tolist()):
        alone, _ = projector(frames[i:i + 1, :n], lengths[i:i + 1])
        torch.testing.assert_close(speech[i, : int(out[i])], alone[0], rtol=0, atol=1e-6)
        assert not speech[i, int(out[i]):].any(), "zero beyond the length"


@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_what_stands_in_the_padding_changes_nothing(name: str, options: dict[str, Any], garbage: float) -> None:
    projector = build(name, options)
    frames, lengths = random_frames([60, 1, 37])
    dirty = frames.masked_fill(~valid_mask(lengths, 60)[:, :, None], garbage).requires_grad_()
    speech, _ = projector(dirty, lengths)
    assert torch.equal(speech, projector(frames, lengths)[0])
    speech.sum().backward()
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[~valid_mask(lengths, 60)].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("gain", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [0.02, 1.3])
@pytest.mark.parametrize(("name", "options"), KINDS)
@torch.no_grad()
def test_output_starts_as_loud_as_told(name: str, options: dict[str, Any], scale: float, gain: float) -> None:
    """Whatever the loudness of the encoder's frames."""
    projector = build(name, options, scale)
    frames, lengths = random_frames([100, 40], gain)
    speech, out = projector(frames, lengths)
    rms = speech[valid_mask(out, speech.shape[1])].pow(2).mean().sqrt()
    assert float(rms) == pytest.approx(scale, rel=0.2)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_gradients_reach_every_parameter_and_every_frame(name: str, options: dict[str, Any]) -> None:
    projector = build(name, options).train()
    frames, lengths = random_frames([60, 37])
    frames.requires_grad_()
    speech, _ = projector(frames, lengths)
    (speech * torch.randn(speech.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    for parameter_name, parameter in projector.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name
    assert frames.grad is not None
    assert frames.grad[valid_mask(lengths, 60)].any(-1).all(), "a frame without influence is lost speech"


@pytest.mark.parametrize(("name", "options"), KINDS)
@torch.no_grad()
def test_frames_of_a_half_precision_encoder_are_taken(name: str, options: dict[str, Any]) -> None:
    projector = build(name, options)
    frames, lengths = random_frames([60, 37])
    speech, _ = projector(frames.bfloat16(), lengths)
    assert speech.dtype == torch.float32
    torch.testing.assert_close(speech, projector(frames.bfloat16().float(), lengths)[0])


@pytest.mark.parametrize(("name", "options", "message"), [
    ("liner", {}, "unknown projector 'liner'; known: linear, mlp, conv, qformer.*did you mean 'linear'"),
    ("linear", {"stak": 3}, "projector 'linear' has no option 'stak'; known: stack; did you mean 'stack'"),
    ("qformer", {"query": 3}, "no option 'query'.*did you mean 'queries'"),
    ("mlp", {"in_dim": 3}, "no option 'in_dim'"),
    ("linear", {"stack": 0}, "projector 'linear'.*stack=0"),
    ("linear", {"stack": "5"}, "projector 'linear'.*stack='5'"),
    ("conv", {"strides": []}, "projector 'conv'.*strides"),
    ("conv", {"strides": 5}, "projector 'conv'.*strides"),
    ("conv", {"strides": [2, 0]}, "projector 'conv'.*strides"),
    ("qformer", {"heads": 5}, "qformer.*hidden=32.*heads=5"),
])
def test_bad_names_and_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_projector(name, D, H, 1.0, options)
