"""CTC projector: what reaches the LLM, whatever a clip is batched with, its loss, what is saved."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.common import SHORT, inputs, make_batch, singles
from tests.tiny import TEXTS, make_speech_llm, make_tokenizer
from unislu_llm.data.dataset import Item
from unislu_llm.data.text_injection import SparsePosteriors
from unislu_llm.errors import UserError
from unislu_llm.models.ctc import CTCProjector, CtcVocabulary, collapse
from unislu_llm.models.ctc_loss import ctc_loss, sample_classes
from unislu_llm.models.encoder import valid_mask, zero_beyond
from unislu_llm.models.saved import Description
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer

D, H, IDS = 32, 24, [4, 9, 11, 30, 31, 40]
CTC = {"projector": "ctc", "projector_options": {"heads": 2, "blank_bias": 0.0},
       "whisper_options": {"init_std": 0.3}}
EXAMPLES, _ = inputs(SHORT)


def build() -> CTCProjector:
    torch.manual_seed(3)
    embeddings = nn.Embedding(50, H).requires_grad_(False)
    scale = float(embeddings.weight.pow(2).mean().sqrt())
    projector = CTCProjector(D, H, scale, heads=4, blank_bias=0.0).eval()
    projector.attach(embeddings, IDS)
    return projector


def random_frames(lengths: list[int]) -> Tensor:
    draw = torch.Generator().manual_seed(4)
    return zero_beyond(torch.randn(len(lengths), max(lengths), D, generator=draw), lengths)


# ---- the projector


@torch.no_grad()
def test_batch_composition_changes_nothing() -> None:
    projector, lengths = build(), [200, 1, 37, 50, 16]
    frames = random_frames(lengths)
    dirty = frames.masked_fill(~valid_mask(lengths, 200)[:, :, None], torch.nan)
    speech = projector(dirty, lengths, transcribe=True)
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
def test_blank_alone_leaves_one_position() -> None:
    projector, logits = build(), torch.zeros(2, 3, len(IDS) + 1)
    logits[..., 0], logits[0, 1, 4] = 50.0, 10.0
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
        assert parameter.ndim, "FSDP shards no scalars"
    names = set(dict(projector.named_parameters()))
    assert set(projector.state_dict()) == names, "neither embeddings nor ids are saved"


def test_a_missing_vocabulary_is_named() -> None:
    with pytest.raises(UserError, match="no vocabulary yet"):
        CTCProjector(D, H, 1.0, heads=4)(random_frames([9]), [9])


def test_vocabulary_spells_what_it_has_not() -> None:
    tokenizer = UnifiedTokenizer(make_tokenizer(), TaskRegistry())
    ids = [tokenizer.text_ids(text) for text in TEXTS]
    whole = CtcVocabulary.learn(TEXTS, tokenizer)
    letters = [i for i in whole.token_ids if len(tokenizer.base.convert_ids_to_tokens(i)) == 1]
    part = CtcVocabulary(sorted({*letters, *ids[0]}), tokenizer)
    assert len(part.classes(TEXTS[0])) == len(ids[0]), "known tokens are not spelt"
    for row, text in zip(ids, TEXTS, strict=True):
        assert [whole.token_ids[c - 1] for c in whole.classes(text)] == row
        spelt = [part.token_ids[c - 1] for c in part.classes(text)]
        assert tokenizer.base.decode(spelt).strip() == text
    with pytest.raises(UserError, match="no transcript"):
        CtcVocabulary.learn([], tokenizer)


# ---- the loss

V, T = 11, 14
TARGETS, LENGTHS = [[3, 3, 7, 1], [5], [2, 9, 2, 2]], [14, 3, 9]


def pick(states: Tensor, classes: Tensor) -> Tensor:
    """Stands for `CTCProjector.logits`: states are the logits themselves."""
    return states[..., torch.cat([torch.zeros(1, dtype=torch.long), classes])]


def random_scores() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(3, T, V + 1, generator=draw).double().mul(2).requires_grad_()


def test_with_the_whole_vocabulary_it_is_the_full_loss() -> None:
    scores, same, weights = random_scores(), random_scores(), torch.tensor([1.0, 0.3, 2.0])
    losses = ctc_loss(scores, LENGTHS, TARGETS, pick, V, samples=V)
    expected = F.ctc_loss(same.log_softmax(-1).transpose(0, 1), torch.tensor([*chain(*TARGETS)]),
                          torch.tensor(LENGTHS), torch.tensor([len(row) for row in TARGETS]),
                          reduction="none")
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(scores.grad, same.grad)
    assert scores.grad is not None
    assert not scores.grad[1, 3:].any(), "frames beyond the length have no influence"


def test_a_sampled_gradient_is_that_of_the_sampled_loss() -> None:
    """By small differences, in double precision."""
    def loss(scores: Tensor) -> Tensor:
        torch.manual_seed(2)
        return ctc_loss(scores, LENGTHS, TARGETS, pick, V, samples=3)

    torch.autograd.gradcheck(loss, random_scores())
    torch.manual_seed(2)
    classes, _ = sample_classes([1, 2, 3, 5, 7, 9], V, 3)
    assert len(set(classes.tolist())) == 9, "three beside those of the targets"


def test_targets_that_do_not_fit_cost_nothing() -> None:
    """[4, 4] needs three frames."""
    scores = random_scores()
    losses = ctc_loss(scores, [2, 3, 2], [[4, 4], [4, 4], []], pick, V, samples=3)
    assert losses[0] == 0
    assert (losses[1:] > 0).all()
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[0].any()


def test_a_sample_estimates_the_normalizer_without_bias() -> None:
    scores, totals = random_scores().detach()[0, 0], []
    torch.manual_seed(0)  # torch's own generator, which a run restores
    for _ in range(3000):
        classes, logs = sample_classes([3, 7], V, 4)
        assert classes[:2].tolist() == [3, 7]
        totals.append((scores[classes] + logs[1:]).exp().sum())
    mean = float(torch.stack(totals).mean())
    assert mean == pytest.approx(float(scores[1:].exp().sum()), rel=0.03)


# ---- in the model


@pytest.fixture
def model() -> Any:
    made = make_speech_llm(**CTC)
    made.learn_vocabulary(TEXTS)
    return made


def test_every_objective_gives_every_trainable_weight_a_gradient(model: Any) -> None:
    """As DDP wants it, of audio, of simulated posteriors, and with CTC; none where not used."""
    model.train()
    batch = make_batch(model, SHORT)
    classes = [model.ctc_vocabulary.classes(e.utterance.text) for e in EXAMPLES]
    assert batch.ctc_targets == tuple(map(tuple, classes))
    sparse = [SparsePosteriors(torch.tensor(c)[:, None], torch.ones(len(c), 1)) for c in classes]
    texts = model.collator()([Item(e, "posteriors", s)
                              for e, s in zip(EXAMPLES, sparse, strict=True)])
    for losses, used in ((model(batch), {"projector", "lora", "markers"}),
                         (model(texts), {"lora", "markers"}),
                         (model(batch, "ctc"), {"projector"})):
        model.zero_grad()
        losses.sum().backward()
        for group, named in model.trainable_groups().items():
            assert all(p.grad is not None for _, p in named)
            assert any(p.grad.any() for _, p in named) == (group in used), group


@torch.no_grad()
def test_ctc_losses_and_transcripts_do_not_depend_on_the_batch(model: Any) -> None:
    batch = make_batch(model, SHORT)
    losses, ids, posteriors = (model(batch, "ctc"), model.ctc_transcripts(batch),
                               model.ctc_posteriors(batch))
    assert model.prefill(batch).ctc_hypothesis == ids
    for i, single in enumerate(singles(model, SHORT)):
        torch.testing.assert_close(model(single, "ctc")[0], losses[i], rtol=1e-4, atol=1e-4)
        assert model.ctc_transcripts(single) == [ids[i]]
        torch.testing.assert_close(model.ctc_posteriors(single)[0], posteriors[i], rtol=1e-4,
                                   atol=1e-4)
        best = collapse(posteriors[i].argmax(-1))
        assert [model.ctc_tokens[c - 1] for c in best] == ids[i]


@torch.no_grad()
def test_certain_posteriors_read_as_text(model: Any) -> None:
    """The LLM then has the very embeddings of the text."""
    classes = model.ctc_vocabulary.classes("anna met")
    path = torch.tensor([c for known in classes for c in (known, known, 0)])
    batch = model.collator()([Item(EXAMPLES[2], "posteriors", SparsePosteriors(
        path[:, None], torch.ones(len(path), 1)))])
    speech = model.speech(batch)
    assert speech.lengths == (len(classes),)
    ids = torch.tensor([model.ctc_tokens[c - 1] for c in classes])
    torch.testing.assert_close(speech.embeddings[0], model.llm.get_input_embeddings()(ids),
                               rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_save_and_load(model: Any, tmp_path: Path) -> None:
    for parameter in model.projector.parameters():
        parameter.add_(0.01)
    batch, state = make_batch(model, SHORT), model.trained_state()
    earlier = {n: v[0] if v.shape == (1,) else v for n, v in state.items()}
    for saved in (state, earlier):  # files of earlier versions hold scalars
        model.save_pretrained(tmp_path, saved)
        again = make_speech_llm(**CTC, ctc_tokens=Description.read(tmp_path).ctc_tokens)
        again.load_trained(tmp_path)
        assert again.ctc_tokens == model.ctc_tokens
        assert torch.equal(again.losses(batch), model.losses(batch))
    with pytest.raises(UserError, match=r"set model\.projector ctc"):
        make_speech_llm()(replace(batch, ctc_targets=()), "ctc")
