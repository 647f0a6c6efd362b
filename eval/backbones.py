"""Every causal LM of transformers, and every kind of tokenizer, as the decoder's backbone.

    python eval/backbones.py                               # minutes on one core
    python eval/backbones.py --only llama mamba WordPiece  # these; nothing is written

Tiny random checkpoints go through the real entry points. What was found goes to
eval/results/backbones.json, and as two tables into adapters/README.md.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported.
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

import backbone_checks
import tokenizer_kinds
import torch
import tyro
from backbone_checks import Bench, Cells
from tiny_llms import CLASSES
from tiny_runs import ROOT
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from unislu_llm.errors import UserError, hint, reported
from unislu_llm.io import write_json, write_text
from unislu_llm.run_folder import versions

README, RESULTS = ROOT / "adapters" / "README.md", ROOT / "eval" / "results" / "backbones.json"
BEGIN, END = "<!-- begin: written by eval/backbones.py -->", "<!-- end -->"


@dataclass
class Options:
    """What is tried."""

    only: tuple[str, ...] = ()
    """Architectures and kinds of tokenizers; default: all, and the page is written."""
    out: Path | None = None
    """JSON file; default with all: eval/results/backbones.json."""


def run(options: Options) -> dict[str, dict[str, Cells]]:
    """Try what is asked for; what was found, by architecture and by kind of tokenizer.

    Raises UserError: a name of neither.
    """
    known = (*CLASSES, *tokenizer_kinds.KINDS)
    for name in set(options.only).difference(known):
        raise UserError(f"--only {name}: no architecture and no kind{hint(name, known)}")
    wanted = options.only or known
    found: dict[str, dict[str, Cells]] = {"architectures": {}, "tokenizers": {}}
    parts: tuple[tuple[str, Sequence[str], Callable[[str, Bench], Cells]], ...] = (
        ("architectures", list(CLASSES), backbone_checks.check),
        ("tokenizers", list(tokenizer_kinds.KINDS), tokenizer_kinds.check))
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        stack.callback(gc.unfreeze)
        bench = Bench(Path(home))
        for part, names, check in parts:
            for name in [name for name in names if name in wanted]:
                gc.collect()
                gc.freeze()  # training collects garbage; all of transformers is none
                with (contextlib.redirect_stdout(io.StringIO()),
                      contextlib.redirect_stderr(io.StringIO())):
                    found[part][name] = check(name, bench)
                wrong = {key: said for key, said in found[part][name].items() if said != "yes"}
                print(f"{name}: {wrong or 'right'}", flush=True)
    return found


# ---- the page


def marks(cells: Cells, columns: Mapping[str, str]) -> tuple[str, ...]:
    """A row of the table: `yes`, `no`, or what there is in place of them."""
    if "refused" in cells:
        return ("refused", *[""] * (len(columns) - 1))
    said = (cells.get(column, "not run") for column in columns)
    return tuple(cell if cell in ("yes", "not run") else
                 "refused" if cell.startswith("UserError: ") else "no" for cell in said)


def table(title: str, found: Mapping[str, Cells], columns: Mapping[str, str]) -> list[str]:
    """Lines of Markdown: rows that are alike are one, the better first; then what is wrong."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, cells in found.items():
        rows.setdefault(marks(cells, columns), []).append(name)
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, names in sorted(rows.items(), key=lambda item: (
            "refused" in item[0], item[0].count("no"), -len(item[1]))):
        lines.append(f"| {listed(names)} ({len(names)}) | {' | '.join(row)} |")
    causes: dict[str, list[str]] = {}
    for name, cells in found.items():
        # The first is nearest to the cause; results/backbones.json has all.
        wrong = [(column, said) for column, said in cells.items() if said != "yes"]
        for column, said in wrong[:1]:
            for own in (f"model.llm {name}: ", CLASSES.get(name)):  # else no two were alike
                said = said.replace(own, "") if own else said
            causes.setdefault(f"{column}: {said}", []).append(name)
    if causes:
        lines += ["", "The first thing that is wrong:", ""]
        lines += [f"* {listed(names)}: {said}" for said, names in sorted(causes.items())]
    return [*lines, ""]


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page(found: Mapping[str, Mapping[str, Cells]]) -> str:
    """What stands between the marks of the page."""
    tried = {n: cells for n, cells in found["architectures"].items() if cells["made"] == "yes"}
    unmade = [name for name in found["architectures"] if name not in tried]
    lines = [f"transformers {versions()['packages']['transformers']} has "
             f"{len(found['architectures'])} architectures of causal LMs. "
             f"{len(tried)} were tried, each as a random model 32 wide; no tiny model was made of "
             f"{listed(unmade)}. Refused: training ends with one error before it begins.", ""]
    for title, some, columns in (
            ("architecture", tried, backbone_checks.COLUMNS),
            ("tokenizer", found["tokenizers"], tokenizer_kinds.COLUMNS)):
        lines += [*(f"* {column}: {what}" for column, what in columns.items()), ""]
        lines += table(title, some, columns)
    return "\n".join(lines)


def write_page(text: str, path: Path = README, script: str = "eval/backbones.py") -> None:
    """Put a text between a script's marks on a page; UserError: it has not both of them."""
    begin = BEGIN.replace("eval/backbones.py", script)
    before, mark, rest = path.read_text(encoding="utf-8").partition(begin)
    _, end, behind = rest.partition(END)
    if not (mark and end):
        raise UserError(f"{path} lacks the lines '{begin}' and '{END}', between which the tables "
                        "go; put them there")
    write_text(path, f"{before}{begin}\n\n{text}\n{END}{behind}")


def main(options: Options) -> None:
    warnings.simplefilter("ignore")
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = run(options)
    out = options.out or (None if options.only else RESULTS)
    if out:
        write_json(out, {**found, "seconds": round(time.perf_counter() - started), **versions()})
    if not options.only:
        write_page(page(found))


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Options, description=__doc__))
