"""An installed package has what `unislu train` takes by default, wherever it is called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as build; build.build_wheel('.')"
ASK = """
from pathlib import Path
from unislu_llm.config_file import load_config, shipped
from unislu_llm.data.manifest import read_manifest
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.recipe import default_config
for decoder in ("llm", "whisper"):
    config = load_config([], default_config(decoder, []), shipped() / "adapters", "", say=print)
    assert not config.train.init
    for file in (*config.data.train, *config.data.dev):
        rows = list(read_manifest(file, TaskRegistry()))
        assert rows and all(Path(u.audio).is_file() for u in rows), file
assert load_config(["--llm", "google/gemma-3-270m"], default_config("llm", ["--llm"]),
                   shipped() / "adapters", "").model.prompt_suffix
"""


def test_every_package_is_installed() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    own = {name for name in setup["packages"] if not name.startswith("unislu_llm.shipped.")}
    assert own == {".".join(p.parent.relative_to(ROOT).parts)
                   for p in (ROOT / "unislu_llm").rglob("__init__.py")}
    assert {*setup["packages"]} - own == setup["package-dir"].keys()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    root = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors", ".*")
    for name in ("unislu_llm", "recipes", "adapters"):
        shutil.copytree(ROOT / name, root / "source" / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "source")
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=root / "source", capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    wheel, = (root / "source").glob("*.whl")
    assert wheel.stat().st_size < 8_000_000
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "installed")
    return root / "installed"


def test_the_revision_of_another_project_is_not_its_version(installed: Path) -> None:
    git = ["git", "-C", str(installed.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    done = subprocess.run([sys.executable, "-m", "unislu_llm.cli", "--version"], text=True,
                          cwd=installed, capture_output=True, check=True)
    assert re.fullmatch(r"unislu_llm \d\S+\n", done.stdout)


def test_defaults_are_found_from_any_folder(installed: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "from_scratch.yaml; preset: " in lines[0], "an installed package has no adapter"
    assert "smollm2-135m.yaml" in lines[0]
    assert "whisper.yaml" in lines[1]
    assert all(line.startswith(f"config: {installed}") for line in lines)
