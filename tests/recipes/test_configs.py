"""Every shipped config, preset and list of tasks loads; the quick start is the adapter's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unislu_llm.config import Config, ModelConfig
from unislu_llm.config_file import load_config, read_preset
from unislu_llm.training.recipe import default_config
from unislu_llm.training.stages import stage_configs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
ADAPTERS = sorted((ROOT / "adapters").glob("*--*"))
PRESETS = sorted((ROOT / "adapters").glob("*.yaml"))


def load(name: str, *flags: str) -> Config:
    return load_config(list(flags), CONFIGS / name, ROOT / "adapters", "")


@pytest.mark.parametrize("name", ["from_adapter.yaml", "from_scratch.yaml", "ctc_llm.yaml",
                                  "whisper.yaml"])
def test_a_config_loads_and_finds_its_data(name: str, tmp_path: Path) -> None:
    config = load(name, "--train.max-steps", "3")
    parts = [own for _, own in stage_configs(config, tmp_path)] if config.stages else [config]
    for part in parts:
        assert part.train.max_steps == 3
        assert all(Path(p).is_file() for p in (*part.data.train, *part.data.dev))
    if config.train.init:
        assert (Path(config.train.init) / "model.safetensors").is_file()
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("#   accelerate launch recipes/train_") for line in lines[:10])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_its_llm_and_a_prompt(path: Path) -> None:
    model = ModelConfig(**read_preset(path)["model"])
    config = load("from_scratch.yaml", "--llm", model.llm)
    assert config.model.prompt_suffix == model.prompt_suffix != ""
    assert config.model.projector == "none"
    assert load("from_scratch.yaml", "--llm", model.llm, "--projector", "mlp"
                ).model.projector_options.get("stack", 5) == 5


def test_the_quick_start_goes_on_from_the_shipped_adapter() -> None:
    config = load(default_config("llm", ["--train.epochs", "3"]).name)
    adapter = Path(config.train.init)
    assert adapter in ADAPTERS
    saved = json.loads((adapter / "config.json").read_text(encoding="utf-8"))["model"]
    saved["transcript"] = "auto"  # what is trained further is validated anew
    # The file may lack settings that came later.
    assert config.model == ModelConfig(**saved).read_from(adapter)
    for flags in (["--llm", "x"], ["--projector=conv"], ["--adapter", "a.yaml"]):
        assert default_config("llm", flags).name == "from_scratch.yaml"
    for flags in (["--data.tasks", "t.yaml"], ["--tasks-file=t.yaml"],
                  ["--model.llm", saved["llm"], "--projector", "ctc"]):
        assert default_config("llm", flags).name == "from_adapter.yaml", "its rows have names"
    assert default_config("whisper", []).name == "whisper.yaml"
    assert not load("from_scratch.yaml").train.init
