"""The config files for `accelerate launch` are what Accelerate reads, and say how they are used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_takes_the_file(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises for keys that it does not know
    head = re.split(r"^(?!#)", path.read_text(encoding="utf-8"), maxsplit=1, flags=re.M)[0]
    assert f"accelerate launch --config_file recipes/accelerate/{path.name}" in head
    assert re.search(r"not run|run[\s#]+on", head.lower())  # whether it was
    assert config.mixed_precision == "no"  # the trainer's own setting decides
    assert config.num_processes % config.num_machines == 0


def test_there_is_one_for_each_way() -> None:
    assert {path.stem for path in FILES} >= {"one_gpu", "ddp", "nodes"}
