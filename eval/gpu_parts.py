"""Parts of `gpu_job.py`: how fast it answers and what, whether shards and launchers work."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny_runs import ROOT, tiny
from torch import Tensor, distributed
from what_ran import run_all, wide_bench

from unislu_llm.config import DecodeConfig
from unislu_llm.data.batch import Batch
from unislu_llm.decoding.engine import Engine
from unislu_llm.loss import weighted_loss
from unislu_llm.models.base import SLUModel, gathered
from unislu_llm.run_folder import load
from unislu_llm.training.sharding import shard

if TYPE_CHECKING:
    from gpu_job import Job

ADAPTERS = ("whisper-base--smollm2-135m", "whisper-base--gemma-3-270m")


def free() -> None:
    """Give memory back before the next model comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gradients(model: SLUModel, batch: Batch, bf16: bool) -> tuple[float, Tensor]:
    """Loss, and the gradient of everything that trains in one vector, on the CPU."""
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        batch = batch.to(model.device)
        loss = weighted_loss(model.losses(batch), batch.target_parts, "dynamic")
    loss.backward()
    found = [gathered(p.grad).float().cpu().flatten() for p in model.parameters()
             if p.grad is not None]
    return loss.item(), torch.cat(found)


def decode(job: Job) -> Iterator[dict[str, Any]]:
    """Answers at several batch sizes, beside plain `generate` of the same LLM and prompt."""
    encoder, llm = job.shapes[min(1, len(job.shapes) - 1)]
    model, new = job.model(encoder, llm), 8 if job.options.tiny else 64
    options = DecodeConfig(max_new_tokens=new, tokens_per_second=1000.0)
    for size in (1, 2) if job.options.tiny else (1, 16, 64):
        batch = job.batch(model, size)
        engine, counted = Engine(model, options), list[int]()

        def ours(batch: Batch = batch, engine: Engine = engine, n: list[int] = counted) -> None:
            with torch.autocast(job.options.device, torch.bfloat16):
                answers = engine.answer(batch, [()] * len(batch))
            n[:] = [sum(sum(a.n_tokens.values()) for a in answers)]

        prompt = torch.randn(size, 128, model.lm.config.hidden_size, dtype=torch.bfloat16,
                             device=job.options.device)

        def plain(cache: str | None, prompt: Tensor = prompt) -> None:
            model.lm.generate(inputs_embeds=prompt, max_new_tokens=new, min_new_tokens=new,
                              do_sample=False, cache_implementation=cache, pad_token_id=0)

        ways: dict[str, Callable[[], None]] = {
            "engine": ours, "generate": lambda: plain(None),
            "generate, static cache": lambda: plain("static")}
        for way, work in ways.items():
            if "static" in way and job.options.device == "cpu":
                continue
            took = job.seconds(work, 2)
            tokens = counted[0] if way == "engine" else size * new
            yield {"way": way, "batch": size, "seconds": took, "tokens_per_s": tokens / took,
                   "rtf": took / sum(batch.durations) if way == "engine" else None}


def adapters(job: Job) -> Iterator[dict[str, Any]]:
    """Answers of the shipped adapters on clips that ship, against the CPU's."""
    from unislu_llm.decoding.predict import understand

    clips = sorted((ROOT / "recipes/data/mini/audio").glob("iv_dev_*.opus"))
    clips = clips[:2 if job.options.tiny else 20]
    for name in ADAPTERS:
        told = [[(a.transcript, a.outputs) for a in understand(
            load(ROOT / "adapters" / name, device=device), clips)]
            for device in ("cpu", job.options.device)]
        yield {"adapter": name, "clips": len(clips),
               "equal": sum(a == b for a, b in zip(*told, strict=True))}
        free()


def shards(job: Job) -> Iterator[dict[str, Any]]:
    """FSDP2 in a group of one process: loss and gradients against the whole model's."""
    device, (encoder, llm) = torch.device(job.options.device), job.shapes[0]
    models = {"whisper": tiny.make_whisper_slu(), "llm": job.model(encoder, llm, "fp32")}
    with patch.dict(os.environ, {"FSDP_VERSION": "2"}):
        plugin = FullyShardedDataParallelPlugin()
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0,
                                   world_size=1, store=distributed.HashStore())
    try:
        for kind, model in models.items():
            batch = job.batch(model.to(device), 4)
            loss, wanted = gradients(model, batch, bf16=False)
            model.zero_grad()
            shard(model, plugin, device)
            own, found = gradients(model, batch, bf16=False)
            yield {"what": f"{kind}: FSDP2, one process", "loss": own,
                   "loss_difference": abs(own - loss) / abs(loss),
                   "gradient_difference": float((found - wanted).norm() / wanted.norm())}
    finally:
        distributed.destroy_process_group()


def launches(job: Job) -> Iterator[dict[str, Any]]:
    """Every way to launch a run that this machine has, as `what_ran.py` tries it."""
    ways = ("one process, bf16",) if job.options.tiny else ()  # each takes ten seconds
    with tempfile.TemporaryDirectory() as folder:
        for name, found in run_all(wide_bench(Path(folder)), ways).items():
            yield {"way": name, **found}
