"""A Whisper encoder, a projector and a causal LLM: `[prompt prefix][speech][prompt suffix][target]`."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.data.targets import TextCodec
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART
from unislu_llm.models import weights
from unislu_llm.models.base import SLUConfig, SLUModel, check_hash, is_checkpointed
from unislu_llm.models.encoder import SpeechEncoder, valid_mask
from unislu_llm.models.head import token_losses
from unislu_llm.models.lora import inject_lora
from unislu_llm.models.markers import install_markers
from unislu_llm.models.projectors import build_projector


class SpeechLLMConfig(SLUConfig):
    """Configuration of :class:`SpeechLLM`, beyond :class:`SLUConfig`.

    Args:
        llm: causal LM checkpoint. llm_revision, llm_hash: what it was at training time.
        projector: registered name. projector_options: its keyword arguments.
        lora: options of the LLM's adapters; None trains no LLM weight.
        prompt_prefix, prompt_suffix: text around the speech, special tokens written out; the same at training and
            inference.
        quantization: none, 8bit or 4bit (bitsandbytes).
    """

    model_type = "speech_llm"

    def __init__(self, llm: str = "HuggingFaceTB/SmolLM2-135M-Instruct", llm_revision: str | None = None,
                 llm_hash: str | None = None, projector: str = "mlp", projector_options: dict[str, Any] | None = None,
                 lora: dict[str, Any] | None = None, prompt_prefix: str = "", prompt_suffix: str = "",
                 quantization: str = "none", **kwargs: Any) -> None:
        self.llm = llm
        self.llm_revision = llm_revision
        self.llm_hash = llm_hash
        self.projector = projector
        self.projector_options = projector_options or {}
        self.lora = lora
        self.prompt_prefix = prompt_prefix
        self.prompt_suffix = prompt_suffix
        self.quantization = quantization
        super().__init__(**kwargs)


class SpeechLLM(SLUModel):
    """Speech in, unified text out, by a causal LLM.

    Args:
        config: see :class:`SpeechLLMConfig`.
        whisper: encoder module of a Whisper model.
        llm: causal LM as transformers loads it; markers and LoRA are put into it here.
        tokenizer: the LLM's; the markers are added to it.
    """

    config_class = SpeechLLMConfig
    kind = "speech_llm"

    def __init__(self, config: SpeechLLMConfig, whisper: WhisperEncoder, llm: Any,
                 tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(config)
        self.codec = TextCodec(tokenizer, config.registry)
        self.n_mels = int(whisper.config.num_mel_bins)
        self.encoder = SpeechEncoder(whisper, config.encoder_mode, top_layers=config.encoder_top_layers,  # type: ignore[arg-type]
                                     lora=config.lora_options("encoder_lora"), pad_to_30s=config.pad_to_30s)
        self.llm = llm
        llm.requires_grad_(False)
        embeddings = llm.get_input_embeddings()
        self.projector = build_projector(config.projector, self.encoder.dim, _embedding_dim(embeddings),
                                         _embedding_rms(embeddings), config.projector_options)
        if lora := config.lora_options("lora"):
            inject_lora(llm.base_model, lora, "LLM")
        install_markers(llm, self.codec)
        self.prefix = self._prompt(config.prompt_prefix, first=True)
        self.suffix = self._prompt(config.prompt_suffix)
        self._finish(llm)

    @classmethod
    def build(cls, config: SpeechLLMConfig, dtype: torch.dtype = torch.float32) -> Self:
        speech = weights.resolve(config.encoder, revision=config.encoder_revision)
        text = weights.resolve(config.llm, revision=config.llm_revision)
        hashes = weights.weights_hash(speech.path), weights.weights_hash(text.path)
        check_hash("encoder", config.encoder, config.encoder_hash, hashes[0])
        check_hash("LLM", config.llm, config.llm_hash, hashes[1])
        config.encoder_hash, config.llm_hash = hashes
        config.encoder_revision, config.llm_revision = speech.revision, text.revision
        whisper: Any = WhisperModel.from_pretrained(speech.path, dtype=torch.float32, attn_implementation="sdpa").encoder
        whisper = whisper.to(dtype if config.encoder_mode == "frozen" else torch.float32)
        llm = AutoModelForCausalLM.from_pretrained(text.path, dtype=dtype, attn_implementation="sdpa",
                                                   **_quantization(config.quantization))
        return cls(config, whisper, llm, AutoTokenizer.from_pretrained(text.path))

    def _prompt(self, text: str, first: bool = False) -> list[int]:
        """Ids of a part of the prompt; the first one gets a beginning-of-text token where the tokenizer wants one."""
        ids = self.codec.prompt_ids(text)
        bos = self.codec.tokenizer.bos_token_id
        wants = bos is not None and self.codec.tokenizer("a")["input_ids"][0] == bos
        return [bos, *ids] if first and wants and ids[:1] != [bos] else ids

    def train(self, mode: bool = True) -> SpeechLLM:
        """A frozen LLM stays in eval mode, unless it is checkpointed, which transformers does in train mode alone."""
        super().train(mode)
        if not self.config.lora and not is_checkpointed(self.llm):
            self.llm.eval()
        return self

    def parameter_group(self, name: str) -> str:
        if name.startswith("projector."):
            return "projector"
        if name.startswith("encoder."):
            return "encoder"
        if name.endswith(".rows"):
            return "markers"
        return "lora" if ".lora_" in name else "decoder"

    def speech(self, mel: Tensor, mel_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Speech embeddings `(batch, T_sp, H)` and their lengths `(batch,)`."""
        frames, lengths = self.encoder(mel, mel_lengths)
        embeddings, out = self.projector(frames[:, : int(lengths.max())], lengths)
        return embeddings, out

    def _embed(self, ids: list[int] | Tensor) -> Tensor:
        device = self.llm.get_input_embeddings().weight.device
        return self.llm.get_input_embeddings()(torch.as_tensor(ids, dtype=torch.long, device=device))

    def forward(self, mel: Tensor, mel_lengths: Tensor, target_ids: Tensor, target_parts: Tensor) -> Tensor:
        speech, lengths = self.speech(mel, mel_lengths)
        supervised = target_parts != NO_PART
        target = self._embed(target_ids.masked_fill(~supervised, self.codec.eos_id))
        prefix, suffix = self._embed(self.prefix), self._embed(self.suffix)
        n_target = supervised.sum(-1)
        speech = speech.to(target.dtype)
        rows = [torch.cat([prefix, speech[i, : int(lengths[i])], suffix, target[i, : int(n_target[i]) - 1]])
                for i in range(len(target))]
        # Right padding under a causal mask: no valid position sees a padded one, so no mask is needed.
        embeds = pad_sequence(rows, batch_first=True)
        hidden = self.llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        before = len(self.prefix) + lengths + len(self.suffix) - 1
        index = (before[:, None] + torch.arange(target_ids.shape[1], device=before.device)).masked_fill(~supervised, 0)
        picked = hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1]))[supervised]
        losses = token_losses(self.llm, picked, target_ids[supervised])
        return losses.new_zeros(target_ids.shape).masked_scatter(supervised, losses)

    @torch.inference_mode()
    def generate(self, mel: Tensor, mel_lengths: Tensor, forced: list[int] | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        speech, lengths = self.speech(mel, mel_lengths)
        prefix, suffix = self._embed(self.prefix), self._embed([*self.suffix, *(forced or [])])
        speech = speech.to(prefix.dtype)
        rows = [torch.cat([prefix, speech[i, : int(n)], suffix]) for i, n in enumerate(lengths)]
        total = torch.tensor([len(row) for row in rows], device=speech.device)
        longest = int(total.max())
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = valid_mask(total, longest).flip(-1).long()
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **{"max_new_tokens": 256} | options)


def _embedding_dim(embeddings: Any) -> int:
    return int(embeddings.weight.shape[1])


@torch.no_grad()
def _embedding_rms(embeddings: Any) -> float:
    """RMS of an LLM's embeddings as its first layer sees them (Gemma scales them), over a sample of the vocabulary."""
    size = embeddings.weight.shape[0]
    ids = torch.arange(0, size, max(1, size // 4096), device=embeddings.weight.device)
    return float(embeddings(ids).float().pow(2).mean().sqrt()) or 1.0 / math.sqrt(_embedding_dim(embeddings))


def _quantization(kind: str) -> dict[str, Any]:
    if kind == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise UserError(f"quantization '{kind}' needs bitsandbytes: pip install 'unislu_llm[quantize]'") from error
    if kind == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if kind == "4bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                          bnb_4bit_use_double_quant=True,
                                                          bnb_4bit_compute_dtype=torch.bfloat16)}
    raise UserError(f"unknown quantization '{kind}'; known: none, 8bit, 4bit")
