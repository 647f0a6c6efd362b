"""What README and docs say is there: links, paths, commands, settings, names, numbers."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import json
import pkgutil
import re
import runpy
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from unislu_llm import cli
from unislu_llm.config import Config
from unislu_llm.io import read_json

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "eval" / "README.md",
         ROOT / "eval" / "results" / "README.md", ROOT / "adapters" / "README.md",
         *sorted((ROOT / "adapters").glob("*/README.md")), ROOT / "recipes/data/mini/README.md"]
PROGRAMS = ("unislu", "accelerate", "torchrun", "python")
RECIPE_FLAGS = {"plan", "config", "adapter", "llm", "encoder", "projector", "tasks_file",
                "decoder", "nproc_per_node", "config_file"}
QUICK_START = ("python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e "
               "'.[dev]' && accelerate launch recipes/train_llm.py")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", outside_code(page.read_text("utf-8")).lower(), re.M)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def settings(section: type[BaseModel] = Config, prefix: str = "") -> set[str]:
    """Dotted names of all settings."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= settings(kind, f"{prefix}{name}.") if inner else {prefix + name}
    return found


def blocks(page: Path) -> list[tuple[str, str]]:
    """Code blocks of a page in order: `shell` for commands, else as the page says, and its text."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    first = re.compile(rf"(#.*\n)*({'|'.join((*PROGRAMS, 'pip'))}) ")
    return [("shell" if kind == "bash" or (not kind and first.match(text)) else kind, text)
            for kind, text in found]


def command_lines(block: str) -> list[tuple[str, str]]:
    """Command lines of a block, each behind what a line `# needs: ...` right above it says."""
    return re.findall(r"^(?:# needs: (\S.*)\n)?([^#\s].*)", block.replace("\\\n", " "), re.M)


def commands(page: Path) -> list[list[str]]:
    """Words of every command of the project in a page's code blocks and lines, without comments."""
    parts = [part for kind, text in blocks(page) if kind == "shell"
             for _, line in command_lines(text) for part in line.split(" && ")]
    found = [[w for w in shlex.split(part, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", w)]
             for part in parts]
    inline = re.findall(r"`(unislu [^`]*)`", outside_code(page.read_text("utf-8")))
    return [*(words for words in found if words and words[0] in PROGRAMS),
            *map(shlex.split, inline)]


@lru_cache
def help_of(*program: str) -> str:
    """What `--help` prints, by the function or the script behind a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        if program[0] == "unislu":
            cli.main([*program[1:], "--help"])
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", [program[0], "--help"])
                patch.syspath_prepend(str(ROOT / program[0]).rsplit("/", 1)[0])
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    return out.getvalue()


def known_flag(words: list[str], flag: str) -> bool:
    """Whether a command takes a flag."""
    script = next((w for w in words if re.match(r"(recipes|eval)/\w+\.py$", w)), "")
    train = words[:2] == ["unislu", "train"] or "unislu_llm.cli" in words
    if train or script.startswith("recipes/train_"):
        return flag.replace("-", "_") in settings() | RECIPE_FLAGS
    # `unislu prepare` has commands of its own.
    program = words[:2 + (words[1] == "prepare")] if words[0] == "unislu" else [script]
    return f"--{flag} " in re.sub(r"[\s,│|]+", " ", help_of(*program)).replace("_", "-") + " "


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code(page.read_text("utf-8"))):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not link.startswith(("http://", "https://")):
            assert target.exists(), f"{link} in {name_of(page)}"
            assert not anchor or anchor in anchors(target), f"{link} in {name_of(page)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text("utf-8"))
    for path in re.findall(r"(?<![\w/.])((?:recipes|eval|docs|unislu_llm)/[\w./*+-]*[\w*])", text):
        example = re.search(r"NAME|my-", path)
        assert example or list(ROOT.glob(path)), f"{path} in {name_of(page)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_take_their_flags(page: Path) -> None:
    for name in re.findall(r"`unislu\s+(\w+)", page.read_text("utf-8")):
        assert f" {name} " in help_of("unislu"), f"unislu {name} in {name_of(page)}"
    for words in commands(page):
        for flag in re.findall(r"(?<= )--([a-zA-Z][\w.-]*)", " ".join(words)):
            assert known_flag(words, flag), f"--{flag} of {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_are_named_exist(page: Path) -> None:
    known = settings() | {"model.safetensors"}
    sections = "|".join(sorted({name.split(".")[0] for name in settings() if "." in name}))
    text = outside_code(page.read_text("utf-8"))
    flags = re.findall(rf"`[^`]*?--((?:{sections})\.[\w.-]+)", text)
    names = re.findall(rf"`((?:{sections})\.[a-z_.]+)[ `]", text)
    for name in [*(flag.replace("-", "_") for flag in flags), *names]:
        section = any(setting.startswith(f"{name}.") for setting in known)
        # A function may be in a room that has the name of a section.
        assert name in known or section or _exists(name), f"{name} in {name_of(page)}"


def _exists(name: str) -> bool:
    """Whether a dotted name below `unislu_llm` leads to something."""
    try:
        pkgutil.resolve_name(f"unislu_llm.{name}")
    except (ImportError, AttributeError):
        return False
    return True


def test_messages_that_are_explained_are_printed() -> None:
    printed = []
    for path in (ROOT / "unislu_llm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            printed.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}"
                                   for part in parts))
    messages = re.findall(r"\*\*`([^`]+)`\*\*",
                          (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"))
    assert len(messages) > 12
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split(" ... "))))
        assert any(map(pattern.search, printed)), message


def test_functions_on_the_walks_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    names = set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]\w*)+)`", text))
    walked = sorted(name for name in names if not name.endswith(".py"))
    assert len(walked) > 40
    assert not [name for name in walked if not _exists(name)]


def test_readme_is_short_and_has_its_two_commands() -> None:
    text = README.read_text("utf-8")
    assert len(text.encode()) <= 9000
    assert re.findall(r"^```bash\n(?:#.*\n)?(.*)\n```", text, re.M) == [
        QUICK_START, "pytest -n auto --dist loadfile"]


def test_scoring_example_prints_what_it_says() -> None:
    assert doctest.testfile(str(ROOT / "docs" / "scoring.md"), module_relative=False).failed == 0


def test_numbers_of_the_results_tables_are_those_of_the_files() -> None:
    folder, rows = ROOT / "eval" / "results" / "slue_voiced", 0
    for line in (ROOT / "docs" / "results_systems.md").read_text("utf-8").splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if len(cells) != 9 or not (folder / f"{cells[0]}-s1.json").is_file():
            continue
        scores = json.loads((folder / f"{cells[0]}-s1.json").read_text("utf-8"))["scores"]
        read = json.loads((folder / f"{cells[0]}-s1-dev-read.json").read_text("utf-8"))["scores"]
        block, tasks = (scores["protocols"]["whisper"][key] for key in ("wer", "tasks"))
        expected = [*(block["by_corpus"][f"voiced-{c}"]["wer"] for c in ("sentiment", "voxpopuli")),
                    read["protocols"]["whisper"]["wer"]["overall"]["wer"],
                    tasks["ner"]["entity"]["f1"], tasks["ner"]["label"]["f1"],
                    tasks["sa"]["macro_f1"]]
        assert [cell.split()[0] for cell in cells[1:7]] == [f"{x:.1f}" for x in expected], cells[0]
        short = [cells[1], cells[2], cells[4], cells[6]]
        if cells[0] in ("whisper-uniform", "pipeline-text", "llm-all"):
            assert " | ".join(short) in README.read_text("utf-8").replace("**", ""), cells[0]
        rows += 1
    assert rows == 14


@pytest.mark.parametrize("name", ["gemma-adapter-open*", "smollm2-open-s1*"])
def test_numbers_of_an_adapter_are_those_of_its_files(name: str) -> None:
    files = (ROOT / "eval" / "results" / "listening").glob(f"{name}.json")
    one, read = sorted(map(read_json, files), key=lambda scores: "asr" in scores["samples"])
    found, spans = one["scores"]["protocols"]["whisper"], one["intervals"]["whisper"]
    cells = [f"{found['wer']['by_corpus'][f'voiced-{c}']['wer']:.1f}"
             for c in ("sentiment", "voxpopuli")]
    cells += [f"{value:.1f} [{spans[key]['low']:.1f}, {spans[key]['high']:.1f}]" for key, value in (
        ("ner/f1", found["tasks"]["ner"]["entity"]["f1"]),
        ("sa/macro_f1", found["tasks"]["sa"]["macro_f1"]))]
    assert " | ".join(cells) in README.read_text("utf-8").replace("**", "")
    cells.insert(2, f"{read['scores']['protocols']['whisper']['wer']['overall']['wer']:.1f}")
    systems = (ROOT / "docs" / "results_systems.md").read_text("utf-8")
    assert " | ".join(cells) in systems.replace("**", "")


@pytest.mark.weights
def test_readme_example_prints_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text("utf-8")
    code, said = re.findall(r"^```python\n(.*?)^```\n+```\n(.*?)^```", text, re.M | re.S)[0]
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {})
    found, expected = out.getvalue().splitlines(), said.splitlines()
    assert found[:2] == expected[:2]
    assert ast.literal_eval(found[2]) == pytest.approx(ast.literal_eval(expected[2]), abs=0.01)
