"""Train the same six steps in each way that a run can be launched, and say which of them ran.

    python eval/what_ran.py           # on this machine's GPUs, else on its CPU; about two minutes
    python eval/what_ran.py --table   # the table in README.md alone, from the files that are there

Tiny random models, two processes where a way has several. A way that ends well, with the losses of
one process in fp32, is `run`. Results go to eval/results/what_ran/DEVICE.json.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from backbones import write_page
from tiny_runs import ROOT, Bench, tiny

from unislu_llm.config import Config
from unislu_llm.config_file import merge, to_yaml
from unislu_llm.errors import reported
from unislu_llm.io import read_json, write_json, write_text
from unislu_llm.run_folder import read_metrics, versions

RESULTS, STEPS = ROOT / "eval" / "results" / "what_ran", 6


@dataclass(frozen=True)
class Way:
    """How a run is launched, and what its losses may differ by, relatively."""

    launch: str = ""  # file of recipes/accelerate
    config: Mapping[str, Any] = field(default_factory=dict)
    within: float = 1e-5
    needs: str = ""  # package


WAYS = {
    "one process, fp32": Way(),
    "one process, bf16": Way(config={"train": {"precision": "bf16"}}, within=0.05),
    "8-bit weights": Way(config={"model": {"quantization": "8bit"}}, within=0.2),
    "4-bit weights": Way(config={"model": {"quantization": "4bit"}}, within=0.2),
    "several processes, DDP": Way("ddp"),
    "several processes, FSDP2": Way("fsdp2"),
    "several processes, DeepSpeed ZeRO-2": Way("zero2", needs="deepspeed"),
    "several processes, DeepSpeed ZeRO-3": Way("zero3", needs="deepspeed")}


@dataclass
class Options:
    """What is done."""

    table: bool = False
    """Rewrite the table of README.md alone."""


def train(bench: Bench, name: str, way: Way) -> list[float]:
    """Losses of the steps; raises RuntimeError with the end of what was printed."""
    run = bench.home / name.replace(" ", "-").replace(",", "")
    rates = dict.fromkeys(("projector", "lora", "markers"), 1e-3)
    # A projector without dropout, of which each process would draw its own.
    usual = {"model": {"projector": "mlp", "projector_options": {}},
             "train": {"max_steps": STEPS, "lr": rates}}
    config = bench.config(run, "unified", **merge(Config, usual, way.config))
    config.data.train = config.data.dev  # all of them are spoken
    write_text(path := bench.home / f"{run.name}.yaml", to_yaml(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable]
    if way.launch:
        command += ["-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file",
                    str(ROOT / "recipes" / "accelerate" / f"{way.launch}.yaml")]
    if not torch.cuda.is_available():
        environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
        if way.launch == "ddp":  # which Accelerate launches on GPUs alone
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(ROOT / "recipes" / "train_llm.py"), "--config", str(path)],
                          env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "rror" in line] or ["no message"]
        raise RuntimeError(f"status {done.returncode}: {told[0].strip()[:200]}")
    return [row["loss"] for row in read_metrics(run) if row["part"] == "train"]


def wide_bench(home: Path) -> Bench:
    """A corpus and tiny models; the LLM is wide enough for 4 bits."""
    bench = Bench(home)
    tiny.save_wide_llm(home / "llm")
    return bench


def run_all(bench: Bench, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What came of each way (or of some), the plain one first."""
    found: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        if only and name not in only:
            continue
        if way.needs and not importlib.util.find_spec(way.needs):
            found[name] = {"status": "not run", "why": f"{way.needs} is not installed"}
        elif "processes" in name and torch.cuda.device_count() == 1:
            found[name] = {"status": "not run", "why": "one GPU"}
        else:
            try:
                losses = train(bench, name, way)
                right = next((row["losses"] for row in found.values()), losses)
                gap = max(abs(a / b - 1) for a, b in zip(losses, right, strict=True))
                found[name] = {"status": "run" if gap <= way.within else "wrong", "losses": losses,
                               "difference": gap}
            except Exception as error:  # the next way may run
                found[name] = {"status": "failed", "why": str(error)}
        print(f"{name}: {found[name]}", flush=True)
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Each way, by kind of device: `run`, `not run`, or what went wrong."""
    lines = ["| | on a CPU | on GPUs |", "|---|---|---|"]
    for name in WAYS:
        cells = []
        for gpu in (False, True):
            own = [file["ways"][name]["status"] for device, file in results.items()
                   if (device != "cpu") == gpu and name in file["ways"]]
            # One device on which it ran is enough; a fault is not hidden by a device without it.
            cells.append(next((s for s in ("wrong", "failed", "run") if s in own), "not run"))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def read_results() -> dict[str, dict[str, Any]]:
    """The files that are there, by device."""
    files = map(read_json, sorted(RESULTS.glob("*.json")))
    return {file["device"]: file for file in files}


def main(options: Options) -> None:
    """Run, write the file, rewrite the table."""
    if not options.table:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            found = run_all(wide_bench(Path(folder)))
        write_json(RESULTS / f"{device.replace(' ', '-').lower()}.json", {
            "versions": versions(), "device": device, "ways": found})
    write_page(f"{table(read_results())}\n", ROOT / "README.md", "eval/what_ran.py")


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Options, description=str(__doc__)))
