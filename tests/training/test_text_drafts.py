"""Rows without audio in models that read drafts alone: they train as their speech rows would, spoilt by a share of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unislu_llm.data.augment import Key
from unislu_llm.data.draft_dropout import DraftDropout
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.config import Config, TrainConfig, apply
from unislu_llm.training.loop import Trainer
from unislu_llm.utterance import Utterance

PIPELINE: dict[str, Any] = {"draft": "manifest", "use_speech": False}
Make = Callable[..., Config]


def mixed(config: Config, *, every: int = 2, drafts: bool = True) -> Config:
    """Each row gets a draft, then every second (or so) loses its audio; without `drafts` those have no draft either."""
    path = Path(config.data.train[0])
    rows = [dataclasses.replace(u, draft=u.text.lower()) for u in read_manifest(path, TaskRegistry())]
    rows = [u if i % every else dataclasses.replace(u, audio=None, duration=None, draft=u.draft if drafts else None)
            for i, u in enumerate(rows)]
    config.data.train, config.data.dev = [str(path.with_name("mixed.jsonl"))], []
    write_manifest(Path(config.data.train[0]), rows)
    return config


def test_a_row_of_text_has_the_loss_of_its_speech(tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", mixed(tiny_config(model=PIPELINE)))
    model: Any = trainer.model.eval()
    batch = next(trainer.batches(0, 0))[0]
    silent = [s.utterance.audio is None for s in batch.samples]
    assert 0 < sum(silent) < len(silent)
    assert batch.simulated_lengths is None
    assert batch.frames is None
    assert len(batch.mel) == len(silent) - sum(silent)
    spoken = model.collator()([(s, torch.randn(9000)) for s in batch.samples])
    alone = model.collator()([(s, None) for s, mute in zip(batch.samples, silent, strict=True) if mute])
    with torch.no_grad():
        found, expected = model.losses(batch), model.losses(spoken)
        apart = model.losses(alone)
    assert (found.sum(-1) > 0).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found[torch.tensor(silent)][:, :apart.shape[1]], apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("augment", [{}, {"gain_db": 3.0, "freq_masks": 1}], ids=["plain", "augmented"])
def test_a_resumed_run_equals_an_uninterrupted_one(augment: dict[str, Any], tiny_config: Make) -> None:
    settings = {"batch_size": 3, "micro_batch_size": 3, "max_steps": 6, "epochs": 3, "draft_word_dropout": 0.1,
                "text_draft_word_dropout": 0.4}

    def make(name: str, **more: Any) -> Config:
        return mixed(tiny_config(name, model=PIPELINE, train=settings | more, augment=augment))

    whole = Trainer("speech_llm", make("whole"))
    whole.fit()
    part = Trainer("speech_llm", make("part", save_every=2))
    part.total_steps = 4
    part.fit()
    config = make("part")
    config.resume = True
    resumed = Trainer("speech_llm", config)
    assert resumed.progress.step == 4
    resumed.fit()
    a, b = (load_file(run / "last" / "model.safetensors") for run in (whole.run, resumed.run))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert SLUModel.from_pretrained(whole.run / "last").config.use_speech is False
    assert not (whole.run / "simulation.json").exists()


@pytest.mark.parametrize("train", [{"batch_tokens": 400}, {}], ids=["tokens", "samples"])
def test_text_alone_trains(train: dict[str, Any], tiny_config: Make) -> None:
    trainer = Trainer("speech_llm", mixed(tiny_config(model=PIPELINE, train=train | {"max_steps": 2}), every=1))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.fit()
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters() if name in before)


def test_words_of_text_rows_are_spoilt_by_their_own_share() -> None:
    draft = " ".join(["one two three four"] * 50)
    text = Sample(Utterance("a", None, "x", draft=draft), None)
    speech = Sample(Utterance("a", Path("a.wav"), "x", draft=draft), None)

    def left(sample: Sample, *, words: float, text_words: float | None) -> list[str | None]:
        dropout = DraftDropout(0.0, words, ["five"], text_words=text_words)
        assert dropout.active
        return [dropout(sample, Key(1, 0, i)).utterance.draft for i in range(100)]

    assert left(text, words=0.4, text_words=None) == left(speech, words=0.4, text_words=None)
    assert left(text, words=0.0, text_words=0.4) == left(speech, words=0.4, text_words=0.0)
    assert left(speech, words=0.0, text_words=0.4) == left(text, words=0.4, text_words=0.0) == [draft] * 100
    replaced = sum(str(d).split().count("five") for d in left(text, words=0.0, text_words=0.4))
    assert 0.19 < replaced / (100 * 200) < 0.21
    with pytest.raises(UserError, match=r"train\.text_draft_word_dropout.*found 1.5"):
        DraftDropout(0.0, 0.0, text_words=1.5)
    # From a file it may be a whole number, a number that YAML reads as a string, or left to the other setting.
    for value, expected in ((1, 1.0), ("1e-1", 0.1), (None, None)):
        train = TrainConfig()
        apply(train, {"text_draft_word_dropout": value}, "test")
        assert train.text_draft_word_dropout == expected
    for wrong in ("much", True):
        with pytest.raises(UserError, match="text_draft_word_dropout"):
            apply(TrainConfig(), {"text_draft_word_dropout": wrong}, "test")


def test_what_a_run_lacks_is_named(tiny_config: Make) -> None:
    with pytest.raises(UserError, match=r"6 of 12 samples have no draft, the first \S*mixed.jsonl:1; .*--text-rows copy"):
        Trainer("speech_llm", mixed(tiny_config(model=PIPELINE), drafts=False))
    with pytest.raises(UserError, match=r"mixed.jsonl:1.*no audio.*model.use_speech false"):
        Trainer("speech_llm", mixed(tiny_config(model={"draft": "manifest"})))  # it listens, and there is nothing to hear
    with pytest.raises(UserError, match=r"text_draft_word_dropout.*set model\.draft"):
        Trainer("speech_llm", tiny_config(train={"text_draft_word_dropout": 0.1}))
    config = mixed(tiny_config(model=PIPELINE))
    config.data.dev = config.data.train
    with pytest.raises(UserError, match=r"mixed.jsonl:1: field 'audio'.*data\.dev"):
        Trainer("speech_llm", config)
