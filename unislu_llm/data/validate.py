"""Check manifests to the end, say what is wrong and what is in them, and write cleaned copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from unislu_llm.data.checks import AudioCheck, Checker, label_counts
from unislu_llm.data.manifest import moved
from unislu_llm.data.row_reader import Problem
from unislu_llm.errors import UserError
from unislu_llm.io import atomic
from unislu_llm.tasks import SpanTask, Task, TaskRegistry
from unislu_llm.utterance import Utterance


@dataclass
class Report:
    """What was found in some manifests."""

    manifests: Sequence[Path]
    registry: TaskRegistry
    utterances: list[Utterance] = field(default_factory=list)  # of the rows without errors
    bad_rows: int = 0
    problems: list[Problem] = field(default_factory=list)  # errors and warnings, in order

    def status(self, strict: bool = False) -> int:
        """1 for errors (`strict`: or warnings), else 0."""
        return int(any(strict or not problem.warning for problem in self.problems))

    def page(self, max_warnings: int = 10) -> str:
        """Every error, `max_warnings` warnings of each kind and file, and the summary."""
        # An error is a row that training will not see; warnings may be one of each row.
        lines, shown = [], Counter[tuple[Path, str]]()
        for p in self.problems:
            shown[p.file, p.kind] += p.warning
            if not p.warning or shown[p.file, p.kind] <= max_warnings:
                lines.append(str(p))
        lines += [f"{file}: {n - max_warnings} more warnings of kind '{kind}' (--max-warnings {n} "
                  "shows them)" for (file, kind), n in shown.items() if n > max_warnings]
        warnings = shown.total()
        number = " and ".join(f"{n or 'no'} {name}{'s' * (n != 1)}" for n, name in (
            (len(self.problems) - warnings, "error"), (warnings, "warning")))
        return "\n".join([*lines, f"{number} in {', '.join(map(str, self.manifests))}", "",
                          summary(self.utterances, self.registry, self.bad_rows)])


def validate(manifests: Sequence[Path], *, tasks_file: Path | None = None,
             audio: AudioCheck = "header", fix: Path | None = None) -> Report:
    """Check manifests, each to its end and against the others.

    Args:
        manifests: JSON-lines files.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        audio: none believes the manifest; header opens each file; full decodes the samples.
        fix: file (for several manifests: folder) for copies without the rows that have errors.
            A copy appears whole or not at all.

    Raises:
        UserError: no manifest, one missing or named twice, a copy that is in the way or cannot be
            written, or tasks that cannot be read.
    """
    # All before the first is read, which may take an hour.
    missing = [f" {path}" for path in manifests if not path.is_file()]
    if missing or not manifests:
        raise UserError(f"there is no manifest{','.join(missing)}; name JSON-lines files")
    if len({path.resolve() for path in manifests}) < len(manifests):
        raise UserError("a manifest is named twice; name each once")
    copies = {p: fix / p.name if len(manifests) > 1 else fix for p in manifests} if fix else {}
    if any(copy.exists() for copy in copies.values()) or len({*copies.values()}) < len(copies):
        raise UserError(f"--fix: {fix} or a file in it exists, or two manifests have one name; "
                        "name another")
    registry = TaskRegistry.from_yaml(tasks_file)
    report, checker = Report(manifests, registry), Checker(registry, audio)
    for path in manifests:
        copy = copies.get(path, path)
        try:
            # Copied as it is checked, so that a large corpus is read once.
            with atomic(copy, "wb") if copies else nullcontext() as handle:
                for row in checker.check(path):
                    report.problems += row.problems
                    report.bad_rows += row.line > 0 and row.utterance is None
                    report.utterances += [row.utterance] if row.utterance else []
                    if handle is not None and row.utterance is not None:
                        handle.write(moved(row.content, path.parent, copy.parent))
        except OSError as error:
            raise UserError(f"{path} cannot be read, or --fix {fix} not be written ({error})"
                            ) from error
    return report


def summary(utterances: Sequence[Utterance], registry: TaskRegistry, bad_rows: int = 0) -> str:
    """What is in a manifest, on one page: rows, hours, annotations by label."""
    spoken = [u for u in utterances if u.audio is not None]
    lengths = [u.stated_seconds for u in spoken if u.stated_seconds is not None]
    corpora = Counter(u.corpus for u in utterances)
    lines = {
        "rows": f"{len(utterances) + bad_rows} ({bad_rows} with errors, not counted below)",
        "text-only rows": len(utterances) - len(spoken),
        "pseudo-labels": f"{sum(u.text_source is not None for u in utterances)} rows, transcribed "
                         "by a recogniser",
        "audio": f"{sum(lengths) / 3600:.2f} h; longest {max(lengths, default=0.0):.1f} s; "
                 f"{len(spoken) - len(lengths)} rows of unknown length",
        "words": sum(len(u.text.split()) for u in utterances),
        "corpora": ", ".join(f"{name} {n}" for name, n in sorted(corpora.items())),
        "speakers": len({u.speaker for u in utterances if u.speaker}) or "not given",
        **{task.name: _task_line(utterances, task) for task in registry},
        "no annotation": sum(not u.labels for u in utterances)}
    return "\n".join(f"{name:<15} {value}" for name, value in lines.items())


def _task_line(utterances: Sequence[Utterance], task: Task) -> str:
    values = [u.labels[task.name] for u in utterances if task.name in u.labels]
    counts = label_counts(utterances, task.name)
    empty = f" ({sum(not value for value in values)} of them empty)"
    listed = ", ".join(f"{label} {counts[label]}" for label in task.labels)
    return f"{len(values)} rows{empty * isinstance(task, SpanTask)}: {listed}"
