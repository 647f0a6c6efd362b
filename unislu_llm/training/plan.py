"""The plan that a run prints before its first step: what trains, how batches add up, what memory to expect."""

from __future__ import annotations

import os

import torch
import yaml
from torch import nn

from unislu_llm.models.base import SLUModel
from unislu_llm.training.config import Config


def describe(config: Config, model: SLUModel, n_samples: dict[str, int], steps: int, world: int, mixture: str = "") -> str:
    """Resolved config, parameters by group, corpora, batch arithmetic and expected memory as text.

    Args:
        n_samples: training samples by task. steps: optimizer steps in all. world: processes.
        mixture: shares by corpus and task, as text.
    """
    groups = {name: sum(p.numel() for _, p in named) for name, named in model.trainable_groups().items()}
    total = sum(p.numel() for p in model.parameters())
    trained = sum(groups.values())
    lines = ["resolved config:", _indent(yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip()), "parameters:"]
    for name, count in groups.items():
        lines.append(f"  {name:<10} {count / 1e6:9.3f} M   lr {getattr(config.train.lr, name):g}")
    lines.append(f"  trainable  {trained / 1e6:9.3f} M of {total / 1e6:.1f} M ({100 * trained / max(total, 1):.2f} %)")
    parts = accumulation(config, world)
    by_task = ", ".join(f"{count} {task}" for task, count in n_samples.items())
    lines += [
        f"samples: {sum(n_samples.values())} ({by_task})",
        *([mixture] if mixture else []),
        f"batch: {_batch(config, world, parts)}; {steps} steps",
        f"expected memory: {expected_memory(model) / 2**30:.2f} GiB for weights, gradients and optimizer a process, "
        "plus activations",
    ]
    return "\n".join(lines)


def _batch(config: Config, world: int, parts: int) -> str:
    train = config.train
    shared = f"= {world} process(es) x {parts} micro-batch(es) of"
    if train.batch_tokens:
        return f"at most {train.batch_tokens} tokens {shared} about {train.batch_tokens // (world * parts)}"
    return f"{train.batch_size} samples {shared} at most {train.micro_batch_size}"


def accumulation(config: Config, world: int) -> int:
    """Micro-batches a process takes for one step."""
    train = config.train
    if train.batch_tokens:
        return -(-train.batch_tokens // (world * train.micro_batch_tokens)) if train.micro_batch_tokens else 1
    return max(1, -(-train.batch_size // (world * train.micro_batch_size)))


def expected_memory(model: nn.Module) -> int:
    """Bytes of weights, gradients and AdamW moments; activations come on top."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return weights + trained * 4 * 3


def use_threads(threads: int) -> int:
    """Set the CPU threads of this process; 0 shares the cores it may use among the processes of this machine."""
    if not threads:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def peak_memory() -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
