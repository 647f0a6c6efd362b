"""Batched decoding beside decoding one by one, token for token, on clips of very unequal lengths."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.analysis.benchmark_options import CheckBatching
from unislu_llm.analysis.runs import file_hash, find_run, load_model
from unislu_llm.data.collate import SpeechDataset
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.batch import decode_encoded, encode_waves
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, NO_PART
from unislu_llm.models.base import WEIGHTS_FILE, SLUModel
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.build import load_samples
from unislu_llm.training.state import append_json
from unislu_llm.utterance import Utterance

SHORTEST, LONGEST = 0.2, 30.0
"""Seconds."""
TIE = 1e-3
"""Nats: two tokens (or beams) closer than this are a tie, which the rounding of fp32 may decide either way."""


@dataclass(frozen=True)
class Setting:
    """One way to decode all clips: beams, utterances at one time, and in which order they are dealt to batches."""

    beams: int
    batch_size: int
    order: str

    def __str__(self) -> str:
        search = "greedy" if self.beams == 1 else f"beam {self.beams}"
        return f"{search}, batch {self.batch_size}" + (f", {self.order}" if self.batch_size > 1 else "")


def check_batching(options: CheckBatching) -> dict[str, Any]:
    """Clips whose answer differs from that of batch size 1, for every model and setting.

    Raises:
        UserError: no model is named, or a model, manifest or audio file cannot be read.
    """
    if not options.model:
        raise UserError("no model is named; give --model with run folders, e.g. --model runs/my-run")
    runs = [find_run(path) for path in options.model]
    waves = unequal_clips(options.manifest, options.clips, options.seed)
    keys = {run.label: file_hash(run.model / WEIGHTS_FILE) for run in runs}
    kept = _Kept(options, keys)
    models = {}
    for run in runs:
        torch.manual_seed(options.seed)
        models[run.label] = _check_model(run.label, load_model(run), waves, options, kept) | {"weights_sha256": keys[run.label]}
    found = [setting for model in models.values() for setting in model["settings"].values()]
    kept.path.unlink(missing_ok=True)
    lengths = sorted(len(w) / 16_000 for w in waves)
    return {"promise": f"batched answers are those of batch size 1, ties of less than {TIE} nats apart",
            "holds": all(s["beyond_ties"] == 0 for s in found), "clips": len(waves), "seed": options.seed, "precision": "fp32",
            "seconds_of_audio": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1],
                                 "all": round(sum(lengths), 1)},
            "max_new_tokens": options.max_new_tokens, "differing_clips": sum(s["differing"] for s in found), "models": models}


def unequal_clips(manifests: Sequence[Path], count: int, seed: int = 0) -> list[Tensor]:
    """`count` waves `(S,)` of 0.2 to 30 s at 16 kHz, log-uniform, the shortest and longest among them.

    Each is speech of the manifests' clips, joined from a random clip on and cut: real audio of every length.

    Raises:
        UserError: a manifest or audio file cannot be read.
    """
    samples = load_samples([str(p) for p in manifests], TaskRegistry(), 0, "manifest")
    clips = SpeechDataset(list({s.utterance.id: s for s in samples}.values()))
    rng = random.Random(seed)
    lengths = [SHORTEST, LONGEST] + [math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))) for _ in range(count - 2)]
    waves = []
    for i, seconds in enumerate(lengths[:count]):
        size, at = int(seconds * 16_000), rng.randrange(len(clips)) if i >= len(clips) else i
        joined = clips[at][1]
        while len(joined) < size:
            at = (at + 1) % len(clips)
            joined = torch.cat([joined, clips[at][1]])
        start = rng.randrange(len(joined) - size + 1)
        waves.append(joined[start:start + size])
    return waves


def plan(lengths: Sequence[int], setting: Setting, seed: int) -> list[list[int]]:
    """Batches of clips: of similar length, as :func:`predict` makes them, or in a random order (most padding)."""
    indices = list(range(len(lengths)))
    if setting.order == "random":
        random.Random(seed).shuffle(indices)
    else:
        indices.sort(key=lambda i: -lengths[i])
    return [indices[i:i + setting.batch_size] for i in range(0, len(indices), setting.batch_size)]


class _Kept:
    """Answers of finished batches in a file, so that an interrupted check goes on where it stopped."""

    def __init__(self, options: CheckBatching, weights: dict[str, str]) -> None:
        self.path = options.out.with_suffix(".partial.jsonl")
        of_answers = {name: getattr(options, name) for name in ("clips", "seed", "manifest", "max_new_tokens")}
        key = json.loads(json.dumps({"weights": weights, **of_answers}, default=str))
        self.rows: dict[tuple[str, str, int], list[int]] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        try:
            rows = [json.loads(line) for line in lines]
        except ValueError:  # cut in the middle of a line
            rows = []
        if rows and rows[0] == key:
            self.rows = {(row["model"], row["setting"], i): ids for row in rows[1:]
                         for i, ids in zip(row["clips"], row["ids"], strict=True)}
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(key) + "\n", encoding="utf-8")

    def add(self, model: str, setting: str, clips: list[int], ids: list[list[int]]) -> None:
        append_json(self.path, {"model": model, "setting": setting, "clips": clips, "ids": ids})
        self.rows |= {(model, setting, i): answer for i, answer in zip(clips, ids, strict=True)}

    def answers(self, model: str, setting: Setting, count: int) -> list[list[int]]:
        """Answers of all clips in a setting, in their order."""
        return [self.rows[model, str(setting), i] for i in range(count)]


def _check_model(label: str, model: SLUModel, waves: list[Tensor], options: CheckBatching, kept: _Kept) -> dict[str, Any]:
    batches = [(1, "sorted"), *((size, order) for size in options.batch_sizes for order in options.orders)]
    seconds: dict[str, float] = {}
    for size, order in batches:
        seconds |= _decode(label, model, waves, [Setting(beams, size, order) for beams in options.beams], options, kept)
    results: dict[str, Any] = {}
    for beams in options.beams:
        serial = Setting(beams, 1, "sorted")
        reference = kept.answers(label, serial, len(waves))
        results[str(serial)] = {"differing": 0, "beyond_ties": 0, "seconds": round(seconds[str(serial)], 1),
                                "tokens": sum(map(len, reference)), "differences": []}
        for size, order in batches[1:]:
            setting = Setting(beams, size, order)
            found = list(_differences(model, waves, reference, kept.answers(label, setting, len(waves)), beams))
            beyond = sum(not d["tie"] for d in found)
            results[str(setting)] = {"differing": len(found), "beyond_ties": beyond, "seconds": round(seconds[str(setting)], 1),
                                     "differences": found}
            print(f"{label}: {setting}: {len(found)} of {len(waves)} clips differ, {beyond} beyond ties", flush=True)
    return {"settings": results}


def _decode(label: str, model: SLUModel, waves: list[Tensor], settings: Sequence[Setting], options: CheckBatching,
            kept: _Kept) -> dict[str, float]:
    """Decode all clips in each setting, which differ by their beams alone and share the encoder; seconds of decoding each."""
    collator = model.collator()
    name, start = str(settings[0]), time.perf_counter()
    batches = plan([len(w) for w in waves], settings[0], options.seed)
    seconds, told = {str(s): 0.0 for s in settings}, start
    for n, batch in enumerate(batches):
        left = [s for s in settings if not all((label, str(s), i) in kept.rows for i in batch)]
        encoded = encode_waves(model, [waves[i] for i in batch], collator) if left else None
        for setting in left:
            how, began = DecodeOptions(max_new_tokens=options.max_new_tokens, num_beams=setting.beams), time.perf_counter()
            durations = [len(waves[i]) / 16_000 for i in batch]
            answers = decode_encoded(model, encoded, durations, [None] * len(batch), how)  # type: ignore[arg-type]
            kept.add(label, str(setting), batch, [best[0] for best in answers])
            seconds[str(setting)] += time.perf_counter() - began
        if time.perf_counter() - told > 30:
            told = time.perf_counter()
            print(f"  {label}: {name}: {n + 1} of {len(batches)} batches, {told - start:.0f} s", flush=True)
    return seconds


def _differences(model: SLUModel, waves: Sequence[Tensor], reference: Sequence[list[int]],
                 answers: Sequence[list[int]], beams: int) -> Iterator[dict[str, Any]]:
    """Each clip whose answers differ, and by how little its two answers could be told apart.

    A greedy answer is excused by a tie of the two tokens alone; one of beam search by a tie of the answers' scores too.
    """
    for i, (one, other) in enumerate(zip(reference, answers, strict=True)):
        if one == other:
            continue
        at = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        margin, gap = _margins(model, waves[i], one, other, at)
        tie = at is not None and (abs(margin) < TIE or (beams > 1 and abs(gap) < TIE))
        first, second = ((one[at], other[at]) if at is not None else (None, None))
        yield {"clip": i, "seconds": round(len(waves[i]) / 16_000, 3), "position": at, "serial": first, "batched": second,
               "margin": margin, "score_gap": gap, "tie": tie}


@torch.no_grad()
def _margins(model: SLUModel, wave: Tensor, one: list[int], other: list[int], at: int | None) -> tuple[float, float]:
    """Nats between the two tokens at the first difference, and between the answers' scores (mean over tokens).

    Both are of the same forward pass of one clip, fed with each answer: up to the difference they see the same context.
    """
    blank = Sample(Utterance("", None, "", {}), None)
    batch = model.collator()([(blank, wave)]).to(model.device)
    ids = pad_sequence([torch.tensor(a) for a in (one, other)], batch_first=True, padding_value=model.codec.pad_id)
    parts = torch.full_like(ids, NO_PART)
    for row, answer in enumerate((one, other)):
        parts[row, :len(answer)] = ASR_PART
    losses = model(batch.mel.expand(2, -1, -1), batch.mel_lengths.expand(2), ids.to(model.device), parts.to(model.device))
    scores = [float(losses[row].sum()) / len(answer) for row, answer in enumerate((one, other))]
    margin = float(losses[1, at] - losses[0, at]) if at is not None else math.inf
    return margin, scores[1] - scores[0]
