"""What Whisper's own decoder makes of each word of the hypothesis, added to the LLM's embedding of
it.

The frozen decoder reads the hypothesis over the encoder's frames, all tokens in one pass. Its state
before a token says which token it expects there: how sure it is of the one that is there, and what
else it may be. This is given to the LLM's tokens of the same characters, since the two tokenizers
differ (decoder states as in SALSA, arXiv 2408.16542; what else it may be as the mixture of the
`ctc` projector). It begins as a model that only reads, and can only learn to use what it hears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unislu_llm.errors import UserError
from unislu_llm.models.encoder import attention_bias
from unislu_llm.models.projector_base import Projector
from unislu_llm.models.whisper_decoder import run_decoder
from unislu_llm.setting_types import Switch
from unislu_llm.tokenizer import UnifiedTokenizer

_ALTERNATIVES = 8  # tokens besides the one that is there
_POSITIONS = 256  # whose logits exist at one time


@dataclass(frozen=True)
class Alignment:
    """Hypotheses as Whisper's decoder reads them. It holds no weights."""

    whisper: Any  # its tokenizer
    prompt: tuple[int, ...]
    most: int  # tokens that its positions hold, prompt included

    def read(self, text: str) -> list[int]:
        """Whisper's ids of a hypothesis, without its prompt."""
        text = " ".join(text.split())
        ids = self.whisper(f" {text}", add_special_tokens=False,
                           split_special_tokens=True)["input_ids"] if text else []
        return list(ids[:self.most - len(self.prompt)])

    def spans(self, read: Sequence[int], own: Sequence[int],
              tokenizer: UnifiedTokenizer) -> list[tuple[int, int]]:
        """Of each of the LLM's `own` ids of a hypothesis the first and behind the last of those
        `read` that share a letter with it; the same number twice where none does."""
        theirs, mine = _letters(self.whisper, read), _letters(tokenizer.base, own)
        spans, first, last = [], 0, 0
        for begin, end in zip([0, *mine], mine, strict=False):
            while first < len(theirs) and theirs[first] <= begin:
                first += 1
            last = max(last, first)
            while last < len(theirs) and (theirs[last - 1] if last else 0) < end:
                last += 1
            spans.append((first, last) if end > begin else (first, first))
        return spans


def _letters(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """How many letters (all but blanks) ids have so far, after each of them."""
    # By what the ids say so far: a letter may take several tokens, and is there with the last one.
    said = (tokenizer.decode(list(ids[:n]), clean_up_tokenization_spaces=False).rstrip("\ufffd")
            for n in range(1, len(ids) + 1))
    return list(accumulate((len("".join(text.split())) for text in said), max))


class DecoderProjector(Projector):
    """States, doubt and alternatives of Whisper's decoder to what is added to embeddings.

    Args:
        states: give the decoder's last state, `(D,)`.
        doubt: give the token's log-probability, and the entropy of what may stand there.
        alternatives: give what else may stand there, as a mixture of the LLM's embeddings.
    """

    def __init__(self, in_dim: int, out_dim: int, scale: float, states: Switch = True,
                 doubt: Switch = True, alternatives: Switch = True) -> None:
        nn.Module.__init__(self)
        if not (states or doubt or alternatives):
            raise UserError("projector 'decoder': states, doubt and alternatives are all off; "
                            "leave one on, or set model.projector none")
        self.states, self.doubt, self.alternatives, self.scale = states, doubt, alternatives, scale
        self.norm_in = nn.LayerNorm(in_dim) if states else nn.Identity()
        self.proj = nn.Linear(in_dim * states + 2 * doubt + out_dim * alternatives, out_dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        # Parts of the model, which are not the projector's: in tuples they become no submodules.
        self._decoder: tuple[Any, ...] = ()
        self._embeddings: tuple[Any, ...] = ()
        self.register_buffer("_same", torch.zeros(0, dtype=torch.long), persistent=False)

    def attach(self, decoder: Any, alignment: Alignment, embeddings: nn.Module,
               tokenizer: UnifiedTokenizer) -> None:
        """Give the projector Whisper's decoder, and the LLM's embeddings of Whisper's tokens."""
        decoder.requires_grad_(False).eval()
        self._decoder, self._embeddings, self.alignment = (decoder,), (embeddings,), alignment
        if self.alternatives:
            self._same = _same_tokens(alignment.whisper, tokenizer, len(decoder.embed_tokens.weight)
                                      ).to(self.proj.weight.device)

    def output_length(self, frames: int) -> int:
        """It gives the LLM no positions of its own."""
        return 0

    def listen(self, frames: Tensor, lengths: Sequence[int], ids: Tensor,
               spans: Tensor) -> Tensor:
        """What is added to the embeddings of hypotheses, `(batch, L, H)`, fp32.

        Of frames `(batch, T_enc, D)`, of which `lengths` count, Whisper's ids `(batch, L_w)` with
        any filler, and the spans `(batch, L, 2)` of these for each of the LLM's tokens.
        """
        decoder, prompt = self._decoder[0], self.alignment.prompt
        trains = torch.is_grad_enabled() and frames.requires_grad
        with torch.set_grad_enabled(trains):
            frames = frames.to(decoder.layer_norm.weight.dtype)
            bias = attention_bias(lengths, frames.shape[1], frames.dtype, frames.device)
            head = torch.tensor(prompt).to(ids.device, non_blocking=True).expand(len(ids), -1)
            hidden = run_decoder(decoder, torch.cat([head, ids[:, :-1]], 1), frames, bias)
            hidden = hidden[:, len(prompt) - 1:]
        parts = [self.norm_in(hidden.float())] if self.states else []
        if self.doubt or self.alternatives:
            parts += self._expected(hidden, ids)
        found = F.pad(torch.cat(parts, -1).cumsum(1), (0, 0, 1, 0))
        first, last = (spans[..., i, None].expand(-1, -1, found.shape[-1]) for i in (0, 1))
        count = (spans[..., 1] - spans[..., 0])[..., None]
        mean = (found.gather(1, last) - found.gather(1, first)) / count.clamp(min=1)
        return self.scale * self.proj(mean) * (count > 0)

    @torch.no_grad()
    def _expected(self, hidden: Tensor, ids: Tensor) -> list[Tensor]:
        """Doubt `(batch, L_w, 2)` and alternatives `(batch, L_w, H)`, where they are asked for."""
        output = self._decoder[0].embed_tokens.weight.T
        doubt, others = [], []
        for some, there in zip(hidden.flatten(0, 1).split(_POSITIONS),
                               ids.flatten().split(_POSITIONS), strict=True):
            log_probs = (some @ output).float().log_softmax(-1)
            own = log_probs.gather(1, there[:, None])
            if self.doubt:
                entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
                doubt.append(torch.cat([own / 4, entropy / 4], 1))  # about as large as states
            if self.alternatives:
                best = log_probs.scatter(1, there[:, None], -torch.inf).topk(_ALTERNATIVES)
                share = best.values.exp()  # together as loud as they are likely
                rows = self._embeddings[0](self._same[best.indices]).float()
                others.append((share[:, None] @ rows)[:, 0] / self.scale)
        shape = (*ids.shape, -1)
        return [torch.cat(parts).view(shape) for parts in (doubt, others) if parts]


def _same_tokens(whisper: Any, tokenizer: UnifiedTokenizer, size: int) -> Tensor:
    """Of each of Whisper's ids the LLM's first id of the same text, or the end of text."""
    base: Any = tokenizer.base
    texts = whisper.batch_decode([[i] for i in range(size)], skip_special_tokens=True)
    found = base([text or "." for text in texts], add_special_tokens=False,
                 split_special_tokens=True)["input_ids"]
    return torch.tensor([ids[0] if text.strip() and ids else tokenizer.eos_id
                         for text, ids in zip(texts, found, strict=True)])


