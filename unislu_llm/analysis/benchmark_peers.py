"""Systems of the training benchmark: ours, and the speech LLM classes of the installed transformers, of equal sizes.

All have random weights, a frozen encoder, a projector that trains, and LoRA on the LLM. The peers get mel of 30 s, which is what
their processors make (Voxtral, Qwen2-Audio and Audio Flamingo 3 refuse anything else).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.data.audio import SAMPLE_RATE, batch_log_mel
from unislu_llm.data.batching import seconds
from unislu_llm.data.cache import FrameCache
from unislu_llm.data.collate import Batch, CachedSpeech, SpeechDataset
from unislu_llm.data.targets import Sample, Target
from unislu_llm.loss import ASR_PART, TASK_PART, Counts, weighted_loss
from unislu_llm.models.frames import build, open_cache
from unislu_llm.models.lora import LoraOptions, inject_lora
from unislu_llm.models.speech_llm import SpeechLLM, SpeechLLMConfig
from unislu_llm.models.tiny import make_tokenizer
from unislu_llm.utterance import Utterance

ENCODERS: dict[str, dict[str, int]] = {
    "tiny": {"dim": 64, "layers": 2, "heads": 2, "ffn": 256},  # for tests
    "base": {"dim": 512, "layers": 6, "heads": 8, "ffn": 2048},
    "small": {"dim": 768, "layers": 12, "heads": 12, "ffn": 3072},
}
"""Sizes of Whisper's encoders."""

LLMS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "head_dim": 64},
}
"""Sizes of LLMs, as `LlamaConfig` names them."""

PEERS = ("GlmAsr", "Voxtral", "AudioFlamingo3", "Qwen2Audio")
"""Classes of transformers, without `ForConditionalGeneration`."""

NEED_30S = ("Voxtral", "AudioFlamingo3", "Qwen2Audio")
"""Those that refuse mel of any other length; GLM-ASR would take less."""

_N_MELS, _TOKENS = 80, 256  # targets take ids below _TOKENS


@dataclass(frozen=True)
class Sizes:
    """Sizes of a system: names of :data:`ENCODERS` and :data:`LLMS`, and of the LLM's vocabulary."""

    encoder: str = "base"
    llm: str = "smollm2-135m"
    vocab: int = 49_152
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of frozen weights."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def text_config(self) -> LlamaConfig:
        """Of the LLM."""
        kind: Any = LlamaConfig  # its fields are not typed as keyword arguments
        return kind(**LLMS[self.llm], vocab_size=self.vocab, max_position_embeddings=8192, tie_word_embeddings=True,
                           rms_norm_eps=1e-5, rope_theta=100_000.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)


class Clock:
    """Seconds by part of a step, of a clock such as `time.perf_counter`."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Count what happens inside as `part`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = self.now()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start

    def watch(self, module: nn.Module, part: str) -> None:
        """Count the forward passes of a module as `part`."""
        contexts: list[Any] = []

        def before(*_: Any) -> None:
            contexts.append(self.time(part))
            contexts[-1].__enter__()

        def after(*_: Any) -> None:
            contexts.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def slue_clips(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and target tokens of clips as SLUE has them: half of mean 10.4 s (VoxPopuli), half 8.0 s (VoxCeleb).

    2.5 words a second of 1.5 tokens, and 8 tokens of annotation. Any number of clips has the two means exactly, so that a
    short list is as long as a long one.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for mean, count in ((10.4, n - n // 2), (8.0, n // 2)):
        drawn = rng.gamma(3.2, mean / 3.2, count).clip(1.0, 29.0)
        parts.append((drawn * mean / max(float(drawn.mean()), 1e-9)).clip(0.5, 29.9) if count else drawn)
    seconds = np.concatenate(parts)[rng.permutation(n)]
    tokens = 8 + seconds * rng.normal(2.5, 0.4, n).clip(1.2) * 1.5
    return seconds, tokens.astype(int)


def write_clips(folder: Path, seconds: np.ndarray, tokens: np.ndarray, seed: int = 0) -> tuple[list[Sample], dict[str, Target]]:
    """Samples with WAV files of noise, and random targets of the wanted lengths by utterance id."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    samples, targets = [], {}
    for i, (length, n) in enumerate(zip(seconds.tolist(), tokens.tolist(), strict=True)):
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.normal(0, 0.1, round(length * SAMPLE_RATE)).clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
        samples.append(Sample(Utterance(str(i), path, "noise", {}, duration=length), None))
        targets[str(i)] = Target(tuple(rng.integers(3, _TOKENS, n).tolist()), (ASR_PART,) * (n - 8) + (TASK_PART,) * 8)
    return samples, targets


class System:
    """A model with its optimizer, and one training step in timed parts.

    Args:
        name: in tables. model: in train mode. parts: modules whose forward passes are timed, by name.
        device: where the model is.
    """

    def __init__(self, name: str, model: nn.Module, parts: dict[str, nn.Module], device: str) -> None:
        self.name, self.model, self.device = name, model.to(device).train(), device
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, betas=(0.9, 0.98), fused=True)
        self.clock = Clock(time.perf_counter)
        self.positions = self.used = 0  # of the LLM's rows: all, and those that are no padding
        for part, module in parts.items():
            self.clock.watch(module, part)

    def items(self, indices: Sequence[int]) -> list[Any]:
        """Read the audio of some samples."""
        raise NotImplementedError

    def batch(self, items: list[Any]) -> Any:
        """Mel and tensors."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """Forward pass."""
        raise NotImplementedError

    def step(self, indices: Sequence[int]) -> None:
        """One optimizer step over some samples."""
        clock = self.clock
        with clock.time("load"):
            items = self.items(indices)
        with clock.time("mel"):
            batch = self.batch(items)
        with clock.time("forward"), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(batch)
        with clock.time("backward"):
            loss.backward()
        with clock.time("optimizer"):
            nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    bf16 = False


class Ours(System):
    """:class:`SpeechLLM` on clips at natural length.

    Args:
        sizes: of the model. samples, targets: what :func:`write_clips` gives.
        cache: folder of an encoder cache, which is filled first; None: the encoder runs in every step.
        packing: see :class:`~unislu_llm.training.config.TrainConfig`.
    """

    def __init__(self, name: str, sizes: Sizes, samples: list[Sample], targets: dict[str, Target], cache: Path | None = None,
                 packing: bool = False, projector: dict[str, Any] | None = None) -> None:
        enc = ENCODERS[sizes.encoder]
        kind: Any = WhisperConfig
        whisper: Any = WhisperEncoder(kind(
            d_model=enc["dim"], encoder_layers=enc["layers"], encoder_attention_heads=enc["heads"], encoder_ffn_dim=enc["ffn"],
            num_mel_bins=_N_MELS, dropout=0.0, attn_implementation="sdpa"))
        llm: Any = LlamaForCausalLM._from_config(sizes.text_config(), attn_implementation="sdpa")
        config = SpeechLLMConfig(encoder=sizes.encoder, llm=sizes.llm, projector_options=projector or {},
                                 lora={"rank": LoraOptions().rank, "alpha": LoraOptions().alpha})
        model = SpeechLLM(config, whisper.to(sizes.torch_dtype), llm.to(sizes.torch_dtype), make_tokenizer())
        model.packing = packing
        super().__init__(name, model, {"encoder": model.encoder, "projector": model.projector}, sizes.device)
        self.bf16 = sizes.dtype == "bf16"
        self.speech_llm = model
        model.codec.target = lambda sample: targets[sample.utterance.id]  # type: ignore[method-assign]
        self.collate = model.collator()
        self.cache: FrameCache | None = None
        if cache is not None:
            self.cache = open_cache(cache, model.encoder, sizes.dtype, "fp16", 8.0)
            build(self.cache, model.encoder, [s.utterance for s in samples], progress=False)
            self.clock.seconds.clear()  # filling the cache is not a part of any step
        self.dataset: Any = SpeechDataset(samples) if self.cache is None else CachedSpeech(samples, self.cache)
        self.rows = [sum(map(int, model.token_counts(round(seconds(s.utterance) * SAMPLE_RATE), len(targets[s.utterance.id]))))
                     for s in samples]

    def items(self, indices: Sequence[int]) -> list[Any]:
        rows = [self.rows[i] for i in indices]
        self.used += sum(rows)
        self.positions += sum(rows) if self.speech_llm.packing else len(rows) * max(rows)
        return [self.dataset[i] for i in indices]

    def batch(self, items: list[Any]) -> Batch:
        return self.collate(items).to(self.device)

    def loss(self, batch: Batch) -> Tensor:
        return weighted_loss(self.speech_llm.losses(batch), batch.target_parts, "dynamic", Counts.of(batch.target_parts))


class Peer(System):
    """A class of transformers with the same sizes.

    Args:
        name: of :data:`PEERS`.

    Raises:
        AttributeError: the installed transformers has no such class.
    """

    def __init__(self, name: str, sizes: Sizes, samples: list[Sample], targets: dict[str, Target]) -> None:
        model = _peer_model(name, sizes)
        model.requires_grad_(False)
        inner = model.model
        inject_lora(inner.language_model, LoraOptions(), "LLM")
        inner.multi_modal_projector.requires_grad_(True)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else sizes.torch_dtype)
        super().__init__(name, model, {"encoder": inner.audio_tower, "projector": inner.multi_modal_projector}, sizes.device)
        self.bf16 = sizes.dtype == "bf16"
        self.kind, self.targets, self.dataset = name, targets, SpeechDataset(samples)
        self.audio_id = sizes.vocab - 1

    def items(self, indices: Sequence[int]) -> list[Any]:
        return [self.dataset[i] for i in indices]

    def audio_tokens(self, mel_lengths: Tensor) -> list[int]:
        """Places that a clip takes in the LLM's row."""
        frames = (mel_lengths - 1) // 2 + 1
        if self.kind == "Voxtral":
            return [375] * len(frames)
        return ((frames - 4) // 4 + 1 if self.kind == "GlmAsr" else (frames - 2) // 2 + 1).tolist()

    def batch(self, items: list[Any]) -> dict[str, Tensor]:
        mel, mel_lengths = batch_log_mel([wave for _, wave in items], _N_MELS, pad_to_30s=True)
        targets = [torch.tensor(self.targets[sample.utterance.id].ids) for sample, _ in items]
        speech = [torch.full((n,), self.audio_id) for n in self.audio_tokens(mel_lengths)]
        rows = [torch.cat(pair) for pair in zip(speech, targets, strict=True)]
        labels = [torch.cat([torch.full_like(s, -100), t]) for s, t in zip(speech, targets, strict=True)]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        self.used, self.positions = self.used + int(mask.sum()), self.positions + mask.numel()
        batch = {"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask, "input_features": mel,
                 "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}
        if self.kind != "Voxtral":
            valid = (torch.arange(mel.shape[-1]) < mel_lengths[:, None]).long()
            batch["feature_attention_mask" if self.kind == "Qwen2Audio" else "input_features_mask"] = valid
        return {key: value.to(self.device) for key, value in batch.items()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, use_cache=False).loss


def _peer_model(name: str, sizes: Sizes) -> Any:
    enc = ENCODERS[sizes.encoder]
    audio: dict[str, Any] = {"num_mel_bins": _N_MELS}
    if name == "Qwen2Audio":
        audio |= {"d_model": enc["dim"], "encoder_layers": enc["layers"], "encoder_attention_heads": enc["heads"],
                  "encoder_ffn_dim": enc["ffn"]}
    else:
        audio |= {"hidden_size": enc["dim"], "num_hidden_layers": enc["layers"], "num_attention_heads": enc["heads"],
                  "intermediate_size": enc["ffn"]}
    audio_config = getattr(transformers, f"{name}EncoderConfig")(**audio)
    config = getattr(transformers, f"{name}Config")(audio_config=audio_config, text_config=sizes.text_config())
    setattr(config, "audio_token_index" if name == "Qwen2Audio" else "audio_token_id", sizes.vocab - 1)
    return getattr(transformers, f"{name}ForConditionalGeneration")._from_config(config, attn_implementation="sdpa")
