"""A Whisper encoder, a projector and a causal LLM: `[prompt prefix][speech][draft][prompt suffix][target]`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.data.audio import encoder_length, mel_length
from unislu_llm.data.collate import Collator
from unislu_llm.data.simulate import densify
from unislu_llm.data.targets import TextCodec
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART
from unislu_llm.models import weights
from unislu_llm.models.base import SLUConfig, SLUModel, check_hash, is_checkpointed
from unislu_llm.models.ctc import CTCProjector, CtcVocabulary
from unislu_llm.models.encoder import SpeechEncoder, valid_mask
from unislu_llm.models.head import token_losses
from unislu_llm.models.lora import inject_lora
from unislu_llm.models.markers import install_markers
from unislu_llm.models.projectors import build_projector
from unislu_llm.models.state import DecoderState, Encoded


class SpeechLLMConfig(SLUConfig):
    """Configuration of :class:`SpeechLLM`, beyond :class:`SLUConfig`.

    Args:
        llm: causal LM checkpoint. llm_revision, llm_hash: what it was at training time.
        projector: registered name. projector_options: its keyword arguments.
        lora: options of the LLM's adapters; None trains no LLM weight.
        prompt_prefix, prompt_suffix: text around the speech, special tokens written out; the same at training and
            inference.
        quantization: none, 8bit or 4bit (bitsandbytes).
        draft_prompt: text before a draft, which stands between the speech and `prompt_suffix`.
        use_speech: False gives the LLM the draft alone: no speech positions, and the encoder does not run.
        ctc_tokens: ids that the `ctc` projector predicts; :meth:`SpeechLLM.learn_vocabulary` fills them in.
    """

    model_type = "speech_llm"

    def __init__(self, llm: str = "HuggingFaceTB/SmolLM2-135M-Instruct", llm_revision: str | None = None,
                 llm_hash: str | None = None, projector: str = "mlp", projector_options: dict[str, Any] | None = None,
                 lora: dict[str, Any] | None = None, prompt_prefix: str = "", prompt_suffix: str = "",
                 draft_prompt: str = "\nDraft:", use_speech: bool = True, quantization: str = "none",
                 ctc_tokens: list[int] | None = None, **kwargs: Any) -> None:
        self.llm = llm
        self.llm_revision = llm_revision
        self.llm_hash = llm_hash
        self.projector = projector
        self.projector_options = projector_options or {}
        self.lora = lora
        self.prompt_prefix = prompt_prefix
        self.prompt_suffix = prompt_suffix
        self.draft_prompt = draft_prompt
        self.use_speech = use_speech
        self.quantization = quantization
        self.ctc_tokens = ctc_tokens
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
        self.packing = False  # lay rows end to end in :meth:`forward` instead of padding them
        self.llm = llm
        llm.requires_grad_(False)
        embeddings = llm.get_input_embeddings()
        self.projector = build_projector(config.projector, self.encoder.dim, _embedding_dim(embeddings),
                                         _embedding_rms(embeddings), config.projector_options)
        if lora := config.lora_options("lora"):
            inject_lora(llm.base_model, lora, "LLM")
        install_markers(llm, self.codec)
        if config.ctc_tokens:
            self._attach(config.ctc_tokens)
        self.prefix = self._prompt(config.prompt_prefix, first=True)
        self.suffix = self._prompt(config.prompt_suffix)
        self.draft_prompt = self._prompt(config.draft_prompt)
        if not config.use_speech:
            if config.draft == "none":
                raise UserError("model.use_speech false leaves nothing to go by without a draft; set model.draft too")
            if not (self.prefix or self.suffix or self.draft_prompt):
                raise UserError("model.use_speech false needs some prompt before an answer; set model.draft_prompt")
            self.encoder.requires_grad_(False)
            self.projector.requires_grad_(False)
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

    def _attach(self, token_ids: list[int]) -> None:
        if isinstance(self.projector, CTCProjector):
            self.projector.attach(self.llm.get_input_embeddings(), token_ids)

    def learn_vocabulary(self, texts: Iterable[str], min_count: int = 1) -> CtcVocabulary:
        """Give a `ctc` projector the tokens of training transcripts to choose among; they are saved with the configuration.

        Args:
            texts: transcripts. min_count: tokens seen less often are spelt with smaller ones.

        Raises:
            UserError: no text, or a projector that takes no vocabulary.
        """
        if not self.projector.needs_embeddings:
            raise UserError(f"projector '{self.config.projector}' takes no vocabulary; choose 'ctc'")
        vocabulary = CtcVocabulary.learn((self.codec.text_ids(text) for text in texts), self.codec.tokenizer, min_count)
        self.config.ctc_tokens = list(vocabulary.token_ids)
        self._attach(self.config.ctc_tokens)
        return vocabulary

    @property
    def ctc_vocabulary(self) -> CtcVocabulary:
        """The vocabulary of a `ctc` projector; empty before :meth:`learn_vocabulary`."""
        ids = self.config.ctc_tokens or []
        return CtcVocabulary(tuple(ids), tuple(self.codec.tokenizer.convert_ids_to_tokens(ids)))

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

    def collator(self) -> Collator:
        draft_prompt = None if self.config.draft == "none" else self.draft_prompt
        return Collator(self.codec, self.n_mels, self.config.pad_to_30s, draft_prompt)

    def token_counts(self, n_samples: int, n_target: int, n_draft: int = 0) -> tuple[int, int]:
        speech = int(self.projector.output_length(encoder_length(mel_length(n_samples)))) if self.config.use_speech else 0
        return speech, len(self.prefix) + n_draft + len(self.suffix) + n_target - 1

    def speech(self, mel: Tensor, mel_lengths: Tensor, frames: Tensor | None = None, frame_lengths: Tensor | None = None,
               simulated_classes: Tensor | None = None, simulated_shares: Tensor | None = None,
               simulated_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Speech embeddings `(batch, T_sp, H)` and their lengths `(batch,)`; arguments as in :meth:`forward`."""
        if simulated_classes is None or simulated_shares is None or simulated_lengths is None:
            return self._heard(mel, mel_lengths, frames, frame_lengths)
        # Rows of text stand for speech that nobody heard: their posteriors go where the projector's go.
        texts = simulated_lengths > 0
        projector: Any = self.projector
        read, counts = projector.mix(densify(simulated_classes, simulated_shares, len(projector.token_ids)),
                                     simulated_lengths[texts])
        if bool(texts.all()):
            # Under DDP every process has to use every parameter in every step.
            idle = sum(p.sum() for part in (self.projector, self.encoder) for p in part.parameters() if p.requires_grad)
            return read + 0.0 * idle, counts
        heard = ~texts
        speech, lengths = self._heard(mel, mel_lengths[heard], None if frames is None else frames[heard],
                                      None if frame_lengths is None else frame_lengths[heard])
        both = speech.new_zeros(len(texts), max(speech.shape[1], read.shape[1]), speech.shape[2])
        both[heard, :speech.shape[1]] = speech
        both[texts, :read.shape[1]] = read.to(both.dtype)
        out = torch.zeros_like(simulated_lengths)
        out[heard], out[texts] = lengths.to(out.dtype), counts.to(out.dtype)
        return both, out

    def _heard(self, mel: Tensor, mel_lengths: Tensor, frames: Tensor | None,
               frame_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        frames, lengths = self._encoder_frames(mel, mel_lengths, frames, frame_lengths)
        embeddings, out = self.projector(frames[:, : int(lengths.max())], lengths)
        return embeddings, out

    def _embed(self, ids: list[int] | Tensor) -> Tensor:
        device = self.llm.get_input_embeddings().weight.device
        return self.llm.get_input_embeddings()(torch.as_tensor(ids, dtype=torch.long, device=device))

    def forward(self, mel: Tensor, mel_lengths: Tensor, target_ids: Tensor, target_parts: Tensor,
                frames: Tensor | None = None, frame_lengths: Tensor | None = None, draft_ids: Tensor | None = None,
                draft_lengths: Tensor | None = None, **simulated: Tensor) -> Tensor:
        encoded = self.encode(mel, mel_lengths, frames, frame_lengths, draft_ids, draft_lengths, **simulated)
        supervised = target_parts != NO_PART
        target = self._embed(target_ids.masked_fill(~supervised, self.codec.eos_id))
        openings = self._beginnings(encoded, self._embed(self.suffix))
        rows = [torch.cat([opening, target[i, : n - 1]])
                for i, (opening, n) in enumerate(zip(openings, supervised.sum(-1).tolist(), strict=True))]
        hidden, starts = self._read_rows(rows)
        before = starts + torch.tensor([len(opening) for opening in openings], device=starts.device) - 1
        index = before[:, None] + torch.arange(target_ids.shape[1], device=before.device)
        losses = token_losses(self.llm, hidden.index_select(0, index[supervised]), target_ids[supervised])
        return losses.new_zeros(target_ids.shape).masked_scatter(supervised, losses)

    def _read_rows(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states `(positions, dim)` of the LLM over rows of embeddings, and where in them each row starts `(batch,)`."""
        counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
        if self.packing:
            embeds = torch.cat(rows)[None]
            # Positions that start anew tell transformers where a row ends: flash attention takes them as sequences of their
            # own, SDPA gets a block-diagonal mask.
            positions = torch.cat([torch.arange(len(row), device=counts.device) for row in rows])[None]
            starts = counts.cumsum(0) - counts
        else:
            # Right padding under a causal mask: no valid position sees a padded one, so no mask is needed.
            embeds, positions = pad_sequence(rows, batch_first=True), None
            starts = torch.arange(len(rows), device=counts.device) * embeds.shape[1]
        hidden = self.llm.base_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1), starts

    @property
    def lm(self) -> Any:
        return self.llm

    def encode(self, mel: Tensor, mel_lengths: Tensor, frames: Tensor | None = None,
               frame_lengths: Tensor | None = None, draft_ids: Tensor | None = None,
               draft_lengths: Tensor | None = None, **simulated: Tensor) -> Encoded:
        if self.config.use_speech:
            speech, lengths = self.speech(mel, mel_lengths, frames, frame_lengths, **simulated)
            heard = None if self.training else getattr(self.projector, "heard", None)
        else:
            heard = None
            lengths = torch.zeros_like(mel_lengths)
            speech = torch.zeros(len(lengths), 0, self.projector.out_dim, device=lengths.device)
        return Encoded(speech, lengths, draft_ids, draft_lengths, heard)

    def _beginnings(self, encoded: Encoded, suffix: Tensor) -> list[Tensor]:
        """`[prefix][speech][draft][suffix]` of every row, `(length, H)` each."""
        prefix = self._embed(self.prefix)
        speech = encoded.frames.to(prefix.dtype)
        rows = [[prefix, speech[i, : int(n)]] for i, n in enumerate(encoded.lengths)]
        if encoded.drafts is not None and encoded.draft_lengths is not None:
            drafts = self._embed(encoded.drafts)
            for i, (row, n) in enumerate(zip(rows, encoded.draft_lengths.tolist(), strict=True)):
                row.append(drafts[i, :n])
        return [torch.cat([*row, suffix]) for row in rows]

    def _opening(self, encoded: Encoded, forced: list[int]) -> tuple[Tensor, Tensor]:
        """Embeddings `(batch, length, H)` of prompt, speech and draft, padded on the left, and their mask."""
        rows = self._beginnings(encoded, self._embed([*self.suffix, *forced]))
        total = torch.tensor([len(row) for row in rows], device=rows[0].device)
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        return embeds, valid_mask(total, int(total.max())).flip(-1)

    def begin(self, encoded: Encoded) -> tuple[DecoderState, Tensor]:
        embeds, mask = self._opening(encoded, [])
        state = DecoderState(DynamicCache(), mask[:, :0])
        return state, self._read(state, mask, inputs_embeds=embeds)[:, -1]

    def extend(self, state: DecoderState, ids: Tensor, valid: Tensor) -> Tensor:
        return self._read(state, valid, input_ids=ids)

    def _read(self, state: DecoderState, valid: Tensor, **inputs: Tensor) -> Tensor:
        positions = state.append(valid)
        hidden: Tensor = self.llm.base_model(**inputs, attention_mask=state.mask.long(), position_ids=positions,
                                             past_key_values=state.cache, use_cache=True).last_hidden_state
        return hidden

    @torch.inference_mode()
    def generate(self, mel: Tensor | Encoded, mel_lengths: Tensor | None = None,  # type: ignore[override]
                 forced: list[int] | None = None, **options: Any) -> Tensor:
        embeds, mask = self._opening(self._encoded(mel, mel_lengths), forced or [])
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask.long(), **{"max_new_tokens": 256} | options)


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
