"""CTC projector: frames to the LLM's own tokens, and from there to the LLM's own embeddings.

A small transformer over stacked encoder frames predicts, frame by frame, one of the LLM's tokens or blank. It is scored against
the LLM's (tied, frozen) embedding matrix, so that it learns by CTC from transcripts alone, without running the LLM. What the LLM
then gets is near-text: each stretch of frames on one token becomes one position, the posterior-weighted mixture of token
embeddings, plus a small learned residual of the acoustic frames (LegoSLM, arXiv 2505.11352; CJST, arXiv 2411.07607).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.errors import UserError
from unislu_llm.models.encoder import attention_bias, valid_mask
from unislu_llm.models.projector_base import Projector, ceil_div, stack_frames

BLANK = 0
"""Class of the blank; token i of a vocabulary is class i + 1."""


@dataclass(frozen=True)
class CtcVocabulary:
    """The LLM's tokens that CTC chooses among.

    Args:
        token_ids: ids in the LLM's vocabulary, ascending.
        pieces: the tokenizer's own string of each; without them no other token can be spelt.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...] = ()

    @classmethod
    def learn(cls, texts: Iterable[Sequence[int]], tokenizer: Any, min_count: int = 1) -> CtcVocabulary:
        """From token ids of training transcripts.

        Args:
            texts: ids of each transcript, tokenised as :meth:`unislu_llm.data.targets.TextCodec.text_ids` does.
            tokenizer: theirs.
            min_count: rarer tokens are left out and spelt with smaller ones: a token heard twice is not learned, its letters
                are.

        Raises:
            UserError: no text.
        """
        counts = Counter(i for ids in texts for i in ids)
        if not counts:
            raise UserError("no transcript to learn the CTC vocabulary from")
        strings = tokenizer.convert_ids_to_tokens(sorted(counts))
        letters = tokenizer.convert_tokens_to_ids(sorted(set("".join(strings))))
        letters = [i for i in letters if i is not None and i != tokenizer.unk_token_id]
        kept = sorted({i for i, n in counts.items() if n >= min_count} | set(letters))
        return cls(tuple(kept), tuple(tokenizer.convert_ids_to_tokens(kept)))

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def _class(self) -> dict[int, int]:
        return {token: i + 1 for i, token in enumerate(self.token_ids)}

    @cached_property
    def _piece_class(self) -> dict[str, int]:
        return {piece: i + 1 for i, piece in enumerate(self.pieces)}

    def classes(self, ids: Sequence[int], tokenizer: Any) -> list[int]:
        """Classes (1 and up) of a transcript's tokens; a token outside is spelt with as few pieces as do, or left out."""
        out: list[int] = []
        for i in ids:
            found = self._class.get(int(i))
            out += [found] if found else self._spell(tokenizer.convert_ids_to_tokens(int(i)))
        return out

    def _spell(self, word: str) -> list[int]:
        known = self._piece_class
        best: list[list[int] | None] = [[], *[None] * len(word)]
        for end in range(1, len(word) + 1):
            options = [[*head, known[word[start:end]]] for start in range(end)
                       if word[start:end] in known and (head := best[start]) is not None]
            best[end] = min(options, key=len) if options else None
        return best[-1] or []


class CtcBlock(nn.Module):
    """Pre-norm transformer layer with a depthwise convolution before attention, which sees order and neighbours.

    Args:
        dim: size of a frame. heads: of attention. kernel: frames of the convolution (odd). dropout: of each branch's output.
    """

    def __init__(self, dim: int, heads: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_conv, self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        """`(batch, T, dim)`; mask `(batch, T)` of valid frames; bias as :func:`attention_bias` gives it."""
        inside = self.norm_conv(x).masked_fill(~mask[:, :, None], 0.0)
        x = x + self._drop(F.gelu(self.conv(inside.transpose(1, 2))).transpose(1, 2))
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        x = x + self._drop(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self._drop(self.down(F.gelu(self.up(self.norm_mlp(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CTCProjector(Projector):
    """Frames to posteriors over the LLM's tokens, to a mixture of its embeddings.

    The LLM's embedding module and the vocabulary come by :meth:`attach`; the module is referred to, never copied or saved.

    Args:
        stack: frames a CTC frame; 3 gives 16.7 Hz.
        layers, heads, hidden: of the transformer; hidden 0 means the encoder's size.
        kernel: CTC frames of the convolution in each layer.
        dropout: in training, of each branch.
        temperature: of the posteriors in the mixture; towards 0 the LLM sees the greedy transcript.
        blank_threshold: posterior of blank from which a frame is dropped; higher keeps doubtful frames.
        blank_bias: logit of blank at the start.
        residual: share of the acoustic residual at the start, of the embeddings' RMS.

    Attributes:
        heard: token ids of the greedy CTC transcripts of the last clips that went through in eval mode.

    Raises:
        UserError: an option out of range.
    """

    needs_embeddings = True

    def __init__(self, in_dim: int, out_dim: int, scale: float, stack: int = 3, layers: int = 2, heads: int = 8, hidden: int = 0,
                 kernel: int = 5, dropout: float = 0.1, temperature: float = 1.0, blank_threshold: float = 0.5,
                 blank_bias: float = 8.0, residual: float = 0.01) -> None:
        super().__init__(in_dim, out_dim, scale)
        hidden = hidden or in_dim
        if hidden % heads or not kernel % 2:
            raise UserError(f"ctc: hidden={hidden} must be a multiple of heads={heads}, and kernel={kernel} odd")
        if not (temperature > 0 and 0 < blank_threshold <= 1 and 0 <= dropout < 1):
            raise UserError(f"ctc: temperature={temperature} must be above 0, blank_threshold={blank_threshold} in (0, 1], "
                            f"dropout={dropout} in [0, 1)")
        self.stack, self.temperature, self.blank_threshold = stack, temperature, blank_threshold
        self.norm_in = nn.LayerNorm(in_dim)
        self.proj_in = nn.Linear(stack * in_dim, hidden)
        self.blocks = nn.ModuleList(CtcBlock(hidden, heads, kernel, dropout) for _ in range(layers))
        self.norm_out = nn.LayerNorm(hidden)
        self.to_token = nn.Linear(hidden, out_dim)
        self.blank = nn.Parameter(torch.randn(out_dim))
        self.blank_bias = nn.Parameter(torch.tensor(float(blank_bias)))
        self.to_residual = nn.Linear(hidden, out_dim)
        self.gate = nn.Parameter(torch.tensor(float(residual)))
        # Not persistent: its size is unknown before `attach`; a saved model has the ids in its configuration.
        self.register_buffer("token_ids", torch.zeros(0, dtype=torch.long), persistent=False)
        self._embeddings: tuple[nn.Module, ...] = ()
        self.heard: list[list[int]] = []

    def attach(self, embeddings: nn.Module, token_ids: Sequence[int]) -> None:
        """Give the projector the LLM's input embedding and the ids of the tokens that it predicts.

        Args:
            embeddings: ids to `(..., H)` as the LLM's first layer sees them. token_ids: class i + 1 is `token_ids[i]`.
        """
        self._embeddings = (embeddings,)  # in a tuple, so that it does not become a submodule
        self.token_ids = torch.tensor(list(token_ids), dtype=torch.long, device=self.blank.device)

    def output_length(self, frames: Any) -> Any:
        """CTC frames of `frames` encoder frames: what the LLM gets is at most as long."""
        return ceil_div(frames, self.stack)

    def rows(self, classes: Tensor | None = None) -> Tensor:
        """Embeddings `(n, H)`, fp32, of classes 1 and up; default: of all.

        Raises:
            UserError: no vocabulary yet.
        """
        if not self._embeddings or not len(self.token_ids):
            raise UserError("the ctc projector has no vocabulary yet; learn it from training transcripts "
                            "(SpeechLLM.learn_vocabulary) before training or use")
        ids = self.token_ids if classes is None else self.token_ids[classes - 1]
        with torch.no_grad():
            table: Tensor = self._embeddings[0].weight  # type: ignore[assignment]
            return self._embeddings[0](ids.to(table.device)).to(self.blank.device, torch.float32)

    def encode(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Acoustic states `(batch, T_ctc, hidden)` and their lengths; frames `(batch, T_enc, D)` at 50 Hz."""
        frames = frames.to(self.blank.dtype).masked_fill(~valid_mask(lengths, frames.shape[1])[:, :, None], 0.0)
        mask = valid_mask(lengths, frames.shape[1])[:, :, None]
        x = self.proj_in(stack_frames(self.norm_in(frames).masked_fill(~mask, 0.0), self.stack))
        out = self.output_length(lengths)
        inside, bias = valid_mask(out, x.shape[1]), attention_bias(out, x.shape[1], x.dtype)
        for block in self.blocks:
            x = block(x, inside, bias)
        return self.norm_out(x), out

    def logits(self, states: Tensor, classes: Tensor | None = None) -> Tensor:
        """`(..., hidden)` to `(..., 1 + n)`, fp32: blank, then `classes` (1 and up; default: all)."""
        with torch.autocast(states.device.type, enabled=False):
            rows = self.rows(classes) / self.norm.scale
            scores = self.to_token(states.float()) @ torch.cat([self.blank[None], rows]).T / self.out_dim ** 0.5
            shift = F.pad(self.blank_bias[None], (0, rows.shape[0]))
            return scores + shift

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states, out = self.encode(frames, lengths)
        residual = self.gate * self.norm(self.to_residual(states))
        logits = self.logits(states)
        if not self.training:
            tokens = self.token_ids.tolist()
            self.heard = [[tokens[c - 1] for c in collapse(row[:n])]
                          for row, n in zip(logits.argmax(-1), out.tolist(), strict=True)]
        return self.mix(logits, out, residual)

    def mix(self, logits: Tensor, lengths: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the LLM gets for posteriors, of speech or simulated from text.

        Args:
            logits: `(batch, T_ctc, 1 + V)`, log-posteriors will do. lengths: `(batch,)`. residual: `(batch, T_ctc, H)`.

        Returns:
            `(batch, T_sp, H)`, zero beyond the lengths, and lengths `(batch,)`, each at least 1.
        """
        return mix_embeddings(logits, lengths, self.rows(), self.temperature, self.blank_threshold, residual)

    @torch.no_grad()
    def ctc_ids(self, frames: Tensor, lengths: Tensor) -> list[list[int]]:
        """Greedy CTC transcript of each clip in the LLM's token ids: a draft at no decoder's cost."""
        return self.greedy(*self.encode(frames, lengths))[0]

    @torch.no_grad()
    def greedy(self, states: Tensor, lengths: Tensor) -> tuple[list[list[int]], list[int]]:
        """Greedy transcript in token ids, and frames that are not blank, of each clip's states `(batch, T_ctc, hidden)`."""
        ids, kept, tokens = [], [], self.token_ids.tolist()
        for row, n in zip(states, lengths.tolist(), strict=True):
            best = self.logits(row[:n]).argmax(-1)
            ids.append([tokens[c - 1] for c in collapse(best)])
            kept.append(int((best != BLANK).sum()))
        return ids, kept


def collapse(best: Tensor) -> list[int]:
    """Classes `(T,)` of the best path to its labels: repetitions become one, blanks go."""
    merged = torch.unique_consecutive(best)
    return [int(c) for c in merged if c != BLANK]


def mix_embeddings(logits: Tensor, lengths: Tensor, rows: Tensor, temperature: float = 1.0, blank_threshold: float = 0.5,
                   residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Posteriors to embeddings: blank frames are dropped, neighbours with the same best token become one position.

    The posteriors of such a run are averaged by how little blank each frame has, and mix the rows. The mixture is as loud as its
    rows are on average: an undecided one would otherwise be quieter than any text. What is dropped is a hard decision, without
    gradient; the mixture is differentiable. A clip without any frame left keeps the one that is least blank.

    Args:
        logits: `(batch, T, 1 + V)`, blank first. lengths: `(batch,)`. rows: `(V, H)`.
        temperature: of the tokens' posteriors. blank_threshold: posterior of blank from which a frame is dropped.
        residual: `(batch, T, H)`, averaged and added likewise.

    Returns:
        `(batch, T_sp, H)`, zero beyond the lengths, and lengths `(batch,)`.
    """
    logits = logits.float()
    odds = logits[..., BLANK] - logits[..., 1:].logsumexp(-1)  # log-odds of blank: they do not saturate as its posterior does
    with torch.no_grad():
        run, first = _runs(logits, lengths, odds, float(torch.tensor(blank_threshold).logit()))
    kept = run >= 0
    runs = run[kept]
    weight = odds[kept].neg().sigmoid().clamp(min=1e-6)[:, None]
    n_runs = int(first.sum())
    share = weight / weight.new_zeros(n_runs, 1).index_add(0, runs, weight)[runs]
    tokens = (logits[kept][:, 1:] / temperature).softmax(-1)
    tokens = tokens.new_zeros(n_runs, tokens.shape[-1]).index_add(0, runs, share * tokens)
    mixed = tokens @ rows
    loudness = (tokens @ rows.norm(dim=-1, keepdim=True)) / mixed.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    mixed = mixed * loudness
    if residual is not None:
        extra = share * residual[kept].float()
        mixed = mixed + extra.new_zeros(mixed.shape).index_add(0, runs, extra)
    counts = first.sum(-1)
    return pad_sequence(list(mixed.split(counts.tolist())), batch_first=True), counts


def _runs(logits: Tensor, lengths: Tensor, odds: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Number of the run `(batch, T)` that each frame is in, -1 where it is dropped, and which frames start one."""
    inside = valid_mask(lengths, logits.shape[1])
    keep = inside & (odds < threshold)
    least = odds.masked_fill(~inside, torch.inf).argmin(-1)
    alone = ~keep.any(-1)
    keep[alone, least[alone]] = True
    top = logits[..., 1:].argmax(-1).masked_fill(~keep, -1)
    before = F.pad(top[:, :-1], (1, 0), value=-1)
    first = keep & (top != before)
    return (first.flatten().cumsum(0) - 1).view_as(top).masked_fill(~keep, -1), first
