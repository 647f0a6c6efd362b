"""What a run minimises, what it logs of a step, and how a validation is scored."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unislu_llm.config import Config
from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.frame_cache import FrameCache
from unislu_llm.data.loading import check_hypotheses
from unislu_llm.data.manifest import manifest_name
from unislu_llm.data.sampler import sorted_batches
from unislu_llm.data.text_injection import SimulationRates
from unislu_llm.decoding.hypotheses import load_recogniser, with_hypotheses
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.predict import predict
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, TASK_PART, TokenCounts, asr_share, weighted_loss
from unislu_llm.models.base import SLUModel
from unislu_llm.models.saved import Description
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.scoring.predictions import check_predictions
from unislu_llm.scoring.score import flat_scores, score_predictions
from unislu_llm.scoring.wer import WER, corpus_wer, edits, rate_of
from unislu_llm.setting_types import Transcript
from unislu_llm.tasks import ASR, TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.training.diagnostics import validation_warnings

log = logging.getLogger(__name__)

Sums = Mapping[str, float]
Predictions = list[dict[str, Any]]

_FIT_CLIPS = 400  # of dev, on which rates of text injection are fitted at most


@dataclass(frozen=True)
class Validation:
    """A scored validation."""

    scores: dict[str, float]  # headline numbers; the highest `score` makes the best checkpoint
    report: dict[str, Any]  # all of them, as plain data
    what: str  # the scores are of, for the terminal
    warnings: Sequence[str] = ()  # what has gone wrong


class Objective(ABC):
    """All that the one trainer knows of an objective; raises UserError: it cannot train the model.

    The loss of a step is a sum over its global batch, divided by numbers that the host knows
    (:meth:`counts`): so accumulation and distribution change nothing.
    """

    # Of the sums that `loss` gives, the loss first. They stay on the device until they are logged,
    # because reading a number there makes the host wait for all work before it.
    sum_names: tuple[str, ...] = ("loss",)
    caches_dev = False  # whether :meth:`decode` wants the frames of dev clips from the cache

    def __init__(self, config: Config, registry: TaskRegistry) -> None:
        self.config, self.registry = config, registry

    def examples(self, loaded: Sequence[Example], *, training: bool) -> list[Example]:
        """The examples that it trains on, or is measured on."""
        return list(loaded)

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """Numbers of a batch on the CPU, always under the same names; `tokens` is one."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, total: Sums) -> tuple[Tensor, Tensor]:
        """A micro-batch's term of the loss, given the `total` :meth:`counts`, and its sums."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """What the log says of steps beside their loss, from their counts and sums added up."""
        return {}

    def prepare(self, model: SLUModel, dev: Sequence[Example], progress: str) -> list[Example]:
        """What is done to dev examples once, before the first validation."""
        return list(dev)

    @abstractmethod
    def decode(self, model: SLUModel, dev: Sequence[Example], cache: FrameCache | None,
               progress: str) -> Predictions:
        """Predictions for dev examples, in their order."""

    @abstractmethod
    def score(self, predictions: Predictions, before: Sequence[Sums]) -> Validation:
        """A validation, from all its predictions and the scores of those before."""

    def finish(self, model: SLUModel, best: Path, folders: Sequence[Path], scores: Sums,
               dev: Sequence[Example], cache: FrameCache | None) -> str:
        """At the end, add to the saved models in `folders` what the validation of the `best` says:
        `scores`; returns what to tell of it."""
        return ""


class UnifiedObjective(Objective):
    """The paper's targets and loss: transcript and task outputs in one sequence."""

    def __init__(self, config: Config, registry: TaskRegistry) -> None:
        super().__init__(config, registry)
        self.sum_names = ("loss", "asr", "task", *(f"sum_{t}" for t in registry.names))

    def examples(self, loaded: Sequence[Example], *, training: bool) -> list[Example]:
        return check_hypotheses(loaded, self.config.model) if training else list(loaded)

    def counts(self, batch: Batch) -> dict[str, float]:
        asr = (batch.target_parts == ASR_PART).sum(1).tolist()
        task = (batch.target_parts == TASK_PART).sum(1).tolist()
        # The transcript's share is that of the dynamic loss, in samples that have both parts.
        shares = [asr_share(a, t) for a, t in zip(asr, task, strict=True) if t]
        by_task = {f"n_{name}": sum(n for n, example in zip(task, batch.examples, strict=True)
                                    if example.task == name) for name in self.registry.names}
        return {"tokens": sum(asr) + sum(task), "n_asr": sum(asr), "n_task": sum(task),
                "w_asr": sum(shares), "tasked": len(shares), **by_task}

    def loss(self, model: nn.Module, batch: Batch, total: Sums) -> tuple[Tensor, Tensor]:
        losses = model(batch)
        counts = TokenCounts(total["n_asr"], total["n_task"])
        loss = weighted_loss(losses, batch.target_parts, self.config.train.loss, counts)
        with torch.no_grad():
            asr = losses.masked_fill(batch.target_parts != ASR_PART, 0.0).sum()
            task = losses.masked_fill(batch.target_parts != TASK_PART, 0.0).sum(1)
            # A product with a mask made on the CPU: choosing rows on the device would wait for it.
            of_task = torch.tensor([[float(e.task == name) for e in batch.examples]
                                    for name in self.registry.names]).view(-1, len(batch))
            by_task = of_task.to(task.device, non_blocking=True) @ task
            return loss, torch.cat([torch.stack([loss.detach(), asr, task.sum()]), by_task])

    def metrics(self, sums: Sums) -> dict[str, float]:
        found = {"loss_asr": sums["asr"] / max(sums["n_asr"], 1)}
        if sums["n_task"]:
            share = sums["w_asr"] / sums["tasked"]
            found |= {"loss_task": sums["task"] / sums["n_task"], "w_asr": share,
                      "w_task": 1.0 - share}
        return found | {f"loss_{name}": sums[f"sum_{name}"] / sums[f"n_{name}"]
                        for name in self.registry.names if sums[f"n_{name}"]}

    def prepare(self, model: SLUModel, dev: Sequence[Example], progress: str) -> list[Example]:
        # The recogniser runs once. A `ctc` projector that trains has other hypotheses every time.
        if not model.reads_hypothesis or model.config.recogniser == "ctc":
            return list(dev)
        found = with_hypotheses(model, [e.utterance for e in dev], progress, phrases=Phrases.of(
            self.config.decode.phrases, self.config.decode.phrase_boost))
        load_recogniser.cache_clear()  # its weights are not needed any more
        return [Example(utterance, e.task) for utterance, e in zip(found, dev, strict=True)]

    def decode(self, model: SLUModel, dev: Sequence[Example], cache: FrameCache | None,
               progress: str) -> Predictions:
        return predict(model, dev, self.config.decode, progress=progress)

    def finish(self, model: SLUModel, best: Path, folders: Sequence[Path], scores: Sums,
               dev: Sequence[Example], cache: FrameCache | None) -> str:
        # What a model may do to a hypothesis is measured on dev data: there it is rewritten.
        rate = "wer" if "wer" in scores else "cer"
        given = scores.get(f"hypothesis_{rate}", scores.get(f"ctc_{rate}"))
        model_config = self.config.model
        if (given is None or model_config.transcript != "auto"
                or model_config.hypothesis == "reference"):  # an upper bound is no choice
            return ""
        way: Transcript = "rewrite" if scores[rate] < given else "verbatim"
        for folder in folders:
            saved = Description.read(folder)
            saved.model.transcript = way
            saved.write(folder)
        return (f"model.transcript {way}: {rate.upper()} on dev of the hypotheses {given:.1f} %, "
                f"of the model, which rewrites them, {scores[rate]:.1f} %"
                + "; `unislu evaluate` scores it verbatim" * (way == "verbatim"))

    def score(self, predictions: Predictions, before: Sequence[Sums]) -> Validation:
        report = score_predictions(predictions, self.registry)
        scores = flat_scores(report)
        return Validation(scores, report, "protocol whisper", validation_warnings(
            [*before, scores], predictions, self.registry))


class CTCObjective(Objective):
    """Transcripts by CTC: the projector `ctc`, and what trains in the encoder, without the LLM.

    A transcript with more tokens than its frames hold counts with a loss of zero. `score` is the
    word accuracy of the greedy text.
    """

    caches_dev = True

    def __init__(self, config: Config, registry: TaskRegistry) -> None:
        super().__init__(config, registry)
        model = config.model
        if model.projector != "ctc":
            raise UserError("train.objective ctc trains the projector 'ctc' of an LLM; set "
                            "model.projector ctc")

    def examples(self, loaded: Sequence[Example], *, training: bool) -> list[Example]:
        # Each clip once, however many tasks it is annotated for.
        spoken = {(e.utterance.where, e.utterance.corpus, e.utterance.id): e.utterance
                  for e in loaded if e.utterance.audio is not None}
        if not spoken:
            raise UserError("train.objective ctc learns from speech alone, and no row has audio")
        return [Example(utterance, None) for utterance in spoken.values()]

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"tokens": sum(map(len, batch.ctc_targets)) if batch.counted else 0}

    def loss(self, model: nn.Module, batch: Batch, total: Sums) -> tuple[Tensor, Tensor]:
        losses = model(batch, objective="ctc")
        loss = losses.sum() / max(total["tokens"], 1) * float(batch.counted)
        return loss, loss.detach()[None]

    def decode(self, model: SLUModel, dev: Sequence[Example], cache: FrameCache | None,
               progress: str) -> Predictions:
        assert isinstance(model, SpeechLLM)
        texts = [""] * len(dev)
        for places, batch in self._batches(model, dev, cache, progress):
            for place, ids in zip(places, model.ctc_transcripts(batch), strict=True):
                texts[place] = model.tokenizer.decode(ids)
        return [{"id": e.utterance.id, "corpus": e.utterance.corpus, "task": ASR,
                 "ref_text": e.utterance.text, "hyp_text": text,
                 "language": e.utterance.language or model.config.language}
                for e, text in zip(dev, texts, strict=True)]

    def _batches(self, model: SLUModel, examples: Sequence[Example], cache: FrameCache | None,
                 progress: str) -> Iterator[tuple[list[int], Batch]]:
        dataset, collate = SpeechDataset(examples, frame_cache=cache), model.collator()
        groups = sorted_batches(examples, self.config.decode.batch_size)
        model.eval()
        for places in tqdm(groups, desc=progress, disable=not progress, unit="batch", leave=False):
            yield places, collate([dataset[place, 0] for place in places]).to(model.device)

    def score(self, predictions: Predictions, before: Sequence[Sums]) -> Validation:
        refs, hyps, codes = ([p[key] for p in predictions]
                             for key in ("ref_text", "hyp_text", "language"))
        found = corpus_wer(refs, hyps, "whisper", codes)
        return Validation({rate_of(codes): found.wer, "score": 100.0 - found.wer},
                          {"n_predictions": len(refs), "wer": found._asdict()},
                          "greedy CTC text")

    def finish(self, model: SLUModel, best: Path, folders: Sequence[Path], scores: Sums,
               dev: Sequence[Example], cache: FrameCache | None) -> str:
        # Rates of text injection, on clips that the projector did not train on: on those that it
        # did it is surer than on any text.
        if not dev:
            return ""
        assert isinstance(model, SpeechLLM)
        model.load_trained(best)
        chosen = dev[::max(1, len(dev) // _FIT_CLIPS)]
        references: list[Sequence[int]] = []
        posteriors: list[Tensor] = []
        for _, batch in self._batches(model, chosen, cache, ""):
            references += batch.ctc_targets
            posteriors += [row.float().cpu() for row in model.ctc_posteriors(batch)]
        try:
            rates = SimulationRates.fit(references, posteriors)
        except ValueError as error:
            log.warning("no rates of text injection were fitted: %s", error)
            return ""
        for folder in folders:
            rates.save(folder)
        return ""


def guard_scores(predictions: Predictions, guard: Sequence[Example]) -> dict[str, float]:
    """WER of the guard set from its predictions, and of each manifest where there are several."""
    groups = {"guard_wer": check_predictions(predictions, TaskRegistry([]))}
    for p, e in zip(groups["guard_wer"], guard, strict=True):
        name = manifest_name(e.utterance.source.rpartition(":")[0])
        groups.setdefault(f"guard_wer_{name}", []).append(p)
    return {key: WER.of(edits(some, "whisper")).wer for key, some in groups.items()
            if some and (key == "guard_wer" or len(groups) > 2)}


OBJECTIVES: dict[str, type[Objective]] = {"unified": UnifiedObjective, "ctc": CTCObjective}
