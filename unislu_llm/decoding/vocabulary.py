"""What every token id of a tokenizer is to the grammar: plain text or not, blank or not, and its characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unislu_llm.data.targets import TextCodec

_CONTROL = re.compile(r"<\|.*\|>")  # Whisper's timestamps and the like, which some tokenizers do not call special
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
BROKEN = "\ufffd"
"""What part of a character decodes to."""


class Vocabulary:
    """The tokens of a codec.

    Args:
        codec: its tokenizer, with the markers.

    Attributes:
        texts: characters of each token inside a sentence; empty for markers and special tokens.
        plain: `(tokens,)` bool, tokens that text may hold: neither markers nor special tokens, and spelling no marker.
        solid: `(tokens,)` bool, plain tokens that decode to more than blanks whatever stands around them.
        whole: of each token, whether its characters do not depend on the tokens around it (byte tokens do).
    """

    def __init__(self, codec: TextCodec) -> None:
        tokenizer = codec.tokenizer
        size = len(tokenizer)
        names = tokenizer.convert_ids_to_tokens(list(range(size)))
        added = tokenizer.added_tokens_decoder
        hidden = {*tokenizer.all_special_ids, *codec.marker_ids.values(), codec.eos_id}
        hidden |= {i for i, token in added.items() if token.special or _CONTROL.fullmatch(token.content)}
        markers = re.compile("|".join(re.escape(m) for m in codec.marker_ids))
        self.texts = ["" if i in hidden else text for i, text in enumerate(_texts(codec, size))]
        self.whole = [not (BROKEN in text or (name and _BYTE.fullmatch(name)))
                      for text, name in zip(self.texts, names, strict=True)]
        self.plain = torch.tensor([bool(text) and markers.search(text) is None for text in self.texts])
        self.solid = self.plain & torch.tensor([bool(text.replace(BROKEN, "").strip()) for text in self.texts])

    def joins(self, left: int, right: int) -> bool:
        """Whether two neighbouring tokens are of one word: no word may start or end between them."""
        if not (self.whole[left] and self.whole[right]):
            return not (self.texts[right][:1].isspace() and self.whole[right])
        a, b = self.texts[left][-1:], self.texts[right][:1]
        return a.isalnum() and b.isalnum() and not (_unspaced(a) or _unspaced(b))


def _unspaced(char: str) -> bool:
    """Scripts that write no blanks between words: Thai to Khmer, and the Chinese and Japanese ones."""
    return "\u0e00" <= char <= "\u0eff" or "\u1780" <= char <= "\u17ff" or "\u2e80" <= char <= "\u9fff" or char > "\U0001ffff"


def _texts(codec: TextCodec, size: int) -> list[str]:
    """Each token's characters after a letter, as the codec decodes them (tokens that it drops have none).

    At the start of a text, tokenizers hide the blank of a word's first token.
    """
    anchor = codec.text_ids("a")[-1]
    pairs = [[anchor, i] for i in range(size)]
    backend = getattr(codec.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        decoded: Sequence[str] = backend.decode_batch(pairs, skip_special_tokens=True)
        alone: str = backend.decode([anchor, anchor], skip_special_tokens=True)
    else:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        decoded = [str(codec.tokenizer.decode(pair, **options)) for pair in pairs]
        alone = str(codec.tokenizer.decode([anchor, anchor], **options))
    lead = alone.index("a") + 1
    return [text[lead:] for text in decoded]


class Brackets:
    """Keeps plain tokens from spelling a marker between them (`[`, `T`, `/L]`): the decoded string could not be told.

    A node is what the text so far could be the beginning of: 0 for nothing, else a proper prefix of some marker.

    Args:
        vocabulary: tokens. markers: what must not be spelled.
    """

    def __init__(self, vocabulary: Vocabulary, markers: Sequence[str]) -> None:
        self._texts = vocabulary.texts
        self._markers = frozenset(markers)
        self._prefixes = ["", *sorted({m[:k] for m in markers for k in range(1, len(m))})]
        self._nodes = {prefix: node for node, prefix in enumerate(self._prefixes)}
        self.from_root = torch.tensor([self._walk("", t) if "[" in t else 0 for t in self._texts])
        self._closing = [(i, t[:t.index("]") + 1]) for i, t in enumerate(self._texts) if "]" in t]
        self._forbidden: dict[int, Tensor] = {}

    def _walk(self, prefix: str, text: str) -> int:
        for char in text:
            longer = prefix + char
            prefix = longer if longer in self._nodes else "[" if char == "[" else ""
        return self._nodes[prefix]

    def after(self, node: int, token: int) -> int:
        """Node after a token; a marker or special token starts anew."""
        text = self._texts[token] if token < len(self._texts) else ""
        return self._walk(self._prefixes[node], text) if text else 0

    def forbidden(self, node: int) -> Tensor:
        """Ids that would complete a marker at `node`."""
        if node not in self._forbidden:
            prefix = self._prefixes[node]
            self._forbidden[node] = torch.tensor([i for i, text in self._closing if prefix + text in self._markers],
                                                 dtype=torch.long)
        return self._forbidden[node]


@lru_cache(maxsize=4)
def vocabulary_of(codec: TextCodec) -> Vocabulary:
    """The vocabulary of a codec, made once (a second or two for 262 thousand tokens)."""
    return Vocabulary(codec)
