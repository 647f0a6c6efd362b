"""Decode and score models: predictions into the run folder, scores into a JSON file a run, one table of all."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unislu_llm.analysis.calibration_plot import reliability_plot
from unislu_llm.analysis.options import EvalOptions
from unislu_llm.analysis.predictions import PredictionFile, row_key
from unislu_llm.analysis.runs import (
    Run,
    checkpoint_step,
    file_hash,
    find_run,
    load_model,
    portable,
    shown,
    training_versions,
)
from unislu_llm.data.audio import MAX_SECONDS
from unislu_llm.data.collate import SpeechDataset
from unislu_llm.data.long_audio import LongAudio
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.drafts import given_draft
from unislu_llm.decoding.generate import DecodeOptions, predict
from unislu_llm.decoding.probabilities import label_probabilities
from unislu_llm.errors import UserError
from unislu_llm.models.base import WEIGHTS_FILE, SLUModel
from unislu_llm.scoring.calibration import FIELD, Calibration, calibrate_rows, has_probabilities
from unislu_llm.scoring.slue import format_table, intervals, score_rows
from unislu_llm.scoring.text import PROTOCOLS
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.build import load_samples
from unislu_llm.training.config import DecodeConfig
from unislu_llm.training.plan import use_threads
from unislu_llm.training.state import versions, write_text

_NAME_LIMIT = 100  # characters of a file name that manifests' names may take


@dataclass(frozen=True)
class Job:
    """One run and what it is scored on.

    Args:
        label: name in tables, and of the score file. run: the model.
        manifests: files, scored together. stem: name of the file of their predictions.
        decode: how to decode. precision: fp32 or bf16, of the frozen weights and the computation.
        limit: samples of each manifest at most; 0 means all.
        probabilities: also give every label of single-label tasks its probability.
    """

    label: str
    run: Run
    manifests: tuple[Path, ...]
    stem: str
    decode: DecodeOptions
    precision: str
    limit: int = 0
    probabilities: bool = False

    def key(self) -> dict[str, Any]:
        """Everything that decides what the predictions are.

        Raises:
            UserError: a file cannot be read.
        """
        model = self.run.model
        return {"weights": file_hash(model / WEIGHTS_FILE), "config": file_hash(model / "config.json"),
                "manifests": [file_hash(path) for path in self.manifests], "limit": self.limit,
                "long_audio": self.long_audio, "decode": asdict(self.decode), "precision": self.precision,
                **({"probabilities": True} if self.probabilities else {})}

    @property
    def long_audio(self) -> LongAudio:
        """What becomes of rows longer than Whisper takes: as in the run's training."""
        return self.run.config.data.long_audio if self.run.config else "refuse"


def evaluate(options: EvalOptions, command: Sequence[str] = ()) -> int:
    """Score every run, write its results, and print one table a protocol over all of them.

    Args:
        options: what and how. command: command line, stored with the results.

    Returns:
        Exit status: 0, or 2 when a run could not be scored. Each such run is one message on stderr; the others have
        their results. 130 when interrupted: what was decoded until then is kept.
    """
    if not options.runs:
        print("error: no run is named; give run folders, e.g. eval/evaluate.py runs/my-run", file=sys.stderr)
        return 2
    use_threads(options.threads)
    results: dict[str, Any] = {}
    failed = 0
    try:
        for path in options.runs:
            try:
                job = make_job(path, options)
                if job.label in results:
                    raise UserError(f"another run was named '{job.label}' before; rename one, or score them by "
                                    "separate commands with --label or --out")
                results[job.label] = evaluate_run(job, options.out, command, again=options.again)["scores"]
            except UserError as error:
                failed += 1
                where = "" if str(error).startswith(str(path)) else f"{path}: "
                print(f"error: {where}{error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted; finished batches are kept, the same command goes on from there", file=sys.stderr)
        return 130
    if results:
        print(f"\n{format_table(results)}")
    if failed:
        print(f"error: {failed} of {len(options.runs)} runs could not be scored, see above", file=sys.stderr)
    return 2 if failed else 0


def make_job(path: Path, options: EvalOptions) -> Job:
    """What `options` mean for one run.

    Raises:
        UserError: no such run or checkpoint, or no manifest to score it on.
    """
    run = find_run(path, options.checkpoint)
    manifests = options.manifest or [Path(p) for p in (run.config.data.dev if run.config else [])]
    if not manifests:
        why = "its config has no data.dev" if run.config else "it is a saved model without a run's config"
        raise UserError(f"nothing to score it on: {why}; give --manifest FILE...")
    missing = [str(p) for p in manifests if not p.is_file()]
    if missing:
        of = "" if options.manifest else " of its config"
        raise UserError(f"manifest {missing[0]}{of} does not exist here; give --manifest FILE...")
    part = "+".join(p.stem for p in options.manifest)[:_NAME_LIMIT] or "dev"
    label = "-".join(filter(None, [run.label, part if options.manifest else "", options.label]))
    stem = "-".join(filter(None, [run.checkpoint, part, options.label]))
    if Path(label).name != label:
        raise UserError(f"--label {options.label}: is part of a file name and cannot hold a slash")
    decode = (run.config.decode if run.config else DecodeConfig()).settings() | options.decode.given()
    decode["force_task"] = decode["force_task"] or options.force_task
    for flag, value, least in (("decode.batch-size", decode["batch_size"], 1), ("limit", options.limit, 0),
                               ("decode.max-new-tokens", decode["max_new_tokens"], 1)):
        if value < least:
            raise UserError(f"--{flag} must be {least} or more, found {value}")
    precision = options.precision or ("bf16" if run.config and run.config.train.precision == "bf16" else "fp32")
    return Job(label, run, tuple(manifests), stem, DecodeOptions(**decode), precision, options.limit,
               options.probabilities)


def evaluate_run(job: Job, out: Path, command: Sequence[str] = (), *, again: bool = False) -> dict[str, Any]:
    """Decode (or take up predictions that exist), score, and write `<out>/<label>.json`; returns what is in it.

    Raises:
        UserError: bad manifest or audio, or a model that cannot be loaded.
    """
    run, registry = job.run, job.run.registry()
    samples = _samples(job, registry)
    key = job.key()
    file = PredictionFile(run.folder / "predictions" / f"{job.stem}.jsonl", key)
    found = None if again else file.finished()
    title = f"{job.label} ({run.checkpoint})"
    if found is None:
        if again:
            file.restart()
        print(f"{title}: {len(samples)} samples of {', '.join(p.name for p in job.manifests)}", flush=True)
        rows, meta = _decode(job, samples, file)
    else:
        rows, meta = found
        print(f"{title}: predictions of {meta['date']} reused (--again decodes anew)")
        if meta["versions"]["git"] != versions()["git"]:
            print("  they were made by another revision of the code")
    scores = score_rows(rows, registry)
    add_ctc_wer(scores, rows)
    add_draft_wer(scores, rows, samples, run.model_config().get("draft", "none"))
    result = _result(job, key, registry, rows, meta) | {"command": " ".join(map(shown, command))}
    result |= {"predictions": portable(file.path), "predictions_sha256": meta["rows_sha256"], "scores": scores,
               "intervals": {p: intervals(rows, registry, p) for p in PROTOCOLS}}
    out.mkdir(parents=True, exist_ok=True)
    if job.probabilities:
        result |= {"calibration": _calibrate(job, rows, registry, out)}
    write_text(out / f"{job.label}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"  {meta['seconds']:.1f} s for {meta['audio_seconds']:.1f} s of audio (RTF {meta['rtf']:.3f}); "
          f"predictions: {file.path}; scores: {out / job.label}.json", flush=True)
    return result


def add_ctc_wer(scores: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add `ctc_wer` to each protocol's scores: WER of the greedy CTC transcripts, where the rows have them."""
    heard = [row for row in rows if "ctc_text" in row]
    _add_wer(scores, "ctc_wer", {(row["corpus"], row["id"]): (row["ref_text"], row["ctc_text"]) for row in heard})


def add_draft_wer(scores: dict[str, Any], rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample], mode: str) -> None:
    """Add `draft_wer` to each protocol's scores: WER of the drafts in the prompt, where all are known.

    Args:
        rows: predictions; older ones do not hold what was read. samples: of the same utterances. mode: the model's `draft`.
    """
    drafts = {s.key: given_draft(s, mode) for s in samples} | {row_key(row): row["draft"] for row in rows if "draft" in row}
    said = {(s.utterance.corpus, s.utterance.id): (s.utterance.text, drafts[s.key]) for s in samples}
    known = {key: (text, draft) for key, (text, draft) in said.items() if draft is not None}
    if len(known) == len(said):  # of a part it would mislead
        _add_wer(scores, "draft_wer", known)


def _add_wer(scores: dict[str, Any], name: str, pairs: Mapping[tuple[str, str], tuple[str, str]]) -> None:
    """WER of `(reference, transcript)` by corpus and id: of all under `name`, by corpus under `<name>_by_corpus`."""
    corpora = {corpus: [pair for (of, _), pair in pairs.items() if of == corpus] for corpus, _ in pairs}
    for protocol in PROTOCOLS if pairs else ():
        overall, *each = (corpus_wer([r for r, _ in some], [h for _, h in some], protocol).wer
                          for some in (list(pairs.values()), *corpora.values()))
        by_corpus = dict(zip(corpora, each, strict=True))
        scores["protocols"][protocol] |= {name: overall, f"{name}_by_corpus": by_corpus}
        print(f"  {name} ({protocol}): {overall:.2f} ({', '.join(f'{c} {wer:.2f}' for c, wer in by_corpus.items())})")


def _samples(job: Job, registry: TaskRegistry) -> list[Sample]:
    files = [str(p) for p in job.manifests]
    samples = load_samples(files, registry, job.limit, "manifest", MAX_SECONDS, job.long_audio)
    mute = next((s.utterance for s in samples if s.utterance.audio is None), None)
    if mute is not None:
        raise UserError(f"{mute.source}: field 'audio': the row has no audio and cannot be decoded; take it out of the "
                        "manifest")
    twice = next((key for key, n in Counter(s.key for s in samples).items() if n > 1), None)
    if twice is not None:
        first, second, *_ = [s.utterance for s in samples if s.key == twice]
        raise UserError(f"{second.source}: field 'id': '{second.id}' of corpus '{second.corpus}' is also at "
                        f"{first.source}; give the manifests' rows a `corpus`, or score them one by one")
    return samples


def _decode(job: Job, samples: list[Sample], file: PredictionFile) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Decode what an interrupted evaluation left to do; every finished batch is kept at once."""
    done, seconds = file.resume()
    left = [s for s in samples if s.key not in done]
    if done:
        print(f"  {len(samples) - len(left)} samples were decoded before an interruption")
    model = load_model(job.run, job.precision)
    parameters = {name: sum(p.numel() for _, p in named) for name, named in model.trainable_groups().items()}
    wanted = {s.key: s for s in left}
    clock = time.perf_counter()

    def keep(rows: list[dict[str, Any]]) -> None:
        nonlocal clock, seconds
        taken = time.perf_counter() - clock
        if job.probabilities:  # not part of the time of decoding
            add_probabilities(model, rows, wanted, job.decode.batch_size)
        file.append(rows, taken)
        done.update((row_key(row), row) for row in rows)
        seconds, clock = seconds + taken, time.perf_counter()

    with torch.autocast(model.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
        predict(model, left, job.decode, progress="decode", on_rows=keep)
    rows = [done[s.key] for s in samples]
    audio = sum(row["duration"] for row in rows)
    meta = {"model": portable(job.run.model), "manifests": [portable(p) for p in job.manifests],
            "seconds": round(seconds, 3), "audio_seconds": round(audio, 3), "rtf": seconds / audio if audio else 0.0,
            "trainable_parameters": {"total": sum(parameters.values()), **parameters},
            "threads": torch.get_num_threads(), "date": _now(), "versions": _versions()}
    return rows, file.finish(rows, meta)


def add_probabilities(model: SLUModel, rows: Sequence[dict[str, Any]], samples: Mapping[str, Sample], batch_size: int) -> None:
    """Give prediction rows of single-label tasks the probability of every label, after the transcript that was decoded.

    Args:
        model: that decoded them, in eval mode. rows: changed in place. samples: of the rows, by key.
        batch_size: utterances times labels at one time.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["task"] in model.codec.registry.names and has_probabilities(model.codec.registry[row["task"]]):
            by_task.setdefault(row["task"], []).append(row)
    for name, some in by_task.items():
        labels = model.codec.registry[name].labels
        asked = [samples[row_key(row)] for row in some]
        waves = [wave for _, wave in SpeechDataset(asked)]  # type: ignore[attr-defined]
        found = label_probabilities(model, waves, [row["hyp_text"] for row in some], name, batch_size=batch_size,
                                    drafts=[given_draft(s, model.config.draft) for s in asked])
        for row, values in zip(some, found.tolist(), strict=True):
            row[FIELD] = {label: round(value, 6) for label, value in zip(labels, values, strict=True)}


def _calibrate(job: Job, rows: Sequence[dict[str, Any]], registry: TaskRegistry, out: Path) -> dict[str, Any]:
    """Calibration by task as plain data, and its plot beside the scores."""
    found: dict[str, Calibration] = calibrate_rows(rows, registry)
    if not found:
        print("  no calibration: no sample is annotated for a task with one label an utterance")
        return {}
    for name, c in found.items():
        print(f"  calibration of {name}: ECE {c.ece:.3f} (adaptive {c.ece_adaptive:.3f}), Brier {c.brier:.3f}, NLL {c.nll:.3f}; "
              f"accuracy {c.accuracy:.3f} at mean confidence {c.confidence:.3f}, {c.n} utterances")
    picture = out / f"{job.label}-calibration.svg"
    try:
        reliability_plot(found, picture, job.label)
    except UserError as error:
        print(f"  reliability plot not drawn: {error}", file=sys.stderr)
    else:
        print(f"  reliability plot: {picture}")
    return {name: scores.to_dict() for name, scores in found.items()}


def _result(job: Job, key: dict[str, Any], registry: TaskRegistry, rows: list[dict[str, Any]],
            meta: dict[str, Any]) -> dict[str, Any]:
    config = {k: shown(v) if isinstance(v, str) else v for k, v in job.run.model_config().items()
              if k not in ("tasks", "transformers_version")}
    manifests = [{"file": portable(p), "sha256": digest}
                 for p, digest in zip(job.manifests, key["manifests"], strict=True)]
    trained = {key: value for key, value in training_versions(job.run).items() if key in ("git", "packages")}
    seed = {} if job.run.config is None else {"seed": job.run.config.train.seed}
    return {
        "run": job.label, "folder": portable(job.run.folder), "checkpoint": job.run.checkpoint,
        "step": checkpoint_step(job.run), "weights_sha256": key["weights"], "model": config,
        "training": seed | trained, "trainable_parameters": meta["trainable_parameters"], "tasks": list(registry.names),
        "manifests": manifests, "limit": job.limit, "samples": dict(Counter(row["task"] for row in rows)),
        "decode": key["decode"], "precision": job.precision,
        "decoding": {k: meta[k] for k in ("seconds", "audio_seconds", "rtf", "threads", "date", "versions")},
        "versions": _versions(), "date": _now(),
    }


def _versions() -> dict[str, Any]:
    """Versions without the command line, which may hold paths of this machine."""
    return {key: value for key, value in versions().items() if key != "command"}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
