"""What is odd about the data of a run, a line each: true, and something that one can act on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from unislu_llm.data.manifest import Row
from unislu_llm.data.mending import composed
from unislu_llm.data.mixture import Mixture
from unislu_llm.data.row_reader import FIELDS, lookalike
from unislu_llm.errors import shorten
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer


class Unread(NamedTuple):
    """A key of a manifest that nothing reads."""

    name: str
    rows: int
    file: str
    line: int  # of the first
    spans: bool | None  # labelled phrases: an annotation of no known task; None: empty lists alone
    like: str | None  # the key that it looks like, which its rows have too or do without

    def __str__(self) -> str:
        return f"'{self.name}' ({_count(self.rows, 'row')}, the first {self.file}:{self.line})"

    def told(self, flag: str) -> str:
        """What is wrong and what to do, where `flag` names a tasks file."""
        advice = f"'{self.like}' is one" if self.like else f"if it is one, {flag} FILE names it"
        return (f"is no key of a manifest and no known task ({_count(self.rows, 'row')}), and will "
                f"not be read; {advice}")


class UnreadFields(dict[str, Unread]):
    """Keys of a manifest's rows that nothing reads; more rows are added one by one."""

    def __init__(self, path: str, registry: TaskRegistry, rows: Iterable[Row] = ()) -> None:
        self._path, self._known = path, (*FIELDS, "condition", *registry.names)  # it is for people
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        for key, value in row.content.items():
            if value is not None and key not in self._known and not any(
                    problem.field == key for problem in row.problems):
                seen = self.get(key) or Unread(key, 0, self._path, row.line, None,
                                               lookalike(key, self._known))
                # An empty list says that there are none, and nothing of what there could be.
                spans = seen.spans if value == [] else seen.spans is not False and _are_spans(
                    str(row.content.get("text", "")), value)
                self[key] = seen._replace(rows=seen.rows + 1, spans=spans)


def _are_spans(text: str, value: Any) -> bool:
    """Labelled spans or phrases, in the forms of manifests or of other tools."""
    return isinstance(value, list) and all(_is_span(text, item) for item in value)


def _is_span(text: str, item: Any) -> bool:
    if isinstance(item, dict):
        return isinstance(item.get("label", item.get("phrase")), str)
    kinds = [type(part) for part in item] if isinstance(item, list) else []
    if kinds in ([str, int, int], [int, int, str]):
        # Alignments are written alike, with times where spans have characters.
        start, end = item[1:] if kinds[0] is str else item[:2]
        return bool(0 <= start < end <= len(text))
    # Pairs of words may be anything, if they are not said.
    return kinds == [str, str] and item[1].lower() in text.lower()


def run_findings(train: Sequence[Example], dev: Sequence[Example], mixture: Mixture | None,
                 samples: int, guard: Sequence[Example] = ()) -> list[str]:
    """What is odd about the examples of a run that draws so many `samples` in all."""
    found, drawn = [], list(train)
    if mixture is not None:
        kept = mixture.shares * samples >= 1
        drawn = [e for e, group in zip(train, mixture.groups, strict=True) if kept[group]]
        found = [f"data.weights: none of the {len(members)} examples of '{name}' trains: its share "
                 f"is {100 * share:.2g} % of {samples} samples" for name, share, members, there
                 in zip(mixture.names, mixture.shares, mixture.members, kept, strict=True)
                 if not there]
    return [*found, *_shared(drawn, dev, guard), *_tasks(drawn, dev)]


def unspelled(train: Sequence[Example], tokenizer: UnifiedTokenizer) -> Iterator[str]:
    """What a tokenizer does not give back of the training texts."""
    texts = {composed(e.utterance.text): e.utterance.where for e in train}
    lost = [(text, back) for text in texts
            if (back := composed(tokenizer.decode(tokenizer.text_ids(text)))) != text]
    for text, back in lost[:1]:
        at = next((i for i, c in enumerate(text) if back[i:i + 1] != c), len(text))
        at = text.rfind(" ", 0, at) + 1  # long texts are told from the word on where they differ
        yield (f"data.train: the tokenizer cannot write {_count(len(lost), 'text')} of {len(texts)}"
               f" as they are; in {texts[text]}, the first, '{shorten(text[at:])}' becomes "
               f"'{shorten(back[at:])}': write it otherwise, or take another LLM")


def _shared(train: Sequence[Example], dev: Sequence[Example],
            guard: Sequence[Example]) -> Iterator[str]:
    """Examples that are there twice, and clips that are scored and in another set too."""
    places: dict[Any, list[str]] = {}
    for u, task in ((e.utterance, e.task) for e in train):
        if u.audio is not None:  # sentences alone may well be the same
            places.setdefault((u.audio, u.start, u.end, u.text, task), []).append(u.where)
    if again := [where for where in places.values() if len(where) > 1]:
        yield (f"data.train: {_count(len(again), 'example')} more than once there, the first as "
               f"{' and '.join(again[0][:2])}")
    clips = {flag: {(u.audio, u.start, u.end): u.where for u in (e.utterance for e in some)
                    if u.audio is not None}
             for flag, some in (("train", train), ("dev", dev), ("guard", guard))}
    for flag, other in (("dev", "train"), ("guard", "train"), ("guard", "dev")):
        if both := [where for clip, where in clips[flag].items() if clip in clips[other]]:
            yield (f"data.{flag}: {len(both)} of {len(clips[flag])} clips are in data.{other} too, "
                   f"the first {both[0]}" + "; their scores say what was learnt by heart" * (
                       other == "train"))


def _tasks(train: Sequence[Example], dev: Sequence[Example]) -> Iterator[str]:
    trained, scored = (Counter(e.task for e in some if e.task) for some in (train, dev))
    yield from (f"task '{task}': {_count(n, 'example')} in data.dev and none in data.train; it is "
                "scored, and counts for the best checkpoint, but does not train"
                for task, n in scored.items() if task not in trained)
    yield from (f"task '{task}': {_count(n, 'example')} in data.train and none in data.dev; it "
                "trains, and nothing measures it"
                for task, n in trained.items() if dev and task not in scored)
    # Where no task is scored at all, the lines above have said so.
    if trained.keys() & scored.keys():
        sources: dict[str, Counter[bool]] = {}
        for e in dev:
            manifest = e.utterance.source.rpartition(":")[0]
            sources.setdefault(manifest, Counter())[e.task in trained] += 1
        for manifest, counts in sources.items():
            if not counts[True]:
                yield (f"data.dev: {manifest} has none of the trained tasks "
                       f"({', '.join(trained)}); of its {counts[False]} examples only the "
                       "transcripts say something of this run")


def _count(n: int, name: str) -> str:
    return f"{n} {name}{'s' * (n != 1)}"
