"""Text to token ids and back, the same for training targets and for decoding.

Pieces are tokenised one by one and their ids are concatenated, never strings, so that what
training supervises is what decoding can produce. Plain text is tokenised as it stands inside a
sentence, with a leading blank: a phrase inside tags then has the very tokens that it has in the
transcript, also as the first word. The blank is a matter of tokens only; a decoded string has
none around markers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from transformers import AddedToken, PreTrainedTokenizerBase

from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, TASK_PART
from unislu_llm.tasks import ASR, TaskRegistry
from unislu_llm.unified import encode
from unislu_llm.utterance import Utterance


@dataclass(frozen=True)
class Example:
    """One item of training or evaluation: an utterance and one of its annotated tasks."""

    utterance: Utterance
    task: str | None  # its name; None for the transcript alone

    @property
    def key(self) -> str:
        """Unique name within a data set."""
        return f"{self.utterance.corpus}/{self.utterance.id}#{self.task or ASR}"


def make_examples(utterances: Iterable[Utterance], registry: TaskRegistry) -> list[Example]:
    """Two annotated tasks give two examples; an utterance without any gives its transcript."""
    examples: list[Example] = []
    for utterance in utterances:
        names = [name for name in registry.names if name in utterance.labels]
        examples += [Example(utterance, name) for name in names] or [Example(utterance, None)]
    return examples


@dataclass(frozen=True)
class Target:
    """Token ids of a target with the part that each belongs to; the last id ends the text."""

    ids: tuple[int, ...]
    parts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class UnifiedTokenizer:
    """A tokenizer and a task registry as one: utterances to targets, ids to unified strings.

    Args:
        base: any Hugging Face tokenizer; the markers are added to it in place.
        registry: tasks whose markers it learns.
        eos_id: id that ends a target; default: the tokenizer's end-of-text token.

    Raises:
        UserError: no end-of-text token, or a marker that the tokenizer has with another meaning.
    """

    def __init__(self, base: PreTrainedTokenizerBase, registry: TaskRegistry,
                 eos_id: int | None = None) -> None:
        self.base, self.registry = base, registry
        self.marker_ids = dict(zip(registry.markers, _add_markers(base, registry), strict=True))
        self._markers = {i: m for m, i in self.marker_ids.items()}
        eos = base.eos_token_id if eos_id is None else eos_id
        if eos is None:
            raise UserError("the tokenizer has no end-of-text token; pass eos_id")
        self.eos_id = int(eos)
        # Filler of batches; supervision never depends on it.
        self.pad_id = self.eos_id if base.pad_token_id is None else int(base.pad_token_id)
        # SentencePiece puts the blank before a word by itself.
        first = base.convert_ids_to_tokens(base("word", add_special_tokens=False)["input_ids"])[0]
        self._lead = "" if first.startswith("▁") else " "

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text inside a sentence; a special token written in it is text as well."""
        encoded = self.base(self._lead + text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def prompt_ids(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a part of a prompt, in which special tokens may be written out.

        The first part gets a beginning-of-text token where the tokenizer wants one.
        """
        ids = list(self.base(text, add_special_tokens=False)["input_ids"]) if text else []
        bos = self.base.bos_token_id
        wants = first and bos is not None and self.base("a")["input_ids"][0] == bos
        return [bos, *ids] if wants and ids[:1] != [bos] else ids

    def target(self, example: Example) -> Target:
        """Ids and parts of an example's target, the end of text included."""
        task = None if example.task is None else self.registry[example.task]
        ids: list[int] = []
        parts: list[int] = []
        for piece in encode(example.utterance, task):
            new = [self.marker_ids[piece.text]] if piece.marker else self.text_ids(piece.text)
            ids += new
            parts += [ASR_PART if piece.part == "asr" else TASK_PART] * len(new)
        # The end belongs to what it ends: without it, an utterance of no entities would have no
        # task part at all.
        return Target((*ids, self.eos_id), (*parts, ASR_PART if task is None else TASK_PART))

    def decode(self, ids: Sequence[int]) -> str:
        """Unified string of generated ids up to the first end of text."""
        chunks: list[str] = []
        # Text is decoded in runs between markers, since a character may take several tokens.
        said = takewhile(lambda i: i != self.eos_id, ids)
        for marker, run in groupby(said, key=self._markers.get):
            if marker is None:
                text = self.base.decode([int(i) for i in run], skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)
                chunks.append(str(text).strip())
            else:
                chunks += [marker for _ in run]
        return "".join(chunks)


def _add_markers(tokenizer: PreTrainedTokenizerBase, registry: TaskRegistry) -> list[int]:
    """Give every marker one id, contiguous and in the registry's order; twice changes nothing."""
    vocabulary = tokenizer.get_vocab()
    known = [m for m in registry.markers if m in vocabulary]
    if known and len(known) != len(registry.markers):
        raise UserError(f"the tokenizer already has a token '{known[0]}'; rename this marker in "
                        "the task registry")
    if not known:
        tokenizer.add_tokens([AddedToken(m, normalized=False, special=False)
                              for m in registry.markers])
        vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[m] for m in registry.markers]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError("the tokenizer holds the markers in another order than the task registry; "
                        "use the tokenizer and the tasks of one run together")
    return ids
