"""The table of an experiment: a row a system, from score files alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from unislu_llm.config_file import config_of_run
from unislu_llm.io import read_json, write_json, write_text

Values = dict[str, Any]

COLUMNS = {
    "NER F1": ("scores/protocols/*/tasks/ner/entity/f1", "ner/f1"),
    "NER label F1": ("scores/protocols/*/tasks/ner/label/f1", "ner/label_f1"),
    "NER position F1": ("scores/position/ner/f1", "ner/position_f1"),
    "SA macro-F1": ("scores/protocols/*/tasks/sa/macro_f1", "sa/macro_f1"),
    "SLUE": ("scores/protocols/*/slue_score", "slue_score"),
    "malformed": ("scores/malformed/share", ""),
    "trainable": ("trainable_parameters/total", ""),
    "minutes": ("train_minutes", ""),
    "RTF": ("decoding/rtf", ""),
}
"""Where a score file has a column (`*` is the protocol), and the name of its interval there."""


def write_table(experiment: Any, jobs: Sequence[Any]) -> None:
    """Write `table.md` into the results folder from the score files that are there.

    Args:
        experiment: as its file describes it.
        jobs: the runs of all its systems.
    """
    every = {job.name: _scores(job) for job in jobs}
    corpora = dict.fromkeys(corpus for result in every.values() for corpus in
                            _dig(result, "scores/protocols/slue/wer/by_corpus", "") or ())
    at = "scores/protocols/*/"
    columns = {f"WER {c}": (f"{at}wer/by_corpus/{c}/wer", f"wer/{c}") for c in corpora}
    for title, key in (("hypothesis WER", "hypothesis_wer"), ("CTC WER", "ctc_wer")):
        columns |= {f"{title} {c}": (f"{at}{key}_by_corpus/{c}", "") for c in corpora}
    columns |= COLUMNS
    columns |= {f"WER {t}": (f"tests/{t}/{at}wer/overall/wer", "") for t in experiment.tests}
    columns |= {f"CTC WER {t}": (f"tests/{t}/{at}ctc_wer", "") for t in experiment.tests}
    text = f"# {experiment.title}\n\n[]: 95 % interval of one run (bootstrap); ±: over seeds.\n"
    for protocol in ("whisper", "slue"):
        rows = []
        for system in experiment.systems:
            own = list(filter(None, (every[f"{system.name}-s{seed}"] for seed in system.seeds)))
            cells = {name: _cell(own, *places, protocol) for name, places in columns.items()}
            title = (system.title or system.name) + (" (not run)" if not own else "")
            rows.append({"system": title} | cells)
        shown = [c for c in ("system", *columns) if any(row[c] != "-" for row in rows)]
        table = tabulate([[row[c] for c in shown] for row in rows], headers=shown,
                         tablefmt="github", disable_numparse=True)
        text += f"\nProtocol `{protocol}`\n\n{table}\n"
    write_text(experiment.results / "table.md", text)


def _scores(job: Any) -> Values:
    """Scores of a run, its minutes of training noted in the file, which outlives the run."""
    if not job.scores().is_file():
        return {}
    result = read_json(job.scores())
    if "train_minutes" not in result and (job.folder / "finished.json").is_file():
        result["train_minutes"] = _minutes(job.folder)
        write_json(job.scores(), result)
    tests = {test: read_json(job.scores(test)) for test in job.experiment.tests
             if job.scores(test).is_file()}
    return result | {"tests": tests}


def _minutes(run: Path) -> float:
    """Minutes of training, with those of the runs that it starts from."""
    if not (run / "finished.json").is_file():
        return 0.0
    init = config_of_run(run).train.init
    before = _minutes(Path(init)) if init else 0.0
    return before + read_json(run / "finished.json").get("train_seconds", 0.0) / 60


def _dig(values: Any, place: str, protocol: str) -> Any:
    for key in place.replace("*", protocol).split("/"):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _cell(results: Sequence[Values], place: str, interval: str, protocol: str) -> str:
    """Mean over seeds with its spread, or the one value with its interval; `-` without any."""
    values = [v for result in results if (v := _dig(result, place, protocol)) is not None]
    if not values:
        return "-"
    mean = statistics.fmean(values)
    digits = 0 if mean >= 1000 else 3 if mean < 1 else 1
    text = f"{mean:,.{digits}f}"
    if len(values) > 1:
        return f"{text} ± {statistics.stdev(values):.{digits}f}"
    span = _dig(results[0], f"intervals/{protocol}", "").get(interval) if interval else None
    return text + (f" [{span['low']:.1f}, {span['high']:.1f}]" if span else "")
