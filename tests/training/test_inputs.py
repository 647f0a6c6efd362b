"""Runs on inputs of every kind: cached frames, text without audio, hypotheses, augmented audio."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import CTC, fitted, logged, stop_after, weights
from unislu_llm import models
from unislu_llm.config import Config
from unislu_llm.data.augment import Augmenter
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.decoding.recogniser import WhisperRecogniser
from unislu_llm.errors import UserError
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.trainer import Trainer

Make = Callable[..., Config]
READS: dict[str, Any] = {"hypothesis": "manifest", "projector": "none", "projector_options": {}}
SMALL = {"batch_size": 3, "max_steps": 6, "epochs": 3}
RATES = {"lr": dict.fromkeys(("projector", "lora", "markers", "decoder"), 1e-4)}


@pytest.fixture
def rewritten(tiny_config: Make) -> Callable[..., list[str]]:
    """Factory of manifests: some of the corpus's rows without audio, some with a hypothesis."""

    def make(silent: int = 0, hypotheses: int = 0) -> list[str]:
        path = Path(tiny_config().data.train[0])
        rows = list(read_manifest(path, TaskRegistry()))
        for i, row in enumerate(rows):
            if silent and i % silent == 0:
                rows[i] = replace(rows[i], audio=None, duration=None)
            if hypotheses and i % hypotheses == 0:
                rows[i] = replace(rows[i], hypothesis=row.text.partition(" ")[2])
        write_manifest(path.with_name("rewritten.jsonl"), rows)
        return [str(path.with_name("rewritten.jsonl"))]

    return make


def losses(kind: str, config: Config) -> list[float]:
    return [row["loss"] for row in logged(fitted(kind, config).run)]


@pytest.mark.parametrize(("kind", "pad"), [("speech_llm", False), ("whisper_slu", False),
                                           ("whisper_slu", True)])
def test_cached_frames_change_no_loss_and_spare_the_encoder(
        kind: str, pad: bool, tiny_config: Make, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"model": {"silence": 30.0 * pad}, "train": SMALL | RATES}
    plain = losses(kind, tiny_config("plain", **sections, data={"dev": []}))
    data = {"dev": [], "frame_cache": str(tmp_path / "cache")}
    assert losses(kind, tiny_config("cache", **sections, data=data)) == pytest.approx(plain,
                                                                                     rel=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(SpeechEncoder, "forward", None)  # would fail
        data["num_workers"] = 1
        again = losses(kind, tiny_config("again", **sections, data=data))
    assert again == pytest.approx(plain, rel=1e-3)
    # A clip that was lost is computed anew.
    next((tmp_path / "cache").glob("*/*.npy")).unlink()
    assert losses(kind, tiny_config("lost", **sections, data=data)) == again


def test_ctc_trains_on_cached_frames_and_masks_them(tiny_config: Make, tmp_path: Path) -> None:
    data = {"frame_cache": str(tmp_path / "cache")}
    sections = {"model": CTC, "train": {"objective": "ctc", "batch_size": 4}}
    plain = losses("speech_llm", tiny_config("plain", **sections))
    cached = losses("speech_llm", tiny_config("cached", **sections, data=data))
    assert cached == pytest.approx(plain, rel=1e-2)
    masked = losses("speech_llm", tiny_config("masked", **sections, data=data, augment={
        "time_masks": 1, "freq_masks": 1}))
    assert masked != cached


@pytest.mark.parametrize("cache", [False, True])
def test_text_trains_beside_speech_and_resumes_exactly(
        cache: bool, tiny_config: Make, rewritten: Callable[..., list[str]],
        tmp_path: Path) -> None:
    data = {"train": rewritten(silent=2), "dev": [],
            "frame_cache": str(tmp_path / "frames") if cache else ""}

    def make(name: str, *, more: dict[str, Any] | None = None, **top: Any) -> Config:
        return tiny_config(name, model=CTC, data=data | (more or {}), **top,
                           train=SMALL | {"save_every": 2})

    whole = fitted("speech_llm", make("whole")).run
    stop_after(Trainer("speech_llm", make("part")), 5)
    resumed = Trainer("speech_llm", make("part", resume=True))
    assert resumed.progress.step == 4
    assert {batch.kind for micro in resumed.batches(0) for batch in micro} == {
        "posteriors", "frames" if cache else "audio"}
    resumed.fit()
    one, two = weights(whole / "last"), weights(resumed.run / "last")
    assert all(torch.equal(one[n], two[n]) for n in one)
    other = fitted("speech_llm", make("other", more={"text_injection": {"deletions": 0.5}})).run
    assert any(not torch.equal(one[n], value) for n, value in weights(other / "last").items())
    assert '"deletions": 0.5' in (other / "last" / "simulation.json").read_text()


def test_a_model_that_only_reads_trains_on_text(tiny_config: Make,
                                                rewritten: Callable[..., list[str]],
                                                tmp_path: Path) -> None:
    """A row without audio has the loss of its speech; no encoder, no cache, no rates."""
    found = []
    for silent in (0, 2, 1):
        data = {"train": rewritten(silent=silent, hypotheses=1), "dev": [],
                "frame_cache": str(tmp_path / "cache")}
        train = {"batch_size": 12, "max_steps": 2} | ({"batch_tokens": 900} if silent == 1 else {})
        run = fitted("speech_llm", tiny_config(f"silent-{silent}", model=READS, data=data,
                                               train=train)).run
        found.append([row["loss"] for row in logged(run)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert not (tmp_path / "cache").exists()
    assert not (run / "last" / "simulation.json").exists()
    assert models.load(run / "last").config.projector == "none"


def test_hypotheses_are_spoilt_alike_wherever_they_are_loaded(
        tiny_config: Make, rewritten: Callable[..., list[str]]) -> None:
    data = {"train": rewritten(hypotheses=1), "dev": []}
    train = {"batch_size": 4, "hypothesis_dropout": 0.3, "hypothesis_word_dropout": 0.3}
    make = {"model": {"hypothesis": "manifest"}, "train": train}

    def read(trainer: Trainer, epoch: int, skip: int = 0) -> list[str | None]:
        return [example.utterance.hypothesis for micro in trainer.batches(epoch, skip)
                for batch in micro for example in batch.examples]

    one = Trainer("speech_llm", tiny_config("one", **make, data=data))
    plain = read(one, 1)
    assert len(set(plain)) > 3
    assert read(one, 1, skip=1) == plain[4:]
    two = Trainer("speech_llm", tiny_config("two", **make, augment={"gain_db": 3.0},
                                            data=data | {"num_workers": 2}))
    assert read(two, 1) == plain
    assert read(two, 0) != plain


def test_validation_hears_the_clip_itself(tiny_config: Make,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer("speech_llm", tiny_config(augment={"silence_share": 1.0, "freq_masks": 1}))
    assert all(e.utterance.text == "" for b in next(trainer.batches(0)) for e in b.examples)
    monkeypatch.setattr(Augmenter, "clip", None)  # would fail
    decoded = trainer.objective.decode(trainer.model, trainer.dev, None, "")
    assert [row["ref_text"] for row in decoded] == [e.utterance.text for e in trainer.dev]


def test_what_a_run_lacks_is_named(tiny_config: Make, rewritten: Callable[..., list[str]],
                                   caplog: pytest.LogCaptureFixture) -> None:
    half = {"train": rewritten(silent=2, hypotheses=2), "dev": []}
    for kind, model in (("speech_llm", {}), ("whisper_slu", {}),
                        ("speech_llm", {"hypothesis": "manifest"})):
        with pytest.raises(UserError, match=r"rewritten.jsonl:1.*no audio.*set model.projector"):
            Trainer(kind, tiny_config(model=model, data=half))
    with pytest.raises(UserError, match="did you mean 'deletions'"):
        Trainer("speech_llm", tiny_config(model=CTC, data=half | {
            "text_injection": {"deletion": 0.1}}))
    with pytest.raises(UserError, match=r"3 of 12 examples have no hypothesis.*--copy-text"):
        Trainer("speech_llm", tiny_config(model=READS, data={
            "train": rewritten(silent=2, hypotheses=4), "dev": []}))
    whole = rewritten(silent=2, hypotheses=1)
    with pytest.raises(UserError, match=r"rewritten.jsonl:1: field 'audio'.*data\.dev"):
        Trainer("speech_llm", tiny_config(model=READS, data={"train": whole, "dev": whole}))
    with caplog.at_level(logging.WARNING):
        Trainer("speech_llm", tiny_config(
            model=CTC | {"hypothesis": "manifest", "recogniser": "ctc"},
            data={"train": rewritten(hypotheses=2), "dev": []}))
    assert "6 of 12 examples have no hypothesis" in caplog.text


def test_hypotheses_that_are_missing_are_made_once(
        tiny_config: Make, rewritten: Callable[..., list[str]],
        monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    said = WhisperRecogniser.__call__

    def counted(self: WhisperRecogniser, waves: Any, language: str) -> Any:
        asked.append(len(waves))
        return said(self, waves, language)

    monkeypatch.setattr(WhisperRecogniser, "__call__", counted)
    config = tiny_config(model=READS, data={"train": rewritten(hypotheses=3), "dev": []},
                         train={"max_steps": 2, "save_every": 1})
    first = Trainer("speech_llm", config)
    stop_after(first, 1)
    assert sum(asked) == 8, "four of twelve rows have one"
    there = [e.utterance.hypothesis for e in first.dataset.examples]
    assert None not in there
    assert there[0] == "council met in paris on monday", "the row's own stays"
    config.resume = True
    again = Trainer("speech_llm", config)
    assert [e.utterance.hypothesis for e in again.dataset.examples] == there
    assert sum(asked) == 8, "a resumed run has those that it began with"
