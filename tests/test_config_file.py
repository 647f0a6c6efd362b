"""Configuration: what overrides what, and errors that name file and line, or flag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from unislu_llm.config import Config, ModelConfig
from unislu_llm.config_file import config_from_file, load_config, to_yaml
from unislu_llm.errors import UserError
from unislu_llm.io import write_json
from unislu_llm.setting_types import Common


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A config file and a folder of presets."""
    (tmp_path / "c.yaml").write_text(
        "train: {epochs: 3, lr: {lora: 1e-4}}\ndata: {train: [a.jsonl]}\n")
    presets = tmp_path / "adapters"
    presets.mkdir()
    for name, rank in (("one", 4), ("two", 8)):
        (presets / f"{name}.yaml").write_text(
            f"llm: org/{name}\nlora: {{rank: {rank}}}\nprompt_suffix: {name}\nprecision: bf16\n")
    return tmp_path / "c.yaml", presets


def test_flag_beats_file_beats_preset_beats_default(files: tuple[Path, Path]) -> None:
    config = load_config(["--llm", "org/two", "--train.epochs", "7"], *files, "")
    model, train = config.model, config.train
    assert (model.llm, model.lora.rank, model.prompt_suffix) == ("org/two", 8, "two")
    assert (train.epochs, train.lr.lora, train.precision) == (7, 1e-4, "bf16")
    assert train.lr.projector == Config().train.lr.projector
    assert config.data.train == [str(files[0].parent / "a.jsonl")]
    assert load_config(["--llm=org/none"], *files, "").train.precision == "fp32"


def test_a_named_preset_brings_its_llm(files: tuple[Path, Path]) -> None:
    named = ["--adapter", str(files[1] / "one.yaml"), "--projector", "qformer"]
    model = load_config(named, *files, "").model
    assert (model.llm, model.lora.rank, model.projector) == ("org/one", 4, "qformer")
    assert load_config([*named, "--llm", "org/x"], *files, "").model.llm == "org/x"


def test_flags_of_every_kind(files: tuple[Path, Path]) -> None:
    files[0].write_text("data: {weights: {a: 2}}\naugment: {noise: musan, speeds: [0.9, 1.1]}\n")
    flags = ["--data.temperature", "2", "--data.weights", '{"b": 0.5}', "--augment.freq-masks",
             "2", "--model.projector-options", '{"stack": 3}', "--data.train", "x", "y"]
    config = load_config(flags, *files, "")
    assert config.data.weights == {"b": 0.5}
    assert (config.data.temperature, config.augment.freq_masks) == (2.0, 2)
    assert config.model.projector_options == {"stack": 3}
    assert config.data.train == ["x", "y"], "a flag's paths are those of the shell"
    assert config.augment.noise == str(files[0].parent / "musan"), "a file's are relative to it"


def saved_model(folder: Path, **settings: object) -> Path:
    """What is read of a saved model to begin with."""
    folder.mkdir()
    model = ModelConfig.model_validate({"llm": "org/two", "projector": "ctc", **settings})
    write_json(folder / "config.json", {"model_type": "speech_llm", "model": model.model_dump()})
    (folder / "model.safetensors").touch()
    return folder


def test_a_saved_model_brings_its_settings(files: tuple[Path, Path]) -> None:
    saved = saved_model(files[0].parent / "saved", lora={"rank": 5}, projector_options={"stack": 3},
                        hypothesis="manifest", hypothesis_bias=2.0, transcript="verbatim",
                        recogniser="./recogniser")
    files[0].write_text("train: {init: saved}\nmodel: {hypothesis_bias: 1}\n")
    config = load_config(["--model.language", "de"], *files, "")
    model = config.model
    assert config.train.init == str(saved), "a file's paths are relative to it"
    assert (model.llm, model.projector, model.projector_options) == ("org/two", "ctc", {"stack": 3})
    assert (model.lora.rank, model.prompt_suffix, model.hypothesis) == (5, "", "manifest")
    assert (model.hypothesis_bias, model.language) == (1.0, "de"), "what may differ is the user's"
    assert model.recogniser == str(saved / "recogniser"), "it lies in the saved model's folder"
    assert model.transcript == "auto", "what is trained further is validated anew"
    asked = load_config(["--model.transcript", "rewrite"], *files, "")
    assert asked.model.transcript == "rewrite"
    assert config.train.precision == "bf16", "the preset of its LLM still says how it trains"
    assert config_from_file(files[0]).model.projector == "ctc"
    # What a stage begins with is what the run begins with.
    files[0].write_text("stages: [{name: a, train: {init: saved}}]\n")
    assert load_config([], *files, "").model.lora.rank == 5


def test_a_flag_that_names_a_saved_model_replaces_the_default_files(
        files: tuple[Path, Path]) -> None:
    saved = saved_model(files[0].parent / "saved", lora={"rank": 5})
    files[0].write_text("model: {llm: org/one, projector: none, hypothesis: manifest}\n")
    flags, told = ["--train.init", str(saved)], list[str]()
    model = load_config(flags, *files, "", say=told.append).model
    assert told[0].endswith(f"; model settings: those of {saved}")
    assert (model.llm, model.projector, model.lora.rank) == ("org/two", "ctc", 5)
    # A file that is named is meant, as flags are.
    model = load_config([*flags, "--config", str(files[0]), "--projector", "mlp"], *files, "").model
    assert (model.llm, model.projector, model.lora.rank) == ("org/one", "mlp", 5)


@pytest.mark.parametrize(("values", "message"), [
    ({}, r"train\.init: .*saved is neither a saved model nor a run"),
    ({"model_type": "speech_llm", "model": {"projektor": "ctc"}},
     r"saved.config\.json: model\.projektor: unknown key; did you mean 'projector'"),
])
def test_a_saved_model_that_is_none(values: dict[str, object], message: str,
                                    files: tuple[Path, Path]) -> None:
    write_json(saved_model(files[0].parent / "saved") / "config.json", values)
    files[0].write_text("train: {init: saved}\n")
    with pytest.raises(UserError, match=message):
        load_config([], *files, "")


def test_own_training_data_needs_dev_data_of_its_own(files: tuple[Path, Path],
                                                     tmp_path: Path) -> None:
    """The dev manifests of a config that ships would choose the best checkpoint by other data."""
    files[0].write_text("data: {train: [a.jsonl], dev: [mini.jsonl]}\n")
    own = tmp_path / "mine" / "own.yaml"
    own.parent.mkdir()
    own.write_text("data: {dev: [own.jsonl]}\n")
    its = str(own.parent / "own.jsonl")
    with pytest.raises(UserError, match=r"--data\.train without .*c\.yaml \(mini\.jsonl\)"):
        load_config(["--data.train=x"], *files, "")
    for flags, dev in ((["--data.train", "x", "--data.dev", "y"], ["y"]),
                       (["--data.train", "x", "--data.dev", "none"], []),
                       (["--data.train", "x", "--config", str(own)], [its]),
                       ([], [str(tmp_path / "mini.jsonl")])):
        assert load_config(flags, *files, "").data.dev == dev


def test_options_belong_to_their_projector(files: tuple[Path, Path]) -> None:
    files[0].write_text("model: {projector: mlp, projector_options: {stack: 6}}\n")
    (files[1] / "one.yaml").write_text(
        "llm: org/one\nprojector: mlp\nprojector_options: {stack: 5, hidden: 64}\n")
    same = load_config(["--llm", "org/one"], *files, "").model
    assert same.projector_options == {"stack": 6, "hidden": 64}
    other = load_config(["--llm", "org/one", "--projector", "qformer"], *files, "").model
    assert (other.projector, other.projector_options) == ("qformer", {})


@pytest.mark.parametrize(("text", "message"), [
    ("train:\n  epoch: 3\n", r"c\.yaml:2: train\.epoch: .*'epochs'"),
    ("data:\n\nmodle: {}\n", r"c\.yaml:3: modle.*'model'"),
    ("train:\n  seed: 2\n  epochs: three\n", r"c\.yaml:3: train\.epochs.*'three'"),
    ("train:\n  loss: dynamc\n", r"c\.yaml:2: train\.loss.*dynamic.*fixed.*uniform"),
    ("train: 3\n", r"c\.yaml:1: train: "),
    ("train:\n", r"c\.yaml:1: train"),
    ("train:\n  lr:\n    lora: fast\n", r"c\.yaml:3: train\.lr\.lora"),
    ("data:\n  train: a.jsonl\n", r"c\.yaml:2: data\.train: .*list"),
    ("augment:\n  speeds:\n    - 1.0\n    - 9\n", r"c\.yaml:4: augment\.speeds\[1\]"),
    ("train: {epochs: 0}\n", r"c\.yaml:1: train\.epochs: must be at least 1, found 0"),
    ('model:\n  projector_options: {stack: "5"}\n',
     r"c\.yaml:2: model\.projector_options\.stack: must be a number.*found '5'"),
    ("model:\n  projector_options: {strides: [2, true]}\n", r"c\.yaml:2: .*\.strides: .*number"),
    ('train: {epochs: "5"}\n',
     r"c\.yaml:1: train\.epochs: must be a whole number of at least 1, found '5'"),
    ("train: {epochs: true}\n", r"c\.yaml:1: train\.epochs: .*whole number.*, found True"),
    ('train: {lr: {lora: "1e-4"}}\n', r"c\.yaml:1: train\.lr\.lora: .*number.*, found '1e-4'"),
    ("decode: {temperature: true}\n", r"c\.yaml:1: decode\.temperature: .*number.*, found True"),
    ("augment: {snr: [3, .nan]}\n", r"c\.yaml:1: augment\.snr\[1\]: .*finite number"),
    ("train: {epochs: 3\n", r"c\.yaml:2: not valid YAML"),
    ("- 3\n", r"c\.yaml:1: expected a mapping"),
    ("train: {epochs: 2}\ndata: {}\ntrain: {seed: 2}\n", r"c\.yaml:3: .*key .train. .*twice"),
    ("stages:\n  - name: a\n    train: {epoch: 3}\n",
     r"c\.yaml:3: stages\[0\]\.train\.epoch: .*'epochs'"),
    ("stages:\n  - train: {}\n", r"c\.yaml:2: stages\[0\]\.name: is missing"),
    ("stages:\n  - {name: a,\n     trian: {}}\n", r"c\.yaml:3: stages\[0\]\.trian.*'train'"),
])
def test_faults_are_named_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        config_from_file(tmp_path / "c.yaml")


@pytest.mark.parametrize(("flags", "message"), [
    (["--train.epochs", "0"], r"--train\.epochs: .*found 0"),
    (["--train.lr.lora", "-1"], r"--train\.lr\.lora: "),
    (["--data.weights", '{"a": "much"}'], r"--data\.weights\.a: "),
    (["--config", "no.yaml"], r"no\.yaml does not exist"),
    (["--llm", "org/one"], r"one\.yaml:3: lora\.ranks.*'rank'"),
])
def test_a_bad_flag_is_named(flags: list[str], message: str, files: tuple[Path, Path]) -> None:
    (files[1] / "one.yaml").write_text("llm: org/one\nlora:\n  ranks: 4\n")
    with pytest.raises(UserError, match=message):
        load_config(flags, *files, "")


def flags_of(config: type[BaseModel], common: bool, prefix: str = "--") -> set[str]:
    """Flags of all settings, or of the common ones."""
    found: set[str] = set()
    for name, field in config.model_fields.items():
        kind, flag = field.annotation, prefix + name.replace("_", "-")
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= flags_of(kind, common, f"{flag}.")
        elif Common in field.metadata or not common:
            found.add(flag)
    return found


def test_help_shows_twenty_settings_and_help_all_the_rest(
        files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for asked, common in (("--help", True), ("--help-all", False)):
        with pytest.raises(SystemExit) as stop:
            load_config([asked, "--llm", "org/two"], *files, "Train it.")
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        # Long flags at the start of a line, or behind a short name; no `--no-` twins.
        flag = r"--(?!no-)(?:\w+\.)*(?!no-(?!speech))\w[\w-]*(?![\w.-])"
        shown = set(re.findall(rf"(?m)(?:^[^\w-]*|, )({flag})", printed))
        shown -= {"--llm", "--encoder", "--projector", "--tasks-file", "--config", "--adapter",
                  "--help", "--help-all"}
        assert shown == flags_of(Config, common)
        assert "Run folder, never overwritten" in printed, "descriptions are the settings' own"
        # A long path is broken into lines of a box.
        assert "two.yaml" in re.sub(r"[^\w./-]", "", printed), "of this LLM"
    assert len(flags_of(Config, True)) == 20


def test_a_list_given_twice_is_refused_and_of_other_flags_the_last_wins(
        files: tuple[Path, Path]) -> None:
    for again in ("--data.train", "--data.train=b.jsonl"):
        with pytest.raises(UserError, match=r"--data\.train is given 2 times.*--data\.train A B"):
            load_config(["--data.train", "a.jsonl", again, "b.jsonl"], *files, "")
    with pytest.raises(UserError, match="target-modules is given 2"):
        load_config(["--model.lora.target_modules", "a", "--model.lora.target-modules", "b"],
                    *files, "")
    assert load_config(["--train.epochs", "2", "--train.epochs", "4"], *files, "").train.epochs == 4


@pytest.mark.parametrize(("flags", "said"), [
    (["--llm", "org/two"], "preset: .*two.yaml"), (["--llm", "org/x"], "preset: none for org/x"),
    (["--adapter", "one"], "preset: .*one.yaml")])
def test_it_is_said_which_preset_was_taken(flags: list[str], said: str,
                                           files: tuple[Path, Path]) -> None:
    told: list[str] = []
    flags = [str(files[1] / "one.yaml") if flag == "one" else flag for flag in flags]
    load_config(flags, *files, "", say=told.append)
    assert len(told) == 1
    assert re.fullmatch(rf"config: .*c\.yaml; {said}.*", told[0])


def test_whispers_decoder_has_no_llm(files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="--llm, --projector and --adapter are of an LLM decoder"):
        load_config(["--llm", "org/two"], files[0], None, "")


@pytest.mark.parametrize(("flags", "status", "shown"), [
    (["--llm", "org/two", "--help"], 0, ["Train it.", "org/two"]),  # as they are now
    (["--train.epcohs", "3"], 2, ["--train.epochs"]),
])
def test_help_shows_the_settings_and_an_unknown_flag_the_nearest(
        flags: list[str], status: int, shown: list[str], files: tuple[Path, Path],
        capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(flags, *files, "Train it.")
    assert stop.value.code == status
    printed = " ".join("".join(capsys.readouterr()).split())
    assert all(text in printed for text in shown)


def test_a_manifest_behind_a_link_keeps_its_folder_and_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/8f3a").touch()
    (tmp_path / "voxpopuli.jsonl").symlink_to(tmp_path / "blobs/8f3a")
    file = tmp_path / "config.yaml"
    file.write_text("data: {train: [voxpopuli.jsonl]}\n")
    assert config_from_file(file).data.train == [str(tmp_path / "voxpopuli.jsonl")]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("output: '1e5'\ndata: {train: [a.jsonl], weights: {a: 1}}\n"
                    "train: {lr: {lora: 3e-4, markers: 2.5E+1}, max_grad_norm: 0}\n"
                    "stages: [{name: one, train: {epochs: 2}}]\n")
    config = config_from_file(file, resolve=False)
    assert (config.train.lr.lora, config.train.lr.markers) == (3e-4, 25)
    file.write_text(to_yaml(config), encoding="utf-8")
    assert config_from_file(file, resolve=False) == config
