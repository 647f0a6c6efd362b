"""Every setting, by file and by flag: a hostile value is refused in one line, or is legal."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml

from unislu_llm.config import Config, Section, check_together
from unislu_llm.config_file import absolute, config_from_file, load_config
from unislu_llm.errors import UserError, dotted
from unislu_llm.models.projectors import check_projector

LONG = "x" * 100_000
ANY: tuple[Any, ...] = (None, {}, {"a": {"b": [1]}}, [[]], [None] * 2000, b"\x00", True, -1, 10**30,
                        float("nan"), float("inf"), -float("inf"), "", "\0", LONG, "a/" * 9000,
                        "é" * 200)
NUMBERS: tuple[Any, ...] = (0, -1, 1, 10**9, 10**30, 0.0, 1e-300, 1e300, 0.5, "1", "x", [1], False)


def settings(model: type[Section], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...],
                                                                                 Any]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from settings(kind, (*place, name))
        else:
            yield (*place, name), kind


SETTINGS = dict(settings(Config))


def nested(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {place[0]: nested(place[1:], value) if place[1:] else value}


def hostile(kind: Any) -> list[Any]:
    """Values for a setting of a type: those that are wrong anywhere, and in lists and mappings."""
    values = [*ANY, *NUMBERS]
    if get_origin(kind) in (list, tuple, dict):
        values += [{"a": value} if get_origin(kind) is dict else [value, value]
                   for value in (*ANY, *NUMBERS)]
    return values


@pytest.mark.parametrize("place", SETTINGS, ids=dotted)
def test_a_file_with_a_hostile_value_is_refused_in_one_line_or_right(
        place: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file, refused = tmp_path / "c.yaml", 0
    for value in hostile(SETTINGS[place]):
        file.write_text(yaml.safe_dump(nested(place, value), allow_unicode=True))
        try:
            config = absolute(config_from_file(file))
            check_together(config)
            check_projector(config.model.projector, config.model.projector_options)
        except UserError as error:
            refused += 1
            message = str(error)
            assert len(message) < 5000
            lines = message.splitlines()
            assert len(lines) <= 11, "a line a fault, and not all of them"
            assert all(len(line) < 1000 for line in lines)
            named = (dotted(place), place[-1], "projector 'mlp': option", "not valid YAML")
            assert any(name in message for name in named), message
            assert "Input should" not in message
            assert "invalid literal" not in message
    assert refused > 5, "wrong types at least"
    assert list(tmp_path.iterdir()) == [file]


def is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) in (list, Union, types.UnionType, Annotated)
                           and any(map(is_text, get_args(kind))))


@pytest.mark.parametrize("place", SETTINGS, ids=dotted)
def test_a_flag_with_a_hostile_value_is_named(place: tuple[str, ...], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("{}\n")
    flag = "--" + dotted(place).replace("_", "-")
    kind = SETTINGS[place]
    if kind is bool or place[0] == "resume":  # takes no value
        return
    value = "\0" * 20_000 if is_text(kind) else "x"
    words = [value, value] if get_origin(kind) is tuple else [value]
    with pytest.raises(UserError) as refused:
        load_config([flag, *words], tmp_path / "c.yaml", tmp_path, "")
    message = str(refused.value)
    assert message.startswith((flag, f"--model.{place[-1]}", "train.init")), message
    assert all(words not in message for words in ("literal", "Input", "Traceback", "int()"))


@pytest.mark.parametrize(("flag", "value", "message"), [
    ("--train.max-steps", "x", "must be a whole number of at least 0, found 'x'"),
    ("--train.max-steps", "-1", "must be at least 0, found -1"),
    ("--train.epochs", "20000", "must be at most 10000, found 20000"),
    ("--train.lr.lora", "1e400", "must be a finite number of at least 0, found inf"),
    ("--train.loss", "dynamc", "'dynamc' is not one of dynamic, fixed, uniform; did you mean "
     "'dynamic'?"),
    ("--data.weights", "x", "must be a mapping, found 'x'"),
    ("--stages", "[" * 100_000, "must be a list, found '[[["),
    ("--model.projector-options.a", "", ""),
])
def test_a_flag_is_answered_in_plain_words(flag: str, value: str, message: str,
                                           tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}\n")
    if not message:
        flag, value = "--model.projector-options", json.dumps({"a": float("nan")})
        message = "must be a number, a list of numbers, true or false, found nan"
        with pytest.raises(UserError, match=f"{flag}.a: {message}"):
            load_config([flag, value], tmp_path / "c.yaml", tmp_path, "")
        return
    with pytest.raises(UserError) as refused:
        load_config([flag, value], tmp_path / "c.yaml", tmp_path, "")
    assert str(refused.value).startswith(f"{flag}: {message}")


@pytest.mark.parametrize(("sections", "message"), [
    ({"augment": {"snr": [9, 3]}}, "augment.snr"),
    ({"train": {"batch_size": 4, "accumulation": 3}}, "processes x accumulation = 6"),
    ({"model": {"lora": {"target_modules": []}}}, "model.lora.target_modules"),
    ({"data": {"weights": {"a": 0}}}, "data.weights: all weights are 0"),
    ({"data": {"guard": ["x"]}}, "data.guard: is scored beside data.dev"),
    ({"train": {"guard_limit": 1.0, "eval_every": 2}}, "train.guard_limit: counts"),
    ({"data": {"frame_cache": "c"}, "augment": {"gain_db": 3}}, "data.frame_cache: augmentation"),
    ({"data": {"frame_cache": "c"}, "model": {"encoder_mode": "top"}}, "frozen encoder alone"),
    ({"train": {"hypothesis_word_dropout": 0.1}}, "set model.hypothesis"),
    ({"train": {"hypothesis_dropout": 0.1}, "model": {"hypothesis": "manifest",
                                                      "projector": "none"}}, "nothing to go by"),
    ({"decode": {"grounded": True}}, "decode.grounded: set decode.grammar"),
    ({"decode": {"temperature": 1, "num_beams": 2}}, "takes decode.num_beams 1"),
    ({"decode": {"temperature": 1e-9}}, "decode.temperature: 0 takes"),
])
def test_settings_that_contradict_each_other_are_named(sections: dict[str, Any],
                                                       message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check_together(Config.model_validate(sections), processes=2)
    masks = {"data": {"frame_cache": "c"}, "augment": {"time_masks": 1, "freq_masks": 1}}
    check_together(Config.model_validate(masks), processes=2)  # frames can be masked
