"""Kill, stop, starve and damage small training runs, and measure what is lost.

    python eval/survive.py                          # all of it, minutes on 2 cores
    python eval/survive.py --only kill --moments 50 --seed 7

Tiny random models on tones; with the frame cache, text injection and augmentation. Each run is
forked from this process, which has loaded everything, so that a run takes a second. A moment is a
step or an operation on a file of the run folder, which Python's audit events tell: so also the one
between two renames is hit. What was found goes to eval/results/survive.json; the exit status is 1
if anything was lost that should not be.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported.
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

import psutil
import torch
import tyro
from tabulate import tabulate
from tiny_runs import ROOT, SAVE_EVERY, Bench, Fault

from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.io import BEST, LAST, write_json
from unislu_llm.models import load
from unislu_llm.run_folder import read_finished, versions
from unislu_llm.training.checkpoint import newest, read_progress
from unislu_llm.training.steps import Steps

Row = dict[str, Any]


@dataclass
class Options:
    """What is tried."""

    only: tuple[str, ...] = ()
    """Parts: kill, signal, rank, damage, disk, memory, twice; default: all."""
    moments: int = 20
    """Random moments of each part, objective and number of processes."""
    flips: int = 200
    """Damaged copies of a file, over all files of `last` and `best`."""
    seed: int = 1
    """Of the moments."""
    out: Path = ROOT / "eval" / "results" / "survive.json"
    """Where the results go."""


def weights(run: Path) -> str:
    """What a finished run has come to: hash of both models and all scores."""
    digest = hashlib.sha256()
    for name in (BEST, LAST):
        digest.update((run / name / "model.safetensors").read_bytes())
    digest.update(repr(read_progress(run / LAST).history).encode())
    return digest.hexdigest()


def steps_of(run: Path) -> int:
    """The last step that the log of a run knows of."""
    file = run / "metrics.jsonl"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return sum('"part": "train"' in line for line in lines)


def go_on(bench: Bench, config: Config, world: int, want: str) -> Row:
    """Resume a run that was torn; how far it had come, what of that was kept, how it ended."""
    run, said = Path(config.output), list[str]()
    reached = steps_of(run)
    found = newest(run, said.append) if run.is_dir() else None
    kept = read_progress(found).step if found else 0
    if (run / "config.yaml").is_file():
        config = config.model_copy(update={"resume": True})
    codes, text, _ = bench.run(config, world)
    equal = not any(codes) and weights(run) == want
    row = {"reached": reached, "lost": max(0, reached - kept), "equal": equal}
    return row if equal else row | {"codes": codes, "text": text[-2000:]}


def whole(bench: Bench, objective: str, world: int) -> tuple[str, list[int]]:
    """An undisturbed run: what it came to, and how many moments each process has."""
    config = bench.config(bench.home / f"whole-{objective}-{world}", objective)
    codes, text, moments = bench.run(config, world, *(Fault(rank=i) for i in range(world)))
    if any(codes):
        raise SystemExit(f"the undisturbed run failed:\n{text}")
    return weights(Path(config.output)), moments


def torn(bench: Bench, options: Options, draw: random.Random, kill: bool) -> Iterator[Row]:
    """SIGKILL, or SIGTERM and SIGINT, at random moments."""
    numbers = [signal.SIGKILL] if kill else [signal.SIGTERM, signal.SIGINT]
    for objective in ("unified", "ctc"):
        for world in (1, 2):
            want, moments = whole(bench, objective, world)
            for i in range(options.moments):
                number, rank = numbers[i % len(numbers)], draw.randrange(world)
                at = draw.randint(1, moments[rank])
                run = bench.home / f"{number.name}-{objective}-{world}-{i}"
                config = bench.config(run, objective)
                fault = Fault(at, lambda n=number: os.kill(os.getpid(), n),  # type: ignore[misc]
                              rank=rank)
                codes, text, _ = bench.run(config, world, fault)
                row = go_on(bench, config, world, want)
                # A process that is killed takes the others with it: within the interval.
                bound = SAVE_EVERY if kill else 0
                yield {"part": number.name, "objective": objective, "processes": world,
                       "moment": f"{at} of {moments[rank]}", "codes": codes, **row,
                       "told": _last_line(text),
                       "good": row["equal"] and row["lost"] <= bound
                       and "Traceback" not in text}
                shutil.rmtree(run, ignore_errors=True)


def stopped_rank(bench: Bench, options: Options, draw: random.Random) -> Iterator[Row]:
    """One process of two is frozen: the other ends after train.timeout."""
    want, moments = whole(bench, "unified", 2)
    for i in range(4):
        run, rank = bench.home / f"frozen-{i}", i % 2
        config = bench.config(run, "unified")
        fault = Fault(draw.randint(1, moments[rank] - 2),
                      lambda: os.kill(os.getpid(), signal.SIGSTOP), rank=rank)
        began = time.monotonic()
        codes, text, _ = bench.run(config, 2, fault)
        row = go_on(bench, config, 2, want)
        yield {"part": "frozen process", "processes": 2, "codes": codes, **row,
               "seconds": round(time.monotonic() - began, 1), "told": _last_line(text),
               "good": row["equal"] and "train.timeout" in text and "Traceback" not in text}


def damaged(bench: Bench, options: Options, draw: random.Random) -> Iterator[Row]:
    """Single bits and ends of files of both checkpoints."""
    whole(bench, "unified", 1)
    run = bench.home / "whole-unified-1"
    files = [p for name in (BEST, LAST) for p in sorted((run / name).rglob("*")) if p.is_file()]
    outcomes: dict[str, list[bool]] = {}
    for i in range(options.flips):
        file, copy = files[i % len(files)], bench.home / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        victim, data = copy / file.relative_to(run), bytearray(file.read_bytes())
        if i % 5 == 4 or not data:
            data = data[:draw.randrange(max(len(data), 1))]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        victim.write_bytes(data)
        said: list[str] = []
        if file.parent.name == LAST:
            found = newest(copy, said.append)
            # The one before has taken its place.
            fine = (found == copy / LAST and (copy / f"{LAST}.damaged").is_dir()
                    and victim.name in " ".join(said))
        else:
            try:
                load(copy / BEST)
                fine = bytes(data) == file.read_bytes()
            except UserError as error:
                fine = str(copy / BEST) in str(error)
        outcomes.setdefault(str(file.relative_to(run)), []).append(fine)
    for name, refused in outcomes.items():
        yield {"part": "damage", "file": name, "tried": len(refused), "refused": sum(refused),
               "good": all(refused)}


def full_disk(bench: Bench, options: Options, draw: random.Random) -> Iterator[Row]:
    """A file system that fills up, and one that turns read-only, while a run writes to it."""
    want, moments = whole(bench, "unified", 1)
    size = sum(p.stat().st_size for p in (bench.home / "whole-unified-1").rglob("*"))
    place = bench.home / "small"
    place.mkdir(exist_ok=True)

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options, str(place)], capture_output=True).returncode == 0

    for i in range(11):
        room = int(size * (0.15 + 0.17 * i)) if i < 10 else 4 * size
        if not mount("-t", "tmpfs", "-o", f"size={room // 4096 * 4096 + 4096}", "tmpfs"):
            yield {"part": "disk", "told": "not run: a file system can be mounted by root alone",
                   "good": True}
            return
        config = bench.config(place / "run", "unified")
        faults = [Fault(moments[0] // 2, lambda: mount("-o", "remount,ro"))] if i == 10 else []
        codes, text, _ = bench.run(config, 1, *faults)
        mount("-o", f"remount,rw,size={8 * size}")
        row: Row = {"equal": True, "lost": 0}
        if any(codes):
            row = go_on(bench, config, 1, want)
        yield {"part": "read-only" if i == 10 else "disk full", "room": f"{room // 1024} KiB",
               "codes": codes, **row, "told": _last_line(text),
               "good": row["equal"] and "Traceback" not in text}
        subprocess.run(["umount", str(place)], check=True)


def memory(bench: Bench, options: Options, draw: random.Random) -> Iterator[Row]:
    """A limit on memory that a step meets: stop, or split."""
    for mode in ("stop", "split"):
        run = bench.home / f"memory-{mode}"
        # A wide projector: 10 MB a second of speech.
        config = bench.config(run, "unified", model={"projector": "mlp"},
                              data={"train": [str(bench.home / "dev.jsonl")], "epoch_samples": 96},
                              train={"on_oom": mode, "batch_size": 48, "max_steps": 2})
        config.model.projector_options = {"stack": 2, "hidden": 1 << 14}
        codes, text, _ = bench.run(config, 1, before=_bounded)
        done = read_finished(run).get("step") == 2 and not any(codes)
        stopped = codes == [2] and "out of memory at step" in text
        yield {"part": "memory", "mode": mode, "codes": codes, "told": _last_line(text),
               "good": "Traceback" not in text and (stopped if mode == "stop" else done)}


def _bounded() -> None:
    """Let a step have 150 MB more than the process has when the first begins."""
    step, limited = Steps.step, list[int]()

    def bounded(steps: Steps, micro: Any) -> None:
        if not limited:
            limited.append(psutil.Process().memory_info().vms + (150 << 20))
            resource.setrlimit(resource.RLIMIT_AS, (limited[0], limited[0]))
        step(steps, micro)

    Steps.step = bounded  # type: ignore[method-assign, assignment]


def twice(bench: Bench, options: Options, draw: random.Random) -> Iterator[Row]:
    """Two resumes of one run at once: one goes on, the other is told who does."""
    want, moments = whole(bench, "unified", 1)
    run = bench.home / "twice"
    config = bench.config(run, "unified")
    bench.run(config, 1, Fault(moments[0] // 2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    config = config.model_copy(update={"resume": True})
    first = os.fork()
    if not first:
        codes, _, _ = bench.run(config, 1, before=lambda: time.sleep(0))
        os._exit(codes[0])
    codes, text, _ = bench.run(config, 1)
    other = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    yield {"part": "two resumes", "codes": [*codes, other], "told": _last_line(text),
           "good": sorted((*codes, other)) == [0, 2] and weights(run) == want}


def _last_line(text: str) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines()
             if line.strip() and not line.startswith("moments")]
    errors = [line for line in lines if line.startswith(("error: ", "stopped ("))]
    return (errors or lines or [""])[-1][-300:]


PARTS: dict[str, Callable[[Bench, Options, random.Random], Iterator[Row]]] = {
    "kill": lambda b, o, d: torn(b, o, d, kill=True),
    "signal": lambda b, o, d: torn(b, o, d, kill=False),
    "rank": stopped_rank, "damage": damaged, "disk": full_disk, "memory": memory, "twice": twice}


def main(options: Options) -> int:
    """Run the parts, print a line each, write the results; returns the exit status."""
    rows: list[Row] = []
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory() as home:
            bench, draw = Bench(Path(home)), random.Random(f"{options.seed} {name}")
            for row in PARTS[name](bench, options, draw):
                rows.append({k: v.replace(home, "") if isinstance(v, str) else v
                             for k, v in row.items()})
                if not row["good"]:
                    print(row, flush=True)
        print(name, f"{sum(r['good'] for r in rows)} of {len(rows)} good so far", flush=True)
    table: dict[str, list[Row]] = {}
    for row in rows:
        table.setdefault(row["part"], []).append(row)
    print(tabulate([(part, len(found), sum(r["good"] for r in found),
                     max(r.get("lost", 0) for r in found)) for part, found in table.items()],
                   headers=("part", "tried", "good", "most steps lost")))
    write_json(options.out, {"versions": versions(), "seed": options.seed, "rows": rows})
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main(tyro.cli(Options, description=str(__doc__))))
