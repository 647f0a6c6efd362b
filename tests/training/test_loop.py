"""The run as a whole: what it writes, that it resumes exactly, and that it refuses what cannot go well."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.training.config import Config
from unislu_llm.training.loop import Trainer


def metrics(run: Path, part: str) -> list[dict[str, Any]]:
    """Logged rows of one part of a run."""
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["part"] == part]


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_run_learns_and_leaves_a_loadable_model(kind: str, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(train={"epochs": 8, "eval_start": True, "lr": {"decoder": 1e-2}})
    trainer = Trainer(kind, config)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.fit()
    rows = metrics(trainer.run, "train")
    assert len(rows) == trainer.total_steps == 8 * len(trainer.plan)
    for row in rows:  # from the first step on
        assert 0 < row["w_asr"] < 1
        assert row["w_asr"] + row["w_task"] == pytest.approx(1)
    for part in ("loss_asr", "loss_ner", "loss_sa"):
        seen = [r[part] for r in rows if part in r]
        assert seen[-1] < seen[0], part
    for name, before in frozen.items():
        assert torch.equal(dict(trainer.model.named_parameters())[name], before), name
    assert [r["step"] for r in metrics(trainer.run, "dev")] == [0, trainer.total_steps]
    assert len(list((trainer.run / "predictions").glob("*.jsonl"))) == 2
    assert {"config.yaml", "versions.json", "best", "last", "metrics.jsonl"} <= {p.name for p in trainer.run.iterdir()}
    loaded = SLUModel.from_pretrained(trainer.run / "last")
    state, own = loaded.trained_state(), trainer.model.trained_state()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[n], own[n]) for n in own)


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_validation_can_decode_with_the_grammar(kind: str, tiny_config: Callable[..., Config]) -> None:
    """Answers of an untrained model keep to the format with it, if they are about anything or not; without, they do not."""
    problems: dict[bool, set[str]] = {}
    for grammar in (True, False):
        trainer = Trainer(kind, tiny_config(f"{kind}-{grammar}", decode={"max_new_tokens": 40, "grammar": grammar}))
        trainer.validate("untrained")
        lines = (trainer.run / "predictions" / "step-000000.jsonl").read_text(encoding="utf-8").splitlines()
        problems[grammar] = {problem for line in lines for problem in json.loads(line)["problems"]}
        trainer.close()
    about_what_is_said = {"loop", "wrong_task", "empty_transcript"}
    assert problems[True] <= about_what_is_said
    assert not problems[False] <= about_what_is_said


def test_resumed_run_equals_an_uninterrupted_one(tiny_config: Callable[..., Config]) -> None:
    """Stopped in the middle of an epoch, with dropout at work: bit-exact."""
    model = {"lora": {"rank": 4, "dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}}
    settings: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "epochs": 2}
    whole = Trainer("speech_llm", tiny_config("whole", train=settings, model=model))
    whole.fit()
    part = Trainer("speech_llm", tiny_config("part", train=settings | {"save_every": 2}, model=model))
    part.total_steps = 5  # killed after step 5; the last checkpoint is of step 4, inside epoch 2
    part.validate = lambda title: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    config = tiny_config("part", train=settings, model=model)
    config.resume = True
    resumed = Trainer("speech_llm", config)
    assert (resumed.progress.step, resumed.progress.epoch) == (4, 1)
    resumed.fit()
    a, b = (load_file(run / "last" / "model.safetensors") for run in (whole.run, resumed.run))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_run_folder_is_never_overwritten(tiny_config: Callable[..., Config]) -> None:
    first = Trainer("speech_llm", tiny_config("same"))
    before = (first.run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        Trainer("speech_llm", tiny_config("same", train={"epochs": 9}))
    assert (first.run / "config.yaml").read_bytes() == before


def test_resume_without_a_checkpoint_says_so(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("nothing")
    config.resume = True
    with pytest.raises(UserError, match="holds no checkpoint"):
        Trainer("speech_llm", config)


def test_non_finite_loss_stops_the_run_and_keeps_what_was_written(tiny_config: Callable[..., Config]) -> None:
    trainer = Trainer("speech_llm", tiny_config(train={"save_every": 1}))
    trainer.step(next(iter(trainer.batches(0, 0))))
    trainer.save()
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if n.startswith("projector.")).fill_(math.nan)
    with pytest.raises(UserError, match=r"loss is nan at step"):
        trainer.step(next(iter(trainer.batches(0, 0))))
    saved = load_file(trainer.run / "last" / "model.safetensors")
    assert all(bool(t.isfinite().all()) for t in saved.values())


def test_bf16_trains_with_fp32_trainables(tiny_config: Callable[..., Config]) -> None:
    trainer = Trainer("speech_llm", tiny_config(train={"precision": "bf16", "max_steps": 2}))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    trainer.fit()
    assert all(math.isfinite(r["loss"]) for r in metrics(trainer.run, "train"))
    assert trainer.model.llm.config._attn_implementation == "eager"  # see choose_attention


def test_gradient_checkpointing_changes_no_gradient(tiny_config: Callable[..., Config]) -> None:
    gradients = []
    for name, on in (("plain", False), ("checkpointed", True)):
        trainer = Trainer("speech_llm", tiny_config(name, train={"gradient_checkpointing": on}))
        trainer.wrapped.train()
        micro = next(iter(trainer.batches(0, 0)))
        from unislu_llm.loss import Counts

        trainer.backward(micro, Counts(*trainer.totals(micro).tolist()))
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_asr_only_corpus_trains(tiny_config: Callable[..., Config], make_utterances: Any, tmp_path: Path) -> None:
    from unislu_llm.data.manifest import write_manifest
    from unislu_llm.utterance import Utterance

    bare = [Utterance(u.id, u.audio, u.text, {}, duration=u.duration) for u in make_utterances(seconds=[0.6, 0.8, 1.0, 0.7])]
    write_manifest(tmp_path / "asr.jsonl", bare)
    trainer = Trainer("speech_llm", tiny_config(data={"train": [str(tmp_path / "asr.jsonl")], "dev": []},
                                                train={"batch_size": 4, "max_steps": 3}))
    trainer.fit()
    rows = metrics(trainer.run, "train")
    assert all("loss_task" not in r and r["loss"] == pytest.approx(r["loss_asr"]) for r in rows)
