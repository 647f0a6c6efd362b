"""Keeping to the draft: in its transcript an LLM is drawn to the draft's next words, and departs from them where it is sure.

The draft is a recogniser's, or, where a model reads none, what its own `ctc` projector heard. A small LLM paraphrases what it
should copy: it shortens, completes, repeats. The bonus is shallow fusion with a copy model whose place in the draft is the end
of a Levenshtein alignment of the transcript so far (as in biasing by context, Pundak et al. 2018, arXiv 1808.02480, where the
phrases are fixed and their automaton is walked by prefix).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from unislu_llm.data.targets import TextCodec
from unislu_llm.decoding.vocabulary import BROKEN, vocabulary_of
from unislu_llm.models.state import Encoded
from unislu_llm.tasks import SEPARATOR

_FAR = 1 << 20


class DraftBias(LogitsProcessor):
    """Add `bonus` nats to the tokens with which a transcript goes on along its draft; for one call of `generate`.

    Punctuation is not aligned and stays the LLM's own. Where the draft ends, the bonus is
    for what may stand there: punctuation, `[T/L]`, the end of text. To end before that leaves out the rest of the draft,
    and costs the bonus once for each of its tokens (a coverage penalty, as in Wu et al. 2016, arXiv 1609.08144):
    otherwise one choice would drop a sentence for the price of a word. Where reading on wins by that, it takes the score
    that the end had, so that nothing else profits. Rows without a draft, and everything after `[T/L]`, are left as they
    are. All is done on the device.

    Args:
        codec: of the model. drafts: ids of each row's draft, `(L,)`; empty for none.
        bonus: nats. start: tokens in the ids before the first new one.
        then: a processor that comes after it.
    """

    def __init__(self, codec: TextCodec, drafts: list[Tensor], bonus: float, start: int = 0,
                 then: LogitsProcessor | None = None) -> None:
        self.bonus, self.start, self.then = bonus, start, then
        self._codec = codec
        aligned = _aligned(codec)
        kept = [ids[aligned[ids.cpu()].to(ids.device)] for ids in drafts]
        self._draft = pad_sequence(kept, batch_first=True, padding_value=-1)
        self._length = torch.tensor([len(ids) for ids in kept], device=self._draft.device)
        self._seen = 0
        self._cost = self._open = self._at = torch.zeros(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores `(rows, vocabulary)` after `input_ids` `(rows, length)`; rows are beams of one utterance after another."""
        answer = input_ids[:, self.start:]
        rows, device = answer.shape[0], scores.device
        beams = rows // len(self._length)
        if self._seen == 0 or answer.shape[1] != self._seen + 1 or beams > 1:  # beams change places
            self._begin(beams, device, scores.shape[1])
            for i in range(answer.shape[1]):
                self._step(answer[:, i])
        else:
            self._step(answer[:, -1])
        self._seen = answer.shape[1]
        scores = self._add(scores)
        return scores if self.then is None else self.then(input_ids, scores)  # type: ignore[arg-type, return-value]

    def _begin(self, beams: int, device: torch.device, width: int) -> None:
        self._ids = self._draft.to(device).repeat_interleave(beams, 0)
        length = self._length.to(device).repeat_interleave(beams, 0)
        place = torch.arange(self._ids.shape[1] + 1, device=device)
        self._place, self._within = place, place <= length[:, None]
        self._last = place == length[:, None]
        self._left = length[:, None] - place
        self._cost = torch.where(self._within, place, _FAR)  # edits from nothing to the draft's first words
        self._at = (place == 0).expand_as(self._cost)
        self._open = length > 0
        self._aligned = torch.zeros(width, dtype=torch.bool, device=device)
        known = _aligned(self._codec)[:width]
        self._aligned[:len(known)] = known.to(device)
        self._ends = _ends(self._codec).to(device)
        self._separator = self._codec.marker_ids[SEPARATOR]
        self._stops = torch.tensor([self._separator, self._codec.eos_id], device=device)

    def _step(self, token: Tensor) -> None:
        """Align one more token a row; negative ones are none."""
        old, known = self._cost, token.clamp(min=0)
        same = self._ids == token[:, None]
        through = old[:, :-1] + (~same).long()
        new = old + 1
        new[:, 1:] = torch.minimum(new[:, 1:], through)
        new = (new - self._place).cummin(-1).values + self._place  # draft words left out
        new = new.masked_fill(~self._within, _FAR)
        best = new == new.amin(-1, keepdim=True)
        heard = best.clone()  # of equal places, those that the token itself led to
        heard[:, 0] = False
        heard[:, 1:] &= same & (through == new[:, 1:])
        at = torch.where(heard.any(-1, keepdim=True), heard, best)
        moves = ((token >= 0) & self._aligned[known])[:, None]
        self._cost, self._at = torch.where(moves, new, old), torch.where(moves, at, self._at)
        self._open = self._open & (token != self._separator)

    def _add(self, scores: Tensor) -> Tensor:
        """The bonus, once for each token, wherever in the draft it is expected; ending early against reading on."""
        at = self._at & self._open[:, None]
        out = scores.clone()
        ended = (at & self._last).any(-1)
        out.index_add_(1, self._ends, (self.bonus * ended.to(out.dtype))[:, None].expand(-1, len(self._ends)).contiguous())
        words = (at & ~self._last)[:, :-1]
        if words.shape[1]:
            ids = self._ids.clamp(min=0)
            first = ids.gather(1, words.int().argmax(-1, keepdim=True))  # stands for the places that are not meant
            ids = torch.where(words, ids, first)
            known = out.gather(1, ids)
            lift, cost = self._against_the_end(scores, known.amax(-1), at)
            any_word = words.any(-1)
            bonus = torch.where(any_word, self.bonus + lift, 0.0)[:, None]
            out.scatter_(1, ids, known + bonus)
            cost = torch.where(any_word, cost, 0.0)[:, None]
            out.index_add_(1, self._stops, -cost.expand(-1, len(self._stops)).contiguous())
        return out

    def _against_the_end(self, scores: Tensor, word: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """What the next words gain and the end loses, `(rows,)` each; `word` is the score of the likeliest next word."""
        stop = scores.index_select(1, self._stops).amax(-1)
        left = self._left.masked_fill(~at, _FAR).amin(-1)  # of equal places, the last
        cost = self.bonus * left.to(scores.dtype)
        read_on = (left > 0) & (word + self.bonus >= stop - cost)
        lift = (stop - word - self.bonus).clamp(min=0)
        return torch.where(read_on, lift, 0.0), torch.where(read_on, cost, 0.0)


def draft_bias(model: Any, encoded: Encoded, bonus: float, start: int, then: LogitsProcessor | None) -> LogitsProcessor | None:
    """The processor for a batch, before `then`; `then` alone without a bonus, or where there is nothing to keep to.

    A model that reads no draft is drawn to what its `ctc` projector heard.
    """
    if not bonus:
        return then
    if encoded.drafts is not None and encoded.draft_lengths is not None:
        before, lengths = len(model.draft_prompt), encoded.draft_lengths.tolist()
        return DraftBias(model.codec, [ids[before:n] for ids, n in zip(encoded.drafts, lengths, strict=True)], bonus, start, then)
    if encoded.heard is not None:
        drafts = [torch.tensor(ids, dtype=torch.long, device=encoded.lengths.device) for ids in encoded.heard]
        return DraftBias(model.codec, drafts, bonus, start, then)
    return then


@lru_cache(maxsize=4)
def _aligned(codec: TextCodec) -> Tensor:
    """`(tokens,)` bool: plain tokens with a letter or digit (or a part of one), and blanks."""
    vocabulary = vocabulary_of(codec)
    letters = torch.tensor([any(c.isalnum() or c == BROKEN for c in text) for text in vocabulary.texts])
    return vocabulary.plain & (letters | ~vocabulary.solid)


@lru_cache(maxsize=4)
def _ends(codec: TextCodec) -> Tensor:
    """Ids of what may stand behind the last word: punctuation, `[T/L]`, the end of text."""
    marks = vocabulary_of(codec).plain & ~_aligned(codec)
    return torch.cat([marks.nonzero().flatten(), torch.tensor([codec.marker_ids[SEPARATOR], codec.eos_id])]).unique()
