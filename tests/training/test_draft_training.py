"""Training with drafts: what is dropped is reproducible, runs resume exactly, and the saved model reads drafts."""

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
from unislu_llm.training.config import Config
from unislu_llm.training.loop import Trainer
from unislu_llm.utterance import Utterance

SPOILT = {"draft_dropout": 0.3, "draft_word_dropout": 0.3, "batch_size": 4, "micro_batch_size": 2, "epochs": 2}
Make = Callable[..., Config]


def drafted(config: Config, every: int = 1) -> Config:
    """Give each row (or every second one) of the corpus a draft: its transcript without the first word."""
    path = Path(config.data.train[0])
    rows = [dataclasses.replace(u, draft=u.text.partition(" ")[2] if i % every == 0 else None)
            for i, u in enumerate(read_manifest(path, TaskRegistry()))]
    write_manifest(path, rows)
    return config


def drafts(trainer: Trainer, epoch: int, skip: int = 0) -> list[str | None]:
    return [s.utterance.draft for step in trainer.batches(epoch, skip) for batch in step for s in batch.samples]


def test_dropout_follows_from_the_draw() -> None:
    sample = Sample(Utterance("a", None, "x", draft=" ".join(["one two three four"] * 50)), None)
    vocabulary = ["five six", "six"]
    dropout = DraftDropout(0.25, 0.4, vocabulary)
    found = [dropout(sample, Key(1, 0, i)).utterance.draft for i in range(400)]
    assert found == [DraftDropout(0.25, 0.4, reversed(vocabulary))(sample, Key(1, 0, i)).utterance.draft for i in range(400)]
    assert 0.15 < found.count(None) / 400 < 0.35
    words = [word for draft in found if draft is not None for word in draft.split()]
    n = 200 * sum(draft is not None for draft in found)
    new = [word for word in words if word in ("five", "six")]
    assert 0.19 < len(new) / n < 0.21  # replaced
    assert 0.19 < 1 - len(words) / n < 0.21  # deleted
    assert 0.6 < new.count("six") / len(new) < 0.73  # as often as in the drafts
    assert dropout(sample, Key(1, 0, 0, 1)) != dropout(sample, Key(1, 0, 0)) != dropout(sample, Key(1, 1, 0))
    bare = Sample(Utterance("a", None, "x"), None)
    assert dropout(bare, Key(1, 0, 0)) is bare
    with pytest.raises(UserError, match="draft_dropout"):
        DraftDropout(1.5, 0.0)


def test_loader_processes_and_augmentation_leave_the_drafts_alone(tiny_config: Make) -> None:
    model = {"draft": "manifest"}
    one = Trainer("speech_llm", drafted(tiny_config("one", train=SPOILT, model=model)))
    plain = drafts(one, 1)
    assert len(set(plain)) > 3
    assert drafts(one, 1, skip=1) == plain[4:]
    two = Trainer("speech_llm", tiny_config("two", train=SPOILT, model=model, data={"num_workers": 2}, augment={"gain_db": 3.0}))
    assert drafts(two, 1) == plain
    assert drafts(two, 0) != plain


def test_resumed_run_equals_an_uninterrupted_one(tiny_config: Make) -> None:
    model: dict[str, Any] = {"draft": "manifest"}
    dev: dict[str, Any] = {"dev": []}
    whole = Trainer("speech_llm", drafted(tiny_config("whole", train=SPOILT, model=model, data=dev)))
    whole.fit()
    part = Trainer("speech_llm", tiny_config("part", train=SPOILT | {"save_every": 2}, model=model, data=dev))
    part.total_steps = 3  # killed after step 3; the last checkpoint is of step 2, inside the first epoch
    part.validate = lambda title: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    config = tiny_config("part", train=SPOILT, model=model, data=dev)
    config.resume = True
    resumed = Trainer("speech_llm", config)
    assert resumed.progress.step == 2
    resumed.fit()
    a, b = (load_file(run / "last" / "model.safetensors") for run in (whole.run, resumed.run))
    assert all(torch.equal(a[name], b[name]) for name in a)
    # What was saved reads drafts as it did.
    loaded = SLUModel.from_pretrained(whole.run / "last")
    batch = next(iter(whole.batches(0, 0)))[0]
    assert int(batch.draft_lengths.max()) > 0  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(loaded.losses(batch), whole.model.eval().losses(batch))
    assert loaded.collator().draft(batch.samples[0]) == whole.model.collator().draft(batch.samples[0])


def test_text_alone_trains_by_tokens_and_needs_no_cache(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(model={"draft": "gold", "use_speech": False}, data={"encoder_cache": str(tmp_path / "cache"), "dev": []},
                         train={"batch_tokens": 400, "max_steps": 2})
    trainer = Trainer("speech_llm", config)
    trainer.fit()
    assert not (tmp_path / "cache").exists()
    assert all(s.utterance.draft == s.utterance.text for s in trainer.train_samples)
    assert not any(name.startswith("projector") for name in load_file(trainer.run / "last" / "model.safetensors"))


def test_what_a_run_lacks_is_named(tiny_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="unislu draft"):
        Trainer("speech_llm", tiny_config(model={"draft": "manifest"}))
    with pytest.raises(UserError, match=r"set model\.draft"):
        Trainer("speech_llm", tiny_config(train={"draft_word_dropout": 0.1}))
    with pytest.raises(UserError, match="takes no draft"):
        Trainer("whisper_slu", tiny_config(model={"draft": "gold"}))
    half = drafted(tiny_config(model={"draft": "manifest", "use_speech": False}), every=2)
    with pytest.raises(UserError, match="6 of 12 samples have no draft"):
        Trainer("speech_llm", half)
    Trainer("speech_llm", tiny_config(model={"draft": "manifest"}))
    assert "6 of 12 samples have no draft" in caplog.text
