"""CTC projector: what reaches the LLM, whatever a clip is batched with, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unislu_llm.errors import UserError
from unislu_llm.models.ctc import CTCProjector, CtcVocabulary, collapse, mix_embeddings
from unislu_llm.models.encoder import valid_mask
from unislu_llm.models.tiny import TEXTS

D, H, IDS = 32, 24, [4, 9, 11, 30, 31, 40]


def build(**options: Any) -> CTCProjector:
    torch.manual_seed(3)
    embeddings = nn.Embedding(50, H).requires_grad_(False)
    projector = CTCProjector(D, H, float(embeddings.weight.pow(2).mean().sqrt()), heads=4, **{"blank_bias": 0.0} | options).eval()
    projector.attach(embeddings, IDS)
    return projector


def random_frames(lengths: list[int]) -> tuple[Tensor, Tensor]:
    n = torch.tensor(lengths)
    frames = torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(4))
    return frames.masked_fill(~valid_mask(n, max(lengths))[:, :, None], 0.0), n


def one_hot(path: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(path), len(IDS) + 1).float().mul(50.0)[None]


@torch.no_grad()
def test_batch_composition_changes_nothing() -> None:
    projector = build()
    frames, lengths = random_frames([200, 1, 37, 50, 16])
    speech, out = projector(frames.masked_fill(~valid_mask(lengths, 200)[:, :, None], torch.nan), lengths)
    ids = projector.ctc_ids(frames, lengths)
    assert (out >= 1).all()
    assert (out <= projector.output_length(lengths)).all()
    for i, n in enumerate(lengths.tolist()):
        alone, m = projector(frames[i:i + 1, :n], lengths[i:i + 1])
        assert int(m) == int(out[i])
        torch.testing.assert_close(speech[i, : int(m)], alone[0], rtol=0, atol=2e-5)
        assert not speech[i, int(m):].any(), "zero beyond the length"
        assert projector.ctc_ids(frames[i:i + 1, :n], lengths[i:i + 1])[0] == ids[i]


@torch.no_grad()
def test_one_hot_posteriors_are_the_text_embeddings() -> None:
    """At any temperature for certain posteriors; towards 0 for undecided ones."""
    projector = build(temperature=1e-3)
    path = [0, 2, 2, 0, 2, 5, 5, 1, 0, 0]
    assert collapse(torch.tensor(path)) == [2, 2, 5, 1]
    expected = projector.rows(torch.tensor([2, 2, 5, 1]))
    blurred = one_hot(path) / 15 + 0.2 * torch.rand(1, 10, 7, generator=torch.Generator().manual_seed(0))
    for logits in (one_hot(path), blurred):
        speech, out = projector.mix(logits, torch.tensor([10]))
        assert out.tolist() == [4]
        torch.testing.assert_close(speech[0], expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_blank_alone_leaves_one_position() -> None:
    projector = build()
    logits = one_hot([0, 0, 0]).repeat(2, 1, 1)
    logits[0, 1, 4] = 10.0
    speech, out = projector.mix(logits, torch.tensor([3, 1]))
    assert out.tolist() == [1, 1]
    assert speech.isfinite().all()
    torch.testing.assert_close(speech[0, 0], projector.rows(torch.tensor([4]))[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0])
@torch.no_grad()
def test_what_enters_the_llm_is_as_loud_as_its_embeddings(sharpness: float) -> None:
    projector = build(residual=0.1)
    logits = sharpness * torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0))
    states = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(1))
    speech, out = mix_embeddings(logits, torch.tensor([40, 20]), projector.rows(), 1.0, 0.9,
                                 projector.gate * projector.norm(projector.to_residual(states)))
    rms = speech[valid_mask(out, speech.shape[1])].pow(2).mean().sqrt()
    assert float(rms) == pytest.approx(projector.norm.scale, rel=0.2)


def test_gradients_reach_every_parameter_and_not_the_llm() -> None:
    projector = build().train()
    frames, lengths = random_frames([60, 37])
    speech, _ = projector(frames, lengths)
    (speech * torch.randn(speech.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name in ("blank", "blank_bias"), name
    assert "_embeddings" not in projector.state_dict()
    assert sum(p.numel() for p in projector.parameters()) == sum(v.numel() for v in projector.state_dict().values())


def test_options_and_a_missing_vocabulary_are_named() -> None:
    with pytest.raises(UserError, match="no vocabulary yet"):
        CTCProjector(D, H, 1.0, heads=4)(*random_frames([9]))
    for options in ({"temperature": 0.0}, {"blank_threshold": 1.5}, {"kernel": 4}, {"heads": 5}, {"dropout": 1.0}):
        with pytest.raises(UserError, match="ctc"):
            CTCProjector(D, H, 1.0, **options)


def test_vocabulary_spells_what_it_has_not(tiny_tokenizer: Callable[..., Any]) -> None:
    """With the letters of rare tokens kept, every training text comes back, whatever the least count."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(" " + text)["input_ids"] for text in TEXTS]
    whole, frequent = CtcVocabulary.learn(ids, tokenizer), CtcVocabulary.learn(ids, tokenizer, min_count=3)
    assert len(frequent) < len(whole)
    for row, text in zip(ids, TEXTS, strict=True):
        assert [whole.token_ids[c - 1] for c in whole.classes(row, tokenizer)] == row
        spelt = [frequent.token_ids[c - 1] for c in frequent.classes(row, tokenizer)]
        assert tokenizer.decode(spelt).strip() == text
    assert not whole.classes([tokenizer.eos_token_id], tokenizer)
    with pytest.raises(UserError, match="no transcript"):
        CtcVocabulary.learn([], tokenizer)


@torch.no_grad()
def test_save_and_load(tiny_speech_llm: Callable[..., Any], tmp_path: Path) -> None:
    options = {"projector": "ctc", "projector_options": {"heads": 2, "blank_bias": 0.0}}
    model = tiny_speech_llm(**options)
    vocabulary = model.learn_vocabulary(TEXTS)
    assert not set(vocabulary.token_ids) & set(model.codec.marker_ids.values()), "markers are not heard"
    for parameter in model.projector.parameters():
        parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    again = tiny_speech_llm(**options, ctc_tokens=type(model.config).from_pretrained(str(tmp_path)).ctc_tokens)
    again.load_trained(tmp_path)
    mel = torch.randn(2, 80, 120, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([120, 70])
    torch.testing.assert_close(again.speech(mel, lengths), model.speech(mel, lengths), rtol=0, atol=0)
    assert again.ctc_vocabulary == vocabulary
    with pytest.raises(UserError, match="takes no vocabulary"):
        tiny_speech_llm().learn_vocabulary(TEXTS)
