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
from unicodedata import normalize

from transformers import AddedToken, PreTrainedTokenizerBase

from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, TASK_PART
from unislu_llm.tasks import ASR, LabelTask, Task, TaskRegistry
from unislu_llm.unified import encode
from unislu_llm.utterance import Utterance

_PROBES = {"capital letters": "Anna", "blanks": "he was here", "digits": "on 12 May 2004",
           "punctuation": "O'Neil's 1,250 re-opened.", "accents": "naïve, Zürich",
           "letters of other scripts": "東京Москва"}  # by what each of them has


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
    """A tokenizer and a task registry as one: utterances to targets, ids to unified strings. `base`
    is any Hugging Face tokenizer, to which the markers are added in place; `eos_id` ends a target
    (default: its end-of-text token). Raises UserError: no end-of-text token, or a marker that the
    tokenizer has in another meaning."""

    def __init__(self, base: PreTrainedTokenizerBase, registry: TaskRegistry,
                 eos_id: int | None = None) -> None:
        self.base, self.registry = base, registry
        self.marker_ids = dict(zip(registry.markers, _add_markers(base, registry), strict=True))
        self._markers = {i: m for m, i in self.marker_ids.items()}
        eos = base.eos_token_id if eos_id is None else eos_id
        if eos is None:
            raise UserError(f"{base.name_or_path}: the tokenizer has no end-of-text token; name "
                            "one as eos_token in the folder's tokenizer_config.json")
        self.eos_id = int(eos)
        # Filler of batches; supervision never depends on it.
        self.pad_id = self.eos_id if base.pad_token_id is None else int(base.pad_token_id)
        # SentencePiece puts the blank before a word by itself.
        word = base.convert_ids_to_tokens(base("word", add_special_tokens=False)["input_ids"])
        self._lead = "" if "".join(word).startswith("▁") else " "
        # Pieces of a unigram model are found in a text whatever they are called: there they are
        # letters, and what is unknown, which may share its token with the end, is left out.
        known, end, unknown = base.get_vocab(), self.eos_id, base.unk_token_id
        self._spelled = {i: [known[c] for c in str(base.convert_ids_to_tokens(i))
                             if i != unknown and known.get(c, end) != end]
                         for i in {*base.all_special_ids, end}}
        self._decomposes = "\u0301" in base.decode(base.encode("é", add_special_tokens=False))

    def check(self, llm: str) -> None:
        """Raises UserError: text, or a label, comes back otherwise than it is written (in NFC)."""
        lacking = self.decode(self.text_ids("\U0010fffd"))  # a letter that no vocabulary has
        for kept, text in _PROBES.items():
            # Letters that a vocabulary merely lacks may be of no use to it: see `data.findings`.
            back = self.decode(self.text_ids(text)).replace(lacking, "")
            if [c for c in back if c.isascii()] != [c for c in text if c.isascii()]:
                raise UserError(f"{llm}: its tokenizer does not keep {kept}: it gives '{back}' back"
                                f" for '{text}'; take an LLM whose tokenizer keeps what is written")
        for task in self.registry:
            for label in task.labels if isinstance(task, LabelTask) else ():
                self.label_ids(task, label)

    def label_ids(self, task: Task, label: str) -> list[int]:
        """Ids of a label between its markers; UserError: they decode to something else."""
        ids = self.text_ids(label)
        if (back := self.decode(ids)) != label:
            raise UserError(f"task '{task.name}': the tokenizer gives label '{label}' back as "
                            f"'{back}'; rename it")
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text inside a sentence; a special token written in it is text as well."""
        ids = self.base(self._lead + text, add_special_tokens=False,
                        split_special_tokens=True)["input_ids"] if text else []
        return [j for i in ids for j in self._spelled.get(i, (i,))]

    def prompt_ids(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a part of a prompt, in which special tokens may be written out; the first gets a
        beginning-of-text token where the tokenizer wants one."""
        ids = list(self.base(text, add_special_tokens=False)["input_ids"]) if text else []
        bos = self.base.bos_token_id
        wants = first and bos is not None and self.base("a")["input_ids"][0] == bos
        return [bos, *ids] if wants and ids[:1] != [bos] else ids

    def target(self, example: Example) -> Target:
        """Ids and parts of an example's target, the end of text included."""
        task = None if example.task is None else self.registry[example.task]
        ids, parts = list[int](), list[int]()
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
                text = str(self.base.decode([int(i) for i in run], skip_special_tokens=True,
                                            clean_up_tokenization_spaces=False)).strip()
                chunks.append(normalize("NFC", text) if self._decomposes else text)
            else:
                chunks += [marker for _ in run]
        return "".join(chunks)


def _add_markers(tokenizer: PreTrainedTokenizerBase, registry: TaskRegistry) -> list[int]:
    """Give every marker one id, contiguous and in the registry's order; twice changes nothing."""
    known = sorted(tokenizer.get_vocab().keys() & {*registry.markers})
    if known and len(known) != len(registry.markers):
        raise UserError(f"the tokenizer already has a token '{known[0]}'; rename this marker in "
                        "the task registry")
    if not known:
        tokenizer.add_tokens([AddedToken(m, normalized=False, special=False)
                              for m in registry.markers])
    ids = list(map(tokenizer.get_vocab().__getitem__, registry.markers))
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError("the tokenizer holds the markers in another order than the task registry; "
                        "use the tokenizer and the tasks of one run together")
    return ids
