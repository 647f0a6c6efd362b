"""What decoding promises, counted: well-formed answers whatever the model says, and answers that no batch changes."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from unislu_llm.analysis.benchmark_options import CheckBatching, CheckMalformed
from unislu_llm.analysis.benchmarking import decoder_of, environment, shown, write
from unislu_llm.analysis.check_batching import check_batching
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.generate import DecodeOptions, decode_batch, prediction_row
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.models.tiny import make_speech_llm, make_whisper_slu
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry
from unislu_llm.training.plan import use_threads
from unislu_llm.utterance import Utterance

TASKS = TaskRegistry([
    NER, SA, LabelTask("emotion", "[EMO]", ("sad", "sad face", "happy"), "[E]", "[/E]"),
    LabelTask("acts", "[ACT]", ("question", "answer", "question mark"), "[A]", "[/A]", multi=True)])
"""Every kind of task; labels that begin alike."""
DECODERS = ("speech_llm", "whisper_slu")
ARMS: dict[str, dict[str, bool]] = {"plain": {"grammar": False}, "grammar": {"grammar": True},
                                    "grammar, grounded": {"grammar": True, "grounded": True}}
"""How the same requests are decoded."""


def run(options: CheckMalformed | CheckBatching, command: Sequence[str] = ()) -> int:
    """Run one check, write its result.

    Returns:
        Exit status: 0 where the promise holds, 1 where it does not, 2 for bad input (one message on stderr).
    """
    use_threads(options.threads)
    try:
        result = check_malformed(options) if isinstance(options, CheckMalformed) else check_batching(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; `batching` keeps finished batches, the same command goes on from there", file=sys.stderr)
        return 130
    write(result | {"command": shown(command), "environment": environment()}, options.out)
    print(f"{'holds' if result['holds'] else 'DOES NOT HOLD'}: {result['promise']}; written to {options.out}")
    return 0 if result["holds"] else 1


def check_malformed(options: CheckMalformed) -> dict[str, Any]:
    """Malformed answers by kind, of random models: every decoder, search, and forced or free task, in equal parts."""
    cells = list(product(DECODERS, options.searches, (True, False)))
    names: list[str | None] = [*TASKS.names, None]
    batches = -(-options.decodes // (len(cells) * len(names)))
    counts: dict[str, dict[str, Counter[str]]] = {arm: {} for arm in ARMS}
    answers, start = 0, time.perf_counter()
    for decoder, search, forced in cells:
        for i in range(batches):
            seed = options.seed + i
            model = random_model(decoder, seed)
            answers += len(names)
            for arm, how in ARMS.items():
                cell = counts[arm].setdefault(f"{decoder}, {search}, {'forced' if forced else 'free'}", Counter())
                cell.update(_problems(model, names, search, forced, seed, how))
        print(f"  {answers} requests, {time.perf_counter() - start:.0f} s", flush=True)
    arms = {arm: _summary(by_cell, answers) for arm, by_cell in counts.items()}
    for arm, found in arms.items():
        print(f"{arm}: {found['malformed']} of {answers} malformed {found['problems']}")
    return {"promise": "with the grammar, no answer of a random model is malformed",
            "holds": all(found["malformed"] == 0 for arm, found in arms.items() if arm != "plain"),
            "answers": answers, "seed": options.seed, "tasks": TASKS.to_dict(), "arms": arms}


def random_model(kind: str, seed: int) -> SLUModel:
    """A random model of one kind whose markers are as likely as words, so that its answers have task parts too."""
    options: dict[str, Any] = {"tasks": TASKS.to_dict(), "seed": seed, "whisper_options": {"init_std": 0.3}}
    model: SLUModel = make_speech_llm(**options) if kind == "speech_llm" else make_whisper_slu(**options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".rows"):
                parameter.normal_(std=0.45)
    return model


def _problems(model: SLUModel, names: Sequence[str | None], search: str, forced: bool, seed: int,
              how: dict[str, bool]) -> Iterator[str]:
    """For every answer, each kind of problem that it has and, if it has one, `malformed`."""
    generator = torch.Generator().manual_seed(seed)
    budget = int(torch.randint(24, 96, (), generator=generator))
    waves = [0.3 * torch.randn(int(16_000 * (0.2 + 2 * float(torch.rand((), generator=generator)))), generator=generator)
             for _ in names]
    samples = [Sample(Utterance(str(i), None, "", {}), name) for i, name in enumerate(names)]
    options = replace(DecodeOptions(max_new_tokens=budget, extra_tokens=8, force_task=forced, cut_loops=bool(seed % 2),
                                    num_beams=4 if search == "beam 4" else 1), **how)
    config = decoder_of(model).generation_config
    config.do_sample = search == "sampling"
    torch.manual_seed(seed)
    for sample, ids in zip(samples, decode_batch(model, samples, waves, options), strict=True):
        found = prediction_row(model.codec, sample, ids, 1.0)["problems"]
        if not forced:  # the task is free, so that another one is no fault
            found = [p for p in found if p != "wrong_task"]
        yield from set(found)
        if found:
            yield "malformed"


def _summary(by_cell: dict[str, Counter[str]], answers: int) -> dict[str, Any]:
    total: Counter[str] = sum(by_cell.values(), Counter())
    malformed = total.pop("malformed", 0)
    return {"malformed": malformed, "share": malformed / answers, "problems": dict(total.most_common()),
            "malformed_by_cell": {cell: found["malformed"] for cell, found in by_cell.items()}}


__all__ = ["check_batching", "check_malformed", "random_model", "run"]
