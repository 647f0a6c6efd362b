"""CTC projector: what reaches the LLM, whatever a clip is batched with, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.common import SHORT, examples, make_batch, singles
from tests.tiny import TEXTS
from unislu_llm.data.dataset import Item
from unislu_llm.data.text_injection import SparsePosteriors
from unislu_llm.errors import UserError
from unislu_llm.models.ctc import CTCProjector, CtcVocabulary, collapse
from unislu_llm.models.encoder import valid_mask
from unislu_llm.models.saved import Description
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer

D, H, IDS = 32, 24, [4, 9, 11, 30, 31, 40]
CTC = {"projector": "ctc", "projector_options": {"heads": 2, "blank_bias": 0.0},
       "whisper_options": {"init_std": 0.3}}


def build(**options: Any) -> CTCProjector:
    torch.manual_seed(3)
    embeddings = nn.Embedding(50, H).requires_grad_(False)
    scale = float(embeddings.weight.pow(2).mean().sqrt())
    projector = CTCProjector(D, H, scale, heads=4, **{"blank_bias": 0.0} | options).eval()
    projector.attach(embeddings, IDS)
    return projector


def random_frames(lengths: list[int]) -> Tensor:
    frames = torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(4))
    return frames.masked_fill(~valid_mask(lengths, max(lengths))[:, :, None], 0.0)


def one_hot(path: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(path), len(IDS) + 1).float().mul(50.0)[None]


@torch.no_grad()
def test_batch_composition_changes_nothing() -> None:
    projector, lengths = build(), [200, 1, 37, 50, 16]
    frames = random_frames(lengths)
    dirty = frames.masked_fill(~valid_mask(lengths, 200)[:, :, None], torch.nan)
    speech = projector(dirty, lengths, transcribe=True)
    states, out = projector.encode(frames, lengths)
    assert speech.ids == projector.greedy(projector.logits(states), out)
    assert projector(frames, lengths).ids is None, "a transcript is made where it is asked for"
    for i, (n, out) in enumerate(zip(lengths, speech.lengths, strict=True)):
        assert 1 <= out <= projector.output_length(n)
        alone = projector(frames[i:i + 1, :n], [n], transcribe=True)
        assert alone.lengths == (out,)
        torch.testing.assert_close(speech.embeddings[i, :out], alone.embeddings[0], rtol=0,
                                   atol=2e-5)
        assert not speech.embeddings[i, out:].any(), "zero beyond the length"
        assert alone.ids == [speech.ids[i]]


@torch.no_grad()
def test_one_hot_posteriors_are_the_text_embeddings() -> None:
    projector = build()
    path = [0, 2, 2, 0, 2, 5, 5, 1, 0, 0]
    assert collapse(torch.tensor(path)) == [2, 2, 5, 1]
    expected = projector.rows(torch.tensor([2, 2, 5, 1]))
    speech = projector.mix(one_hot(path), [10])
    assert speech.lengths == (4,)
    torch.testing.assert_close(speech.embeddings[0], expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_blank_alone_leaves_one_position() -> None:
    projector = build()
    logits = one_hot([0, 0, 0]).repeat(2, 1, 1)
    logits[0, 1, 4] = 10.0
    speech = projector.mix(logits, [3, 1])
    assert speech.lengths == (1, 1)
    assert speech.embeddings.isfinite().all()
    torch.testing.assert_close(speech.embeddings[0, 0], projector.rows(torch.tensor([4]))[0],
                               rtol=0, atol=2e-3)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0])
@torch.no_grad()
def test_what_enters_the_llm_is_as_loud_as_its_embeddings(sharpness: float) -> None:
    projector = build()
    logits = sharpness * torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0))
    speech = projector.mix(logits, [40, 20])
    rms = speech.embeddings[valid_mask(speech.lengths, speech.embeddings.shape[1])]
    assert float(rms.pow(2).mean().sqrt()) == pytest.approx(projector.norm.scale, rel=0.2)


def test_gradients_reach_every_parameter_and_not_the_llm() -> None:
    projector = build().train()
    speech = projector(random_frames([60, 37]), [60, 37]).embeddings
    weights = torch.randn(speech.shape, generator=torch.Generator().manual_seed(5))
    (speech * weights).sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name in ("blank", "blank_bias"), name
    names = set(dict(projector.named_parameters()))
    assert set(projector.state_dict()) == names, "neither embeddings nor ids are saved"


def test_options_and_a_missing_vocabulary_are_named() -> None:
    with pytest.raises(UserError, match="no vocabulary yet"):
        CTCProjector(D, H, 1.0, heads=4)(random_frames([9]), [9])
    with pytest.raises(UserError, match="ctc: hidden"):
        CTCProjector(D, H, 1.0, heads=5)


def test_vocabulary_spells_what_it_has_not(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = UnifiedTokenizer(tiny_tokenizer(), TaskRegistry())
    ids = [tokenizer.text_ids(text) for text in TEXTS]
    whole = CtcVocabulary.learn(TEXTS, tokenizer)
    pieces = tokenizer.base.convert_ids_to_tokens(list(whole.token_ids))
    letters = [i for i, piece in zip(whole.token_ids, pieces, strict=True) if len(piece) == 1]
    part = CtcVocabulary(sorted({*letters, *ids[0]}), tokenizer)
    assert len(part.token_ids) < len(whole.token_ids)
    for row, text in zip(ids, TEXTS, strict=True):
        assert [whole.token_ids[c - 1] for c in whole.classes(text)] == row
        spelt = [part.token_ids[c - 1] for c in part.classes(text)]
        assert tokenizer.base.decode(spelt).strip() == text
    with pytest.raises(UserError, match="no transcript"):
        CtcVocabulary.learn([], tokenizer)


# The projector in its model


@pytest.fixture
def model(tiny_speech_llm: Callable[..., Any]) -> Any:
    made = tiny_speech_llm(**CTC)
    made.learn_vocabulary([text for _, text, _, _ in SHORT])
    assert not set(made.ctc_tokens) & set(made.tokenizer.marker_ids.values())
    return made


def test_every_objective_gives_every_trainable_weight_a_gradient(model: Any) -> None:
    """As DDP wants it, of audio, of simulated posteriors, and with CTC; none where not used."""
    model.train()
    batch = make_batch(model, SHORT)
    classes = [model.ctc_vocabulary.classes(e.utterance.text) for e in examples(SHORT)]
    assert batch.ctc_targets == tuple(map(tuple, classes))
    sparse = [SparsePosteriors(torch.tensor(c)[:, None], torch.ones(len(c), 1)) for c in classes]
    texts = model.collator()([Item(e, "posteriors", s)
                              for e, s in zip(examples(SHORT), sparse, strict=True)])
    for losses, used in ((model(batch), {"projector", "lora", "markers"}),
                         (model(texts), {"lora", "markers"}),
                         (model(batch, "ctc"), {"projector"})):
        model.zero_grad()
        losses.sum().backward()
        for group, named in model.trainable_groups().items():
            assert all(p.grad is not None for _, p in named)
            assert any(p.grad.any() for _, p in named) == (group in used), group
    assert model(batch, "ctc").shape == (len(SHORT),)


@torch.no_grad()
def test_ctc_losses_and_transcripts_do_not_depend_on_the_batch(model: Any) -> None:
    batch = make_batch(model, SHORT)
    losses, ids = model(batch, "ctc"), model.ctc_transcripts(batch)
    assert model.prefill(batch).ctc_hypothesis == ids
    posteriors = model.ctc_posteriors(batch)
    for i, single in enumerate(singles(model, SHORT)):
        torch.testing.assert_close(model(single, "ctc")[0], losses[i], rtol=1e-4, atol=1e-4)
        assert model.ctc_transcripts(single) == [ids[i]]
        torch.testing.assert_close(model.ctc_posteriors(single)[0], posteriors[i], rtol=1e-4,
                                   atol=1e-4)
        best = collapse(posteriors[i].argmax(-1))
        assert [model.ctc_tokens[c - 1] for c in best] == ids[i]


@torch.no_grad()
def test_certain_posteriors_read_as_text(model: Any) -> None:
    """The LLM then has the very embeddings of the text, and so the losses of a prompt of it."""
    classes = model.ctc_vocabulary.classes("anna met")
    path = torch.tensor([c for pair in zip(classes, [0] * len(classes), strict=True)
                         for c in pair])
    batch = model.collator()([Item(examples(SHORT)[2], "posteriors", SparsePosteriors(
        path[:, None], torch.ones(len(path), 1)))])
    speech = model.speech(batch)
    assert speech.lengths == (len(classes),)
    ids = torch.tensor([model.ctc_tokens[c - 1] for c in classes])
    torch.testing.assert_close(speech.embeddings[0], model.llm.get_input_embeddings()(ids),
                               rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_save_and_load(model: Any, tiny_speech_llm: Callable[..., Any], tmp_path: Path) -> None:
    for parameter in model.projector.parameters():
        parameter.add_(0.01)
        assert parameter.ndim, "FSDP shards no scalars"
    batch = make_batch(model, SHORT)
    state = model.trained_state()
    earlier = {n: v[0] if v.shape == (1,) else v for n, v in state.items()}
    for saved in (state, earlier):  # files of earlier versions hold scalars
        model.save_pretrained(tmp_path, saved)
        again = tiny_speech_llm(**CTC, ctc_tokens=Description.read(tmp_path).ctc_tokens)
        again.load_trained(tmp_path)
        assert again.ctc_vocabulary.token_ids == model.ctc_vocabulary.token_ids
        assert torch.equal(again.losses(batch), model.losses(batch))
    with pytest.raises(UserError, match=r"set model\.projector ctc"):
        tiny_speech_llm().learn_vocabulary(TEXTS)
    with pytest.raises(UserError, match=r"set model\.projector ctc"):
        tiny_speech_llm()(replace(batch, ctc_targets=()), "ctc")
