"""What one GPU should be asked when there is one: is it right, how fast, and where does time go.

    python eval/gpu_job.py                         # all parts: within 7 minutes on one H100
    python eval/gpu_job.py --only exact train      # some of them
    python eval/gpu_job.py --tiny --device cpu     # the same with tiny models, to try the script

Random weights in the shapes of real models, noise of SLUE's lengths. A part is written to
eval/results/gpu/PART.json when it ends; one that fails is written with its error, and the next
begins. MFU is counted FLOPs a second over those of a large matrix product measured beside it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from benchmark import random_clips, random_model, wait
from gpu_parts import adapters, decode, free, gradients, launches, shards
from tabulate import tabulate
from tiny_runs import tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unislu_llm.config import DecodeConfig, TrainConfig
from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.decoding.engine import Engine
from unislu_llm.io import write_json
from unislu_llm.loss import weighted_loss
from unislu_llm.models.base import SLUModel
from unislu_llm.run_folder import versions
from unislu_llm.training.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [("base", "smollm2-135m"), ("medium", "qwen2.5-0.5b"), ("medium", "qwen2.5-7b")]


@dataclass
class Options:
    """What is measured, and on what."""

    only: tuple[str, ...] = ()
    """Parts: exact, train, decode, profile, shards, launches, adapters; default: all."""
    tiny: bool = False
    """Tiny models and few steps."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where."""
    steps: int = 6
    """Steps that are timed, after two that are not."""
    out: Path = ROOT / "eval" / "results" / "gpu"
    """Folder of the results."""


@dataclass
class Job:
    """The options, and clips as batches."""

    options: Options
    folder: Path
    ceiling: float = field(default=0.0, init=False)  # FLOPs a second of a bf16 matrix product

    @property
    def shapes(self) -> list[tuple[str, str]]:
        """Encoder and LLM of each model."""
        return [("tiny", "tiny")] if self.options.tiny else SHAPES

    def model(self, encoder: str, llm: str, precision: str = "bf16",
              change: Callable[[Any], Any] = lambda llm: llm, device: str = "") -> SLUModel:
        """A model with random weights, on the device."""
        device = device or self.options.device
        return random_model(encoder, llm, "mlp", precision, 0, device, change).to(device)

    def batch(self, model: SLUModel, size: int) -> Batch:
        """Clips in the order of their numbers."""
        examples = random_clips(self.folder, size, 0)
        data = SpeechDataset(examples, listens=model.listens)
        return model.collator()([data[i, 0] for i in range(size)])

    def peak(self) -> float:
        """GiB of the device, at most, since the last call; 0 on a CPU."""
        if self.options.device == "cpu":
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Of one call, the mean of so many after two."""
        device = torch.device(self.options.device)
        for i in range(times + 2):
            if i == 2:
                wait(device)
                began = time.perf_counter()
            work()
        wait(device)
        return (time.perf_counter() - began) / times

    def measure_ceiling(self) -> float:
        """FLOPs a second of a large bf16 matrix product, measured once."""
        if not self.ceiling:
            n = 256 if self.options.tiny else 8192
            a = torch.randn(n, n, dtype=torch.bfloat16, device=self.options.device)
            self.ceiling = 2 * n**3 / self.seconds(lambda: a @ a, 10)
        return self.ceiling


# ---- (a) is it right


def exact(job: Job) -> Iterator[dict[str, Any]]:
    """Loss and gradients against the CPU in fp32; and batched against single answers."""
    encoder, llm = job.shapes[0]
    whisper: dict[str, Any] = {} if job.options.tiny else {
        "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
        "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    models = {"whisper": tiny.make_whisper_slu(whisper_options=whisper),
              "llm": job.model(encoder, llm, "fp32", device="cpu")}
    for kind, model in models.items():
        batch = job.batch(model, 4)
        loss, wanted = gradients(model, batch, bf16=False)
        model.to(job.options.device)
        for name, tf32, bf16 in (("fp32", False, False), ("tf32", True, False),
                                 ("bf16", False, True)):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            own, found = gradients(model, batch, bf16)
            yield {"what": f"{kind}: loss and gradient, {name}", "loss": own,
                   "loss_difference": abs(own - loss) / abs(loss),
                   "gradient_difference": float((found - wanted).norm() / wanted.norm())}
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        yield _batched(job, kind, model, batch)


def _batched(job: Job, kind: str, model: SLUModel, batch: Batch) -> dict[str, Any]:
    names = model.registry.names
    options = DecodeConfig(max_new_tokens=24, grammar=True, force_task=True)
    whole = Engine(model, options).answer(batch, [names] * 4)
    examples = random_clips(job.folder, 4, 0)
    data = SpeechDataset(examples, listens=model.listens)
    single = [Engine(model, options).answer(model.collator()([data[i, 0]]), [names])[0]
              for i in range(4)]
    return {"what": f"{kind}: answers, batch of 4 against single", "equal": sum(
        (a.transcript, a.outputs) == (b.transcript, b.outputs)
        for a, b in zip(whole, single, strict=True)), "of": 4}


# ---- (b) how fast it trains, (c) where the time goes


def in_4_bits(llm: Any) -> Any:
    """The linear layers of an LLM's body as bitsandbytes' (NF4)."""
    import bitsandbytes as bnb

    for module in list(llm.base_model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False,
                                           compute_dtype=torch.bfloat16, quant_type="nf4")
                packed.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False,
                                                  quant_type="nf4")
                packed.support_avx512bf16_for_cpu = False  # as SpeechLLM does for training
                setattr(module, name, packed.to(llm.device))
    llm.is_loaded_in_4bit = True  # as PEFT asks
    return llm


def step_of(job: Job, model: SLUModel, batch: Batch) -> Callable[[], None]:
    """One training step in bf16, as the trainer takes it."""
    optimizer = build_optimizer(model.trainable_groups(), TrainConfig())
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with torch.autocast(job.options.device, torch.bfloat16):
            loss = weighted_loss(model(batch), batch.target_parts, "dynamic")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(job: Job) -> Iterator[dict[str, Any]]:
    """Steps of each shape: audio or cached frames, bf16 or 4 bits, checkpointing, compile."""
    size = 2 if job.options.tiny else 16
    for encoder, llm in job.shapes:
        for way in ("audio", "cached frames", "checkpointing", "compiled", "4-bit"):
            if way == "compiled" and job.options.device == "cpu":
                continue
            row: dict[str, Any] = {"encoder": encoder, "llm": llm, "way": way, "batch": size}
            model: Any = None
            step: Any = None
            try:
                model = job.model(encoder, llm, change=in_4_bits if way == "4-bit" else
                                  lambda llm: llm).train()
                batch = job.batch(model, size).to(job.options.device)
                seconds, tokens = sum(batch.durations), sum(batch.target_lengths)
                if way == "cached frames":
                    with torch.no_grad(), torch.autocast(job.options.device, torch.bfloat16):
                        frames, lengths = model.encoder(batch.mel, batch.speech_lengths)
                    batch = replace(batch, kind="frames", mel=None, frames=frames,
                                    speech_lengths=lengths)
                if way == "checkpointing":
                    model.enable_gradient_checkpointing()
                if way == "compiled":
                    model.llm.base_model.compile(dynamic=True)
                step = step_of(job, model, batch)
                job.peak()
                took = job.seconds(step, job.options.steps)
                row |= {"step_s": took, "audio_s_per_s": seconds / took,
                        "tokens_per_s": tokens / took, "peak_gib": job.peak()}
                if way in ("audio", "cached frames"):
                    with FlopCounterMode(display=False) as counter:
                        step()
                    flops = counter.get_total_flops()
                    row |= {"tflop": flops / 1e12, "mfu": flops / took / job.measure_ceiling()}
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            yield row
            del model, step
            free()


def profile(job: Job) -> Iterator[dict[str, Any]]:
    """Kernels of one step of the largest shape, by time."""
    encoder, llm = job.shapes[-1]
    model = job.model(encoder, llm).train()
    step = step_of(job, model, job.batch(model, 2 if job.options.tiny else 16).to(
        job.options.device))
    job.seconds(step, 1)
    with torch.profiler.profile() as found:
        step()
        wait(torch.device(job.options.device))
    on_gpu = job.options.device == "cuda"
    rows = sorted(found.key_averages(), key=lambda r: -(
        r.self_device_time_total if on_gpu else r.self_cpu_time_total))
    for r in rows[:25]:
        yield {"name": r.key[:80], "calls": r.count, "device_ms": r.self_device_time_total / 1e3,
               "cpu_ms": r.self_cpu_time_total / 1e3}


PARTS: dict[str, Callable[[Job], Iterator[dict[str, Any]]]] = {
    "exact": exact, "train": train, "decode": decode, "profile": profile, "shards": shards,
    "launches": launches, "adapters": adapters}


def main(options: Options) -> int:
    """Run the parts; returns the exit status."""
    torch.manual_seed(0)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        job = Job(options, Path(folder))
        for name in options.only or PARTS:
            began, rows, error = time.perf_counter(), list[dict[str, Any]](), ""
            try:
                for row in PARTS[name](job):
                    rows.append(row)
            except Exception:  # the next part may go well
                error, failed = traceback.format_exc(), 1
            took = round(time.perf_counter() - began, 1)
            device = (torch.cuda.get_device_name() if options.device == "cuda"
                      and torch.cuda.is_available() else "cpu")
            write_json(options.out / f"{name}.json", {
                "versions": versions(), "device": device, "tiny": options.tiny, "seconds": took,
                "ceiling_tflops": job.ceiling / 1e12, "rows": rows, "error": error})
            print(f"\n{name}: {took} s\n{tabulate(rows, headers='keys', floatfmt='.4g')}\n{error}",
                  flush=True)
            with contextlib.suppress(RuntimeError):
                free()
    return failed


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=str(__doc__))))
