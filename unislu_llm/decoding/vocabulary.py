"""What every token id of a tokenizer is to the grammar: plain text or not, blank or not, and its characters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
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

    A node is what the text so far could be the beginning of: 0 for nothing, else a proper prefix of some marker. What a token
    does at a node is in tables, so that a step of decoding asks nothing of the host.

    Args:
        vocabulary: tokens. markers: what must not be spelled; `[` only begins them.

    Attributes:
        from_root: `(tokens,)` node after a token at node 0, and at every other node but for what follows.
        longer_ids, longer_nodes: `(nodes, n)` tokens that go on with a node's prefix and where to; -1 fills up.
        forbidden: `(nodes, n)` tokens that would complete a marker; the first one fills up, -1 where there is none.
    """

    def __init__(self, vocabulary: Vocabulary, markers: Sequence[str]) -> None:
        prefixes = ["", *sorted({m[:k] for m in markers for k in range(1, len(m))})]
        nodes = {prefix: node for node, prefix in enumerate(prefixes)}
        texts = vocabulary.texts
        self.from_root = torch.tensor([_walk(nodes, t) if "[" in t else 0 for t in texts])
        ends = {m[k:] for m in markers for k in range(1, len(m))}
        spelled: defaultdict[str, list[int]] = defaultdict(list)
        closing: defaultdict[str, list[int]] = defaultdict(list)
        pieces = {q[k:] for q in prefixes for k in range(1, len(q))}
        for i, text in enumerate(texts):
            if text in pieces:
                spelled[text].append(i)
            if "]" in text and (end := text[:text.index("]") + 1]) in ends:
                closing[end].append(i)
        longer = [[(i, nodes[q]) for q in prefixes if p and q.startswith(p) for i in spelled[q[len(p):]]] for p in prefixes]
        self.longer_ids = _table([[i for i, _ in row] for row in longer])
        self.longer_nodes = _table([[node for _, node in row] for row in longer])
        closed = [[m[len(p):] for m in sorted(set(markers)) if p and m.startswith(p)] for p in prefixes]
        self.forbidden = _table([[i for end in row for i in closing[end]] for row in closed], repeat=True)


def _walk(nodes: Mapping[str, int], text: str) -> int:
    """Node after a text that begins at node 0."""
    prefix = ""
    for char in text:
        longer = prefix + char
        prefix = longer if longer in nodes else "[" if char == "[" else ""
    return nodes[prefix]


def _table(rows: Sequence[Sequence[int]], *, repeat: bool = False) -> Tensor:
    """Rows of one width, at least 1, filled up with -1 or with their first value."""
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([[*row, *[row[0] if row and repeat else -1] * (width - len(row))] for row in rows])


@lru_cache(maxsize=4)
def vocabulary_of(codec: TextCodec) -> Vocabulary:
    """The vocabulary of a codec, made once (a second or two for 262 thousand tokens)."""
    return Vocabulary(codec)
