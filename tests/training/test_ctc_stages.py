"""Training with the `ctc` projector: its own stage, the vocabulary, rows without audio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unislu_llm.errors import UserError
from unislu_llm.models import load
from unislu_llm.training import ctc_run, state
from unislu_llm.training.build import build_model, build_registry
from unislu_llm.training.config import Config, apply
from unislu_llm.training.ctc_stage import train_ctc
from unislu_llm.training.loop import Trainer
from unislu_llm.training.stages import train_run, train_stages

ROOT = Path(__file__).parents[2]
MODEL: dict[str, Any] = {"projector": "ctc", "projector_options": {"stack": 2, "layers": 1, "heads": 2, "hidden": 16,
                                                                   "blank_bias": 1.0}}
CTC = {"name": "ctc", "train": {"objective": "ctc", "epochs": 2, "lr": {"projector": 1e-2}}}
ADAPT = {"name": "adapt", "train": {"max_steps": 1}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_stages_ctc_then_adapt(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(model=MODEL)
    config.stages = [CTC, ADAPT]
    run = train_stages("speech_llm", config, "run")
    done = state.read_finished(run / "ctc")
    assert done["step"] == 4
    assert {"train_seconds", "best_step", "best_wer"} <= set(done)
    fresh = build_model("speech_llm", tiny_config("other", model=MODEL), build_registry(config)).trained_state()
    best = weights(run / "ctc" / "best")
    assert {n.split(".")[0] for n in best if not torch.equal(best[n], fresh[n])} == {"projector"}
    # The next stage has the vocabulary and starts from those weights: after a step it is near them.
    places = ("ctc/best", "ctc/last", "adapt/last")
    tokens = [json.loads((run / name / "config.json").read_text())["ctc_tokens"] for name in places]
    assert tokens[0]
    assert tokens[0] == tokens[1] == tokens[2]
    after = weights(run / "adapt" / "last")
    name = "projector.to_token.weight"
    changed = [n for n in after if not torch.equal(after[n], best[n])]
    assert name in changed, changed
    assert (after[name] - best[name]).norm() < (after[name] - fresh[name]).norm()
    model: Any = load(run / "best")
    assert model.projector.token_ids.tolist() == tokens[0]
    assert (run / "ctc" / "best" / "simulation.json").is_file()


def test_a_stopped_ctc_stage_goes_on(tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    def config(output: str, **more: Any) -> Config:
        made = tiny_config(output, model=MODEL)
        apply(made, more, "test")
        made.stages = [CTC, ADAPT]
        return made

    whole = train_stages("speech_llm", config("whole"), "run")

    def stopped(projector: Any, train: Any, dev: Any, decode: Any, folder: Any, options: Any) -> Any:
        from unislu_llm.training import ctc_stage

        finish = ctc_stage._Run.finish

        def finish_and_stop(self: Any, row: dict[str, Any]) -> None:
            finish(self, row)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ctc_stage._Run, "finish", finish_and_stop)
            return train_ctc(projector, train, dev, decode, folder, options)

    part = config("part")
    with monkeypatch.context() as patch:
        patch.setattr(ctc_run, "train_ctc", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_stages("speech_llm", part, "run")
    assert not state.is_finished(Path(part.output) / "ctc")
    train_stages("speech_llm", config("part", resume=True), "run")
    for place in ("ctc/best", "ctc/last", "adapt/last"):
        a, b = weights(whole / place), weights(Path(part.output) / place)
        assert all(torch.equal(a[n], b[n]) for n in a), place


def test_stages_on_two_processes_train_what_one_trains(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    """One process trains the projector by CTC while the other waits; both train the stage after it."""
    ends = {}
    still = MODEL | {"projector_options": MODEL["projector_options"] | {"dropout": 0.0}}  # it is drawn by each process
    for processes in (1, 2):
        config = tiny_config(f"on-{processes}", model=still, train={"batch_size": 4, "micro_batch_size": 2})
        config.stages = [CTC, {"name": "adapt", "train": {"max_steps": 2}}]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run([*launcher, str(ROOT / "recipes" / "train_llm.py"), "--config", str(tmp_path / "config.yaml")],
                              env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-6000:]
        run = Path(config.output)
        assert state.read_finished(run)["step"] == 6 + 2
        logged = [json.loads(line) for line in (run / "adapt" / "metrics.jsonl").read_text().splitlines()]
        ends[processes] = weights(run / "ctc" / "best"), [row["loss"] for row in logged if row["part"] == "train"]
    (one, losses), (two, same_losses) = ends[1], ends[2]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(losses) == 2
    assert same_losses == pytest.approx(losses, rel=1e-3)


def test_the_projector_alone_without_stages(tiny_config: Callable[..., Config]) -> None:
    trainer = Trainer("speech_llm", tiny_config(model=MODEL, train={"max_steps": 2, "save_every": 1}))
    trainer.fit()
    model: Any = trainer.model
    assert len(model.ctc_vocabulary) > 0
    resumed = tiny_config(model=MODEL, train={"max_steps": 3}, data={"train": [trainer.config.data.train[0]]})
    resumed.resume, resumed.output = True, str(trainer.run)
    trainer.close()
    again: Any = Trainer("speech_llm", resumed).model
    assert again.config.ctc_tokens == model.config.ctc_tokens


def test_bad_ctc_stages_are_named(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    objective = {"objective": "ctc"}
    for kind, sections, message in [("speech_llm", {}, "set model.projector ctc"), ("whisper_slu", {"model": MODEL}, "of an LLM"),
                                    ("speech_llm", {"model": MODEL | {"encoder_mode": "full"}}, "frozen encoder"),
                                    ("speech_llm", {"model": MODEL, "augment": {"gain_db": 3.0}}, "augment")]:
        config = tiny_config(train=objective, **sections)
        with pytest.raises(UserError, match=message):
            train_run(kind, config, "run")
        assert not Path(config.output).exists()


def test_another_vocabulary_is_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    from unislu_llm.training.build import start_from

    registry = build_registry(tiny_config())
    one = build_model("speech_llm", tiny_config(model=MODEL), registry, ["the council met"])
    one.save_pretrained(tmp_path / "one")
    two = build_model("speech_llm", tiny_config(model=MODEL), registry, ["quite another text"])
    with pytest.raises(UserError, match="vocabulary"):
        start_from(two, tmp_path / "one")
    config = tiny_config(model=MODEL | {"init": str(tmp_path / "one")})
    heir: Any = build_model("speech_llm", config, registry, ["quite another text"])
    assert heir.config.ctc_tokens == one.config.ctc_tokens


def test_a_projector_of_one_model_and_the_llm_of_another(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    registry = build_registry(tiny_config())
    hearing = build_model("speech_llm", tiny_config(model=MODEL), registry, ["the council met"])
    reading = build_model("speech_llm", tiny_config(model={"draft": "manifest", "use_speech": False}), registry)
    for name, model in (("hearing", hearing), ("reading", reading)):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
    both = MODEL | {"draft": "manifest", "init": str(tmp_path / "hearing"), "init_llm": str(tmp_path / "reading")}
    heir = build_model("speech_llm", tiny_config(model=both), registry, ["the council met"])
    for name, value in heir.trained_state().items():
        of = hearing if name.startswith("projector.") else reading
        assert torch.equal(value, of.trained_state()[name]), name
    with pytest.raises(UserError, match=r"model.init_llm: .*nowhere"):
        build_model("speech_llm", tiny_config(model=both | {"init_llm": "nowhere"}), registry, ["the council met"])


def texted(config: Config, tmp_path: Path) -> Config:
    """With half of the training rows without audio."""
    rows = [json.loads(line) for line in Path(config.data.train[0]).read_text().splitlines()]
    for row in rows[::2]:
        for key in ("audio", "duration"):
            row.pop(key, None)
    manifest = Path(config.data.train[0]).with_name("half.jsonl")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train = [str(manifest)]
    return config


def trained(config: Config) -> dict[str, torch.Tensor]:
    trainer = Trainer("speech_llm", config)
    trainer.fit()
    return weights(trainer.run / "last")


@pytest.mark.parametrize("data", [{}, {"encoder_cache": "frames"}], ids=["audio", "cache"])
def test_text_trains_beside_speech_and_resumes_exactly(data: dict[str, Any], tiny_config: Callable[..., Config],
                                                       tmp_path: Path) -> None:
    if data:
        data = {"encoder_cache": str(tmp_path / "frames")}
    settings = {"batch_size": 3, "micro_batch_size": 3, "max_steps": 6, "epochs": 3}

    def make(name: str, **more: Any) -> Config:
        return texted(tiny_config(name, model=MODEL, data=data | {"dev": []}, train=settings | more), tmp_path)

    whole = trained(make("whole"))
    part = Trainer("speech_llm", make("part", save_every=2))
    part.total_steps = 4
    part.fit()
    config = make("part", save_every=2)
    config.resume, config.output = True, str(part.run)
    resumed = trained(config)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    other = make("other")
    other.data.simulate = {"deletions": 0.5}
    assert any(not torch.equal(whole[n], value) for n, value in trained(other).items())


def test_a_row_of_text_does_not_change_the_speech_beside_it(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    trainer = Trainer("speech_llm", texted(tiny_config(model=MODEL, data={"dev": []}), tmp_path))
    model: Any = trainer.model.eval()
    (batch,) = next(trainer.batches(0, 0))
    spoken = [i for i, s in enumerate(batch.samples) if s.utterance.audio is not None]
    assert 0 < len(spoken) < len(batch)
    assert batch.simulated_lengths is not None
    assert [i for i, n in enumerate(batch.simulated_lengths.tolist()) if not n] == spoken
    alone = model.collator()([(s, w) for s, w in [trainer_item(batch.samples[i]) for i in spoken]])
    with torch.no_grad():
        together, apart = model.losses(batch), model.losses(alone)
    width = apart.shape[1]
    assert torch.allclose(together[spoken][:, :width], apart, atol=1e-5)
    texts = [i for i in range(len(batch)) if i not in spoken]
    assert (together[texts].sum(-1) > 0).all()
    # A batch of text alone reaches every trained parameter, as DDP asks for.
    only = model.collator()([(batch.samples[i], trainer.simulator(batch.samples[i], key())) for i in texts])  # type: ignore[misc]
    model.losses(only).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and n.startswith("projector"))


def trainer_item(sample: Any) -> tuple[Any, torch.Tensor]:
    from unislu_llm.data.collate import SpeechDataset

    return SpeechDataset([sample])[0]


def key() -> Any:
    from unislu_llm.data.augment import Key

    return Key(0, 0, 0)


def test_text_needs_a_ctc_model(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    for kind in ("speech_llm", "whisper_slu"):
        with pytest.raises(UserError, match=r"half.jsonl:1.*no audio.*model.projector ctc"):
            Trainer(kind, texted(tiny_config(data={"dev": []}), tmp_path))
    with pytest.raises(UserError, match="did you mean 'deletions'"):
        Trainer("speech_llm", texted(tiny_config(model=MODEL, data={"dev": [], "simulate": {"deletion": 0.1}}), tmp_path))


def test_predictions_carry_the_greedy_ctc_text(tiny_config: Callable[..., Config]) -> None:
    from unislu_llm.analysis.evaluate import add_ctc_wer
    from unislu_llm.data.audio import load as load_audio
    from unislu_llm.decoding.drafts import CtcRecogniser
    from unislu_llm.decoding.generate import DecodeOptions, predict
    from unislu_llm.scoring.slue import score_rows
    from unislu_llm.scoring.wer import corpus_wer

    config = tiny_config(model=MODEL)
    trainer = Trainer("speech_llm", config)
    rows = predict(trainer.model, trainer.dev_samples, DecodeOptions(max_new_tokens=2, batch_size=5))
    waves = [load_audio(s.utterance.audio) for s in trainer.dev_samples if s.utterance.audio]
    alone = [CtcRecogniser(trainer.model.eval())([wave], "en")[0] for wave in waves]
    assert [row["ctc_text"] for row in rows] == alone
    assert len(set(alone)) > 1
    scores = score_rows(rows, trainer.registry)
    add_ctc_wer(scores, rows)
    assert scores["protocols"]["whisper"]["ctc_wer"] == corpus_wer([r["ref_text"] for r in rows], alone, "whisper").wer
