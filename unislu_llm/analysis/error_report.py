"""The report of `eval/errors.py`: prediction files in, Markdown and JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unislu_llm.analysis.error_options import ErrorOptions
from unislu_llm.analysis.error_pairs import compare
from unislu_llm.analysis.error_tables import markdown
from unislu_llm.analysis.errors import analyse
from unislu_llm.analysis.predictions import row_key
from unislu_llm.analysis.runs import Run, file_hash, find_run, portable, shown
from unislu_llm.data.manifest import iter_rows
from unislu_llm.data.mixture import manifest_name
from unislu_llm.errors import UserError
from unislu_llm.scoring.rows import Row, check_rows, read_rows, utterance_key
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.state import versions, write_text

_HOW = "give a file of a run's `predictions` folder, written by eval/evaluate.py, or the run folder"


@dataclass(frozen=True)
class System:
    """A system's predictions: its name in tables, their file, and its run where they lie in one."""

    name: str
    path: Path
    run: Run | None
    rows: tuple[Row, ...] = ()


def report(options: ErrorOptions, command: Sequence[str] = ()) -> int:
    """Sort the errors of `options.systems`, compare them, and write or print the report.

    Returns:
        Exit status: 0, or 2 for bad input (one message on stderr).
    """
    try:
        if options.out and options.out.suffix == ".json":
            raise UserError(f"--out {options.out}: names the Markdown report; its figures go to a .json file beside it")
        result = measure(options)
        text = markdown(result)
        if options.out is None:
            print(text)
            return 0
        result |= {"command": " ".join(map(shown, command)), "versions": {k: v for k, v in versions().items() if k != "command"}}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, text + "\n")
        write_text(options.out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {options.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"written to {options.out} and {options.out.with_suffix('.json')}")
    return 0


def measure(options: ErrorOptions) -> dict[str, Any]:
    """Everything the report says, as plain data.

    Raises:
        UserError: no system, a file without predictions, or systems that were not scored on the same rows.
    """
    systems, registry = load_systems(options)
    total = len({row_key(row) for system in systems for row in system.rows})
    systems = same_rows(systems, options.common)
    first = systems[0]
    fields = row_fields(first.rows, options.manifest, options.by, registry)
    return {
        "protocol": options.protocol, "resamples": options.resamples, "seed": options.seed,
        "rows": len(first.rows), "rows_left_out": total - len(first.rows),
        "systems": {s.name: {"predictions": portable(s.path), "sha256": file_hash(s.path),
                             "corpora": analyse(s.rows, registry, options.protocol, fields)} for s in systems},
        "compared_to": first.name,
        "comparisons": {s.name: compare(first.rows, s.rows, registry, options.protocol, resamples=options.resamples,
                                        seed=options.seed, examples=options.examples) for s in systems[1:]},
    }


def load_systems(options: ErrorOptions) -> tuple[list[System], TaskRegistry]:
    """The systems with their rows, and the tasks: of --tasks, else of the first run there is, else the built-in ones.

    Raises:
        UserError: see :func:`measure`.
    """
    if not options.systems:
        raise UserError("no system is named; give prediction files or run folders, e.g. eval/errors.py runs/a runs/b")
    found = [_find(path) for path in options.systems]
    names = [s.name for s in found]
    systems = [s if names.count(s.name) == 1 else replace(s, name=portable(s.path)) for s in found]
    twice = next((s for i, s in enumerate(systems) if s.path.resolve() in {o.path.resolve() for o in systems[:i]}), None)
    if twice:
        raise UserError(f"{twice.path} is named twice; name every system once")
    run = next((s.run for s in systems if s.run), None)
    registry = TaskRegistry.from_yaml(options.tasks) if options.tasks else run.registry() if run else TaskRegistry()
    return [replace(s, rows=tuple(_read(s.path, registry))) for s in systems], registry


def _find(path: Path) -> System:
    if path.is_dir():
        run = find_run(path)
        file = run.folder / "predictions" / f"{run.checkpoint}-dev.jsonl"
        if not file.is_file():
            raise UserError(f"{path}: no predictions of the dev manifests ({file} is not there); run eval/evaluate.py {path} "
                            "first, or name the file")
        return System(run.label, file, run)
    if path.parent.name != "predictions":
        return System(path.stem, path, None)
    folder = path.resolve().parent.parent
    try:
        return System(f"{folder.name}/{path.stem}", path, find_run(folder))
    except UserError:  # predictions outlive their model
        return System(f"{folder.name}/{path.stem}", path, None)


def _read(path: Path, registry: TaskRegistry) -> list[Row]:
    try:
        rows = read_rows(path, registry)
        check_rows(rows, registry)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a prediction file (not UTF-8); {_HOW}") from None
    except UserError as error:
        raise UserError(f"{path} cannot be read as predictions: {error}; {_HOW}") from None
    if not rows:
        raise UserError(f"{path} has no rows; {_HOW}")
    bad = next((row for row in rows if not isinstance(row.get("hyp_text", 0), str | None)), None)
    if bad is not None:
        raise UserError(f"{path} is not a prediction file: row '{bad['id']}' has no transcript in the field 'hyp_text'; {_HOW}")
    return rows


def same_rows(systems: Sequence[System], common: bool) -> list[System]:
    """The systems with their rows in the first one's order.

    Args:
        common: leave out rows that a system lacks.

    Raises:
        UserError: a system lacks rows (without `common`), none are common, or references differ.
    """
    by_key = [{row_key(row): row for row in s.rows} for s in systems]
    union, shared = set().union(*by_key), set(by_key[0]).intersection(*by_key)
    if union != shared and not common:
        lacking = [f"'{s.name}' lacks {len(union - set(keys))} of {len(union)} (e.g. {min(union - set(keys))})"
                   for s, keys in zip(systems, by_key, strict=True) if union - set(keys)]
        raise UserError(f"the systems were not scored on the same rows: {', '.join(lacking)}; score them on the same "
                        "manifests, or give --common to compare the rows that all have")
    if not shared:
        raise UserError("the systems have no rows in common; score them on the same manifests")
    order = [key for key in by_key[0] if key in shared]
    for s, rows in zip(systems[1:], by_key[1:], strict=True):
        for key in order:
            field = next((f for f in ("ref_text", "ref") if rows[key].get(f) != by_key[0][key].get(f)), None)
            if field:
                raise UserError(f"'{s.name}' and '{systems[0].name}' have different references of {key} (field '{field}'); "
                                "score them on the same manifests")
    return [replace(s, rows=tuple(rows[key] for key in order)) for s, rows in zip(systems, by_key, strict=True)]


def row_fields(rows: Sequence[Row], manifests: Sequence[Path], by: Sequence[str],
               registry: TaskRegistry) -> dict[str, dict[str, str]]:
    """Values of the fields `by`, by utterance key: of the prediction row, its mapping `extra` or `meta`, or a manifest's row.

    Raises:
        UserError: a manifest cannot be read, or has none of the utterances.
    """
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for source in (row, row.get("extra"), row.get("meta")):
            found.setdefault(utterance_key(row), {}).update(_values(source, by))
    for path in manifests:
        own, known = manifest_name(path), False
        for line in iter_rows(path, registry, corpus=own):
            if line.utterance is None:
                raise UserError(str(line.problems[0]))
            key = f"{line.utterance.corpus}/{line.utterance.id}"
            if key in found:
                known = True
                found[key] = _values(line.content, by) | found[key]
        if not known:
            raise UserError(f"--manifest {path}: none of its rows (corpus and id) is among the predictions")
    return {key: values for key, values in found.items() if values}


def _values(source: Any, by: Sequence[str]) -> dict[str, str]:
    if not isinstance(source, Mapping):
        return {}
    return {name: str(source[name]) for name in by if isinstance(source.get(name), str | int | float)}
