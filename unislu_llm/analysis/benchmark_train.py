"""Speed and memory of training: beside the speech LLM classes of transformers, by part of a step.

Every system sees the same clips in the same batches, from WAV files to the optimizer's step, in alternating runs. Peak memory is
measured on one step in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import set_verbosity_error

from unislu_llm.analysis.benchmark_options import TrainBenchmark
from unislu_llm.analysis.benchmark_peers import NEED_30S, PEERS, Ours, Peer, Sizes, System, slue_clips, write_clips
from unislu_llm.analysis.benchmarking import alternate, environment, shown, spread, table, write
from unislu_llm.data.batching import BatchPlan
from unislu_llm.data.targets import Sample, Target
from unislu_llm.errors import UserError, hint
from unislu_llm.models import speech_llm
from unislu_llm.models.head import logits_of
from unislu_llm.training.plan import peak_memory, use_threads

OURS = ("ours", "ours, cached", "ours, packed")
FULL = "ours, full logits"
PARTS = ("load", "mel", "encoder", "projector", "LLM forward", "backward", "optimizer")


def run(options: TrainBenchmark, command: Sequence[str] = ()) -> int:
    """Run the parts, print a table of each, write the result.

    Returns:
        Exit status: 0, or 2 for bad input (one message on stderr).
    """
    threads = use_threads(options.threads)
    set_verbosity_error()
    try:
        _check(options)
        result: dict[str, Any] = {"command": shown(command), "environment": environment(), "options": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}, "threads": threads}
        if "speed" in options.parts:
            result["speed"] = measure_speed(options)
            print(table(_speed_rows(result["speed"])), "\n\n", table(_part_rows(result["speed"])), sep="", flush=True)
        if "memory" in options.parts:
            result["memory"] = measure_memory(options)
            print("\n", table([{"system": name, **row} for name, row in result["memory"].items()]), sep="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(result, options.out)
    if options.plot is not None and "speed" in result:
        draw(result["speed"], options.plot)
    return 0


def _check(options: TrainBenchmark) -> None:
    known = [*OURS, FULL, *PEERS]
    for name in options.systems:
        if name not in known:
            raise UserError(f"--systems: '{name}' is not known; known: {', '.join(known)}{hint(name, known)}")
    if options.clips < options.batch_size:
        raise UserError(f"--clips {options.clips} is less than --batch-size {options.batch_size}")


def _sizes(options: TrainBenchmark) -> Sizes:
    return Sizes(options.encoder, options.llm, options.vocab, options.precision, options.device)


def build(name: str, options: TrainBenchmark, folder: Path, samples: list[Sample], targets: dict[str, Target]) -> System:
    """A system by its name; random weights from the seed."""
    torch.manual_seed(options.seed)
    if name in PEERS:
        return Peer(name, _sizes(options), samples, targets)
    cache = folder / "cache" if name == "ours, cached" else None
    return Ours(name, _sizes(options), samples, targets, cache, packing=name == "ours, packed")


def _clips(options: TrainBenchmark, folder: Path) -> tuple[list[Sample], dict[str, Target], list[list[int]], float]:
    """Samples, targets, batches of like length, and seconds in all."""
    seconds, tokens = slue_clips(options.clips, options.seed)
    samples, targets = write_clips(folder / "audio", seconds, tokens, options.seed)
    batches = BatchPlan(seconds.tolist(), options.batch_size, seed=options.seed).epoch(0)
    return samples, targets, batches, float(seconds.sum())


# ---- speed -----------------------------------------------------------------------------------------------------------


def measure_speed(options: TrainBenchmark) -> dict[str, Any]:
    """Figures of each system, by name, and what they are in proportion to each other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, targets, batches, seconds = _clips(options, folder)
        systems = {}
        for title in [n for n in options.systems if n != FULL]:
            try:
                systems[title] = build(title, options, folder, samples, targets)
            except AttributeError as error:
                print(f"{title}: not in the installed transformers ({error})", flush=True)

        now = time.process_time if options.clock == "cpu" else time.perf_counter
        for system in systems.values():
            system.clock.now = now

        def work(system: System) -> None:
            for batch in batches:
                system.step(batch)

        def forget(round_number: int) -> None:
            if round_number < 0:  # the warm-up
                for system in systems.values():
                    system.clock.seconds.clear()
                    system.used = system.positions = 0
            print(f"round {round_number + 1} of {options.repeats} done", file=sys.stderr, flush=True)

        turns = {title: partial(work, system) for title, system in systems.items()}
        times = alternate(turns, options.repeats, options.warm_up, forget, now)
        tokens = sum(len(t) for t in targets.values())
        found = {title: _figures(system, times[title], len(samples), seconds, tokens, options)
                 for title, system in systems.items()}
        if options.device == "cuda":
            ceiling = matmul_ceiling(options)
            for title, system in systems.items():
                found[title]["mfu"] = flops(system, batches[0]) * len(batches) / found[title]["seconds"]["median"] / ceiling
    return {"systems": found, "ratios": _ratios(found), "mfu": "see systems" if options.device == "cuda" else "not run"}


def _figures(system: System, times: list[float], clips: int, seconds: float, tokens: int,
             options: TrainBenchmark) -> dict[str, Any]:
    took = statistics.median(times)
    clock = dict(system.clock.seconds)
    inside = clock.get("encoder", 0.0) + clock.get("projector", 0.0)
    clock["LLM forward"] = clock.pop("forward", 0.0) - inside
    total = sum(clock.values())
    return {"seconds": spread(times), "times": times, "samples_per_s": clips / took, "audio_s_per_s": seconds / took,
            "tokens_per_s": tokens / took, "padding": 1.0 - system.used / max(system.positions, 1),
            "positions": system.positions / max(options.repeats, 1), "share": {p: clock.get(p, 0.0) / total for p in PARTS}}


def _ratios(found: dict[str, Any]) -> dict[str, float]:
    speed = {name: row["samples_per_s"] for name, row in found.items()}
    peers = {name: value for name, value in speed.items() if name in PEERS}
    ratios = {}
    if peers and "ours" in speed:
        ratios["ours / fastest peer"] = speed["ours"] / max(peers.values())
        padded = [value for name, value in peers.items() if name in NEED_30S]
        if padded:
            ratios["ours / fastest class that needs 30 s"] = speed["ours"] / max(padded)
    if "ours" in speed:
        share = found["ours"]["share"]
        saved = share["encoder"] + share["mel"]
        ratios["bound of cached / ours (Amdahl)"] = 1.0 / (1.0 - saved)
        ratios |= {f"{name} / ours": speed[name] / speed["ours"] for name in OURS[1:] if name in speed}
    return ratios


def flops(system: System, batch: Sequence[int]) -> int:
    """Floating-point operations of a training step, counted."""
    with FlopCounterMode(display=False) as counter:
        system.step(batch)
    return int(counter.get_total_flops())


def matmul_ceiling(options: TrainBenchmark, size: int = 4096, repeats: int = 20) -> float:
    """Operations a second of a large matrix product on the device: what a model can reach at most."""
    a = torch.randn(size, size, device=options.device, dtype=_sizes(options).torch_dtype)
    times = alternate({"matmul": lambda: a @ a}, repeats, 3)["matmul"]
    return 2.0 * size**3 / min(times)


def _speed_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("samples_per_s", "audio_s_per_s", "tokens_per_s", "padding", "mfu")
    rows = [{"system": name, **{key: row[key] for key in keys if key in row}, "least s": row["seconds"]["min"],
             "most s": row["seconds"]["max"]} for name, row in result["systems"].items()]
    return rows + [{"system": name, "samples_per_s": value} for name, value in result["ratios"].items()]


def _part_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"system": name, **{part: f"{100 * share:.1f} %" for part, share in row["share"].items()}}
            for name, row in result["systems"].items()]


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of seconds a clip, stacked by part.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'unislu_llm[plot]'") from error
    names = list(result["systems"])[::-1]
    figure = Figure(figsize=(8, 0.6 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [result["systems"][n]["share"][part] / result["systems"][n]["samples_per_s"] for n in names]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("seconds a clip (training step)")
    axes.legend(fontsize=8)
    figure.savefig(path)


# ---- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(options: TrainBenchmark) -> dict[str, dict[str, float]]:
    """Memory of one step of each system in GiB: before it (weights), at most, and the difference."""
    names = list(options.systems) + ([FULL] if options.full_logits and FULL not in options.systems else [])
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[name] = pool.submit(_peak, name, options).result()
    return found


def _peak(name: str, options: TrainBenchmark) -> dict[str, float]:
    use_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        samples, targets, batches, _ = _clips(options, folder)
        system = build("ours" if name == FULL else name, options, folder, samples, targets)
        if name == FULL:
            _use_full_logits(system)
        longest = max(batches, key=lambda batch: sum(len(targets[samples[i].utterance.id]) for i in batch))
        before = _status("VmRSS")
        started = time.perf_counter()
        system.step(longest)
        took = time.perf_counter() - started
    peak = peak_memory() if torch.cuda.is_available() else _status("VmHWM")
    return {"before_gib": before, "peak_gib": peak, "step_gib": peak - before, "seconds": took}


def _status(key: str) -> float:
    """Memory of this process in GiB; a process's peak, as `getrusage` tells it, may be its parent's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak_memory()
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def _use_full_logits(system: System) -> None:
    """Make the logits of every position of every row at one time, as transformers' own loss does."""
    assert isinstance(system, Ours)
    model: Any = system.speech_llm
    read_rows = model._read_rows
    rows: list[Tensor] = []

    def keep(*args: Any) -> tuple[Tensor, Tensor]:
        hidden, starts = read_rows(*args)
        rows[:] = [hidden]
        return hidden, starts

    def losses(llm: Any, picked: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(llm, rows[0]).float()
        # Which positions are supervised makes no difference to memory: the first ones stand for them.
        labels = torch.full((len(logits),), -100, device=logits.device)
        labels[: len(targets)] = targets
        return F.cross_entropy(logits, labels, reduction="none")[: len(targets)]

    model._read_rows = keep
    speech_llm.token_losses = losses  # type: ignore[assignment]
