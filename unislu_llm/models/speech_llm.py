"""A Whisper encoder, a projector and a causal LLM.

The LLM reads `[prompt prefix][speech][hypothesis][prompt suffix][target]`; speech or hypothesis may
be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import WhisperForConditionalGeneration as Whisper
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.config import ModelConfig
from unislu_llm.data.audio import encoder_length, mel_length
from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import Collator
from unislu_llm.data.text_injection import densify
from unislu_llm.errors import UserError
from unislu_llm.models.base import Objective, SLUModel
from unislu_llm.models.ctc import CTCProjector, CtcVocabulary
from unislu_llm.models.ctc_loss import SAMPLES, ctc_loss
from unislu_llm.models.encoder import SpeechEncoder, valid_mask
from unislu_llm.models.kv_cache import NoCache, State
from unislu_llm.models.lora import inject_lora, quantization
from unislu_llm.models.markers import install_markers
from unislu_llm.models.probe import probe
from unislu_llm.models.projector_base import Projected, Projector
from unislu_llm.models.projectors import NONE, build_projector
from unislu_llm.models.saved import Base
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer
from unislu_llm.weights import from_pretrained

_SPECIAL = re.compile(r"<\|[^|\s]+\|>|</?s>|<[a-z]+_of_[a-z]+>|</?think>|\[/?INST\]")
_POSITIONS = ("max_position_embeddings", "max_seq_len")  # where configurations have them
_ATTENTION = {"flash": "flash_attention_2", "flex": "flex_attention"}  # transformers' names

Part = tuple[Tensor, Sequence[int]]
"""Embeddings of one part of a prompt, `(batch, n, dim)` or `(1, n, dim)` where all rows have the
same, and how many positions of each row count."""


class SpeechLLM(SLUModel):
    """Speech in, unified text out, by a causal LLM.

    `whisper` is the encoder of a Whisper model; None with the projector `none`. The LLM, as
    transformers loads it, gets markers and LoRA here, its tokenizer the markers. Settings that do
    not fit each other are a `UserError`.
    """

    kind = "speech_llm"
    rewinds = True  # whether the LLM's cache can be cut and shared; else all is read again

    def __init__(self, config: ModelConfig, registry: TaskRegistry, whisper: WhisperEncoder | None,
                 llm: Any, tokenizer: Tokenizer, ctc_tokens: Sequence[int] | None = None) -> None:
        super().__init__(config, UnifiedTokenizer(tokenizer, registry))
        self.listens = whisper is not None
        self.reads_hypothesis = config.hypothesis != "none"
        self.encoder: SpeechEncoder | None = None
        self.projector: Projector | None = None
        if whisper is not None:
            self.n_mels = int(whisper.config.num_mel_bins)
            self.encoder = SpeechEncoder(whisper, config)
        self.llm = llm
        if getattr(llm.get_output_embeddings(), "weight", None) is None:
            raise UserError(f"model.llm {config.llm}: {type(llm).__name__} has no output layer")
        llm.requires_grad_(False)
        embeddings = llm.get_input_embeddings()
        if self.encoder is not None:
            self.projector = build_projector(
                config.projector, self.encoder.dim, int(embeddings.weight.shape[1]),
                _embedding_rms(embeddings), config.projector_options)
        if config.lora.rank:
            lora = inject_lora(self.body, config.lora, "LLM", owner=llm)
            self.config = config.model_copy(update={"lora": lora})
        else:
            self._frozen = (llm,)
        install_markers(llm, self.tokenizer)
        if ctc_tokens:
            self._attach(ctc_tokens)
        self.prefix = self.tokenizer.prompt_ids(config.prompt_prefix, first=True)
        self.suffix = self.tokenizer.prompt_ids(config.prompt_suffix)
        self.hypothesis_prompt = self.tokenizer.prompt_ids(config.hypothesis_prompt)
        if not (self.listens or self.reads_hypothesis):
            raise UserError("model.projector none leaves nothing to go by without a hypothesis; "
                            "set model.hypothesis too")
        if not (self.listens or self.prefix or self.suffix or self.hypothesis_prompt):
            raise UserError("model.projector none needs some prompt before an answer; set "
                            "model.hypothesis_prompt")
        sizes = (getattr(llm.config.get_text_config(), n, None) or 0 for n in _POSITIONS)
        self.positions = next((n for n in sizes if n > 0), None)
        self._check_prompt()
        self._finish()
        self.rewinds = probe(self)

    @classmethod
    def build(cls, config: ModelConfig, registry: TaskRegistry,
              dtype: torch.dtype = torch.float32, ctc_tokens: Sequence[int] | None = None,
              bases: Mapping[str, Base] | None = None) -> Self:
        stored, found = bases or {}, dict(bases or {})
        whisper: Any = None
        if config.projector != NONE:
            path, found["encoder"] = Base.resolve("encoder", config.encoder, stored.get("encoder"))
            whisper = from_pretrained(Whisper, path, dtype=torch.float32,
                                      attn_implementation="sdpa").model.encoder
            whisper = whisper.to(dtype if config.encoder_mode == "frozen" else torch.float32)
        path, found["llm"] = Base.resolve("LLM", config.llm, stored.get("llm"))
        tokenizer = from_pretrained(AutoTokenizer, path)  # of the two the one that is soon read
        options = quantization(config.quantization)
        if config.attention != "auto":
            options["attn_implementation"] = _ATTENTION.get(config.attention, config.attention)
        llm = from_pretrained(AutoModelForCausalLM, path, dtype=dtype, **options)
        # For CPUs bitsandbytes packs 4 bits anew when it first infers; then no gradient passes.
        for layer in [m for m in llm.modules() if hasattr(m, "support_avx512bf16_for_cpu")]:
            layer.support_avx512bf16_for_cpu = False
        model = cls(config, registry, whisper, llm, tokenizer, ctc_tokens)
        model.bases = found
        return model

    def _ctc(self) -> CTCProjector:
        if not isinstance(self.projector, CTCProjector):
            raise UserError("only the projector ctc has CTC; set model.projector ctc")
        return self.projector

    def _attach(self, token_ids: Sequence[int]) -> None:
        self._ctc().attach(self.llm.get_input_embeddings(), token_ids)
        self.ctc_tokens = tuple(token_ids)

    def learn_vocabulary(self, texts: Iterable[str]) -> None:
        """Give a `ctc` projector the tokens of training transcripts; UserError for another."""
        self._attach(CtcVocabulary.learn(texts, self.tokenizer).token_ids)

    @property
    def ctc_vocabulary(self) -> CtcVocabulary | None:
        """The vocabulary of a `ctc` projector; None before it is known, and for others."""
        return CtcVocabulary(self.ctc_tokens, self.tokenizer) if self.ctc_tokens else None

    @torch.no_grad()
    def _ctc_logits(self, batch: Batch) -> tuple[Tensor, tuple[int, ...]]:
        states, lengths = self._ctc().encode(*self._frames(batch))
        return self._ctc().logits(states), lengths

    def ctc_transcripts(self, batch: Batch) -> list[list[int]]:
        """Token ids of each clip's greedy transcript by a `ctc` projector, without the LLM."""
        return self._ctc().greedy(*self._ctc_logits(batch))

    def ctc_posteriors(self, batch: Batch) -> list[Tensor]:
        """Log-posteriors `(T_ctc, 1 + V)` of each clip by a `ctc` projector, blank first."""
        logits, lengths = self._ctc_logits(batch)
        return [row[:n].log_softmax(-1) for row, n in zip(logits, lengths, strict=True)]

    @property
    def body(self) -> Any:
        """The LLM without its output layer; Llama 4 has it by another name than it says."""
        return self.llm.model if self.llm.base_model is self.llm else self.llm.base_model

    @property
    def lm(self) -> Any:
        return self.llm

    def collator(self) -> Collator:
        prompt = self.hypothesis_prompt if self.reads_hypothesis else None
        return Collator(self.tokenizer, self.n_mels, self.config.silence,
                        hypothesis_prompt=prompt, listens=self.listens,
                        ctc_vocabulary=self.ctc_vocabulary)

    def token_counts(self, n_samples: int, n_target: int, n_hypothesis: int = 0) -> tuple[int, int]:
        frames = encoder_length(mel_length(n_samples))
        speech = self.projector.output_length(frames) if self.projector is not None else 0
        return speech, len(self.prefix) + n_hypothesis + len(self.suffix) + n_target - 1

    def _frames(self, batch: Batch) -> tuple[Tensor, tuple[int, ...]]:
        frames, lengths = super()._frames(batch)
        return frames[:, : max(lengths)], lengths  # behind them is silence

    def speech(self, batch: Batch, *, transcribe: bool = False) -> Projected | None:
        """Speech embeddings of a batch; None where the LLM is given none.

        With `transcribe` a `ctc` projector also gives its greedy transcript.
        """
        if self.projector is None or batch.kind == "text":
            return None
        if batch.posterior_classes is None or batch.posterior_shares is None:
            return self.projector(*self._frames(batch), transcribe=transcribe)
        # Posteriors simulated for a text go where the projector's own go: they are mixed alike.
        projector = self._ctc()
        return projector.mix(densify(batch.posterior_classes, batch.posterior_shares,
                                     len(projector.token_ids)), batch.speech_lengths)

    def forward(self, batch: Batch, objective: Objective = "unified") -> Tensor:
        if objective == "ctc":
            projector = self._ctc()
            states, lengths = projector.encode(*self._frames(batch))
            # A sample of the vocabulary is faster; outside of training the loss is exact.
            size = len(projector.token_ids)
            return self._idle(ctc_loss(states, lengths, batch.ctc_targets,
                                       projector.logits, size, SAMPLES if self.training else size))
        parts = self._prompt(batch, self.speech(batch))
        starts = [sum(n) - 1 for n in zip(*(lengths for _, lengths in parts), strict=True)]
        # The last token of a target is foretold, never read.
        read = [max(n - 1, 0) for n in batch.target_lengths]
        target = self.llm.get_input_embeddings()(batch.target_ids)
        embeds, _ = lay_out([*parts, (target, read)], "right")
        self.check_fit(embeds.shape[1], "target")
        # Right padding under a causal mask: no valid position sees a padded one; no mask is needed.
        # Layers that are computed again take no cache, and recurrent ones have their own kinds.
        cached = {} if self.recomputes or not self.rewinds else {"past_key_values": NoCache()}
        hidden = self.body(inputs_embeds=embeds, use_cache=False, **cached).last_hidden_state
        return self._target_losses(hidden, starts, batch)

    def _prompt(self, batch: Batch, speech: Projected | None) -> list[Part]:
        """`[prefix][speech][hypothesis][suffix]` of every row."""
        embed = self.llm.get_input_embeddings()
        prefix, suffix = (
            embed(torch.tensor([ids], dtype=torch.long).to(self.device, non_blocking=True))
            for ids in (self.prefix, self.suffix))
        parts: list[Part] = [(prefix, [len(self.prefix)] * len(batch))]
        if speech is not None:
            parts.append((speech.embeddings.to(prefix.dtype), speech.lengths))
        if batch.hypothesis_ids is not None:
            parts.append((embed(batch.hypothesis_ids), batch.hypothesis_lengths))
        return [*parts, (suffix, [len(self.suffix)] * len(batch))]

    def hypotheses(self, batch: Batch) -> list[list[int]] | None:
        if batch.hypothesis_ids is None:
            return None
        rows = zip(batch.hypothesis_ids.tolist(), batch.hypothesis_lengths, strict=True)
        return [ids[len(self.hypothesis_prompt):n] for ids, n in rows]

    def prefill(self, batch: Batch) -> State:
        speech = self.speech(batch, transcribe=True)
        embeds, totals = lay_out(self._prompt(batch, speech), "left")
        self.check_fit(embeds.shape[1] + 1, "answer")
        # On the left, so that the last position of every row foretells its first token.
        mask = valid_mask(totals, embeds.shape[1], embeds.device).flip(-1)
        state = State(DynamicCache(), mask[:, :0], embeds[:, -1],
                      hypothesis=self.hypotheses(batch),
                      ctc_hypothesis=None if speech is None else speech.ids)
        state.hidden = self._read(state, mask, inputs_embeds=embeds)[:, -1]
        return state

    def _read(self, state: State, valid: Tensor, **inputs: Tensor) -> Tensor:
        if self.rewinds:
            return self.body(**inputs, **self.cached(state, valid)).last_hidden_state
        # A recurrent state cannot be taken back, and padding would get into it. So the State keeps
        # what was read in the place of keys, and all is read again: slower, and as in training.
        embed = self.llm.get_input_embeddings()
        new = inputs["inputs_embeds"] if "inputs_embeds" in inputs else embed(inputs["input_ids"])
        state.append(valid)
        read = state.cache.update(new[:, None], new[:, None, :, :0], 0)[0][:, 0]
        # Padding comes last, where no token that counts sees it.
        order = state.mask.long().argsort(dim=1, descending=True, stable=True)
        laid = read.gather(1, order[..., None].expand_as(read))
        hidden = self.body(inputs_embeds=laid, use_cache=False).last_hidden_state
        back = order.argsort(dim=1)[:, -valid.shape[1]:, None]
        return hidden.gather(1, back.expand(-1, -1, hidden.shape[-1]))

    def cached(self, state: State, valid: Tensor) -> dict[str, Any]:
        """Arguments by which the LLM reads tokens into a state, of which `valid` count."""
        options = {"position_ids": state.append(valid), "attention_mask": state.mask.long(),
                   "past_key_values": state.cache, "use_cache": True}
        if "position_ids" not in signature(self.body.forward).parameters:
            del options["position_ids"]
        return options

    def _check_prompt(self) -> None:
        """Raises UserError: special tokens in the prompt's text that the LLM does not have."""
        base: Any = self.tokenizer.base
        for token in _SPECIAL.findall(self.config.prompt_prefix + self.config.prompt_suffix):
            # Some models write their turns in plain text: what their own template has is right.
            if token not in base.get_vocab() and token not in str(base.chat_template):
                raise UserError("model.prompt_prefix, prompt_suffix: the tokenizer of "
                                f"{self.config.llm} has no token '{token}'; write the prompt in "
                                "the LLM's own format, or give its preset by --adapter")


@torch.no_grad()
def _embedding_rms(embeddings: Any) -> float:
    """RMS of an LLM's embeddings as its first layer sees them (Gemma scales them), of a sample."""
    size = len(embeddings.weight)
    ids = torch.arange(0, size, max(1, size // 4096), device=embeddings.weight.device)
    return float(embeddings(ids).float().pow(2).mean().sqrt())


def lay_out(parts: Sequence[Part], padding: Literal["left", "right"]) -> tuple[Tensor, list[int]]:
    """Parts of every row end to end, `(batch, length, dim)`, and how many positions count."""
    # The positions of a batch are one gather from a table of all parts, whose index is made on the
    # CPU. Cutting and joining row by row would cost a kernel for each part of each row, and in the
    # backward pass a tensor of the whole part for each cut.
    rows = []
    for i in range(len(parts[0][1])):
        pieces, offset = [], 1
        for embeddings, lengths in parts:
            count, size = embeddings.shape[:2]
            begin = offset + (i * size if count > 1 else 0)
            pieces.append(torch.arange(begin, begin + lengths[i]))
            offset += count * size
        rows.append(torch.cat(pieces))
    # Padding points to the row of zeros that the table begins with.
    index = pad_sequence(rows, batch_first=True, padding_side=padding)
    zeros = parts[0][0].new_zeros(1, parts[0][0].shape[-1])
    table = torch.cat([zeros, *(embeddings.flatten(0, 1) for embeddings, _ in parts)])
    laid = table.index_select(0, index.flatten().to(table.device, non_blocking=True))
    return laid.view(*index.shape, -1), [len(row) for row in rows]
