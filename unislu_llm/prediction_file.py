"""Predictions on disk, which are neither lost nor decoded twice.

`best-dev.jsonl` holds the predictions and `best-dev.meta.json` what they were decoded with. While
decoding, every finished batch is appended to `best-dev.<hash>.partial`, from which an interrupted
evaluation goes on. The hash is of everything that decides what the predictions are; finished ones
made with all the same are taken up, others are written over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unislu_llm.config_file import config_from_file
from unislu_llm.errors import UserError
from unislu_llm.io import (
    MODEL_FILE,
    WEIGHTS_FILE,
    append_json,
    find_model,
    read_json,
    read_json_lines,
    sha256,
    write_json,
    write_text,
)
from unislu_llm.run_folder import Run, is_run, read_finished

Rows = list[dict[str, Any]]


class PredictionFile:
    """Predictions of one model on some examples, decoded in one way.

    `key` is everything that decides what they are, as plain data.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path, self.meta_path = path, path.with_suffix(".meta.json")
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        # Part of the name, so that another decoding does not go on where this one stopped.
        self.partial = path.with_name(f"{path.stem}.{self.key[:8]}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: predictions cannot be written there "
                            f"({error.strerror})") from error

    def finished(self) -> tuple[Rows, dict[str, Any]] | None:
        """Predictions and meta of a complete decoding with this key; None when there is none."""
        meta = read_json(self.meta_path) if self.meta_path.is_file() else {}
        # They may have been changed by hand, or a kill came between the two files.
        whole = self.path.is_file() and meta.get("sha256") == sha256(self.path)
        ours = whole and meta.get("key") == self.key
        return (read_json_lines(self.path), meta) if ours else None

    def resume(self) -> tuple[dict[str, dict[str, Any]], float]:
        """Predictions of an interrupted decoding by key, and the seconds that they took."""
        if not self.partial.is_file():
            return {}, 0.0
        whole, _, cut = self.partial.read_text("utf-8", "replace").rpartition("\n")
        if cut:  # by a kill; what is appended must not continue such a line
            write_text(self.partial, f"{whole}\n" if whole else "")
        batches = read_json_lines(self.partial)
        return ({key_of(row): row for batch in batches for row in batch["predictions"]},
                sum(batch["seconds"] for batch in batches))

    def append(self, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Keep a finished batch and the time that it took."""
        append_json(self.partial, {"seconds": seconds, "predictions": list(rows)})

    def finish(self, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Write all predictions and `meta`, which is returned as written."""
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        about = {"key": self.key, "sha256": sha256(self.path), **meta}
        write_json(self.meta_path, about)
        self.partial.unlink(missing_ok=True)
        return about


def dev_predictions(run: Run) -> Path | None:
    """A run's predictions of its dev manifests by `unislu evaluate`, else by the validation of its
    checkpoint, which is told; None: neither is there."""
    file = run.folder / "predictions" / f"{run.checkpoint}-dev.jsonl"
    meta = read_json(about) if (about := file.with_suffix(".meta.json")).is_file() else {}
    # Training that went on may have found another best since.
    if file.is_file() and meta.get("weights") in (None, sha256(run.model / WEIGHTS_FILE)):
        if limit := meta.get("limit"):
            print(f"{run.label}: predictions of {limit} rows of each manifest (--limit)")
        return file
    # The best of stages is that of the last finished one.
    stages = [run.folder / stage["name"] for stage in (run.config.stages if run.config else [])]
    home = next((stage for stage in reversed(stages) if read_finished(stage)), run.folder)
    step = run.step()
    validated = home / "predictions" / f"step-{-1 if step is None else step:06d}.jsonl"
    if not validated.is_file() or known_decoding(validated) is None:
        return None
    print(f"{run.label}: predictions of its validation after {step} steps ({run.checkpoint})")
    return validated


def known_decoding(predictions: Path) -> dict[str, Any] | None:
    """How the predictions of a file were decoded, as :func:`decoding_of`; None: not known."""
    meta, folder = predictions.with_suffix(".meta.json"), predictions.parent.parent
    if meta.is_file():
        return read_json(meta).get("decoding")
    model = find_model(folder)
    if model is None or not is_run(folder) or not predictions.stem.startswith("step-"):
        return None
    # Validations decode as the run's config says; a `ctc` objective's do not decode the model.
    config = config_from_file(folder / "config.yaml", resolve=False)
    return None if config.train.objective == "ctc" else decoding_of({
        "decode": config.decode.model_dump(), "precision": config.train.precision, "model": {
            "model_type": read_json(model / MODEL_FILE)["model_type"],
            "model": config.model.model_dump()}})


def decoding_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """How predictions were decoded, as far as scores depend on it, from what a score file says:
    `decode`, `precision` and `model`."""
    decode, saved = dict(result["decode"]), result.get("model") or {}
    for name in ("batch_size", "no_speech"):  # decide nothing: evaluation only marks
        decode.pop(name, None)
    whisper = saved.get("model_type") == "whisper_slu"  # reads no hypothesis, so has no way of it
    for name in ("transcript", "hypothesis_bias"):
        # Without a value of its own, decoding has the model's.
        own = decode.pop(name, None)
        value = own if own is not None else (saved.get("model") or saved).get(name)
        if not whisper and value is not None:
            decode[name] = value
    return {**{f"decode.{name}": value for name, value in decode.items()},
            "precision": result["precision"]}


def differences(decodings: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """A line for each way in which systems of one table were not decoded alike; by their names,
    :func:`decoding_of` each, or None where that is not known."""
    lines = [f"warning: how '{name}' was decoded is not known" for name, known in
             decodings.items() if known is None]
    settings = {name: known for name, known in decodings.items() if known is not None}
    for key in dict.fromkeys(key for known in settings.values() for key in known):
        # What a system has nothing of (Whisper's decoder a hypothesis) is no other way of it.
        values = {name: "rewrite" if known[key] == "auto" else known[key]  # not chosen yet
                  for name, known in settings.items() if key in known}
        if len({json.dumps(value) for value in values.values()}) > 1:
            lines.append(f"warning: not decoded alike: {key} is " + ", ".join(
                f"{json.dumps(value)} in {name}" for name, value in values.items()))
    return lines


def key_of(row: Mapping[str, Any]) -> str:
    """Key of the example that a prediction answers, as :attr:`unislu_llm.tokenizer.Example.key`."""
    return f"{row['corpus']}/{row['id']}#{row['task']}"
