"""What every token id of a tokenizer is to decoding: plain text or not, and its characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from unicodedata import category

import torch

from unislu_llm.scoring.text import is_letter
from unislu_llm.tokenizer import UnifiedTokenizer

BROKEN = "\ufffd"  # what a part of a character decodes to
_CONTROL = re.compile(r"<\|.*\|>")  # Whisper's timestamps; some tokenizers do not call them special
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Vocabulary:
    """The tokens of a tokenizer, markers included; `(tokens,)` bool tensors where nothing is said.

    Attributes:
        texts: list, characters of each inside a sentence; empty for markers and special tokens.
        whole: list, whether these do not depend on the tokens around (those of byte tokens do).
        plain: what text may hold with the grammar: no marker, no special token, and no `[`. No run
            of such tokens spells a marker, which a decoded string could not tell from a real one.
        solid: plain ones that are more than blanks whatever stands around them.
        words: those with a letter, an accent or a digit (or a part of one), and blanks: what a
            hypothesis is aligned by. Other tokens of text are punctuation.
    """

    def __init__(self, tokenizer: UnifiedTokenizer) -> None:
        base, size = tokenizer.base, len(tokenizer.base)
        names = base.convert_ids_to_tokens(list(range(size)))
        hidden = {*base.all_special_ids, *tokenizer.marker_ids.values(), tokenizer.eos_id}
        # What decoding drops, and what some tokenizers do not call special, is no text.
        hidden |= {i for i, token in base.added_tokens_decoder.items()
                   if token.special or _CONTROL.fullmatch(token.content)}
        self.texts = ["" if i in hidden else text for i, text in enumerate(texts_of(base, size))]
        self.whole = [not (BROKEN in text or (name and _BYTE.fullmatch(name)))
                      for text, name in zip(self.texts, names, strict=True)]
        visible = torch.tensor([bool(text.replace(BROKEN, "").strip()) for text in self.texts])
        letters = torch.tensor([any(c == BROKEN or category(c)[0] in "LMN" for c in text)
                                for text in self.texts])
        self.plain = torch.tensor([bool(text) and "[" not in text for text in self.texts])
        self.solid = self.plain & visible
        self.words = torch.tensor([bool(text) for text in self.texts]) & (letters | ~visible)

    def joins(self, left: int, right: int) -> bool:
        """Whether neighbouring tokens are of one word: no word starts or ends between them."""
        if not (self.whole[left] and self.whole[right]):
            return not (self.texts[right][:1].isspace() and self.whole[right])
        a, b = self.texts[left][-1:], self.texts[right][:1]
        return bool(a and b) and is_letter(a) and is_letter(b)


@lru_cache(maxsize=4)
def texts_of(base: Any, size: int) -> list[str]:
    """Each of so many tokens' characters as decoded; of special tokens they mean nothing."""
    # Behind a letter, because tokenizers hide the blank of a text's first word.
    anchor = base("a", add_special_tokens=False)["input_ids"][-1:]
    pairs = [anchor, *([*anchor, i] for i in range(size))]
    if backend := getattr(base, "backend_tokenizer", None):  # many times faster
        decoded: Sequence[str] = backend.decode_batch(pairs, skip_special_tokens=True)
    else:
        decoded = [str(base.decode(pair, skip_special_tokens=True,
                                   clean_up_tokenization_spaces=False)) for pair in pairs]
    # Python's tokenizers give nothing for a part of a character.
    return [text.removeprefix(decoded[0]) or ("" if backend else BROKEN) for text in decoded[1:]]


vocabulary_of = lru_cache(maxsize=4)(Vocabulary)
"""The vocabulary of a tokenizer, made once (a second or two for 262 thousand tokens)."""
