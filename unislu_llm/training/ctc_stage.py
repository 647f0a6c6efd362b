"""Stage `ctc`: train the CTC projector alone, over encoder frames, without running the LLM.

Only the LLM's embedding matrix is needed, so a step costs a small fraction of one of the LLM's. One process; nothing here keeps
state outside of projector, optimizer and schedule, so that Accelerate can prepare those three.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from unislu_llm.data.batching import BatchPlan
from unislu_llm.errors import UserError
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.models.ctc_loss import ctc_loss
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.training.optim import factor
from unislu_llm.training.state import CTC_LAST, append_json

LAST, BEST, LOG = CTC_LAST, "ctc_best.pt", "ctc_log.jsonl"


class Indexable(Protocol):
    """Frames by number: a list, a memory map, a cache behind a list of utterances."""

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class CtcData:
    """Clips to train or measure on.

    Args:
        frames: clip i is `(T_enc, D)` at 50 Hz, natural length. lengths: T_enc of each.
        targets: classes of the projector's vocabulary, see `CtcVocabulary.classes`. texts: transcripts, to measure on.
    """

    frames: Indexable
    lengths: Sequence[int]
    targets: Sequence[Sequence[int]]
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class CtcOptions:
    """Settings of the stage.

    Args:
        epochs: passes over the data. batch_size: clips a step. bucket: batches in whose pool clips are sorted by length.
        lr, weight_decay, warmup_steps, max_grad_norm: of AdamW with warm-up and cosine decay.
        samples: tokens beside the batch's own in the softmax.
        time_masks, time_width: stretches of frames (50 Hz) zeroed per 5 s of a clip, and their greatest length.
        feature_masks, feature_width: stretches of features zeroed, and their greatest share of the features.
        precision: fp32, or bf16 for the layers (the loss is fp32 always). seed: of everything drawn.
        max_steps: stop after so many steps; 0 stops by epochs alone.
    """

    epochs: int = 10
    batch_size: int = 16
    bucket: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    max_grad_norm: float = 5.0
    samples: int = 700
    time_masks: int = 0
    time_width: int = 20
    feature_masks: int = 0
    feature_width: float = 0.1
    precision: str = "fp32"
    seed: int = 0
    max_steps: int = 0


def train_ctc(projector: CTCProjector, train: CtcData, dev: CtcData | None, decode: Callable[[list[int]], str],
              folder: str | Path, options: CtcOptions | None = None) -> list[dict[str, Any]]:
    """Train `projector` by CTC; it ends with the weights of the best epoch by dev WER (without dev: the last).

    After each epoch `folder` has `ctc_last.pt` (to go on from; a call with the same folder does), `ctc_best.pt` and one more
    line of `ctc_log.jsonl`. An interrupted run that goes on ends with the weights of one that was not.

    Args:
        projector: attached to embeddings and vocabulary. decode: token ids to text, such as `TextCodec.decode`.

    Returns:
        a row an epoch: steps, loss a token, infeasible targets, dev WER in percent, seconds.

    Raises:
        UserError: the folder belongs to a run with other options or vocabulary, or the loss is not finite.
    """
    options = options or CtcOptions()
    run = _Run(projector, train, options, Path(folder))
    run.resume()
    for epoch in range(len(run.history), run.epochs):
        started = time.perf_counter()
        row = {"epoch": epoch + 1, **run.epoch(epoch)}
        row["seconds"] = time.perf_counter() - started
        if dev is not None:
            row |= evaluate_ctc(projector, dev, decode, options)
        run.finish(row)
    if (run.folder / BEST).exists():
        projector.load_state_dict(torch.load(run.folder / BEST, map_location="cpu", weights_only=True)["projector"])
    return run.history


class _Run:
    def __init__(self, projector: CTCProjector, train: CtcData, options: CtcOptions, folder: Path) -> None:
        self.projector, self.train, self.options, self.folder = projector, train, options, folder
        self.plan = BatchPlan(list(train.lengths), min(options.batch_size, len(train)), seed=options.seed, bucket=options.bucket)
        decayed = [p for p in projector.parameters() if p.ndim > 1]
        plain = [p for p in projector.parameters() if p.ndim <= 1]
        self.optimizer = AdamW([{"params": decayed, "weight_decay": options.weight_decay},
                                {"params": plain, "weight_decay": 0.0}], lr=options.lr, betas=(0.9, 0.98))
        total = options.epochs * len(self.plan)
        if options.max_steps:
            total = min(total, options.max_steps)
        self.total, self.epochs = total, -(-total // len(self.plan))
        self.schedule = LambdaLR(self.optimizer, partial(factor, kind="cosine", warmup=min(options.warmup_steps, total // 4) or 1,
                                                         total=total))
        self.history: list[dict[str, Any]] = []

    def resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / LAST).exists():
            return
        state = torch.load(self.folder / LAST, map_location="cpu", weights_only=True)
        same = CtcOptions(**state["options"]) == self.options
        if not same or state["token_ids"] != self.projector.token_ids.tolist():
            raise UserError(f"{self.folder / LAST} is of a run with other options or another vocabulary; give another folder")
        self.projector.load_state_dict(state["projector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]

    def epoch(self, epoch: int) -> dict[str, float]:
        options, projector = self.options, self.projector
        torch.manual_seed(options.seed * 1_000_003 + epoch)  # dropout of an epoch does not depend on the epochs before
        draw = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        projector.train()
        total = tokens = infeasible = 0.0
        steps = self.plan.epoch(epoch)[:self.total - epoch * len(self.plan)]
        bar = tqdm(steps, desc=f"ctc epoch {epoch + 1}/{options.epochs}", unit="step")
        for indices in bar:
            frames, lengths = _batch(self.train, indices, projector)
            frames = mask_frames(frames, lengths, options, draw)
            targets = [self.train.targets[i] for i in indices]
            with _autocast(projector, options):
                states, out = projector.encode(frames, lengths)
            result = ctc_loss(states.float(), out, targets, projector.logits, len(projector.token_ids), options.samples, draw)
            n = sum(map(len, targets))
            loss = result.losses.sum() / max(n, 1)
            if not math.isfinite(float(loss.detach())):
                raise UserError(f"CTC loss is {float(loss.detach())} in epoch {epoch + 1}; lower lr ({options.lr:g})")
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in projector.parameters() if p.grad is not None], options.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            total, tokens, infeasible = total + float(loss.detach()) * n, tokens + n, infeasible + result.infeasible
            bar.set_postfix(loss=f"{total / max(tokens, 1):.3f}", refresh=False)
        return {"steps": len(steps), "loss": total / max(tokens, 1), "infeasible": infeasible}

    def finish(self, row: dict[str, Any]) -> None:
        """Log an epoch and write where the run stands, each file whole or not at all."""
        best = min((r.get("wer", math.inf) for r in self.history), default=math.inf)
        self.history.append(row)
        weights = {"projector": self.projector.state_dict(), "token_ids": self.projector.token_ids.tolist()}
        if row.get("wer", -math.inf) < best:
            _save(weights | {"row": row}, self.folder / BEST)
        _save(weights | {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                         "history": self.history, "options": asdict(self.options)}, self.folder / LAST)
        append_json(self.folder / LOG, row)


@torch.no_grad()
def evaluate_ctc(projector: CTCProjector, data: CtcData, decode: Callable[[list[int]], str],
                 options: CtcOptions | None = None) -> dict[str, float]:
    """WER in percent of the greedy CTC transcript (Whisper's normaliser) and the share of frames that blank drops."""
    options = options or CtcOptions()
    projector.eval()
    order = sorted(range(len(data)), key=lambda i: data.lengths[i])
    texts = [""] * len(data)
    kept = total = 0
    for start in range(0, len(order), options.batch_size):
        indices = order[start:start + options.batch_size]
        frames, lengths = _batch(data, indices, projector)
        with _autocast(projector, options):
            states, out = projector.encode(frames, lengths)
        for i, ids, frames_kept in zip(indices, *projector.greedy(states, out), strict=True):
            texts[i] = decode(ids)
            kept += frames_kept
        total += int(out.sum())
    score = corpus_wer(list(data.texts), texts, "whisper")
    words = max(score.ref_words, 1)
    return {"wer": score.wer, "substitutions": 100 * score.substitutions / words, "deletions": 100 * score.deletions / words,
            "insertions": 100 * score.insertions / words, "kept": kept / max(total, 1)}


def mask_frames(frames: Tensor, lengths: Tensor, options: CtcOptions, draw: torch.Generator) -> Tensor:
    """SpecAugment's masks (arXiv 1904.08779) on frames `(batch, T_enc, D)`: stretches of time and of features become zero."""
    if not (options.time_masks or options.feature_masks):
        return frames
    keep = torch.ones(frames.shape, dtype=torch.bool)
    for i, n in enumerate(lengths.tolist()):
        for start, width in _stretches(options.time_masks * max(1, round(n / 250)), n, options.time_width, draw):
            keep[i, start:start + width] = False
        size = frames.shape[-1]
        for start, width in _stretches(options.feature_masks, size, max(1, int(options.feature_width * size)), draw):
            keep[i, :, start:start + width] = False
    return frames * keep.to(frames.device)


def _stretches(count: int, size: int, width: int, draw: torch.Generator) -> Iterator[tuple[int, int]]:
    for _ in range(count):
        wide = int(torch.randint(0, width + 1, (), generator=draw))
        yield int(torch.randint(0, max(1, size - wide + 1), (), generator=draw)), wide


def _batch(data: CtcData, indices: Sequence[int], projector: CTCProjector) -> tuple[Tensor, Tensor]:
    frames = [data.frames[i].float() for i in indices]
    device = projector.blank.device
    return pad_sequence(frames, batch_first=True).to(device), torch.tensor([len(f) for f in frames], device=device)


def _autocast(projector: CTCProjector, options: CtcOptions) -> Any:
    return torch.autocast(projector.blank.device.type, torch.bfloat16, enabled=options.precision == "bf16")


def _save(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(path)
