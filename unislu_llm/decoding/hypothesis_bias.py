"""Hypothesis bias: a transcript is drawn to the next words of a first-pass hypothesis.

A small LLM paraphrases what it should copy: it shortens, completes, repeats. The bonus is shallow
fusion with a copy model whose place in the hypothesis is the end of a Levenshtein alignment of the
transcript so far (as in biasing by context, Pundak et al. 2018, arXiv 1808.02480, where the
automaton of fixed phrases is walked by prefix).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.tasks import SEPARATOR
from unislu_llm.tokenizer import UnifiedTokenizer

_FAR = 1 << 20


class HypothesisBias:
    """Processor that adds nats to the tokens with which a transcript goes on along its hypothesis.

    Punctuation is not aligned and stays the LLM's own. Where the hypothesis ends, the bonus is for
    what may stand there: punctuation, `[T/L]`, the end of text. To end before that costs the bonus
    once for each token that is left out (a coverage penalty, as in Wu et al. 2016, arXiv
    1609.08144). Rows with an empty hypothesis, and everything after `[T/L]`, stay as they are.
    Nothing in it waits for the device.
    """

    def __init__(self, tokenizer: UnifiedTokenizer, hypotheses: Sequence[Sequence[int]],
                 bonus: float, device: torch.device | str = "cpu") -> None:
        vocabulary, self._bonus = vocabulary_of(tokenizer), bonus
        words = vocabulary.words
        # One more entry than there are tokens: False, for ids beyond them.
        self._words = torch.cat([words, words.new_zeros(1)]).to(device)
        kept = [ids[words[ids]] for ids in (torch.tensor(list(h), dtype=torch.long)
                                            for h in hypotheses)]
        self._ids = pad_sequence(kept, batch_first=True, padding_value=-1).to(device)
        self._length = torch.tensor([len(ids) for ids in kept], device=device)[:, None]
        self._place = torch.arange(self._ids.shape[1] + 1, device=device)
        self._separator = tokenizer.marker_ids[SEPARATOR]
        self._stops = torch.tensor([self._separator, tokenizer.eos_id], device=device)
        punctuation = (vocabulary.plain & ~words).nonzero().flatten().to(device)
        self._ends = torch.cat([punctuation, self._stops])
        # A row of the Levenshtein matrix: edits from the transcript so far to the hypothesis'
        # first `place` words, and at which of these places the transcript may stand.
        self._cost = torch.where(self._place <= self._length, self._place, _FAR)
        self._at = (self._place == 0).expand_as(self._cost)
        self._open = self._length[:, 0] > 0
        # For :meth:`ahead`: all tokens, and behind each number of words the index that follows.
        self._all = [list(ids) for ids in hypotheses]
        self._after = [[0, *(i + 1 for i, token in enumerate(ids) if words[token])]
                       for ids in self._all]
        self._row = torch.arange(len(self._all), device=device)
        self._led = torch.ones_like(self._open)  # whether the last word is the hypothesis' own
        self._since = torch.zeros_like(self._row)  # tokens since then, all punctuation

    def ahead(self) -> list[list[int] | None]:
        """Of each row the tokens of the hypothesis that come next; None where the last word of the
        transcript is not the hypothesis' own, and behind the transcript."""
        place = self._at.int().argmax(-1)  # the first of equal ones
        found: list[list[int] | None] = []
        for row, n, since, led in torch.stack(
                [self._row, place, self._since, self._led.long()], 1).tolist():
            ids, after = self._all[row], self._after[row]
            word = after[n + 1] - 1 if n + 1 < len(after) else len(ids)
            # Punctuation stands for that of the hypothesis, whatever it is.
            found.append(ids[min(after[n] + since, word):] if led else None)
        return found

    def reorder(self, rows: Tensor) -> None:
        self._ids, self._length, self._row = self._ids[rows], self._length[rows], self._row[rows]
        self._led, self._since = self._led[rows], self._since[rows]
        self._cost, self._at, self._open = self._cost[rows], self._at[rows], self._open[rows]

    def advance(self, tokens: Tensor) -> None:
        for token in tokens.unbind(1):
            old = self._cost
            same = self._ids == token[:, None]
            through = old[:, :-1] + (~same).long()
            new = old + 1
            new[:, 1:] = torch.minimum(new[:, 1:], through)
            # Words of the hypothesis left out cost 1 each: new[j] = min over i <= j of
            # new[i] + j - i, which is a running minimum once the slope is taken off.
            new = (new - self._place).cummin(-1).values + self._place
            new = new.masked_fill(self._place > self._length, _FAR)
            best = new == new.amin(-1, keepdim=True)
            led = best.clone()  # of equal places, those that the token itself led to
            led[:, 0] = False
            led[:, 1:] &= same & (through == new[:, 1:])
            at = torch.where(led.any(-1, keepdim=True), led, best)
            word = self._words[token.clamp(0, len(self._words) - 1)]
            moves = ((token >= 0) & word)[:, None]
            self._cost = torch.where(moves, new, old)
            self._at = torch.where(moves, at, self._at)
            self._led = torch.where(moves[:, 0], led.any(-1), self._led)
            self._led = self._led & (token != self._separator)
            self._since = torch.where(moves[:, 0], 0, self._since + (token >= 0).long())
            self._open = self._open & (token != self._separator)

    def __call__(self, scores: Tensor) -> Tensor:
        if not self._bonus:
            return scores
        # The bonus comes once for each token, wherever in the hypothesis it is expected.
        at = self._at & self._open[:, None]
        last = self._place == self._length
        out = scores.clone()
        ended = self._bonus * (at & last).any(-1).to(out.dtype)
        out.index_add_(1, self._ends, ended[:, None].repeat(1, len(self._ends)))
        following = (at & ~last)[:, :-1]
        if not following.shape[1]:
            return out
        ids = self._ids.clamp(min=0)
        # A row's places that are not meant repeat one that is, so that all writes agree.
        ids = torch.where(following, ids, ids.gather(1, following.int().argmax(-1, keepdim=True)))
        known = out.gather(1, ids)
        lift, cost = self._against_the_end(scores, known.amax(-1), at)
        meant = following.any(-1)
        out.scatter_(1, ids, known + torch.where(meant, self._bonus + lift, 0.0)[:, None])
        cost = torch.where(meant, cost, 0.0)[:, None]
        out.index_add_(1, self._stops, -cost.repeat(1, len(self._stops)))
        return out

    def _against_the_end(self, scores: Tensor, word: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """What the next words gain and the end loses, `(rows,)` each."""
        # With `word` the score of the likeliest next word, `stop` that of the end and `left` words
        # of the hypothesis to come, reading on wins where word + bonus >= stop - left * bonus. The
        # word then gets at least the score that the end had: a third choice, which lay between
        # the two, would otherwise win by the penalty of the end.
        stop = scores.index_select(1, self._stops).amax(-1)
        # Of equal places the last: the shortest rest.
        left = (self._length - self._place).masked_fill(~at, _FAR).amin(-1)
        cost = self._bonus * left.to(scores.dtype)
        read_on = (left > 0) & (word + self._bonus >= stop - cost)
        lift = (stop - word - self._bonus).clamp(min=0)
        return torch.where(read_on, lift, 0.0), torch.where(read_on, cost, 0.0)
