"""`unislu validate`: check manifests to the end, then say what is in them, on one page."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from unislu_llm.errors import UserError

if TYPE_CHECKING:
    from unislu_llm.data.checks import Checked, Checker
    from unislu_llm.data.clean import CleanCopies
    from unislu_llm.data.manifest import Problem
    from unislu_llm.data.summary import Summary

_LISTED = 20  # lines of the table of problems


def validate(manifests: Annotated[list[Path], tyro.conf.arg(metavar="MANIFEST [MANIFEST ...]")], /,
             tasks_file: Path | None = None, audio: Literal["none", "header", "full"] = "header",
             tokenizer: tyro.conf.UseAppendAction[tuple[str, ...]] = (), fix: Path | None = None, strict: bool = False,
             max_warnings: int = 10) -> int:
    """Check manifests to the end: every problem as file:line: field: message, then what is in them.

    Errors are rows that cannot be trained on, warnings are worth a look. The exit status is 1 when there are errors, 2 when a
    manifest cannot be read at all, else 0.

    Args:
        manifests: JSON-lines files. Name those of one experiment together: ids, texts and audio in two of them are found.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        audio: none believes the manifest; header opens each file (does it exist, is it audio, is the crop inside, is the length
            as stated, rate, channels); full decodes the samples (truncation, NaN, clipping, silence).
        tokenizer: Name or folder of a tokenizer, repeatable: warn of characters that it cannot hold.
        fix: Write the rows without errors to this file (several manifests: into this folder), and the others with their
            problems to FIX.left-out.jsonl.
        strict: Exit with status 1 also for warnings.
        max_warnings: Warnings of one kind that are shown for a file; -1 shows all. Errors are all shown.
    """
    if not manifests:
        raise UserError("no manifest is named; give one or more JSON-lines files")
    if len({path.resolve() for path in manifests}) < len(manifests):
        raise UserError("a manifest is named twice; name each once")
    from unislu_llm.data.checks import Checker
    from unislu_llm.data.clean import CleanCopies
    from unislu_llm.data.summary import Summary
    from unislu_llm.tasks import TaskRegistry

    registry = TaskRegistry.from_yaml(tasks_file) if tasks_file else TaskRegistry()
    tokenizers = {name: _holds(name) for name in tokenizer}
    report = _Report(Summary(registry), max_warnings)
    copies = CleanCopies(manifests, fix) if fix else None
    try:
        with Checker(registry, audio, tokenizers) as checker:
            unreadable = [path for path in manifests if not _check(checker, path, report, copies)]
        if copies:
            copies.finish(unreadable)
    finally:
        if copies:
            copies.discard()
    report.page(manifests)
    if copies:
        print(f"\n{copies.kept} rows written to {fix}, {copies.dropped} to {copies.left_out}")
    failed = report.errors or (strict and report.warnings)
    return 2 if unreadable else int(bool(failed))


@dataclass
class _Report:
    """Prints problems as they come, counts them, and prints the page at the end."""

    summary: Summary
    max_warnings: int
    counts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """By level, file, field without indices, and kind."""
    shown: Counter[tuple[str, str]] = field(default_factory=Counter)
    errors: int = 0
    warnings: int = 0

    def add(self, checked: Checked) -> None:
        for problem in checked.errors:
            self.errors += 1
            self._count("error", problem)
            print(problem)
        for problem in checked.warnings:
            self.warnings += 1
            self._count("warning", problem)
            kind = str(problem.file), problem.kind
            self.shown[kind] += 1
            if self.max_warnings < 0 or self.shown[kind] <= self.max_warnings:
                print(str(problem).replace(f": {problem.field}: ", f": {problem.field}: warning: ", 1))
        if checked.row.line == 0:
            return
        if checked.errors or checked.row.utterance is None:
            self.summary.bad_rows += 1
        else:
            self.summary.add(checked.row.utterance, checked.seconds)

    def end(self, path: Path) -> None:
        """Say what was not shown of a file."""
        for (file, kind), number in self.shown.items():
            if file == str(path) and 0 <= self.max_warnings < number:
                print(f"{file}: {number - self.max_warnings} more warnings of kind '{kind}' (--max-warnings -1 shows all)")

    def page(self, manifests: Sequence[Path]) -> None:
        number = " and ".join(f"{n or 'no'} {name}{'s' * (n != 1)}"
                              for n, name in ((self.errors, "error"), (self.warnings, "warning")))
        print(f"{number} in {', '.join(map(str, manifests))}\n\n{self.summary}")
        if self.counts:
            print("problems")
        listed = sorted(self.counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))
        for (level, file, name, kind), n in listed[:_LISTED]:
            print(f"{n:>8} {level:<8} {kind:<13} {name:<13} {file}")
        if len(listed) > _LISTED:
            rest = sum(n for _, n in listed[_LISTED:])
            print(f"{rest:>8} others of {len(listed) - _LISTED} sorts, named above")

    def _count(self, level: str, problem: Problem) -> None:
        from unislu_llm.data.checks import plain_field

        self.counts[level, str(problem.file), plain_field(problem.field), problem.kind] += 1


def _check(checker: Checker, path: Path, report: _Report, copies: CleanCopies | None) -> bool:
    """Check one manifest; False when it cannot be read."""
    try:
        for checked in checker.check(path):
            report.add(checked)
            if copies:
                copies.add(path, checked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    report.end(path)
    return True


def _holds(name: str) -> Callable[[str], bool]:
    """Whether a character comes back from a tokenizer's ids, by itself or inside of a word."""
    from transformers import AutoTokenizer

    from unislu_llm.models.weights import resolve

    folder = Path(name)
    bare = folder.is_dir() and (folder / "tokenizer_config.json").is_file()  # a tokenizer without its model
    path = folder if bare else resolve(name).path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name}: cannot be loaded ({error}); give the name or folder of a tokenizer") from error

    def survives(text: str, character: str) -> bool:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.unk_token_id not in ids and character in tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return lambda character: survives(character, character) or survives(f"a{character}a", character)
