"""The house rules, measured: sizes, layers, comments, words, settings. A change that breaks one
has to be made smaller, or the rule changed on purpose."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from unislu_llm.config import Config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unislu_llm"
CODE = tuple(sorted(p for top in ("unislu_llm", "recipes", "eval")
                    for p in (ROOT / top).rglob("*.py")))
TESTS = tuple(sorted((ROOT / "tests").rglob("*.py")))

LAYERS = ("cli", "run_commands", "serve", "report", "evaluate merge parity", "merge_whisper",
          "export",
          "evaluate_options", "demo pipeline", "model_card prediction_file", "training",
          "run_folder", "decoding", "models", "data", "scoring", "config_file", "flags", "config",
          "setting_types", "weights", "io", "tokenizer", "unified", "utterance", "tasks", "loss",
          "text_files", "errors")
"""Rooms of the package from the roof down; a room imports what is below it, and itself."""
RANKS = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms.split()}

OLD_WORDS = frozenset({
    "draft", "drafts", "drafter", "drafted", "heard", "tally", "monitor", "monitors", "codec",
    "figures", "packing", "asr_floor", "fill_text", "text_rows", "use_speech", "init_llm",
    "micro_batch_size", "encoder_cache"})
"""Names that the field has other words for, or that went with what they named."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# ---- sizes


# What is there, and a little: who adds takes something away, or raises these on purpose.


def test_the_package_is_small() -> None:
    assert sum(len(lines_of(p)) for p in PACKAGE.rglob("*.py")) <= 20_312


def test_the_tests_are_small() -> None:
    assert sum(len(lines_of(p)) for p in TESTS) <= 18_460


def test_no_line_is_over_100_characters() -> None:
    long = [f"{name_of(p)}:{n}" for p in (*CODE, *TESTS) for n, line in enumerate(lines_of(p), 1)
            if len(line) > 100]
    assert not long


def test_no_file_is_over_350_lines() -> None:
    assert not {name_of(p): n for p in CODE if (n := len(lines_of(p))) > 350}


def test_no_function_is_over_60_lines() -> None:
    assert not {f"{name_of(p)}:{node.lineno} {node.name}": n for p in CODE
                for node in ast.walk(parsed(p))
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                and (n := (node.end_lineno or 0) - node.lineno + 1) > 60}


def test_results_are_small() -> None:
    files = {name_of(p): p.stat().st_size for p in (ROOT / "eval" / "results").rglob("*")
             if p.is_file()}
    assert sum(files.values()) < 2_300_000
    assert not {name: size for name, size in files.items() if size > 100_000}


def test_there_are_87_settings_at_most() -> None:
    def count(model: type[BaseModel]) -> int:
        kinds = [field.annotation for field in model.model_fields.values()]
        return sum(count(kind) if isinstance(kind, type) and issubclass(kind, BaseModel) else 1
                   for kind in kinds)

    assert count(Config) <= 87


# ---- comments and words


def test_comments_are_five_in_a_hundred_lines_of_code() -> None:
    comments = code = 0
    for path in PACKAGE.rglob("*.py"):
        docstrings = {line for node in ast.walk(parsed(path)) if isinstance(node, ast.Expr)
                      and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
                      for line in range(node.lineno, (node.end_lineno or 0) + 1)}
        # By tokens: a `#` inside a string is no comment, and one behind code is.
        with path.open("rb") as file:
            noted = {token.start[0] for token in tokenize.tokenize(file.readline)
                     if token.type == tokenize.COMMENT}
        comments += len(noted)
        code += sum(bool(line.strip()) and not line.lstrip().startswith("#")
                    for n, line in enumerate(lines_of(path), 1) if n not in docstrings)
    assert comments >= 0.05 * code, f"{comments} comments in {code} lines of code"


def test_old_words_are_gone() -> None:
    found: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type != tokenize.NAME:
                    continue
                words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", token.string).lower()
                if OLD_WORDS & {words, *words.split("_")}:
                    found.setdefault(token.string, []).append(f"{name_of(path)}:{token.start[0]}")
        assert not OLD_WORDS & set(path.stem.split("_")), path
    assert not {word: places[:3] for word, places in found.items()}


def test_no_path_of_a_machine_is_named() -> None:
    texts = [p for suffix in ("py", "md", "yaml", "toml") for p in ROOT.rglob(f"*.{suffix}")
             if not {"runs", "build", ".git"} & set(p.relative_to(ROOT).parts)
             and not any(part.startswith((".", "venv")) for part in p.relative_to(ROOT).parts)]
    pattern = re.compile(r"(?<![\w.])/(work|root|home/\w+|workspace|mnt)/\w")
    assert not [f"{name_of(p)}:{n}" for p in texts for n, line in enumerate(lines_of(p), 1)
                if pattern.search(line) and p != Path(__file__)]


# ---- layers


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p): p for p in PACKAGE.rglob("*.py")}
MODULES.pop("")  # the public names: fetched when they are asked for


def imports(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, at its top or inside a function."""
    for node in _running(parsed(MODULES[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            inner = name.removeprefix("unislu_llm.")
            if inner != name:
                yield inner if inner in MODULES else inner.rpartition(".")[0]


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module without what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from _running(node)


GRAPH = {module: sorted(set(imports(module)) - {module, ""}) for module in MODULES}


def test_every_room_has_its_place() -> None:
    assert {module.partition(".")[0] for module in MODULES} <= set(RANKS)


def test_imports_point_down() -> None:
    def up(module: str, other: str) -> bool:
        room, imported = module.partition(".")[0], other.partition(".")[0]
        return room != imported and RANKS.get(room, -1) >= RANKS.get(imported, -1)

    assert not [f"{module} -> {other}" for module, others in GRAPH.items() for other in others
                if up(module, other)]


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module):], module))
        if module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize(("start", "absent"), [
    ("unislu_llm.cli", "torch pydantic numpy yaml matplotlib"),
    ("unislu_llm", "torch pydantic numpy yaml"),
    ("unislu_llm.decoding.predict, unislu_llm.run_folder",
     "unislu_llm.training unislu_llm.evaluate"),
    ("unislu_llm.training.recipe, unislu_llm.evaluate_options", "torch transformers"),
    ("unislu_llm.scoring.score", "unislu_llm.models transformers.models"),
])
def test_what_a_start_does_not_load(start: str, absent: str) -> None:
    code = (f"import sys\nimport {start}\n"
            f"print([name for name in {absent.split()!r} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr or done.stdout
