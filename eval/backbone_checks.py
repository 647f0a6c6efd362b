"""What has to hold of an LLM as the decoder, each property checked through the real entry points.

For `backbones.py`: training puts a tiny random checkpoint together and trains it, the engine
decodes, the saved model is loaded.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import soundfile
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_llms import save_tiny
from tiny_runs import tiny
from torch import Tensor

from unislu_llm.config import Config, DecodeConfig
from unislu_llm.data.batch import Batch
from unislu_llm.data.manifest import write_manifest
from unislu_llm.decoding import engine
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.greedy import Greedy
from unislu_llm.errors import UserError, shorten
from unislu_llm.io import LAST
from unislu_llm.loss import weighted_loss
from unislu_llm.models import load, speech_llm
from unislu_llm.models.base import SLUModel
from unislu_llm.run_folder import read_metrics
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.training.build import build_model
from unislu_llm.training.trainer import Trainer

COLUMNS = {
    "loads": "training puts the model together",
    "loss": "losses are those of the model's own forward pass, which reads embeddings as it reads "
            "ids; no later token changes one",
    "LoRA": "the default targets find layers, and each adapter gets a gradient",
    "trains": "the loss falls",
    "decodes": "each decoded token has the probability that training's forward pass gives it",
    "batched": "a batch of clips answers as each clip alone",
    "tasks": "two tasks that share a transcript answer as each alone",
    "rounds": "a hypothesis rewritten in rounds is what one token at a time gives",
    "checkpoints": "gradient checkpointing leaves the gradients as they are",
    "bf16": "trains a step and decodes in bf16, at nearly the same loss",
    "4-bit": "the same on 4-bit weights",
    "saved": "the saved model, loaded again, has the same losses and answers",
}
STEPS, SECONDS = 10, 60  # of training; of an architecture, after which it is given up
HEARD = ("the council met in paris monday", "this is a wonderful report and i am glad",
         "we thank the european parliament", "it was a bad and bad evening for us all")
TASKS = ("ner", "sa")
Answers = list[dict[str, Any]]  # by task, what was decoded of a clip
Cells = dict[str, str]  # by column `yes`, or what is wrong


@dataclass
class Bench:
    """A folder with a tiny Whisper, clips and a manifest whose rows have hypotheses."""

    home: Path

    def __post_init__(self) -> None:
        for part in tiny.make_whisper():
            part.save_pretrained(self.home / "whisper")
        spoken = tiny.write_utterances(self.home / "audio")
        self.utterances = [replace(u, hypothesis=text)
                           for u, text in zip(spoken, HEARD, strict=True)]
        write_manifest(self.home / "train.jsonl", self.utterances)
        self.waves = [torch.from_numpy(soundfile.read(u.audio, dtype="float32")[0])
                      for u in spoken]

    def config(self, llm: Path, run: Path, **train: Any) -> Config:
        """A run on all clips at a time, with the settings of an LLM that has no preset."""
        return Config.model_validate({
            "output": str(run), "model": {
                "encoder": str(self.home / "whisper"), "llm": str(llm), "hypothesis": "manifest",
                "projector_options": {"stack": 5, "hidden": 32}, "transcript": "rewrite",
                "lora": {"rank": 4}},
            "data": {"train": [str(self.home / "train.jsonl")]},
            "train": {"max_steps": STEPS, "epochs": STEPS, "batch_size": len(HEARD),
                      "warmup_steps": 2, "trackers": [], "threads": 1, "loss": "uniform",
                      "lr": {"projector": 1e-2, "lora": 1e-2, "markers": 1e-2}} | train})

    def batch(self, model: SLUModel, rows: Sequence[int] = range(len(HEARD))) -> Batch:
        """Clips by number, with their targets."""
        examples = [Example(u, next(iter(u.labels), None)) for u in self.utterances]
        return model.collator().from_waves([examples[i] for i in rows],
                                           [self.waves[i] for i in rows])

    def decode(self, model: SLUModel, tasks: Sequence[str] = TASKS,
               rows: Sequence[int] = range(len(HEARD)), **options: Any) -> Answers:
        """The best answers under the grammar, with forced tasks."""
        seen: Answers = []
        fill = engine.fill

        def watch(answer: Any, tokenizer: Any, ranked: Any, *rest: Any, **more: Any) -> Any:
            seen.append({name: answers[0] for name, answers in ranked.items()})
            return fill(answer, tokenizer, ranked, *rest, **more)

        how = DecodeConfig(**{"grammar": True, "force_task": True, "max_new_tokens": 24,
                              "tokens_per_second": 25.0} | options)
        with patch.object(engine, "fill", watch):
            Engine(model, how).answer(self.batch(model, rows), [tasks] * len(rows))
        return seen


def same(found: Answers, right: Answers) -> None:
    """Raises AssertionError: other tokens, or other probabilities."""
    for i, (mine, its) in enumerate(zip(found, right, strict=True)):
        for name in mine:
            assert mine[name].ids == its[name].ids, f"clip {i}, {name}: other tokens"
            first, second = (torch.tensor(one[name].log_probs).nan_to_num() for one in (mine, its))
            near(first, second, f"clip {i}, {name}: log-probabilities")


def near(found: Tensor, right: Tensor, what: str) -> None:
    """Raises AssertionError: numbers differ by more than rounding explains."""
    gap = float((found - right).abs().max()) if found.numel() else 0.0
    assert gap <= 1e-3 * max(1.0, float(right.abs().max())), f"{what} differ by {gap:.2g}"


# ---- one property each: what is not so is an AssertionError that says what


@torch.no_grad()
def own_loss(bench: Bench, model: Any) -> None:
    batch = bench.batch(model, [0])
    with patch.object(speech_llm, "lay_out", wraps=speech_llm.lay_out) as spy:
        losses = model.losses(batch)[0]
    # Laid out anew: CTRL scales in place what it is given.
    embeddings = speech_llm.lay_out(*spy.call_args.args)[0]
    logits = model.llm(inputs_embeds=embeddings, use_cache=False).logits
    n = batch.target_lengths[0]
    own = logits[0, -n:].float().log_softmax(-1).gather(1, batch.target_ids[0, :, None])[:, 0]
    near(losses, -own, "losses and those of the model's own forward")
    other = batch.target_ids.clone()
    other[:, n // 2:] = other[:, n // 2:].roll(1, 1)
    early = model.losses(replace(batch, target_ids=other))[0, :n // 2]
    near(early, losses[:n // 2], "losses before a token that is changed")
    ids = torch.arange(3, 19)[None]
    by_ids, by_embeddings = (model.llm(**given, use_cache=False).logits for given in (
        {"input_ids": ids}, {"inputs_embeds": model.llm.get_input_embeddings()(ids)}))
    near(by_embeddings, by_ids, "logits by ids and by their embeddings")


def gradients(bench: Bench, model: SLUModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    batch = bench.batch(model)
    losses = model.losses(batch)
    weighted_loss(losses, batch.target_parts, "uniform").backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return losses.detach(), found


def lora(bench: Bench, model: SLUModel) -> None:
    names = [name for name, _ in model.trainable_groups().get("lora", ())]
    assert names, "no layer is adapted"
    found = gradients(bench, model)[1]
    idle = [n for n in names if ".lora_B." in n and (n not in found or not found[n].any())]
    # Experts that no token chose have none.
    assert not idle or ("expert" in idle[0] and len(idle) < len(names) // 2), f"idle: {idle[0]}"


def decodes(bench: Bench, model: SLUModel, answers: Answers) -> None:
    with torch.no_grad():
        for i, answer in enumerate(answers):
            for name, said in answer.items():
                ids = torch.tensor([said.ids])
                batch = replace(bench.batch(model, [i]), target_ids=ids, target_lengths=(
                    len(said.ids),), target_parts=torch.zeros_like(ids))
                near(torch.tensor(said.log_probs), -model.losses(batch)[0],
                     f"clip {i}, {name}: log-probabilities and training's")


def batched(bench: Bench, model: SLUModel, answers: Answers) -> None:
    for i in (1, 2):  # the longest clip and the shortest
        same([(answers or bench.decode(model))[i]], bench.decode(model, rows=[i]))


def tasks(bench: Bench, model: SLUModel) -> None:
    # Word for word the transcript does not end by its budget, which depends on what is asked.
    both = bench.decode(model, transcript="verbatim")
    for name in TASKS:
        same([{name: answer[name]} for answer in both],
             bench.decode(model, [name], transcript="verbatim"))


def rounds(bench: Bench, model: SLUModel) -> None:
    fast = bench.decode(model, (), hypothesis_bias=2.0)
    with patch.object(Greedy, "ahead", lambda search: search.last[:, :0]):
        slow = bench.decode(model, (), hypothesis_bias=2.0)
    same(fast, slow)


def checkpoints(bench: Bench, model: SLUModel) -> None:
    plain = gradients(bench, model)
    model.enable_gradient_checkpointing()
    again = gradients(bench, model)
    near(again[0], plain[0], "losses")
    assert plain[1].keys() == again[1].keys(), "other parameters get a gradient"
    for name, gradient in plain[1].items():
        near(again[1][name], gradient, f"gradients of {name}")


def half(bench: Bench, config: Config, right: Tensor, **model: Any) -> None:
    """The trained weights on frozen ones of fewer bits; `right` are the losses in fp32."""
    own = config.model.model_copy(update=model)
    config = config.model_copy(update={"model": own, "train": config.train.model_copy(update={
        "precision": "bf16", "init": str(Path(config.output) / LAST)})})
    trained = build_model("speech_llm", config, TaskRegistry())
    with torch.autocast("cpu", torch.bfloat16):
        losses, found = gradients(bench, trained)
        bench.decode(trained)
    assert all(g.isfinite().all() for g in found.values()), "a gradient is not finite"
    gap = float(losses.float().mean() / right.mean())
    assert abs(gap - 1) < 0.1, f"the mean loss is {gap:.2f} times that in fp32"


def bf16(bench: Bench, config: Config, right: Tensor) -> None:
    half(bench, config, right)


def four_bits(bench: Bench, config: Config, right: Tensor) -> None:
    half(bench, config, right, quantization="4bit")


def saved(bench: Bench, config: Config, model: SLUModel, answers: Answers) -> None:
    again = load(Path(config.output) / LAST)
    with torch.no_grad():
        near(again.losses(bench.batch(again)), model.losses(bench.batch(model)), "losses")
    same(bench.decode(again), answers)


# ---- all of them


def check(kind: str, bench: Bench) -> Cells:
    """What was found of an architecture, by column: `yes`, or the first line of what is wrong.

    `refused` is the one error that a user gets, `made` why there is no tiny checkpoint.
    """
    llm, run, cells = bench.home / "llms" / kind, bench.home / "runs" / kind, Cells()
    config = bench.config(llm, run)

    def cell(name: str, test: Callable[[], object]) -> bool:
        try:
            with limited():
                test()
            cells[name] = "yes"
        except Exception as error:
            cells[name] = said(error, bench)
        return cells[name] == "yes"

    found: dict[str, Any] = {}
    try:
        if not cell("made", lambda: save_tiny(kind, llm, tiny.make_tokenizer())):
            return cells
        try:
            with limited():
                found["trainer"] = trainer = Trainer("speech_llm", config)
            cells["loads"] = "yes"
        except UserError as error:
            return cells | {"refused": told(error, bench)}
        except Exception as error:
            return cells | {"loads": said(error, bench)}
        model = trainer.model.eval()
        cell("loss", lambda: own_loss(bench, model))
        cell("LoRA", lambda: lora(bench, model))
        trained = cell("trains", lambda: trains(trainer))
        model.eval()
        answers: Answers = []

        def first() -> None:
            answers.extend(bench.decode(model))
            decodes(bench, model, answers)

        cell("decodes", first)
        cell("batched", lambda: batched(bench, model, answers))
        cell("tasks", lambda: tasks(bench, model))
        cell("rounds", lambda: rounds(bench, model))
        if trained:
            with torch.no_grad():
                right = model.losses(bench.batch(model))
            cell("saved", lambda: saved(bench, config, model, answers))
            cell("bf16", lambda: bf16(bench, config, right))
            cell("4-bit", lambda: four_bits(bench, config, right))
        cell("checkpoints", lambda: checkpoints(bench, model))
    finally:
        reset(llm, run)
    return cells


def reset(*folders: Path) -> None:
    """Remove what a run left, on the disk and in the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def trains(trainer: Trainer) -> None:
    run = trainer.fit()
    losses = [row["loss"] for row in read_metrics(run) if row["part"] == "train"]
    assert losses[-1] < 0.95 * losses[0], f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}"


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises TimeoutError after a while: some architecture may never end."""
    def end(*_: Any) -> None:
        raise TimeoutError(f"took over {SECONDS} s")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def told(error: UserError, bench: Bench) -> str:
    """What a user reads."""
    text = " ".join(str(error).split()).replace(f"{bench.home}/", "").replace("llms/", "")
    return shorten(text, 300)


def said(error: Exception, bench: Bench) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().replace(f"{bench.home}/", "").replace("llms/", "")
    lines = text.splitlines() or [""]
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return shorten(kind + lines[0], 160)
