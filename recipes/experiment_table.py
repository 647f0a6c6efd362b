"""The table of an experiment: a row a system, from score files alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, model_validator
from tabulate import tabulate

from unislu_llm.config_file import config_of_run
from unislu_llm.io import read_json, write_json, write_text
from unislu_llm.scoring.score import slue_score

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


class Published(BaseModel, extra="forbid"):
    """Rows of numbers that others have published."""

    source: str
    """Where; it stands in front of every row."""
    protocol: Literal["whisper", "slue"]
    set: str
    """What they are scored on: dev, or a name in the experiment's `tests`."""
    columns: list[str]
    """Titles of columns of the table."""
    rows: dict[str, list[float]]
    """Numbers of these columns, by system."""

    @model_validator(mode="after")
    def _whole(self) -> Published:
        for name, numbers in self.rows.items():
            if len(numbers) != len(self.columns):
                raise ValueError(f"{len(self.columns)} columns, and {len(numbers)} numbers in the "
                                 f"row '{name}'")
        return self


def write_table(experiment: Any, jobs: Sequence[Any]) -> None:
    """Write `table.md` into the results folder from the score files that are there.

    Args:
        experiment: as its file describes it.
        jobs: the runs of all its systems.
    """
    every = {job.name: _scores(job) for job in jobs}
    for system in experiment.systems:
        every |= {f"{system.name}-s{seed}": _joined(
            {key: every.get(f"{part}-s{seed}") for key, part in system.parts})
            for seed in system.seeds if system.parts}
    corpora = dict.fromkeys(corpus for result in every.values() for corpus in
                            _dig(result, "scores/protocols/slue/wer/by_corpus", "") or ())
    at = "scores/protocols/*/"
    columns = {f"WER {c}": (f"{at}wer/by_corpus/{c}/wer", f"wer/{c}") for c in corpora}
    for title, key in (("hypothesis WER", "hypothesis_wer"), ("CTC WER", "ctc_wer")):
        columns |= {f"{title} {c}": (f"{at}{key}_by_corpus/{c}", "") for c in corpora}
    columns |= COLUMNS
    columns = {c: columns.get(c, ("", "")) for p in experiment.published for c in p.columns
               } | columns
    sets = ["", *experiment.tests] if experiment.published else [""]
    if not experiment.published:
        columns |= {f"WER {t}": (f"tests/{t}/{at}wer/overall/wer", "") for t in experiment.tests}
        columns |= {f"CTC WER {t}": (f"tests/{t}/{at}ctc_wer", "") for t in experiment.tests}
    text = f"# {experiment.title}\n\n[]: 95 % interval of one run (bootstrap); ±: over seeds.\n"
    for protocol in ("whisper", "slue"):
        rows = [row for name in reversed(sets)
                for row in _rows(experiment, every, columns, name, protocol)]
        shown = [c for c in ("system", "set", *columns) if any(row.get(c, "-") != "-"
                                                              for row in rows)]
        table = tabulate([[row.get(c, "-") for c in shown] for row in rows], headers=shown,
                         tablefmt="github", disable_numparse=True)
        text += f"\nProtocol `{protocol}`\n\n{table}\n"
    write_text(experiment.results / "table.md", text)


def _rows(experiment: Any, every: Mapping[str, Values], columns: Mapping[str, tuple[str, str]],
          test: str, protocol: str) -> Iterator[dict[str, str]]:
    """What is published for a set (dev without a name), and a row for each system of ours."""
    where = {"set": test or "dev"} if experiment.published else {}
    for some in experiment.published:
        for name, numbers in some.rows.items() if some.protocol == protocol else ():
            if some.set == where["set"]:
                cells = {c: f"{n:g}" for c, n in zip(some.columns, numbers, strict=True)}
                yield {"system": f"published ({some.source}): {name}"} | where | cells
    parts = {part for system in experiment.systems for _, part in system.parts or ()}
    for system in experiment.systems:
        found = [every[f"{system.name}-s{seed}"] for seed in system.seeds]
        own = [r for result in found if (r := result.get("tests", {}).get(test) if test
                                          else result)]
        if system.name not in parts:
            cells = {name: _cell(own, *places, protocol) for name, places in columns.items()}
            title = system.title or system.name
            if len(own) < len(found):
                none = "not scored" if test and any(found) else "not run"
                title += f" ({len(own)} of {len(found)} seeds)" if own else f" ({none})"
            yield {"system": title} | where | cells


def _joined(parts: Mapping[str, Any]) -> Values:
    """Scores of models of one task each as those of one system; none before all are there."""
    if not all(parts.values()):
        return {}
    wer, protocols = parts["wer"]["scores"]["protocols"], dict[str, Any]()
    for protocol, block in wer.items():
        tasks = {task: parts[task]["scores"]["protocols"][protocol]["tasks"][task]
                 for task in ("ner", "sa")}
        score = slue_score([c["wer"] for c in block["wer"]["by_corpus"].values()],
                           tasks["ner"]["entity"]["f1"], tasks["sa"]["macro_f1"])
        protocols[protocol] = {"wer": block["wer"], "tasks": tasks, "slue_score": score}
    spans = {p: {name: span for key, part in parts.items()
                 for name, span in part["intervals"][p].items() if name.split("/")[0] == key}
             for p in wer}
    tests = {test: joined for test in parts["wer"].get("tests", {}) if (joined := _joined(
        {key: part.get("tests", {}).get(test) for key, part in parts.items()}))}
    return {"scores": {"protocols": protocols}, "intervals": spans, "tests": tests}


def _scores(job: Any) -> Values:
    """Scores of a run, its minutes of training noted in the file, which outlives the run."""
    if not job.scores().is_file():
        return {}
    result = read_json(job.scores())
    if "train_minutes" not in result and (job.folder / "finished.json").is_file():
        result["train_minutes"] = _minutes(job.folder)
        write_json(job.scores(), result)
    tests = {test: read_json(job.scores(test)) for test in job.tests
             if test and job.scores(test).is_file()}
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
