"""The baseline: Whisper's own decoder on the unified format, with the same markers, loss, data, loop and decoding."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerBase,
    WhisperForConditionalGeneration,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from unislu_llm.data.audio import encoder_length, mel_length
from unislu_llm.data.targets import TextCodec
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART
from unislu_llm.models import weights
from unislu_llm.models.base import SLUConfig, SLUModel, check_hash, is_checkpointed
from unislu_llm.models.encoder import SpeechEncoder, attention_bias
from unislu_llm.models.head import token_losses
from unislu_llm.models.lora import inject_lora
from unislu_llm.models.markers import install_markers
from unislu_llm.models.state import DecoderState, Encoded


class WhisperSLUConfig(SLUConfig):
    """Configuration of :class:`WhisperSLU`, beyond :class:`SLUConfig`.

    Args:
        language: Whisper language code of the prompt, e.g. `en`.
        decoder_mode: full (all decoder weights train, as in the paper), lora, or frozen (markers alone).
        lora: options of the decoder's adapters, with `lora`.
    """

    model_type = "whisper_slu"

    def __init__(self, language: str = "en", decoder_mode: str = "full", lora: dict[str, Any] | None = None,
                 **kwargs: Any) -> None:
        self.language = language
        self.decoder_mode = decoder_mode
        self.lora = lora
        super().__init__(**{"encoder_mode": "full"} | kwargs)


class WhisperSLU(SLUModel):
    """Whisper that emits the unified format.

    Args:
        config: see :class:`WhisperSLUConfig`.
        whisper: the whole model; markers (and adapters) are put into it here.
        tokenizer: Whisper's; the markers are added to it.
    """

    config_class = WhisperSLUConfig
    kind = "whisper_slu"

    def __init__(self, config: WhisperSLUConfig, whisper: WhisperForConditionalGeneration,
                 tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(config)
        if config.draft != "none":
            raise UserError("model.draft: Whisper's decoder takes no draft; drafts are for an LLM (kind speech_llm)")
        self.codec = TextCodec(tokenizer, config.registry, eos_id=int(whisper.config.eos_token_id))  # type: ignore[arg-type]
        self.n_mels = int(whisper.config.num_mel_bins)
        self.whisper = whisper
        whisper.requires_grad_(config.decoder_mode == "full")
        encoder = SpeechEncoder(whisper.model.encoder, config.encoder_mode, top_layers=config.encoder_top_layers,  # type: ignore[arg-type]
                                lora=config.lora_options("encoder_lora"), pad_to_30s=config.pad_to_30s)
        if config.decoder_mode == "lora":
            options = config.lora_options("lora")
            if options is None:
                raise UserError("decoder_mode 'lora' needs `lora` options")
            inject_lora(whisper.model.decoder, options, "Whisper decoder")
        elif config.decoder_mode not in ("full", "frozen"):
            raise UserError(f"unknown decoder_mode '{config.decoder_mode}'; known: full, lora, frozen")
        install_markers(whisper, self.codec)
        # The encoder lives inside `whisper`; the wrapper adds no weights and is kept out of the module tree.
        self._encoder = [encoder]
        self._cross_bias: Tensor | None = None
        for layer in whisper.model.decoder.layers:
            layer.encoder_attn.register_forward_pre_hook(self._mask_cross_attention, with_kwargs=True)
        self.prompt = whisper_prompt(whisper, tokenizer, config.language)
        self._finish(whisper)

    @classmethod
    def build(cls, config: WhisperSLUConfig, dtype: torch.dtype = torch.float32) -> Self:
        found = weights.resolve(config.encoder, revision=config.encoder_revision)
        digest = weights.weights_hash(found.path)
        check_hash("Whisper", config.encoder, config.encoder_hash, digest)
        config.encoder_hash, config.encoder_revision = digest, found.revision
        whisper = WhisperForConditionalGeneration.from_pretrained(found.path, dtype=torch.float32,
                                                                  attn_implementation="sdpa")
        return cls(config, whisper, AutoTokenizer.from_pretrained(found.path))

    @property
    def encoder(self) -> SpeechEncoder:
        return self._encoder[0]

    @property
    def room(self) -> int:
        """New tokens that fit after the prompt: Whisper has learnt so many positions."""
        return int(self.whisper.config.max_target_positions) - len(self.prompt)

    def train(self, mode: bool = True) -> WhisperSLU:
        """What is frozen stays in eval mode; a decoder that is checkpointed must be in train mode for it."""
        super().train(mode)
        self.encoder.train(mode)
        if self.config.decoder_mode == "frozen" and not is_checkpointed(self.whisper):
            self.whisper.model.decoder.eval()
        return self

    def parameter_group(self, name: str) -> str:
        if name.endswith(".rows"):
            return "markers"
        if name.startswith("whisper.model.encoder."):
            return "encoder"
        return "lora" if ".lora_" in name else "decoder"

    def _mask_cross_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """transformers' Whisper attends to all encoder frames, padding included; natural lengths need a mask."""
        bias = self._cross_bias
        if bias is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[0] != bias.shape[0]:  # beams
                bias = bias.repeat_interleave(hidden.shape[0] // bias.shape[0], dim=0)
            kwargs["attention_mask"] = bias.to(hidden.dtype)
        return args, kwargs

    @property
    def lm(self) -> Any:
        return self.whisper

    def encode(self, mel: Tensor, mel_lengths: Tensor, frames: Tensor | None = None,
               frame_lengths: Tensor | None = None, draft_ids: Tensor | None = None,
               draft_lengths: Tensor | None = None) -> Encoded:
        return Encoded(*self._encoder_frames(mel, mel_lengths, frames, frame_lengths))

    def _bias(self, encoded: Encoded) -> Tensor | None:
        """Mask of the cross-attention."""
        return None if self.config.pad_to_30s else attention_bias(encoded.lengths, encoded.frames.shape[1], torch.float32)

    def begin(self, encoded: Encoded) -> tuple[DecoderState, Tensor]:
        ids = torch.tensor(self.prompt, device=encoded.frames.device).expand(len(encoded), -1)
        state = DecoderState(EncoderDecoderCache(DynamicCache(), DynamicCache()),
                             torch.zeros(len(ids), 0, dtype=torch.bool, device=ids.device), encoded.frames, self._bias(encoded))
        return state, self.extend(state, ids, torch.ones_like(ids, dtype=torch.bool))[:, -1]

    def extend(self, state: DecoderState, ids: Tensor, valid: Tensor) -> Tensor:
        positions = state.append(valid)
        self._cross_bias = state.frame_bias
        hidden: Tensor = self.whisper.model.decoder(
            input_ids=ids, attention_mask=state.mask.long(), position_ids=positions, encoder_hidden_states=state.frames,
            past_key_values=state.cache, use_cache=True).last_hidden_state
        return hidden

    def token_counts(self, n_samples: int, n_target: int, n_draft: int = 0) -> tuple[int, int]:
        """Speech counts as encoder frames, which the decoder attends to as they are."""
        return encoder_length(mel_length(n_samples)), len(self.prompt) + n_target - 1

    def forward(self, mel: Tensor, mel_lengths: Tensor, target_ids: Tensor, target_parts: Tensor,
                frames: Tensor | None = None, frame_lengths: Tensor | None = None, draft_ids: Tensor | None = None,
                draft_lengths: Tensor | None = None) -> Tensor:
        encoded = self.encode(mel, mel_lengths, frames, frame_lengths)
        frames, self._cross_bias = encoded.frames, self._bias(encoded)
        n = len(self.prompt)
        prompt = torch.tensor(self.prompt, device=target_ids.device).expand(len(target_ids), -1)
        supervised = target_parts != NO_PART
        inputs = torch.cat([prompt, target_ids.masked_fill(~supervised, self.codec.eos_id)[:, :-1]], dim=1)
        limit = int(self.whisper.config.max_target_positions)
        if inputs.shape[1] > limit:
            raise UserError(f"a target of {target_ids.shape[1]} tokens does not fit Whisper's {limit} positions; "
                            "shorten the utterance")
        hidden = self.whisper.model.decoder(input_ids=inputs, encoder_hidden_states=frames,
                                            use_cache=False).last_hidden_state
        losses = token_losses(self.whisper, hidden[:, n - 1:][supervised], target_ids[supervised])
        return losses.new_zeros(target_ids.shape).masked_scatter(supervised, losses)

    @torch.inference_mode()
    def generate(self, mel: Tensor | Encoded, mel_lengths: Tensor | None = None,  # type: ignore[override]
                 forced: list[int] | None = None, **options: Any) -> Tensor:
        encoded = self._encoded(mel, mel_lengths)
        frames, self._cross_bias = encoded.frames, self._bias(encoded)
        start = torch.tensor([*self.prompt, *(forced or [])], device=frames.device).expand(len(frames), -1)
        room = int(self.whisper.config.max_target_positions) - start.shape[1]
        settings = options | {"max_new_tokens": min(int(options.get("max_new_tokens", 256)), room)}
        # Whisper's own generate adds 30-s windows, timestamps and language detection; the generic one is what is meant.
        whisper: Any = self.whisper
        # The mask is of the encoder's input, which is encoded already: it only tells `generate` not to guess one.
        out = GenerationMixin.generate(whisper, encoder_outputs=BaseModelOutput(last_hidden_state=frames),
                                       attention_mask=torch.ones(frames.shape[:2], dtype=torch.long, device=frames.device),
                                       decoder_input_ids=start, **settings)
        return out[:, start.shape[1]:]


def whisper_prompt(whisper: Any, tokenizer: PreTrainedTokenizerBase, language: str) -> list[int]:
    """Start-of-transcript ids, `<|startoftranscript|><|en|><|transcribe|><|notimestamps|>` where they exist."""
    start = [int(whisper.config.decoder_start_token_id)]
    vocabulary = tokenizer.get_vocab()
    if "<|notimestamps|>" not in vocabulary:
        return start
    if f"<|{language}|>" not in vocabulary and "<|transcribe|>" in vocabulary:
        raise UserError(f"language '{language}' is not one of Whisper's; use a code such as en, de, fr")
    names = [f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]
    if not getattr(whisper.generation_config, "is_multilingual", True):  # English-only checkpoints have no such prompt
        names = ["<|notimestamps|>"]
    return start + [vocabulary[name] for name in names]
