"""Text to token ids and back: one codec for training targets and for decoding, over any tokenizer.

Pieces are tokenised one by one and their ids concatenated, never strings, so that what training supervises is what
decoding can produce. Plain text is tokenised as it stands inside a sentence (with a leading blank): a phrase inside
tags then has the very tokens that it has in the transcript, also as the first word. The blank is a matter of tokens
only; the decoded string has none around markers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import AddedToken, PreTrainedTokenizerBase

from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, TASK_PART
from unislu_llm.tasks import TaskRegistry
from unislu_llm.unified import Piece, encode
from unislu_llm.utterance import Utterance


@dataclass(frozen=True)
class Target:
    """Token ids of one target with the part that each belongs to; the last one is the end-of-text token."""

    ids: tuple[int, ...]
    parts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Sample:
    """One training or evaluation item: an utterance and one of its annotated tasks (None: transcript alone)."""

    utterance: Utterance
    task: str | None

    @property
    def key(self) -> str:
        """Unique name within a data set."""
        return f"{self.utterance.corpus}/{self.utterance.id}#{self.task or 'asr'}"


def make_samples(utterances: Iterable[Utterance], registry: TaskRegistry) -> list[Sample]:
    """An utterance with two annotated tasks gives two samples, one with none gives a transcript-only sample."""
    samples: list[Sample] = []
    for utterance in utterances:
        names = [name for name in registry.names if name in utterance.labels]
        samples += [Sample(utterance, name) for name in names] or [Sample(utterance, None)]
    return samples


def add_markers(tokenizer: PreTrainedTokenizerBase, registry: TaskRegistry) -> list[int]:
    """Give every marker one token id in `tokenizer` (in place); ids are contiguous, in the registry's order.

    Calling it again on the same tokenizer changes nothing.

    Raises:
        UserError: the tokenizer has one of the markers as a token of its own, with another meaning.
    """
    vocabulary = tokenizer.get_vocab()
    known = [m for m in registry.markers if m in vocabulary]
    if known and len(known) != len(registry.markers):
        raise UserError(f"the tokenizer already has a token '{known[0]}'; rename this marker in the task registry")
    if not known:
        tokenizer.add_tokens([AddedToken(m, normalized=False, special=False) for m in registry.markers])
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[m] for m in registry.markers]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError("the tokenizer holds the markers in another order than the task registry; "
                        "use the tokenizer and the tasks of one run together")
    return ids


class TextCodec:
    """Tokenizer and task registry as one: utterances to targets, ids to unified strings.

    Args:
        tokenizer: any Hugging Face tokenizer; the markers are added to it in place.
        registry: tasks whose markers it learns.
        eos_id: end of target; default: the tokenizer's end-of-text token.

    Attributes:
        marker_ids: id of each marker.
        pad_id: filler of batches; supervision never depends on it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, registry: TaskRegistry, eos_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.registry = registry
        self.marker_ids = dict(zip(registry.markers, add_markers(tokenizer, registry), strict=True))
        self._markers = {i: m for m, i in self.marker_ids.items()}
        eos = tokenizer.eos_token_id if eos_id is None else eos_id
        if eos is None:
            raise UserError("the tokenizer has no end-of-text token; pass eos_id")
        self.eos_id = int(eos)
        pad = tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)
        first = tokenizer.convert_ids_to_tokens(tokenizer("word", add_special_tokens=False)["input_ids"])[0]
        self._lead = "" if first.startswith("▁") else " "

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text as it stands inside a sentence; a special token written in it (`</s>`) is text as well."""
        encoded = self.tokenizer(self._lead + text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt string, in which special tokens may be written out; nothing is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def piece_ids(self, piece: Piece) -> list[int]:
        """Ids of one piece: a marker is one id."""
        return [self.marker_ids[piece.text]] if piece.marker else self.text_ids(piece.text)

    def target(self, sample: Sample) -> Target:
        """Ids and parts of a sample's target, end-of-text included (its part: task, or asr for a bare transcript)."""
        task = None if sample.task is None else self.registry[sample.task]
        ids: list[int] = []
        parts: list[int] = []
        for piece in encode(sample.utterance, task):
            new = self.piece_ids(piece)
            ids += new
            parts += [ASR_PART if piece.part == "asr" else TASK_PART] * len(new)
        return Target((*ids, self.eos_id), (*parts, ASR_PART if task is None else TASK_PART))

    def decode(self, ids: Sequence[int]) -> str:
        """Unified string of generated ids, up to the first end-of-text token, without blanks around markers."""
        chunks: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                text = self.tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                chunks.append(str(text).strip())
                run.clear()

        for i in ids:
            if i == self.eos_id:
                break
            if i in self._markers:
                flush()
                chunks.append(self._markers[i])
            else:
                run.append(int(i))
        flush()
        return "".join(chunks)
