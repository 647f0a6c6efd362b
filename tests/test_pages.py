"""Every command of README and docs is run in its order, page by page, or says what it needs.

They run in a folder like a checkout where all is small: two clips of each part of the mini corpus,
tiny random models under the names of Whisper, the LLMs and the adapters, one step of training.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils.logging import enable_progress_bar

from tests.hub import Hub, connected
from tests.test_docs import PAGES, PROGRAMS, README, ROOT, blocks, command_lines, name_of
from unislu_llm import cli, models
from unislu_llm.config import ModelConfig
from unislu_llm.io import write_text
from unislu_llm.tasks import TaskRegistry

MINI, COMMIT = Path("recipes/data/mini"), "0" * 40
RUNS = ROOT / "docs" / "training.md"  # its first two commands make the runs of other pages
SMALL = {"train": "--train.max-steps 1 --train.threads 1 --decode.max-new-tokens 24",
         "benchmark": "--encoder tiny --llm tiny --clips 2 --rounds 1 --threads 1 --no-memory"}


@contextlib.contextmanager
def inside(world: Path) -> Iterator[pytest.MonkeyPatch]:
    """The folder in the place of the checkout; a hub, whose cache lies beside it."""
    with pytest.MonkeyPatch.context() as patch, connected(Hub(), world.parent / "cache", patch):
        patch.chdir(world)
        patch.setenv("UNISLU_CACHE", str(world.parent / "converted"))
        patch.setattr("unislu_llm.training.recipe.shipped", lambda: world)
        patch.syspath_prepend("recipes"), patch.syspath_prepend("eval")
        tone = np.sin(np.arange(8000) / 9).astype(np.float32)  # Piper's voices are a package
        patch.setattr("make_voices.PiperVoice.speak", lambda *_: tone)
        yield patch


def run(line: str, patch: pytest.MonkeyPatch) -> str:
    """What a command line prints; it has to end well."""
    words = [file for word in shlex.split(line, comments=True) for file in (
        sorted(map(str, Path().glob(word))) if "*" in word and f"'{word}'" not in line else [word])]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        patch.setenv(*words.pop(0).split("=", 1))
    assert words[0] in PROGRAMS, f"say what it needs, in a line `# needs: ...` above: {line}"
    if words[0] in ("accelerate", "torchrun"):  # one process is this one
        words = words[next(i for i, w in enumerate(words) if w == "-m" or w.endswith(".py")) - 1:]
    words = words[2:] if words[1] == "-m" else words[words[0] != "unislu":]
    script = words[0].endswith(".py")
    what = Path(words[0]).stem.split("_")[0] if script else words[1]
    words += SMALL.get(what, "").split()
    if what == "train" and "--output" not in words:  # two of one second would have one name
        words += ["--output", f"runs/{len([*Path('runs').glob('*')])}"]
    with (contextlib.redirect_stdout(io.StringIO()) as out,
          contextlib.redirect_stderr(io.StringIO()) as err):
        enable_progress_bar()  # as in a new process
        patch.setattr("sys.argv", words)
        try:
            status: Any = cli.main(words[1:]) if not script else not runpy.run_path(
                words[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
    assert not status, f"{line}\n{out.getvalue()[-2000:]}\n{err.getvalue()[-2000:]}"
    assert "Loading weights" not in err.getvalue(), line  # bars of libraries
    return out.getvalue()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: Any, tiny_checkpoints: dict[str, str]) -> Path:
    """Recipes, scripts and adapters as they ship, but small; and two runs."""
    world = tmp_path_factory.mktemp("pages") / "checkout"
    for room in ("recipes", "eval", "adapters"):
        shutil.copytree(ROOT / room, world / room, ignore=shutil.ignore_patterns(
            "audio", "results", "*--*", "__pycache__"))
    (world / MINI / "audio").symlink_to(ROOT / MINI / "audio")
    (world / "names.txt").write_text("Malta\n")
    for file in (world / MINI).glob("*.jsonl"):
        file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:2]), "utf-8")
    presets = [yaml.safe_load(p.read_text("utf-8")) for p in ROOT.glob("adapters/*.yaml")]
    llms = {p["llm"]: f"{p['prompt_prefix']}{{{{ messages[0].content }}}}{p['prompt_suffix']}"
            for p in presets}
    for name in ("openai/whisper-base", *llms):
        place = world.parent / "cache" / f"models--{name.replace('/', '--')}"
        files = shutil.copytree(tiny_checkpoints["llm" if name in llms else "whisper"],
                                place / "snapshots" / COMMIT)
        (files / "chat_template.jinja").write_text(llms.get(name, ""))
        write_text(place / "refs" / "main", COMMIT)
    with inside(world) as patch:
        for file in (ROOT / "adapters").rglob("config.json"):
            saved = json.loads(file.read_text("utf-8"))
            model = models.KINDS[saved["model_type"]].build(
                ModelConfig(**saved["model"]), TaskRegistry.from_dict(saved["tasks"]),
                ctc_tokens=saved["ctc_tokens"] and range(3, 300))
            model.save_pretrained(world / file.parent.relative_to(ROOT))
        for _, line in command_lines(blocks(RUNS)[0][1])[:2]:
            run(line, patch)
    gc.freeze()  # each training collects garbage: a second, of which tests' imports are the most
    return world


def form(line: str) -> str:
    """A printed line without what differs by data: numbers, paths, what a model says."""
    line = re.sub(r"^(  \w+): .*|[\w.-]+/[^\s:]+", r"\1", line)
    return re.sub(r"[-+]?\d+(\.\d+)?|-{2,}", "0", " ".join(line.split()))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name_of)
def test_a_page_runs_and_prints_what_it_says(page: Path, checkout: Path, tmp_path: Path) -> None:
    world, names, printed, before = tmp_path / "checkout", dict[str, Any](), "", ""
    shutil.copytree(checkout, world, symlinks=True, ignore=lambda *_: ["runs"] * (page == RUNS))
    (tmp_path / "cache").symlink_to(checkout.parent / "cache")
    with inside(world) as patch:
        for kind, text in blocks(page):
            for needs, line in command_lines(text) if kind == "shell" else ():
                # What has to be installed first has a mark; what is run at the end is run here.
                for step in line.split(" && ")[1:][-1:] if needs else line.split(" && "):
                    printed += run(step, patch)
            if kind == "python" and ">>>" not in text:
                patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
                exec(compile(text, name_of(page), "exec"), names)
            elif not kind and (page, before) != (README, "python"):  # which real weights say
                rest = iter([form(line) for line in printed.splitlines()])
                gone = [x for x in text.splitlines() if x != "..." and form(x) not in rest]
                assert not gone, f"a page says, and its commands do not print: {gone[0]}\n{printed}"
            assert kind in ("shell", "python", "json", "yaml", "bibtex", "csv", "conll", ""), kind
            before = kind
