"""What is in a manifest, on one page: rows, hours, annotations by label, lengths."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from unislu_llm.data.audio_checks import stated_seconds
from unislu_llm.tasks import SpanTask, Task, TaskRegistry
from unislu_llm.utterance import Utterance

_BARS = 12  # lines of the length histogram at most
_WIDTH = 40  # characters of its longest bar


@dataclass
class Summary:
    """Counts of utterances, added one by one; memory grows by the speakers only.

    Args:
        registry: the tasks that are counted.
    """

    registry: TaskRegistry
    rows: int = 0
    bad_rows: int = 0
    text_only: int = 0
    pseudo: int = 0
    unknown_length: int = 0
    bare: int = 0
    words: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    corpora: Counter[str] = field(default_factory=Counter)
    speakers: set[str] = field(default_factory=set)
    annotated: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    """Utterances by whole seconds."""

    def add(self, utterance: Utterance, seconds: float | None = None) -> None:
        """Count a valid row.

        Args:
            seconds: its length, where it was measured; default: what the row says.
        """
        self.rows += 1
        self.words += len(utterance.text.split())
        self.corpora[utterance.corpus] += 1
        if utterance.speaker:
            self.speakers.add(utterance.speaker)
        self.pseudo += utterance.text_source is not None
        if utterance.audio is None:
            self.text_only += 1
        else:
            self._add_length(stated_seconds(utterance) if seconds is None else seconds)
        self.bare += not utterance.labels
        for name, value in utterance.labels.items():
            self.annotated[name] += 1
            self.empty[name] += not value
            found = [value] if isinstance(value, str) else [v if isinstance(v, str) else v.label for v in value]
            self.labels.setdefault(name, Counter()).update(found)

    def _add_length(self, seconds: float | None) -> None:
        if seconds is None:
            self.unknown_length += 1
            return
        self.seconds += seconds
        self.longest = max(self.longest, seconds)
        self.lengths[int(seconds)] += 1

    def __str__(self) -> str:
        known = sum(self.lengths.values())
        rows = f"{self.rows + self.bad_rows}"
        if self.bad_rows:
            rows += f" ({self.bad_rows} with errors, not counted below)"
        audio = f"{self.seconds / 3600:.2f} h"
        if known:
            audio += f" ({known} rows; mean {self.seconds / known:.1f} s, longest {self.longest:.1f} s)"
        if self.unknown_length:
            audio += f"; {self.unknown_length} rows of unknown length (--audio header measures them)"
        lines = [("rows", rows), ("text-only rows", str(self.text_only)), ("audio", audio), ("words", str(self.words)),
                 ("corpora", _counts(self.corpora)), ("speakers", str(len(self.speakers) or "not given"))]
        if self.pseudo:
            lines.insert(2, ("pseudo text", f"{self.pseudo} rows, whose transcript a recogniser wrote (`text_source`)"))
        lines += [(task.name, self._task_line(task)) for task in self.registry]
        lines.append(("no annotation", str(self.bare)))
        return "\n".join([*(f"{name:<15} {value}" for name, value in lines), *self._histogram()])

    def _task_line(self, task: Task) -> str:
        n = self.annotated[task.name]
        if not n:
            return "not annotated"
        counts = self.labels.get(task.name, Counter())
        listed = ", ".join(f"{label} {counts[label]}" for label in task.labels)
        if isinstance(task, SpanTask):
            return f"{n} rows ({self.empty[task.name]} of them empty), {counts.total()} spans: {listed}"
        return f"{n} rows: {listed}"

    def _histogram(self) -> list[str]:
        if not self.lengths:
            return []
        top = max(self.lengths) + 1
        width = next(w for w in (1, 2, 3, 5, 10, 30, 60, 600, top) if -(-top // w) <= _BARS)
        bins = dict.fromkeys(range(-(-top // width)), 0)
        for second, n in self.lengths.items():
            bins[second // width] += n
        peak = max(bins.values())
        lines = ["length (s)"]
        for i, n in sorted(bins.items()):
            lines.append(f"{i * width:>6}-{(i + 1) * width:<6} {n:>8} {'#' * -(-_WIDTH * n // peak)}".rstrip())
        return lines


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counter.items())) or "none"
