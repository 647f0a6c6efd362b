"""CTC projector: frames to the LLM's own tokens, and from there to the LLM's own embeddings.

A small transformer over stacked encoder frames predicts, frame by frame, one of the LLM's tokens or
blank. It is scored against the LLM's (tied, frozen) embedding matrix, so that it learns by CTC from
transcripts alone, without running the LLM. What the LLM then gets is near-text: each stretch of
frames on one token becomes one position, the posterior-weighted mixture of token embeddings, plus a
small learned residual of the acoustic frames (LegoSLM, arXiv 2505.11352; CJST, arXiv 2411.07607).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.errors import UserError
from unislu_llm.models.encoder import attention_bias, valid_mask, zero_beyond
from unislu_llm.models.projector_base import Projected, Projector, stack_frames
from unislu_llm.setting_types import Few, Share, Width
from unislu_llm.tokenizer import UnifiedTokenizer

BLANK = 0
"""Class of the blank; token i of a vocabulary is class i + 1."""


class CtcVocabulary:
    """Classes of CTC: 0 is blank, the LLM's token `token_ids[i]` is class i + 1."""

    def __init__(self, token_ids: Sequence[int], tokenizer: UnifiedTokenizer) -> None:
        self.token_ids, self._tokenizer = tuple(token_ids), tokenizer
        pieces = tokenizer.base.convert_ids_to_tokens(list(token_ids))
        self._class = {token: i for i, token in enumerate(token_ids, 1)}
        self._piece_class = {piece: i for i, piece in enumerate(pieces, 1)}

    @classmethod
    def learn(cls, texts: Iterable[str], tokenizer: UnifiedTokenizer) -> CtcVocabulary:
        """The tokens of training transcripts, and their letters; UserError without a text."""
        found = {i for text in texts for i in tokenizer.text_ids(text)}
        if not found:
            raise UserError("no transcript to learn the CTC vocabulary from")
        # With the letters, words of other texts can be spelt: text injection needs their classes.
        base: Any = tokenizer.base
        strings = base.convert_ids_to_tokens(sorted(found))
        letters = base.convert_tokens_to_ids(sorted(set("".join(strings))))
        found |= {i for i in letters if i is not None and i != base.unk_token_id}
        return cls(sorted(found), tokenizer)

    def classes(self, text: str) -> list[int]:
        """Classes (1 and up) of a transcript's tokens; those outside are spelt, or left out."""
        out: list[int] = []
        for i in self._tokenizer.text_ids(text):
            known = self._class.get(i)
            out += [known] if known else self._spell(i)
        return out

    def _spell(self, token: int) -> list[int]:
        """The shortest sequence of pieces that makes up a token."""
        known, word = self._piece_class, str(self._tokenizer.base.convert_ids_to_tokens(token))
        # best[n] is that of the first n letters; None where no pieces make them up.
        best: list[list[int] | None] = [[], *[None] * len(word)]
        for end in range(1, len(word) + 1):
            options = [[*head, known[word[start:end]]] for start in range(end)
                       if word[start:end] in known and (head := best[start]) is not None]
            best[end] = min(options, key=len) if options else None
        return best[-1] or []


class CtcBlock(nn.Module):
    """Pre-norm transformer layer; a depthwise convolution before attention sees order."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.norm_conv, self.norm_attention = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, dim, 5, padding=2, groups=dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, outside: Tensor, bias: Tensor | None) -> Tensor:
        """`(batch, T, dim)` to the same; `outside`, `(batch, T, 1)` bool, is what is padding."""
        inside = self.norm_conv(x).masked_fill(outside, 0.0)
        x = x + self.drop(F.gelu(self.conv(inside.transpose(1, 2))).transpose(1, 2))
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Under autocast the queries are in another dtype than the states.
        mask = None if bias is None else bias.to(q.dtype)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.drop(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_mlp(x)))))


class CTCProjector(Projector):
    """Frames to posteriors over the LLM's tokens, to a mixture of its embeddings."""

    def __init__(self, in_dim: int, out_dim: int, scale: float,
                 stack: Few = 3,  # frames a CTC frame; 3 gives 16.7 Hz
                 layers: Few = 2, heads: Few = 8, dropout: Share = 0.1,
                 hidden: Width = 0,  # width of the transformer; 0 is the encoder's
                 blank_bias: float = 8.0,  # logit of blank at the start
                 ) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or in_dim
        if hidden % heads:
            raise UserError(f"ctc: hidden={hidden} must be a multiple of heads={heads}")
        self.stack = stack
        self.norm_in = nn.LayerNorm(in_dim)
        self.proj_in = nn.Linear(stack * in_dim, hidden)
        self.blocks = nn.ModuleList(CtcBlock(hidden, heads, dropout) for _ in range(layers))
        self.norm_out = nn.LayerNorm(hidden)
        self.to_token = nn.Linear(hidden, out_dim)
        self.blank = nn.Parameter(torch.randn(out_dim))
        # Of one dimension each: FSDP shards no scalars.
        self.blank_bias = nn.Parameter(torch.tensor([float(blank_bias)]))
        self.to_residual = nn.Linear(hidden, out_dim)
        self.gate = nn.Parameter(torch.tensor([0.01]))  # of the embeddings' RMS
        self.token_ids: tuple[int, ...] = ()
        # Not persistent: a saved model has the ids in its configuration.
        self.register_buffer("_ids", torch.zeros(0, dtype=torch.long), persistent=False)
        self._embeddings: tuple[nn.Module, ...] = ()

    def attach(self, embeddings: nn.Module, token_ids: Sequence[int]) -> None:
        """Give the projector the LLM's input embedding, and the ids of classes 1 and up."""
        # In a tuple it does not become a submodule, is neither copied nor saved.
        self._embeddings = (embeddings,)
        self.token_ids = tuple(int(i) for i in token_ids)
        self._ids = torch.tensor(self.token_ids, dtype=torch.long, device=self.blank.device)

    def rows(self, classes: Tensor | None = None) -> Tensor:
        """Embeddings `(n, H)`, fp32, of classes 1 and up (all); UserError without a vocabulary."""
        if not self.token_ids:
            raise UserError("the ctc projector has no vocabulary yet; learn it from training "
                            "transcripts (SpeechLLM.learn_vocabulary) before training or use")
        ids = self._ids if classes is None else self._ids[classes - 1]
        with torch.no_grad():
            return self._embeddings[0](ids).to(self.blank.device, torch.float32)

    def encode(self, frames: Tensor, lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Frames `(batch, T_enc, D)` to acoustic states `(batch, T_ctc, hidden)` and lengths."""
        clean = zero_beyond(self.norm_in(self._clean(frames, lengths)), lengths)
        x = self.proj_in(stack_frames(clean, self.stack))
        out = tuple(self.output_length(n) for n in lengths)
        beyond = ~valid_mask(out, x.shape[1], x.device)[:, :, None]
        bias = attention_bias(out, x.shape[1], x.dtype, x.device)
        for block in self.blocks:
            x = block(x, beyond, bias)
        return self.norm_out(x), out

    def logits(self, states: Tensor, classes: Tensor | None = None) -> Tensor:
        """`(..., hidden)` to `(..., 1 + n)`, fp32: blank, then `classes` (default: all)."""
        # bf16 would leave two tokens of near-equal score to rounding.
        where = "cpu" if states.is_meta else states.device.type  # autocast knows no shapes
        with torch.autocast(where, enabled=False):
            rows = self.rows(classes) / self.norm.scale
            keys = torch.cat([self.blank[None], rows])
            scores = self.to_token(states.float()) @ keys.T / len(self.blank) ** 0.5
            return scores + F.pad(self.blank_bias, (0, len(rows)))

    def forward(self, frames: Tensor, lengths: Sequence[int], *,
                transcribe: bool = False) -> Projected:
        states, out = self.encode(frames, lengths)
        residual = self.gate * self.norm(self.to_residual(states))
        logits = self.logits(states)
        mixed = self.mix(logits, out, residual)
        return mixed._replace(ids=self.greedy(logits, out)) if transcribe else mixed

    def greedy(self, logits: Tensor, lengths: Sequence[int]) -> list[list[int]]:
        """Token ids of each clip's best path by :meth:`logits`."""
        best = logits.argmax(-1).cpu()
        return [[self.token_ids[c - 1] for c in collapse(row[:n])]
                for row, n in zip(best, lengths, strict=True)]

    def mix(self, logits: Tensor, lengths: Sequence[int],
            residual: Tensor | None = None) -> Projected:
        """What the LLM gets for posteriors, of speech or simulated from text.

        Blank frames are dropped, neighbours with the same best token become one position. The
        posteriors of such a run are averaged by how little blank each frame has, and mix the rows.
        What is dropped is a hard decision, without gradient; the mixture is differentiable. A clip
        without any frame left keeps the one that is least blank.

        Logits are `(batch, T_ctc, 1 + V)` (log-posteriors will do), of which `lengths` count. A
        `residual` `(batch, T_ctc, H)` is averaged likewise and added.
        """
        logits = logits.float()
        # Log-odds of blank do not saturate, as its posterior does near one.
        odds = logits[..., BLANK] - logits[..., 1:].logsumexp(-1)
        # How many positions there are depends on the data: the one wait for the device.
        run, first = self._runs(logits, lengths, odds).cpu()
        counts = tuple(first.sum(-1).tolist())
        places = (run.flatten() >= 0).nonzero()[:, 0]
        runs = run.flatten()[places].to(logits.device, non_blocking=True)
        kept = places.to(logits.device, non_blocking=True)

        def summed(values: Tensor) -> Tensor:  # (frames kept, n) to (runs, n)
            return values.new_zeros(sum(counts), values.shape[-1]).index_add(0, runs, values)

        frames = logits.flatten(0, 1).index_select(0, kept)
        weight = odds.flatten().index_select(0, kept).neg().sigmoid().clamp(min=1e-6)[:, None]
        share = weight / summed(weight)[runs]
        tokens = summed(share * frames[:, 1:].softmax(-1))
        # The mixture is as loud as its rows are on average: an undecided one is a mean of vectors
        # that point apart, and would be quieter than any text that the LLM has seen.
        rows = self.rows()
        mixed, size = tokens @ rows, tokens @ rows.norm(dim=-1, keepdim=True)
        mixed = mixed * (size / mixed.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        if residual is not None:
            extra = residual.flatten(0, 1).index_select(0, kept).float()
            mixed = mixed + summed(share * extra)
        return Projected(pad_sequence(list(mixed.split(list(counts))), batch_first=True), counts)

    @torch.no_grad()
    def _runs(self, logits: Tensor, lengths: Sequence[int], odds: Tensor) -> Tensor:
        """`(2, batch, T)`: the run that each frame is in, -1 where dropped, and 1 at its start."""
        inside = valid_mask(lengths, logits.shape[1], logits.device)
        keep = inside & (odds < 0)
        least = F.one_hot(odds.masked_fill(~inside, torch.inf).argmin(-1), odds.shape[1]).bool()
        keep = keep | (least & ~keep.any(-1, keepdim=True))
        top = logits[..., 1:].argmax(-1).masked_fill(~keep, -1)
        before = F.pad(top[:, :-1], (1, 0), value=-1)
        first = keep & (top != before)
        run = (first.flatten().cumsum(0) - 1).view_as(top).masked_fill(~keep, -1)
        return torch.stack([run, first.long()])


def collapse(best: Tensor) -> list[int]:
    """Classes `(T,)` of the best path to its labels: repetitions become one, blanks go."""
    return [c for c in torch.unique_consecutive(best).tolist() if c != BLANK]
