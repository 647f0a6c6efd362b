"""Requests to `unislu serve`, one at a time and all at once: none lost, none mixed up, how fast.

    unislu serve adapters/whisper-base--smollm2-135m
    python eval/load_test.py adapters/whisper-base--smollm2-135m --out eval/results/serve.json

The clips are those of the mini corpus. Each answer is compared with what `understand` gives for the
clip alone in this process: transcript and outputs equal, probabilities by 0.01. Exit status 1: an
answer is lost or another one.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx2
import torch
import tyro

from unislu_llm import load, understand
from unislu_llm.decoding.files import as_json
from unislu_llm.errors import reported
from unislu_llm.io import portable, write_text
from unislu_llm.run_folder import versions

CLIPS = Path(__file__).parents[1] / "recipes" / "data" / "mini" / "audio"
Answered = list[tuple[dict[str, Any] | str, float]]  # an answer or a status, and seconds until it


async def ask(client: httpx2.AsyncClient, clip: Path) -> tuple[dict[str, Any] | str, float]:
    """One answer, and the seconds that it took."""
    start = time.perf_counter()
    try:
        reply = await client.post("/understand", files={"file": (clip.name, clip.read_bytes())})
        found = reply.json()["answers"][0] if reply.is_success else f"{reply.status_code}"
    except httpx2.HTTPError as error:
        found = type(error).__name__
    return found, time.perf_counter() - start


async def measure(url: str, clips: list[Path], alone: int) -> tuple[Answered, Answered, float]:
    """Answers of all clips at once; of some, one at a time, half of them before that and half
    behind, so that both find the machine as busy; and the seconds of the former."""
    async with httpx2.AsyncClient(base_url=url, timeout=None,
                                  limits=httpx2.Limits(max_connections=None)) as client:
        await ask(client, clips[0])
        single: Answered = []
        for clip in clips[:alone // 2]:
            single.append(await ask(client, clip))
        start = time.perf_counter()
        together = await asyncio.gather(*(ask(client, clip) for clip in clips))
        seconds = time.perf_counter() - start
        for clip in clips[alone // 2:alone]:
            single.append(await ask(client, clip))
    return together, single, seconds


def same(found: dict[str, Any] | str, expected: dict[str, Any]) -> bool:
    """Whether an answer is the clip's, as far as batching may not change it."""
    if isinstance(found, str):
        return False
    (shares, found), (others, expected) = (
        (a.get("probabilities", {}), {k: v for k, v in a.items() if k != "probabilities"})
        for a in (found, expected))
    return found == expected and all(abs(p - shares[task][label]) < 0.01
                                     for task, by in others.items() for label, p in by.items())


def main(model: str, /, url: str = "http://127.0.0.1:8000/v1", requests: int = 200,
         distinct: int = 300, alone: int = 40, out: Path | None = None) -> int:
    """Measure a server that is running.

    Args:
        model: that it serves, to answer each clip alone here.
        url: of the server.
        requests: at once.
        distinct: clips that they are of.
        alone: of them, one at a time.
        out: file of the result.
    """
    files = sorted(CLIPS.glob("*.opus"))
    files = [files[7 * i % len(files)] for i in range(distinct)]  # of all kinds
    clips = [files[i % len(files)] for i in range(requests)]
    loaded = load(model)
    expected = {clip: json.loads(as_json(clip.name, understand(loaded, clip)))
                for clip in dict.fromkeys(clips)}
    del loaded
    together, single, seconds = asyncio.run(measure(url, clips, alone))
    one_by_one = sum(s for _, s in single)
    lost = sum(isinstance(found, str) for found, _ in (*together, *single))
    wrong = [clip.name for clip, (found, _) in zip((*clips, *clips), (*together, *single),
                                                   strict=False)
             if not isinstance(found, str) and not same(found, expected[clip])]
    times = statistics.quantiles([s for _, s in together], n=100)
    result = {"requests": requests, "clips": len({*clips}), "lost": lost, "other_answers": wrong,
              "a_second": {"one_at_a_time": round(alone / one_by_one, 3),
                           "at_once": round(requests / seconds, 3),
                           "ratio": round(requests / seconds * one_by_one / alone, 2)},
              "seconds": {"p50": round(times[49], 2), "p95": round(times[94], 2),
                          "one_at_a_time_p50": round(statistics.median(s for _, s in single), 2)}}
    print(json.dumps(result, indent=1))
    if out:
        about = {"model": portable(model), "threads": torch.get_num_threads(), **versions()}
        write_text(out, json.dumps(result | about, indent=1) + "\n")
    return int(bool(lost or wrong))


if __name__ == "__main__":
    with reported():
        raise SystemExit(tyro.cli(main))
