"""The table of an experiment: a row a system, written from score files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from unislu_llm.analysis.experiments import Experiment, Job, System, jobs, load_scores
from unislu_llm.training import state
from unislu_llm.training.config import read_yaml

PROTOCOLS = ("whisper", "slue")
_TEXTS = {"WER": ("wer", "overall", "wer"), "WER of CTC text": ("ctc_wer",)}
"""Of further test sets: what is shown, and where a score file has it under a protocol."""
Column = tuple[str, Callable[[Mapping[str, Any], str], float | None], str]
"""Title, value of a score file under a protocol, and the name of its interval there (empty: it has none)."""


def _dig(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def columns(results: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Columns for some score files: WER of each corpus, scores of each task, what the paper's comparison is about."""
    wers = [_dig(r, "scores", "protocols", p, "wer", "by_corpus") or {} for r in results for p in PROTOCOLS]
    corpora = dict.fromkeys(corpus for wer in wers for corpus in wer)

    def protocol(*keys: str) -> Callable[[Mapping[str, Any], str], float | None]:
        return lambda result, name: _dig(result, "scores", "protocols", name, *keys)

    def anywhere(*keys: str, scale: float = 1.0) -> Callable[[Mapping[str, Any], str], float | None]:
        def value(result: Mapping[str, Any], _: str) -> float | None:
            found = _dig(result, *keys)
            return None if found is None else found * scale
        return value

    def of_text(key: str, title: str) -> list[Column]:
        found = [_dig(r, "scores", "protocols", p, key) or {} for r in results for p in PROTOCOLS]
        return [(f"{title} {corpus}", protocol(key, corpus), "") for corpus in corpora if any(corpus in wers for wers in found)]

    return [
        *((f"WER {corpus}", protocol("wer", "by_corpus", corpus, "wer"), f"wer/{corpus}") for corpus in corpora),
        *of_text("ctc_wer_by_corpus", "WER of CTC text"),
        *of_text("draft_wer_by_corpus", "WER of drafts"),
        ("NER F1", protocol("tasks", "ner", "entity", "f1"), "ner/f1"),
        ("NER label-F1", protocol("tasks", "ner", "label", "f1"), "ner/label_f1"),
        ("NER position F1", anywhere("scores", "position", "ner", "f1"), "ner/position_f1"),
        ("SA macro-F1", protocol("tasks", "sa", "macro_f1"), "sa/macro_f1"),
        ("SLUE", protocol("slue_score"), "slue_score"),
        ("malformed", anywhere("scores", "malformed", "share"), ""),
        ("trainable (M)", anywhere("trainable_parameters", "total", scale=1e-6), ""),
        ("training (min)", anywhere("train_seconds", scale=1 / 60), ""),
        ("RTF", anywhere("decoding", "rtf"), ""),
    ]


def write_table(experiment: Experiment) -> None:
    """Write `table.json` and `table.md` into the results folder from the score files that are there."""
    every = jobs(experiment)
    for job in every:
        _note_training(job)
    rows = [(system, _results(experiment, system)) for system in experiment.systems]
    blocks = [f"# {experiment.title}", "In brackets: 95 % interval of one run (bootstrap over utterances); ±: over seeds."]
    data: dict[str, Any] = {"title": experiment.title, "protocols": {}}
    shown = columns([r for _, results in rows for r in results.values()])
    extra = [(f"{title} {test}", test, keys) for title, keys in _TEXTS.items() for test in experiment.tests
             if keys == _TEXTS["WER"] or any(_wer(job, test, PROTOCOLS[0], keys) is not None for job in every)]
    for protocol in PROTOCOLS:
        body, values = [], {}
        for system, results in rows:
            cells = {name: _over_seeds([value(r, protocol) for r in results.values()]) for name, value, _ in shown}
            if len(results) == 1:  # over seeds there is a spread instead
                only = next(iter(results.values()))
                for name, _, key in shown:
                    cells[name] |= _dig(only, "intervals", protocol, key) or {}
            own = _jobs_of(experiment, system)
            cells |= {name: _over_seeds([_wer(job, test, protocol, keys) for job in own]) for name, test, keys in extra}
            values[system.name] = {"seeds": list(results), **{k: c for k, c in cells.items() if c["n"]}}
            body.append([system.title, *(_cell(c) for c in cells.values())] if results
                        else [system.title, *["not run"] * len(cells)])
        headers = ["system", *(name for name, *_ in shown), *(name for name, *_ in extra)]
        blocks.append(f"Protocol `{protocol}`\n\n{tabulate(body, headers=headers, tablefmt='github', disable_numparse=True)}")
        data["protocols"][protocol] = values
    experiment.results.mkdir(parents=True, exist_ok=True)
    state.write_text(experiment.results / "table.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    state.write_text(experiment.results / "table.md", "\n\n".join(blocks) + "\n")


def _jobs_of(experiment: Experiment, system: System) -> list[Job]:
    return [Job(system, seed, experiment) for seed in system.seeds]


def _results(experiment: Experiment, system: System) -> dict[int, dict[str, Any]]:
    return {job.seed: load_scores(job.scores()) for job in _jobs_of(experiment, system) if job.scores().is_file()}


def _note_training(job: Job) -> None:
    """Put the run's training time into its score file, which outlives the run folder; with that of the runs it starts from."""
    seconds = state.read_finished(job.folder).get("train_seconds")
    if seconds is None or not job.scores().is_file():
        return
    left = _starts(job.config())
    while left:
        init = left.pop()
        seconds += state.read_finished(init).get("train_seconds", 0.0)
        left += _starts(read_yaml(init / "config.yaml")) if (init / "config.yaml").is_file() else []
    result = load_scores(job.scores())
    if result.get("train_seconds") != seconds:
        state.write_text(job.scores(), json.dumps(result | {"train_seconds": seconds}, indent=1, ensure_ascii=False) + "\n")


def _starts(config: Mapping[str, Any]) -> list[Path]:
    """Runs that a run starts from."""
    model = config.get("model") or {}
    return [Path(model[key]) for key in ("init", "init_llm") if model.get(key)]


def _wer(job: Job, test: str, protocol: str, keys: Sequence[str]) -> float | None:
    path = job.scores(test)
    value = _dig(load_scores(path), "scores", "protocols", protocol, *keys) if path.is_file() else None
    return None if value is None else float(value)


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    found = [v for v in values if v is not None]
    if not found:
        return {"n": 0}
    spread = {"sd": statistics.stdev(found)} if len(found) > 1 else {}
    return {"n": len(found), "mean": statistics.fmean(found), **spread}


def _cell(cell: Mapping[str, Any]) -> str:
    if not cell["n"]:
        return "-"
    digits = 3 if cell["mean"] < 1 else 1
    spread = f" ± {cell['sd']:.{digits}f}" if "sd" in cell else ""
    return f"{cell['mean']:.{digits}f}{spread}" + (f" [{cell['low']:.1f}, {cell['high']:.1f}]" if "low" in cell else "")
