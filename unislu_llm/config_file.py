"""Config files, presets and flags to one checked :class:`Config`; later ones win.

Every source is checked by itself first, so that a message can name its file and line, or its flag.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from unislu_llm.config import Config, ModelConfig, Section, Stage
from unislu_llm.errors import Place, UserError, dotted, explain
from unislu_llm.flags import Extra, flag_of, parse_flags
from unislu_llm.io import MODEL_FILE, RUN_CONFIG, find_model, is_hub_name, near_models, read_json
from unislu_llm.setting_types import Common, Precision
from unislu_llm.text_files import read_yaml

Values = dict[str, Any]
S = TypeVar("S", bound=Section)

# Settings that are paths, by section; those of models may be names as well.
_PATHS = {"data": ("train", "dev", "guard", "tasks", "frame_cache"), "augment": ("noise",),
          "train": ("init",), "model": ("encoder", "llm", "recogniser"), "decode": ("phrases",)}


class Preset(ModelConfig):
    """A preset, `adapters/*.yaml`: model settings for one LLM, and a precision to train it in."""
    precision: Precision = "fp32"  # default of train.precision
    # Of the LLM's own config.json: copies of it, in folders or under other names, have the same.
    config: dict[str, str | int | list[int]] = Field({})


def load_config(argv: Sequence[str] | None, default_file: Path, presets: Path | None,
                description: str, *, prog: str | None = None, extra: Extra | None = None,
                say: Callable[[str], object] = lambda _: None) -> Config:
    """The configuration of a run; later wins: defaults, preset, saved model, config file, flags.

    A saved model that the run starts from (`train.init`) brings its model settings. Named by a flag
    it also replaces those of the default file, which nobody asked for.

    Args:
        argv: flags; None takes the process's own.
        default_file: config used without `--config`.
        presets: folder of presets; None where there is no LLM.
        description, prog, extra: as of :func:`unislu_llm.flags.parse_flags`.
        say: is told in one line which config file, preset and saved model's settings were taken.

    Raises UserError: a file that is missing or no YAML, an unknown key, a value out of bounds.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = first_flags(argv, prog)
    file, run = chosen.config or default_file, resumed_run(argv)
    if run:  # its settings, under a file that is named and flags
        over = read_layer(chosen.config) if chosen.config else {}
        values = merge(Config, config_of_run(run).model_dump(), over)
        values |= {"output": str(run), "resume": True}
    else:
        values = _with_saved(read_layer(file), chosen.init, over=not chosen.config)
    flags = {key: value for key in ("llm", "projector")
             if (value := getattr(chosen, key)) is not None}
    told, init = f"config: {file}", values.get("train", {}).get("init")
    shown = {"config": (Path, Field(file, description="Config file (YAML).")), **(extra or {})}
    if presets is not None and not run:
        llm = flags.get("llm") or values.get("model", {}).get("llm") or ModelConfig().llm
        preset = chosen.adapter or find_preset(presets, llm)
        below = read_preset(preset) if preset else {}
        if chosen.adapter and "llm" in below["model"]:
            flags.setdefault("llm", below["model"]["llm"])  # an explicit preset names its LLM
        values = merge(Config, below, values)  # its model settings yield to those of weights
        told += f"; preset: {preset}" if preset else f"; preset: none for {llm} (defaults)"
        shown["adapter"] = (Path | None, Field(preset, description=(
            "Preset of an LLM (YAML); default: the one that names the LLM.")))
    elif (flags or chosen.adapter) and not run:
        raise UserError("--llm, --projector and --adapter are of an LLM decoder, and this run "
                        "trains Whisper's own; drop them")
    config = check(Config, merge(Config, values, {"model": flags}), flag_of)
    shown = {name: (Annotated[kind, Common], field) for name, (kind, field) in shown.items()}
    config = parse_flags(config, argv, prog=prog, description=description, extra=shown)
    if config.data.dev == ["none"]:
        config.data.dev = []
    elif not run and file.resolve().parent == default_file.resolve().parent:
        _check_own_data({word.partition("=")[0] for word in argv or ()}, config, file)
    say(told + (f"; model settings: those of {init}" if init and not run else ""))
    return config


def first_flags(argv: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    """The flags that decide what the defaults of all others are, read before them."""
    first = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    for name, kind in (("config", Path), ("adapter", Path), ("output", str)):
        first.add_argument(f"--{name}", type=kind)
    for name in ("llm", "projector", "encoder"):
        first.add_argument(f"--{name}", f"--model.{name}", dest=name)
    first.add_argument("--train.init", dest="init")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--decoder", nargs="?", const="")
    return first.parse_known_args(argv)[0]


def resumed_run(argv: Sequence[str]) -> Path | None:
    """The run that a command line resumes, if it does; raises UserError: there is none."""
    chosen = first_flags(argv)
    values = read_layer(chosen.config) if chosen.config else {}
    if not (chosen.resume or values.get("resume")):
        return None
    output = chosen.output or values.get("output")
    if not output or not (Path(output) / RUN_CONFIG).is_file():
        raise UserError(f"--resume: {output or 'no --output'} holds no run; give the run's folder "
                        "as --output")
    return Path(output)


def config_of_run(folder: str | Path) -> Config:
    """The settings of a run; raises as :func:`load_config`."""
    values = read_layer(Path(folder) / RUN_CONFIG, resolve=False)
    return Config.model_validate(values | {"output": str(folder), "resume": False})


def _with_saved(values: Values, init: str | None, *, over: bool) -> Values:
    """A config file's values on those of the saved model that the run starts from; with `over`
    below them, where a flag names it (`init`)."""
    if init is not None:
        values = merge(Config, values, {"train": {"init": init}})
    saved = inherited(values)
    return merge(Config, values, saved) if init and over else merge(Config, saved, values)


def _check_own_data(flags: set[str], config: Config, file: Path) -> None:
    # The dev manifests of a config that ships fit no others: `best` would be chosen by them.
    if config.data.dev and "--data.train" in flags and "--data.dev" not in flags:
        names = ", ".join(Path(path).name for path in config.data.dev)
        raise UserError(f"--data.train without --data.dev: the dev manifests of {file.name} "
                        f"({names}) would choose the best checkpoint for your data; give "
                        "--data.dev FILE..., or --data.dev none to train without validation")


def shipped() -> Path:
    """The folder with `recipes/configs`, `recipes/data/mini` and `adapters/*.yaml`: the checkout,
    or what an installed package carries of it."""
    package = Path(__file__).parent
    return installed if (installed := package / "shipped").is_dir() else package.parent


def config_from_file(path: str | Path, *, resolve: bool = True) -> Config:
    """The configuration in a YAML file; raises as :func:`load_config`.

    `resolve` takes the paths in it as relative to it, else they are as given.
    """
    values = read_layer(Path(path), resolve=resolve)
    # A run's file has every setting written out, and what it began with may be gone since.
    return Config.model_validate(merge(Config, inherited(values), values) if resolve else values)


def inherited(values: Values) -> Values:
    """What a config takes over from the saved model that it starts from, by `train.init`.

    Raises UserError: there is none.
    """
    stages = [stage.get("train", {}).get("init") for stage in values.get("stages", [])[:1]]
    init = values.get("train", {}).get("init") or next(iter(stages), None)
    if not init:
        return {}
    path = saved_model(init) / MODEL_FILE
    model = check(ModelConfig, read_json(path).get("model"),
                  lambda place: f"{path}: {dotted(('model', *place))}").read_from(path.parent)
    # How its hypotheses become transcripts is measured anew once it is trained further.
    return {"model": model.model_dump() | {"transcript": "auto"}}


def saved_model(init: str | Path) -> Path:
    """Folder of the model that `train.init` names: a folder, a run, or a name on the hub.

    Raises UserError: there is none.
    """
    found = find_model(init)
    if found is None and not Path(init).exists() and is_hub_name(str(init)):
        from unislu_llm.weights import fetch_model  # `--help` should not wait for torch

        return fetch_model(str(init))
    if found is None:
        raise UserError(f"train.init: {init} is neither a saved model nor a run with one"
                        f"{near_models(init)}")
    return found


def config_from_dict(values: Mapping[str, Any], where: str = "config") -> Config:
    """A configuration from plain values; `where` is what messages call them."""
    return check(Config, values, inside(where))


def inside(where: str) -> Callable[[Place], str]:
    """How :func:`check` names places in what is called `where`."""
    return lambda place: f"{where}.{dotted(place)}"


def to_yaml(config: Config) -> str:
    """A configuration as a file holds it, every setting written out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False,
                     allow_unicode=True)


def absolute(config: Config) -> Config:
    """A configuration whose paths work from anywhere, as seen from the current folder."""
    values = config.model_dump()
    for part in (values, *values["stages"]):
        _resolve_paths(part, Path.cwd())
    return Config.model_validate(values)


def find_preset(presets: Path, llm: str) -> Path | None:
    """The preset of an LLM: by its name, however it is spelled, or by the `config.json` of a folder
    that holds a copy of it."""
    file, name = Path(llm) / MODEL_FILE, llm.partition("@")[0].rstrip("/").lower()
    own = read_json(file) if file.is_file() else {}
    own = own.get("text_config") or own
    read = {path: YamlFile.read(path).values for path in sorted(presets.glob("*.yaml"))}
    return next((path for path, values in read.items() if values.get("llm", "").lower() == name or (
        own and dict(own, **values.get("config", {"": 0})) == own)), None)


def read_preset(path: Path) -> Values:
    """The values of a preset as those of a config file."""
    file = YamlFile.read(path)
    check(Preset, file.values, file.where)
    file.values.pop("config", None)
    train = {key: file.values.pop(key) for key in ("precision",) if key in file.values}
    return {"model": file.values, "train": train}


def read_layer(path: Path, *, resolve: bool = True) -> Values:
    """The values of a config file, checked, its stages as well."""
    file = YamlFile.read(path)
    check(Config, file.values, file.where)
    # To pydantic a stage is any mapping; checked here, its faults have lines.
    stages = file.values.get("stages", [])
    for i, stage in enumerate(stages):
        check(Stage, stage, partial(file.where, outer=("stages", i)))
    if resolve:
        for part in (file.values, *stages):
            _resolve_paths(part, path.parent)
    return file.values


def check(model: type[S], values: Any, where: Callable[[Place], str]) -> S:
    """Plain values as a section; raises UserError: a bad one, named as `where` says."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, where) from None


def merge(model: type[Section], below: Mapping[str, Any], above: Mapping[str, Any]) -> Values:
    """Checked values of a section, `above` laid over `below`."""
    merged = dict(below)
    # Options belong to a projector: those of another one do not outlive it, those of the same one
    # are laid over each other.
    before = below.get("projector", ModelConfig().projector)
    if issubclass(model, ModelConfig) and above.get("projector", before) != before:
        merged.pop("projector_options", None)
    for key, value in above.items():
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            merged[key] = merge(kind, merged.get(key, {}), value)
        elif key == "projector_options":
            merged[key] = merged.get(key, {}) | value
        else:
            merged[key] = value
    return merged


class _Loader(yaml.SafeLoader):
    # YAML's readers take the last of two equal keys, and half a config silently does nothing.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is there twice; join them",
                                           problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


class _Dumper(yaml.SafeDumper):
    pass


# To YAML 1.1 `1e-4` is text, for want of a point; everybody who writes it means the number.
for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"),
                               list("-+0123456789"))


@dataclass(frozen=True)
class YamlFile:
    """A YAML mapping that knows on which line each value stands."""

    path: Path
    values: Values
    node: yaml.Node  # what the parser made of it; nodes carry their lines

    @classmethod
    def read(cls, path: Path) -> YamlFile:
        """Raises UserError: no such file, no YAML (with its line), a key twice, or no mapping."""
        if not path.is_file():
            raise UserError(f"config file {path} does not exist")
        node, values = read_yaml(path, _Loader)
        if not isinstance(values, dict) or node is None:
            raise UserError(f"{path}:1: expected a mapping at the top, found "
                            f"{type(values).__name__}")
        return cls(path, values, node)

    def where(self, place: Place, outer: Place = ()) -> str:
        """`file:line: outer.place`; of what is missing, the line of what should hold it."""
        place = (*outer, *place)
        node, line = self.node, self.node.start_mark.line
        for part in place:
            # Of a mapping the line of the key: its value may begin on the next one.
            children: dict[Any, tuple[yaml.Node, yaml.Node]] = (
                {key.value: (key, value) for key, value in node.value}
                if isinstance(node, yaml.MappingNode) else
                {i: (item, item) for i, item in enumerate(node.value)}
                if isinstance(node, yaml.SequenceNode) else {})
            if part not in children:
                break
            begins, node = children[part]
            line = begins.start_mark.line
        return f"{self.path}:{line + 1}: {dotted(place)}"


def _resolve_paths(values: Values, folder: Path) -> None:
    folder = folder.resolve()  # no link beyond it: a manifest's place and name mean something
    for name, keys in _PATHS.items():
        section = values.get(name, {})
        for key in keys:
            if isinstance(value := section.get(key), list):
                section[key] = [os.path.abspath(folder / item) for item in value]
            elif value and not (key == "init" and is_hub_name(value, folder)) and (
                    name != "model" or (folder / value).is_dir()):
                section[key] = os.path.abspath(folder / value)
