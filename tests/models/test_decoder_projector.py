"""The projector `decoder`: states of Whisper's decoder at the words of the hypothesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.common import (
    SPREAD,
    Row,
    greedy,
    inputs,
    losses_and_gradients,
    make_batch,
    singles,
)
from tests.tiny import make_speech_llm, make_tokenizer, make_whisper
from unislu_llm.config import Config, ModelConfig, check_together
from unislu_llm.data.audio import batch_log_mel, with_silence
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.errors import UserError
from unislu_llm.models.decoder_projector import Alignment
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer

ROWS: list[Row] = [(0.9, "the council met in paris", {"sa": "Positive"}, "sa"),
                   (2.0, "we thank anna", {}, None),
                   (0.5, "it was a bad and sad evening for us all", {"sa": "Negative"}, "sa"),
                   (1.3, "a law", {}, None)]
HYPOTHESES = ("the counsel met in Paris on monday", None, "it was a bad evening", "")


def build(hears: bool = True, **options: Any) -> SpeechLLM:
    """`hears`: with weights as if it had learnt something."""
    model = make_speech_llm(**{"whisper_options": SPREAD, "hypothesis": "manifest", "silence": 1.0,
                               "projector": "decoder", "prompt_suffix": "</s> what?"} | options)
    if hears:
        torch.manual_seed(5)
        torch.nn.init.normal_(model.projector.proj.weight, std=0.3)
    return model


@pytest.mark.parametrize("metaspace", [None, "always", "never"])
def test_each_token_gets_the_whisper_tokens_that_share_a_letter_with_it(
        metaspace: str | None) -> None:
    words = make_whisper()[1]
    tokenizer = UnifiedTokenizer(make_tokenizer(metaspace=metaspace), TaskRegistry())
    alignment = Alignment(words, (1, 2), 448)
    for text in ("the council met in paris", "O'Neil's 1,250 re-opened — naïve Zürich", "a", "東 b",
                 "", "  two   blanks "):
        read, own = alignment.read(text), tokenizer.text_ids(text)
        spans = alignment.spans(read, own, tokenizer)
        assert len(spans) == len(own)
        letters = [alignment.whisper.decode(read[a:b]).replace(" ", "") for a, b in spans]
        for i, found in zip(own, letters, strict=True):
            piece = str(tokenizer.base.decode([i])).strip()
            assert "\ufffd" in piece + found or piece in found, (text, piece, found)
        assert spans == sorted(spans) or not text.isascii()
        given = {i for a, b in spans for i in range(a, b)}
        lettered = {i for i, token in enumerate(read) if alignment.whisper.decode([token]).strip()}
        assert given >= lettered or not text.isascii(), "none is left out"
    assert len(alignment.read("word " * 500)) == 446, "what Whisper's positions hold"


@torch.no_grad()
def test_it_gives_what_transformers_own_pass_gives() -> None:
    model = build()
    whisper, _ = make_whisper(**SPREAD)
    examples, waves = inputs(ROWS, hypotheses=HYPOTHESES)
    batch = model.collator().from_waves(examples, waves)
    projector, alignment = model.projector, model.alignment
    parts = {}
    projector.proj.register_forward_pre_hook(lambda _, args: parts.update(mean=args[0]))
    model.prefill(batch)
    mel, _ = batch_log_mel(waves[:1], silence=1.0)
    ids = alignment.read(HYPOTHESES[0])
    frames = model.encoder(*batch_log_mel(waves[:1], silence=1.0))[0]
    assert frames.shape[1] == with_silence(45, 1.0) == (mel.shape[-1] + 1) // 2
    out = whisper(encoder_outputs=(frames,), output_hidden_states=True,
                  decoder_input_ids=torch.tensor([[*alignment.prompt, *ids[:-1]]]))
    start = len(alignment.prompt) - 1
    states = projector.norm_in(out.decoder_hidden_states[-1][0, start:])
    log_probs = out.logits[0, start:].log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(ids)[:, None])
    entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
    expected = torch.cat([states, own / 4, entropy / 4], 1)
    first, last = batch.decoder_spans[0, -1].tolist()
    found = parts["mean"][0, -1, : expected.shape[1]]
    torch.testing.assert_close(found, expected[first:last].mean(0), rtol=1e-4, atol=1e-4)
    # Alternatives: embeddings of the same text, as loud as they are likely, never the token itself.
    shares = log_probs.exp()
    shares[range(len(ids)), ids] = 0
    best = shares.topk(8)
    rows = model.llm.get_input_embeddings()(projector._same[best.indices])
    mixed = (best.values[..., None] * rows).sum(1) / projector.scale
    torch.testing.assert_close(parts["mean"][0, -1, expected.shape[1]:],
                               mixed[first:last].mean(0), rtol=1e-4, atol=1e-4)


def test_it_begins_as_a_model_that_only_reads() -> None:
    model, reads = build(hears=False), build(hears=False, projector="none")
    state = reads.state_dict()
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    batches = [make_batch(m, ROWS, hypotheses=HYPOTHESES) for m in (model, reads)]
    assert [b.kind for b in batches] == ["audio", "text"]
    with torch.no_grad():
        torch.testing.assert_close(model.losses(batches[0]), reads.losses(batches[1]))
    assert not torch.allclose(losses(model), losses(build()), atol=1e-3), "what it learns counts"


def losses(model: SpeechLLM, seed: int = 11) -> Tensor:
    with torch.no_grad():
        return model.losses(make_batch(model, ROWS, seed=seed, hypotheses=HYPOTHESES))


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@torch.no_grad()
def test_losses_and_answers_do_not_depend_on_the_batch(arch: str) -> None:
    model = build(arch=arch)
    batch = make_batch(model, ROWS, hypotheses=HYPOTHESES)
    together, answers = model.losses(batch), greedy(model, batch, 16)
    for i, single in enumerate(singles(model, ROWS, hypotheses=HYPOTHESES)):
        alone = model.losses(single)[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-4)
        assert greedy(model, single, 16) == [answers[i]]
    for half, rows in zip(batch.halves(), (slice(2), slice(2, 4)), strict=True):
        torch.testing.assert_close(model.losses(half), together[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["states", "doubt", "alternatives"])
def test_each_part_alone_hears_the_speech_where_there_is_a_hypothesis(part: str) -> None:
    options = {name: name == part for name in ("states", "doubt", "alternatives")}
    model = build(projector_options=options)
    changed = (losses(model, seed=3) - losses(model, seed=4)).abs().sum(-1)
    assert [bool(c > 1e-4) for c in changed] == [bool(h) for h in HYPOTHESES]
    with pytest.raises(UserError, match="all off; leave one on"):
        build(projector_options=dict.fromkeys(options, False))


@pytest.mark.parametrize(("mode", "states"), [("frozen", True), ("frozen", False), ("lora", True)])
def test_what_trains_gets_a_gradient_and_whispers_decoder_stays(mode: str, states: bool) -> None:
    model = build(encoder_mode=mode, projector_options={"states": states}).train()
    assert not model.whisper_decoder.training
    groups = set(model.trainable_groups())
    assert groups == {"projector", "lora", "markers"} | ({"encoder"} if mode == "lora" else set())
    _, gradients = losses_and_gradients(model, make_batch(model, ROWS, hypotheses=HYPOTHESES))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained
    flat = {model.parameter_group(n) for n, g in gradients.items() if g.abs().sum() > 0}
    assert flat == groups
    assert not any(n.startswith("whisper_decoder.") for n in model.trained_state())


def test_text_without_speech_trains_as_where_nothing_is_heard() -> None:
    model = build()
    batch = make_batch(model, ROWS, hypotheses=HYPOTHESES)
    examples, _ = inputs(ROWS, hypotheses=HYPOTHESES)
    text = model.collator()([SpeechDataset(examples, takes_text=True)[i, 0] for i in range(4)])
    assert (text.kind, text.decoder_ids) == ("text", None)
    spoken, gradients = losses_and_gradients(model, text)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == gradients.keys()
    assert not any(g.abs().sum() for n, g in gradients.items() if n.startswith("projector."))
    assert not torch.allclose(spoken, model.losses(batch), atol=1e-3)


def test_it_needs_a_hypothesis() -> None:
    with pytest.raises(UserError, match="projector decoder leaves nothing to go by"):
        build(hypothesis="none")
    with pytest.raises(UserError, match=r"hypothesis_dropout: .* by model.projector decoder"):
        check_together(Config.model_validate({
            "model": {"projector": "decoder", "hypothesis": "manifest"},
            "train": {"hypothesis_dropout": 0.1}}))


def test_a_saved_one_says_the_same(tiny_checkpoints: dict[str, str], tmp_path: Path) -> None:
    config = ModelConfig(encoder=tiny_checkpoints["whisper"], llm=tiny_checkpoints["llm"],
                         silence=0.5, projector="decoder", hypothesis="manifest")
    model = SpeechLLM.build(config, TaskRegistry()).eval()
    torch.nn.init.normal_(model.projector.proj.weight, std=0.3)
    model.save_pretrained(tmp_path / "saved")
    again = SpeechLLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(losses(model), losses(again))
