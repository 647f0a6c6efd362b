"""Going on with a run: which of its settings may change, and whether its data is what it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unislu_llm.config import Config
from unislu_llm.config_file import absolute, config_of_run
from unislu_llm.errors import UserError, shorten
from unislu_llm.io import RUN_BEGAN, kind_of_run, read_json
from unislu_llm.run_folder import fingerprints, is_run, settings

# How long, how often, how fast it goes on. All else decides what a step sees (data, batches, seed),
# what it minimises, or by what scores `best` is chosen.
_FREE = re.compile(
    r"train\.(epochs|max_steps|warmup_steps|lr\.\w+|max_grad_norm|gradient_checkpointing|on_\w+"
    r"|eval_every|guard_limit|save_every|save_minutes|keep|time_limit|timeout|threads|trackers)"
    r"|data\.num_workers|decode\.batch_size")
_SCRIPTS = {"speech_llm": "train_llm.py", "whisper_slu": "train_whisper.py"}


def check_resume(kind: str, config: Config, processes: int) -> str:
    """Settings that change in the run that `config` resumes (`output`), as a line; empty: none do.

    Raises UserError: no run, one of another kind, files that have changed or are gone, or settings
    with which it would be another run.
    """
    run = Path(config.output)
    if not config.output or not is_run(run):
        raise UserError(f"--resume: {config.output or 'no --output'} holds no run; give the run's "
                        "folder as --output")
    if (own := kind_of_run(run)) not in ("", kind):
        raise UserError(f"--resume: {run} is a run of {_SCRIPTS[own]}, and this is "
                        f"{_SCRIPTS[kind]}; use that, or unislu train --resume --output {run}")
    began = read_json(run / RUN_BEGAN) if (run / RUN_BEGAN).is_file() else {}
    before, now = dict(settings(absolute(config_of_run(run)))), dict(settings(config))
    found = fingerprints(config)
    for key, files in began.get("files", {}).items():
        then, files = [tuple(file) for file in files], found.get(key, [])
        gone = any(not file[2] for file in files)
        if then == files:  # wherever they are
            now[key] = before[key]
        elif gone or before.get(key) == now.get(key):
            paths = now[key] if isinstance(now[key], list) else [now[key]]
            other = next(path for path, file in zip(paths, files, strict=True)
                         if not file[2] or (not gone and file not in then))
            raise UserError(
                f"{key}: {other} {'is gone' if gone else 'has changed'} since {run} began, so that "
                f"batches would be others. Put it back, say where it is now (--{key} FILE), or "
                f"start a new run from these weights: --train.init {run}")
    before["processes"], now["processes"] = began.get("processes", processes), processes
    told = {key: f"{key} {_short(before.get(key))} -> {_short(now.get(key))}"
            for key in before | now if before.get(key) != now.get(key)}
    if refused := [text for key, text in told.items() if not _is_free(key, before, now)]:
        raise UserError(f"--resume: {run} would be another run with {', '.join(refused)}. Resume "
                        f"it with its own, or start a new run from its weights: --train.init {run}")
    rates = re.search(r"train\.(epochs|max_steps|warmup_steps|lr\.)", " ".join(told))
    line = f"over the run's own settings: {', '.join(told.values())}" if told else ""
    other = before["processes"] != now["processes"]
    return (line + "; learning rates follow the new schedule from here on" * bool(rates)
            + "; no longer bit for bit: dropout draws anew, and sums round otherwise" * other)


def _is_free(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    name = re.sub(r"^stages\[\d+\]\.", "", key)
    if name == "processes":  # budgets of tokens are cut into parts, of which each has as many
        return not now["train.batch_tokens"]
    # The same at another place; the checkpoint has all that was taken over from a saved model.
    if name in ("data.frame_cache", "train.init"):
        return bool(before.get(key) and now.get(key))
    return _FREE.fullmatch(name) is not None


def _short(value: Any) -> str:
    return shorten(" ".join(map(str, value)) if isinstance(value, list) else str(value), 120)
