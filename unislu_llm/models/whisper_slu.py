"""The baseline: Whisper's own decoder on the unified format, with the same markers and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, EncoderDecoderCache, PreTrainedTokenizerBase
from transformers import WhisperForConditionalGeneration as Whisper

from unislu_llm.config import ModelConfig
from unislu_llm.data.audio import encoder_length, mel_length, with_silence
from unislu_llm.data.batch import Batch
from unislu_llm.errors import UserError
from unislu_llm.models.base import Objective, SLUModel
from unislu_llm.models.encoder import SpeechEncoder, attention_bias
from unislu_llm.models.kv_cache import State
from unislu_llm.models.lora import inject_lora
from unislu_llm.models.markers import install_markers
from unislu_llm.models.projectors import NONE
from unislu_llm.models.saved import Base
from unislu_llm.models.whisper_decoder import run_decoder, whisper_prompt
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer
from unislu_llm.weights import from_pretrained


class WhisperSLU(SLUModel):
    """Whisper that emits the unified format, with markers (and adapters) put into it here.

    Settings that do not fit it are a `UserError`.
    """

    kind = "whisper_slu"

    def __init__(self, config: ModelConfig, registry: TaskRegistry, whisper: Any,
                 tokenizer: PreTrainedTokenizerBase) -> None:
        end = int(whisper.config.eos_token_id)
        super().__init__(config, UnifiedTokenizer(tokenizer, registry, eos_id=end))
        if config.hypothesis != "none" or config.projector == NONE:
            raise UserError("model.hypothesis and model.projector none are for an LLM (kind "
                            "speech_llm): Whisper's decoder listens, and reads no hypothesis")
        usual = ModelConfig()
        for name in ("quantization", "attention", "prompt_prefix", "hypothesis_bias", "transcript"):
            if getattr(config, name) != getattr(usual, name):
                raise UserError(f"model.{name}: is for an LLM (kind speech_llm); leave it out")
        self.n_mels = int(whisper.config.num_mel_bins)
        self.whisper = whisper
        whisper.requires_grad_(config.decoder_mode == "full")
        # The encoder lives inside `whisper`; its wrapper adds no weights and stays out of the
        # module tree, in which every parameter has one name.
        self._wrapped = (SpeechEncoder(whisper.model.encoder, config),)
        if config.decoder_mode == "frozen":
            self._frozen = (whisper.model.decoder,)
        elif config.decoder_mode == "lora":
            if not config.lora.rank:
                raise UserError("model.decoder_mode lora needs model.lora.rank above 0")
            inject_lora(whisper.model.decoder, config.lora, "Whisper decoder")
        install_markers(whisper, self.tokenizer)
        self.prompt = whisper_prompt(whisper, tokenizer, config.language)
        self._positions = int(whisper.config.max_target_positions)
        self.room = self._positions - len(self.prompt)
        self._finish()

    @classmethod
    def build(cls, config: ModelConfig, registry: TaskRegistry,
              dtype: torch.dtype = torch.float32, ctc_tokens: Sequence[int] | None = None,
              bases: Mapping[str, Base] | None = None) -> Self:
        path, base = Base.resolve("Whisper", config.encoder, (bases or {}).get("encoder"))
        whisper = from_pretrained(Whisper, path, dtype=torch.float32, attn_implementation="sdpa")
        model = cls(config, registry, whisper, from_pretrained(AutoTokenizer, path))
        model.bases = {"encoder": base}
        for parameter in model.parameters():
            if not parameter.requires_grad:  # what trains keeps all of its digits
                parameter.data = parameter.data.to(dtype)
        return model

    @property
    def encoder(self) -> SpeechEncoder:  # type: ignore[override]
        return self._wrapped[0]

    @property
    def lm(self) -> Any:
        return self.whisper

    def token_counts(self, n_samples: int, n_target: int, n_hypothesis: int = 0) -> tuple[int, int]:
        """Speech counts as encoder frames, which the decoder attends to as they are."""
        return encoder_length(mel_length(n_samples)), len(self.prompt) + n_target - 1

    def _listen(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Frames of a batch, the mask of the attention to them, and the prompt `(batch, n)`."""
        frames, lengths = self._frames(batch)
        # A cache keeps fp16.
        autocast = not frames.is_meta and torch.is_autocast_enabled(frames.device.type)
        own = self.encoder.whisper.layer_norm.weight.dtype
        frames = frames.to(torch.float32 if autocast else own)
        prompt = torch.tensor(self.prompt).to(frames.device, non_blocking=True)
        # Silence is listened to as well, as Whisper was trained.
        lengths = tuple(with_silence(n, self.config.silence) for n in lengths)
        bias = attention_bias(lengths, frames.shape[1], torch.float32, frames.device)
        return frames, bias, prompt.expand(len(batch), -1)

    def forward(self, batch: Batch, objective: Objective = "unified") -> Tensor:
        if objective != "unified":
            raise UserError("train.objective ctc trains the ctc projector of an LLM; Whisper's "
                            "decoder has none")
        size = batch.target_ids.shape[1]
        if len(self.prompt) + size - 1 > self._positions:
            raise UserError(f"a target of {size} tokens does not fit Whisper's {self._positions} "
                            "positions; shorten the utterance")
        frames, bias, prompt = self._listen(batch)
        read = torch.cat([prompt, batch.target_ids[:, :-1]], dim=1)
        hidden = run_decoder(self.whisper.model.decoder, read, frames, bias)
        return self._target_losses(hidden, [len(self.prompt) - 1] * len(batch), batch)

    def prefill(self, batch: Batch) -> State:
        frames, bias, prompt = self._listen(batch)
        nothing = torch.zeros(len(batch), 0, dtype=torch.bool, device=frames.device)
        state = State(EncoderDecoderCache(DynamicCache(), DynamicCache()), nothing, frames[:, 0],
                      frames, bias)
        hidden = self.step(state, prompt)
        state.hidden, state.start = hidden[:, -1], hidden[:, 0]
        return state

    def _read(self, state: State, valid: Tensor, **inputs: Tensor) -> Tensor:
        positions = state.append(valid)
        return run_decoder(self.whisper.model.decoder, inputs["input_ids"], state.frames,
                           state.frame_bias, attention_mask=state.mask.long(),
                           position_ids=positions, past_key_values=state.cache)
