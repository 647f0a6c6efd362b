"""The processes of a run: set up before anything is loaded, and what they tell each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, patch_environment
from torch import distributed, nn

from unislu_llm.errors import UserError

T = TypeVar("T")


def processes(timeout: float = 10.0) -> PartialState:
    """The processes of this run, set up if need be.

    `timeout` is in minutes: one waits so long for the others before it ends with an error.
    """
    # As DDP has them: what DeepSpeed does is in `training.zero`.
    with patch_environment(accelerate_use_deepspeed="false"):
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"),
                            timeout=timedelta(minutes=timeout))


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives in the main process, in all of them; a UserError of it is raised in all."""
    state = processes()
    box: list[T | UserError | None] = [None]
    if state.is_main_process:
        try:
            box = [make()]
        except UserError as error:
            box = [error]
    broadcast_object_list(box)  # does nothing in a single process
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]  # type: ignore[return-value]


def lost_process(error: RuntimeError, timeout: float) -> str:
    """What to tell where a process waited for another in vain; nothing for an error of its own."""
    text = str(error)  # gloo's and NCCL's; torch has no class for either case
    if "imed out waiting" in text or "collective operation timeout" in text:
        return (f"a process of this run has not answered for {timeout:g} minutes (train.timeout): "
                "it was stopped, or hangs")
    if "onnection closed by peer" in text or "onnection reset by peer" in text:
        return "another process of this run has ended; what it printed says why"
    return ""


class HostSum:
    """Sums of plain numbers over processes, which make no GPU wait."""

    def __init__(self, timeout: timedelta) -> None:
        # NCCL sums on the device only, behind all that it still has to do; numbers that the host
        # knows go over gloo instead.
        self.world = processes().num_processes
        own = self.world > 1 and distributed.get_backend() != "gloo"
        self.group = distributed.new_group(backend="gloo", timeout=timeout) if own else None

    def __call__(self, values: dict[str, float]) -> dict[str, float]:
        """Sums by name; every process passes the same names in the same order."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        distributed.all_reduce(total, group=self.group)
        return dict(zip(values, total.tolist(), strict=True))


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over processes, as DDP does where it is not told to wait."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # nothing of this process's share needed it
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)
            parameter.grad /= processes().num_processes


def use_threads(threads: int) -> None:
    """Set the CPU threads of this process; 0 shares out the cores that it may use.

    A GPU multiplies fp32 matrices in TF32 from here on, several times as fast.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    # Accelerate's launcher would leave one thread to each process.
    if not threads:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)


def peak_memory(gpu: bool = True) -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, else resident."""
    if gpu and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # on Windows, where the peak is of the working set
        memory = psutil.Process().memory_info()
        return float(getattr(memory, "peak_wset", memory.rss)) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
