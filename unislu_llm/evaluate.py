"""Decode and score models: predictions into run folders, scores into files, one table of all."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from unislu_llm.config import DecodeConfig, check_decoding
from unislu_llm.config_file import check
from unislu_llm.data.loading import load_examples
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.predict import predict
from unislu_llm.errors import UserError
from unislu_llm.evaluate_options import Options
from unislu_llm.flags import flag_of
from unislu_llm.io import MODEL_FILE, WEIGHTS_FILE, portable, read_json, sha256, write_text
from unislu_llm.prediction_file import PredictionFile, Rows, decoding_of, differences, key_of
from unislu_llm.run_folder import Run, find_run, load_model, versions
from unislu_llm.scoring.calibration import calibrate
from unislu_llm.scoring.predictions import check_predictions
from unislu_llm.scoring.score import format_table, intervals, same_data, score_predictions
from unislu_llm.setting_types import Precision
from unislu_llm.tokenizer import Example


@dataclass(frozen=True)
class Job:
    """One run and what it is scored on."""

    label: str  # name in tables, and of the score file
    run: Run
    manifests: list[Path]  # scored together
    stem: str  # name of the file of their predictions
    decode: DecodeConfig
    precision: Precision
    limit: int

    def key(self) -> dict[str, Any]:
        """Everything that decides what the predictions are."""
        return {"weights": sha256(self.run.model / WEIGHTS_FILE),
                "config": sha256(self.run.model / MODEL_FILE),
                "manifests": [sha256(path) for path in self.manifests], "limit": self.limit,
                "decode": self.decode.model_dump(), "precision": self.precision,
                "phrases": Phrases.of(self.decode.phrases, self.decode.phrase_boost)}

    def decoding(self) -> dict[str, Any]:
        """What has to be alike where systems are compared."""
        return decoding_of({"decode": self.decode.model_dump(), "precision": self.precision,
                            "model": read_json(self.run.model / MODEL_FILE)})


def evaluate(options: Options) -> int:
    """Score every run, write its results, and print one table a protocol over all of them.

    Returns the exit status: 2 when a run could not be scored, which is one message on stderr (the
    others have their results), 130 when interrupted (what was decoded is kept), else 0.
    """
    if not options.runs:
        print("error: no run is named; give run folders, e.g. unislu evaluate runs/my-run",
              file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    decodings: dict[str, dict[str, Any]] = {}
    for path in options.runs:
        try:
            job = make_job(path, options)
            if job.label in results:
                raise UserError(f"another run was named '{job.label}' before; rename one, or score "
                                "them by separate commands with --label or --out")
            results[job.label] = _evaluate_run(job, options.out, options.again)
            decodings[job.label] = job.decoding()
        except UserError as error:
            where = "" if str(error).startswith(str(path)) else f"{path}: "
            print(f"error: {where}{error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\ninterrupted; finished batches are kept, the same command goes on from there",
                  file=sys.stderr)
            return 130
    if results:
        print("\n".join(["", format_table(results), *same_data(results), *differences(decodings)]))
    if failed := len(options.runs) - len(results):
        print(f"error: {failed} of {len(options.runs)} runs could not be scored, see above",
              file=sys.stderr)
    return 2 if failed else 0


def make_job(path: str | Path, options: Options) -> Job:
    """What `options` mean for one run.

    Raises UserError: no such run or checkpoint, no manifest to score it on, or a bad option.
    """
    run = find_run(path, options.checkpoint)
    manifests = options.manifest or [Path(p) for p in (run.config.data.dev if run.config else [])]
    if not manifests:
        why = ("its config has no data.dev" if run.config
               else "it is a saved model without a run's config")
        raise UserError(f"nothing to score it on: {why}; give --manifest FILE...")
    if missing := [p for p in manifests if not p.is_file()]:
        of = "" if options.manifest else " of its config"
        raise UserError(f"manifest {missing[0]}{of} does not exist here; give --manifest FILE...")
    part = "+".join(p.stem for p in options.manifest)[:100]  # of the characters of a file name
    label = "-".join(filter(None, [run.label, part, options.label]))
    stem = "-".join(filter(None, [run.checkpoint, part or "dev", options.label]))
    if Path(label).name != label:
        raise UserError(f"--label {options.label}: is part of a file name and cannot hold a slash")
    if options.limit < 0:
        raise UserError(f"--limit must be 0 or more, found {options.limit}")
    # Weights that were trained in bf16 give other answers in fp32.
    trained = run.config.train.precision if run.config else "fp32"
    # As the run itself decodes: its validations then say the same as this does.
    own = run.config.decode if run.config else DecodeConfig()
    given = {name: value for name, value in options.decode  # type: ignore[attr-defined]
             if value is not None and value is not False}
    decode = check(DecodeConfig, own.model_dump() | given,
                   lambda place: flag_of(("decode", *place)))
    check_decoding(decode)
    return Job(label, run, manifests, stem, decode, options.precision or trained, options.limit)


def decoded(job: Job, again: bool = False) -> tuple[Rows, dict[str, Any], Path]:
    """Predictions of a job, decoded where they are not there; what is noted of them; the file."""
    registry = job.run.registry()
    # Before the model is loaded: a bad manifest should not cost minutes.
    examples = load_examples([str(path) for path in job.manifests], registry, limit=job.limit,
                             flag="manifest", scored=True,
                             language=read_json(job.run.model / MODEL_FILE)["model"]["language"])
    file = PredictionFile(job.run.folder / "predictions" / f"{job.stem}.jsonl", job.key())
    found = None if again else file.finished()
    if again:
        file.partial.unlink(missing_ok=True)
    print(f"{job.label} ({job.run.checkpoint}): {len(examples)} examples of "
          f"{', '.join(p.name for p in job.manifests)}", flush=True)
    if found:
        print(f"  predictions of {found[1]['date']} reused (--again decodes anew)")
    return *(found or _decode(job, examples, file)), file.path


def _evaluate_run(job: Job, out: Path, again: bool) -> dict[str, Any]:
    """Decode (or take up predictions), score, write `<out>/<label>.json`; gives the scores."""
    rows, meta, file = decoded(job, again)
    registry, key = job.run.registry(), job.key()
    predictions = check_predictions(rows, registry)
    scores = score_predictions(predictions, registry)
    result = {
        **_about(job, key, meta), "samples": dict(Counter(p.task for p in predictions)),
        "predictions": portable(file), "predictions_sha256": meta["sha256"],
        "scores": scores,
        "intervals": {p: intervals(predictions, registry, p) for p in scores["protocols"]},
        "calibration": calibrate(predictions, registry)}
    # Innermost lists and objects on one line: a number a line makes half of the file blanks.
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_text(out / f"{job.label}.json",
               re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\n *", " ", m[0]), text) + "\n")
    print(f"  {meta['seconds']:.1f} s for {meta['audio_seconds']:.1f} s of audio "
          f"(RTF {meta['rtf']:.3f}); predictions: {file}; scores: {out / job.label}.json")
    if none := result["scores"]["no_speech"]:
        print(f"  {none} utterances hold no speech (decode.no_speech): they are scored as decoded; "
              "unislu predict answers nothing")
    for name, c in result["calibration"].items():
        print(f"  calibration of {name}: ECE {c['ece']:.3f} (adaptive {c['ece_adaptive']:.3f}), "
              f"Brier {c['brier']:.3f}, NLL {c['nll']:.3f}; accuracy {c['accuracy']:.3f} at mean "
              f"confidence {c['confidence']:.3f}, {c['n']} utterances")
    return result["scores"]


def _about(job: Job, key: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a result file says of the model, the data and the decoding."""
    run, config = job.run, read_json(job.run.model / MODEL_FILE)
    training = {k: v for k, v in run.versions().items() if k in ("git", "packages")}
    if run.config is not None:
        training["seed"] = run.config.train.seed
    return _without_paths({
        "run": job.label, "folder": portable(run.folder), "checkpoint": run.checkpoint,
        "step": run.step(), "weights_sha256": key["weights"], "parameters": meta.get("parameters"),
        "model": {k: config.get(k) for k in ("model_type", "model", "bases")},
        "training": training, "trainable_parameters": meta["trainable_parameters"],
        "manifests": [{"file": portable(path), "sha256": digest} for path, digest in
                      zip(job.manifests, key["manifests"], strict=True)],
        "limit": job.limit, "decode": key["decode"], "precision": job.precision,
        "decoding": {k: meta.get(k) for k in ("seconds", "audio_seconds", "rtf", "memory_gib",
                                              "threads", "date", "versions")},
        "command": " ".join(_without_paths(sys.argv)), **_made()})


def _decode(job: Job, examples: list[Example], file: PredictionFile) -> tuple[Rows, dict[str, Any]]:
    """Decode what an interrupted evaluation left to do; every finished batch is kept at once."""
    done, seconds = file.resume()
    left = [example for example in examples if example.key not in done]
    if done:
        print(f"  {len(examples) - len(left)} examples were decoded before an interruption")
    model = load_model(job.run, job.precision)
    parameters = {name: sum(p.numel() for _, p in named)
                  for name, named in model.trainable_groups().items()}
    clock = time.perf_counter()

    def keep(rows: Rows) -> None:
        nonlocal clock, seconds
        # Writing is not part of the time of decoding, which results give.
        taken = time.perf_counter() - clock
        file.append(rows, taken)
        done.update((key_of(row), row) for row in rows)
        seconds, clock = seconds + taken, time.perf_counter()

    with torch.autocast(model.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
        predict(model, left, job.decode, progress="decode", on_predictions=keep)
    # In the order of the manifests, whatever the order of batches was.
    rows = [done[example.key] for example in examples]
    # All tasks of an utterance are decoded together, so that its audio counts once.
    audio = sum({(row["corpus"], row["id"]): row["duration"] for row in rows}.values())
    memory = (torch.cuda.max_memory_allocated() if model.device.type == "cuda" else
              psutil.Process().memory_info().rss)  # no peak, which not every system counts
    meta = {"model": portable(job.run.model), "weights": sha256(job.run.model / WEIGHTS_FILE),
            "limit": job.limit, "manifests": [portable(p) for p in job.manifests],
            "seconds": round(seconds, 3), "audio_seconds": round(audio, 3),
            "rtf": seconds / audio if audio else 0.0, "memory_gib": round(memory / 2**30, 3),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": {"total": sum(parameters.values()), **parameters},
            "threads": torch.get_num_threads(), "decoding": job.decoding(), **_made()}
    return rows, file.finish(rows, meta)


def _without_paths(value: Any) -> Any:
    """Plain data in which no string is a path of this machine."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return portable(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _made() -> dict[str, Any]:
    # Without the command line, in which paths of this machine may stand.
    kept = {key: value for key, value in versions().items() if key != "command"}
    return {"versions": kept, "date": datetime.now(UTC).isoformat(timespec="seconds")}
