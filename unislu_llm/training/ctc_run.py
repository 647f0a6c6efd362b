"""A run with `train.objective: ctc`: data, frames, training by :func:`train_ctc`, and saved models. See docs/ctc.md."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unislu_llm.data.audio import ENCODER_RATE, MAX_SECONDS
from unislu_llm.data.batching import seconds
from unislu_llm.data.cache import FrameCache
from unislu_llm.data.simulate import fit_simulation
from unislu_llm.data.targets import Sample
from unislu_llm.data.text_rows import save_simulation
from unislu_llm.errors import UserError
from unislu_llm.models.ctc import CTCProjector, CtcVocabulary
from unislu_llm.models.frames import build as build_frames
from unislu_llm.models.frames import open_cache
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.training import state
from unislu_llm.training.build import build_cache, build_model, build_registry, load_samples
from unislu_llm.training.config import Config
from unislu_llm.training.ctc_stage import LAST, CtcData, CtcOptions, train_ctc
from unislu_llm.training.plan import use_threads
from unislu_llm.utterance import Utterance

log = logging.getLogger(__name__)

_FIT_CLIPS = 400  # dev clips that a simulation is fitted on at most


class _Frames:
    """Frames of utterances by number, out of a cache."""

    def __init__(self, cache: FrameCache, utterances: Sequence[Utterance]) -> None:
        self.cache, self.utterances = cache, utterances

    def __getitem__(self, index: int) -> Tensor:
        frames = self.cache.get(self.utterances[index])
        if frames is None:
            raise UserError(f"{self.utterances[index].source}: the frame cache {self.cache.folder} lost its frames; run it again")
        return frames


def run_ctc(kind: str, config: Config, name: str = "run") -> Path:
    """Train the `ctc` projector of a run alone; its folder then has the models `best` and `last` and `finished.json`.

    One process trains; the others return when it has finished.

    Args:
        kind: speech_llm. config: with `train.objective` ctc. name: start of the default run folder's name.

    Raises:
        UserError: another kind of model, an encoder that trains, augmentation, no speech to train on; and as :func:`train_ctc`.
    """
    if kind != "speech_llm" or config.model.projector != "ctc":
        raise UserError("train.objective ctc trains the projector 'ctc' of an LLM; set model.projector ctc")
    if config.model.encoder_mode != "frozen" or config.augment.active:
        raise UserError("train.objective ctc goes by the frames of a frozen encoder, computed once: set model.encoder_mode "
                        "frozen and switch the augment section off in this stage (it has masks of its own, train.ctc)")
    process = state.processes()
    if process.is_main_process:
        return _Stage(config, name, process.device).train()
    if not config.output:
        raise UserError("train.objective ctc in several processes needs --output, by which the others find the run")
    while not state.is_finished(Path(config.output)):  # a barrier would time out
        time.sleep(1)
    return Path(config.output)


class _Stage:
    def __init__(self, config: Config, name: str, device: torch.device) -> None:
        self.config = config
        use_threads(config.train.threads)
        registry = build_registry(config)
        data = config.data
        train = load_samples(data.train, registry, max_seconds=data.max_seconds, long_audio=data.long_audio)
        dev = load_samples(data.dev, registry, data.dev_limit, "data.dev", MAX_SECONDS, data.long_audio) if data.dev else []
        self.train_clips, self.dev_clips = _clips(train), _clips(dev)
        if not self.train_clips:
            raise UserError("data.train: no row has audio, and CTC learns from speech alone")
        model = build_model("speech_llm", config, registry, (s.utterance.text for s in train))
        assert isinstance(model, SpeechLLM)
        assert isinstance(model.projector, CTCProjector)
        self.model, self.projector = model, model.projector
        self.vocabulary: CtcVocabulary = model.ctc_vocabulary
        model.encoder.to(device)
        self.projector.to(device)
        # A cache of the user's own is checked before the run folder is made.
        own = build_cache(config, model)
        self.run = state.create_run(config, name)
        # Not `own or`: a cache that has no entries yet is false.
        self.cache: FrameCache = own if own is not None else open_cache(
            self.run / state.FRAMES, model.encoder, config.train.precision, data.cache_dtype, data.cache_gib,
            config.model.encoder)
        (self.run / state.FRAMES).mkdir(exist_ok=True)  # from here on it can be resumed
        texts = sum(s.utterance.audio is None for s in train)
        print(f"ctc: {len(self.train_clips)} clips to train on, {len(self.dev_clips)} dev clips, {len(self.vocabulary)} tokens, "
              f"{sum(p.numel() for p in self.projector.parameters()) / 1e6:.2f} M parameters"
              + (f"; {texts} samples without audio are left out" if texts else "")
              + f"\nrun folder: {self.run}", flush=True)

    def train(self) -> Path:
        build_frames(self.cache, self.model.encoder, [*self.train_clips, *self.dev_clips])
        dev = self._data(self.dev_clips) if self.dev_clips else None
        history = train_ctc(self.projector, self._data(self.train_clips), dev, self.model.codec.decode, self.run,
                            ctc_options(self.config))
        weights = torch.load(self.run / LAST, map_location="cpu", weights_only=True)["projector"]
        best = {k: v.clone() for k, v in self.projector.state_dict().items()}
        simulation = self._fit(dev) if dev else None
        for name, values in ((state.LAST, weights), (state.BEST, best)):
            if name == state.LAST or dev is not None:
                self.projector.load_state_dict(values)
                new = self.run / f"{name}.new"
                self.model.save_pretrained(new)
                if simulation is not None:
                    save_simulation(simulation, new)
                state.swap_folder(new, self.run / name)
        state.write_finished(self.run, self._finished(history))
        return self.run

    def _finished(self, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {"step": sum(int(row["steps"]) for row in history),
                                  "train_seconds": round(sum(row["seconds"] for row in history), 1)}
        if self.dev_clips:
            top = min(range(len(history)), key=lambda i: history[i]["wer"])
            values |= {"best_step": sum(int(row["steps"]) for row in history[:top + 1]), "best_wer": history[top]["wer"]}
            print(f"ctc: best dev WER {history[top]['wer']:.1f} after epoch {top + 1} of {len(history)}", flush=True)
        return values

    def _data(self, clips: Sequence[Utterance]) -> CtcData:
        codec = self.model.codec
        targets = [self.vocabulary.classes(codec.text_ids(u.text), codec.tokenizer) for u in clips]
        lengths = [round(seconds(u) * ENCODER_RATE) for u in clips]
        return CtcData(_Frames(self.cache, clips), lengths, targets, [u.text for u in clips])

    @torch.no_grad()
    def _fit(self, dev: CtcData) -> Any:
        """Rates of simulated posteriors, measured on evenly spread dev clips; None where the projector hears nothing."""
        self.projector.eval()
        step = max(1, len(dev) // _FIT_CLIPS)
        chosen = [i for i in range(0, len(dev), step) if dev.targets[i]]
        posteriors = []
        for i in chosen:
            frames = dev.frames[i].float()[None].to(self.projector.blank.device)
            states, _ = self.projector.encode(frames, torch.tensor([frames.shape[1]], device=frames.device))
            posteriors.append(self.projector.logits(states)[0].log_softmax(-1).cpu())
        try:
            return fit_simulation([dev.targets[i] for i in chosen], posteriors)
        except UserError as error:
            log.warning("no simulation fitted: %s", error)
            return None


def _clips(samples: Sequence[Sample]) -> list[Utterance]:
    """Utterances with audio, each once, whatever number of tasks it has."""
    return list({f"{s.utterance.source}/{s.utterance.corpus}/{s.utterance.id}": s.utterance for s in samples
                 if s.utterance.audio is not None}.values())


def ctc_options(config: Config) -> CtcOptions:
    """Options of the stage as a run's `train` section says."""
    train = config.train
    own = {key: value for key, value in asdict(train.ctc).items() if key != "min_count"}
    return CtcOptions(epochs=train.epochs, batch_size=train.batch_size, bucket=train.bucket, lr=train.lr.projector,
                      weight_decay=train.weight_decay, warmup_steps=train.warmup_steps,
                      max_grad_norm=train.max_grad_norm or float("inf"), precision=train.precision, seed=train.seed,
                      max_steps=train.max_steps, **own)
