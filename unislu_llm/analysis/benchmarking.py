"""What the benchmarks share: alternating runs, medians with their spread, tables, and result files."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unislu_llm.analysis import runs
from unislu_llm.models.base import SLUModel
from unislu_llm.training.state import versions, write_text


def environment() -> dict[str, Any]:
    """Where and with what a benchmark ran: versions, git revision, device, threads, load of the machine, date."""
    known = {key: value for key, value in versions().items() if key != "command"}
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return known | {"threads": torch.get_num_threads(), "load_average": load,
                    "date": datetime.now(UTC).isoformat(timespec="seconds")}


def shown(command: Sequence[str]) -> str:
    """A command line without this machine's folders, to store with a result."""
    return " ".join(runs.shown(part) for part in command)


def decoder_of(model: SLUModel) -> Any:
    """What `generate` of transformers runs on inside a model."""
    return getattr(model, "llm", None) or model.whisper


def alternate(callables: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1,
              on_round: Callable[[int], None] | None = None,
              clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each callable, run in turn `repeats` times, so that what else the machine does meets all of them alike.

    Every second round runs in reverse order. `warm_up` rounds before are not counted; `on_round` is told each round's
    number when it is over. `clock` is the wall's, or `time.process_time` where a busy machine would disturb it.
    """
    times: dict[str, list[float]] = {name: [] for name in callables}
    for i in range(-warm_up, repeats):
        for name in list(callables)[:: -1 if i % 2 else 1]:
            _wait()
            start = clock()
            callables[name]()
            _wait()
            if i >= 0:
                times[name].append(clock() - start)
        if on_round:
            on_round(i)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, columns in the order of their first appearance; numbers with three digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
                     for line in cells)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _wait() -> None:
    """Work that was given to a GPU is not done when the call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
