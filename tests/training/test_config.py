"""Configuration: what overrides what, and errors that name the nearest known key."""

from __future__ import annotations

from pathlib import Path

import pytest

from unislu_llm.errors import UserError
from unislu_llm.training.config import Config, apply, load_config


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A config file and a folder of presets."""
    (tmp_path / "c.yaml").write_text("train: {epochs: 3, lr: {lora: 1e-4}}\ndata: {train: [a.jsonl]}\n")
    presets = tmp_path / "adapters"
    presets.mkdir()
    (presets / "one.yaml").write_text("llm: org/one\nlora: {rank: 4}\nprompt_suffix: one\n")
    (presets / "two.yaml").write_text("llm: org/two\nlora: {rank: 8}\nprompt_suffix: two\n")
    return tmp_path / "c.yaml", presets


def test_flag_beats_file_beats_preset_beats_default(files: tuple[Path, Path]) -> None:
    config = load_config(["--llm", "org/two", "--train.epochs", "7"], *files, "")
    assert (config.model.llm, config.model.lora.rank, config.model.prompt_suffix) == ("org/two", 8, "two")
    assert (config.train.epochs, config.train.lr.lora, config.train.lr.projector) == (7, 1e-4, Config().train.lr.projector)
    assert config.data.train == [str(files[0].parent / "a.jsonl")]


def test_named_preset_brings_its_llm(files: tuple[Path, Path]) -> None:
    config = load_config(["--adapter", str(files[1] / "one.yaml"), "--projector", "qformer"], *files, "")
    assert (config.model.llm, config.model.lora.rank, config.model.projector) == ("org/one", 4, "qformer")


def test_projector_options_as_json(files: tuple[Path, Path]) -> None:
    assert load_config(["--model.projector-options", '{"stack": 3}'], *files, "").model.projector_options == {"stack": 3}


@pytest.mark.parametrize(("values", "message"), [
    ({"train": {"epoch": 3}}, r"here\.train.*'epoch'.*'epochs'"),
    ({"modle": {}}, r"'modle'.*'model'"),
    ({"train": {"epochs": "three"}}, r"here\.train\.epochs.*'three'"),
    ({"train": {"loss": "dynamc"}}, r"here\.train\.loss.*dynamic, fixed, uniform"),
    ({"train": 3}, r"here\.train: expected a mapping"),
    ({"train": {"lr": {"lora": "fast"}}}, r"here\.train\.lr\.lora"),
    ({"data": {"train": "a.jsonl"}}, r"here\.data\.train: expected list"),
    ({"train": {"eval_start": 1}}, r"here\.train\.eval_start"),
])
def test_bad_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(Config(), values, "here")


def test_scientific_notation_is_a_number() -> None:
    config = Config()
    apply(config, {"train": {"lr": {"lora": "3e-4"}}}, "here")  # as YAML 1.1 reads it
    assert config.train.lr.lora == 3e-4


def test_unknown_flag_names_the_nearest(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--lmm", "org/one"], *files, "")
    assert "--llm" in capsys.readouterr().err


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml does not exist"):
        load_config([], tmp_path / "no.yaml", None, "")
    (tmp_path / "broken.yaml").write_text("train: {epochs: 3\n")
    with pytest.raises(UserError, match=r"broken\.yaml: not valid YAML"):
        load_config([], tmp_path / "broken.yaml", None, "")


def test_options_belong_to_their_projector(files: tuple[Path, Path]) -> None:
    files[0].write_text("model: {projector: mlp, projector_options: {stack: 6}}\n")
    (files[1] / "one.yaml").write_text("llm: org/one\nprojector: mlp\nprojector_options: {stack: 5, hidden: 64}\n")
    same = load_config(["--llm", "org/one"], *files, "").model
    assert (same.projector, same.projector_options) == ("mlp", {"stack": 6, "hidden": 64})
    other = load_config(["--llm", "org/one", "--projector", "qformer"], *files, "").model
    assert (other.projector, other.projector_options) == ("qformer", {})
