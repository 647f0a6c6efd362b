"""A saved model holds what was trained and no base weights; a folder that does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.common import LORA, SHORT, make_batch
from tests.tiny import make_llm, make_tokenizer, model_config, save_wide_llm
from unislu_llm.errors import UserError
from unislu_llm.io import write_sums
from unislu_llm.models import KINDS, load
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import NER, SA, LabelTask, SpanTask, TaskRegistry

OWN_TASKS = TaskRegistry([NER, SA, LabelTask("acts", "[DA]", ("yes", "no"), "[A]", "[/A]", True)])
Make = Callable[..., SLUModel]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llm": ("speech_llm", {"projector": "qformer",
                           "projector_options": {"heads": 4, "window": 10}}),
    "llm without lora": ("speech_llm", {"projector": "linear", "lora": None,
                                        "prompt_prefix": "hear ", "prompt_suffix": " say"}),
    "llm without speech": ("speech_llm", {"projector": "none", "hypothesis": "manifest"}),
    "llm, encoder lora": ("speech_llm", {"encoder_mode": "lora"}),
    "llm, encoder top, tasks of one's own": ("speech_llm", {
        "encoder_mode": "top", "encoder_top_layers": 1, "registry": OWN_TASKS}),
    "whisper": ("whisper_slu", {"encoder_mode": "full"}),
    "whisper lora, 30 s": ("whisper_slu", {"decoder_mode": "lora", "silence": 30.0}),
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoints: dict[str, str]) -> Make:
    """Build from base checkpoints in folders, as a run does; trainable weights move at random."""
    monkeypatch.setenv("UNISLU_CACHE", str(tmp_path / "cache"))

    def built(kind: str = "speech_llm", registry: TaskRegistry | None = None,
              **settings: Any) -> SLUModel:
        own = {"encoder": tiny_checkpoints["whisper"], "llm": tiny_checkpoints["llm"]}
        config = model_config(**own | {"lora": LORA} | settings)
        model = KINDS[kind].build(config, registry or TaskRegistry())
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return built


@torch.no_grad()
def losses(model: SLUModel) -> torch.Tensor:
    return model.losses(make_batch(model, SHORT, hypotheses=["we"] * len(SHORT)))


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_holds_what_was_trained_and_comes_back_as_it_was(
        make: Make, tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    model = make(kind, **settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)  # what a stage has frozen was trained all the same
    model.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == trained
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == kind
    assert config["model"] == model.config.model_dump()
    parts = {"encoder"} if kind == "whisper_slu" else {"llm"} if not model.listens else {
        "encoder", "llm"}
    assert set(config["bases"]) == parts
    assert all(len(base["sha256"]) == 64 for base in config["bases"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the base is the one it was trained on
        loaded = load(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(losses(loaded), losses(model))
    own = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(own[name], parameter), name
    assert loaded.tokenizer.marker_ids == model.tokenizer.marker_ids
    assert (loaded.config, loaded.bases) == (model.config, model.bases)
    assert loaded.registry.to_dict() == model.registry.to_dict()


def test_a_folder_with_hashes_is_saved_over(make: Make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    write_sums(tmp_path)
    next(p for p in model.parameters() if p.requires_grad).data.add_(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(losses(load(tmp_path)), losses(model))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_have_the_dtype_that_was_asked_for(make: Make, tmp_path: Path,
                                                          kind: str) -> None:
    model = make(kind, **({"decoder_mode": "lora"} if kind == "whisper_slu" else {}))
    model.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses(half), losses(model), rtol=0.05, atol=0.05)


def test_weights_gathered_elsewhere_are_saved_instead(make: Make, tmp_path: Path) -> None:
    model = make()
    gathered = {name: torch.zeros_like(value) for name, value in model.trained_state().items()}
    model.save_pretrained(tmp_path / "saved", gathered)
    state = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any(value.any() for value in state.values())


def test_a_model_starts_from_part_of_another(make: Make, tmp_path: Path) -> None:
    first, second = make(projector="linear"), make(projector="linear", encoder_mode="top")
    first.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(not parameter.requires_grad)
    with pytest.raises(UserError, match=r"missing .*encoder"):
        second.load_trained(tmp_path / "saved")
    lacking, given = second.load_trained(tmp_path / "saved", partial=True), first.trained_state()
    for name, value in second.trained_state().items():
        assert (name in lacking) == name.startswith("encoder.") == (not value.any())
        assert name in lacking or torch.equal(value, given[name])


ACTS = SpanTask("acts", "[DA]", ("yes", "no"))
OTHERS = TaskRegistry([SA, ACTS, dataclasses.replace(NER, labels=NER.labels[:0:-1], words=None)])


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_marker_rows_are_found_by_name(make: Make, tmp_path: Path, kind: str) -> None:
    """Tasks in another order, one more, a label less; a file says what it holds."""
    options = {} if kind == "speech_llm" else {"encoder_mode": "frozen"}
    first, second = make(kind, **options), make(kind, registry=OTHERS, **options)
    first.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["markers"] == list(first.registry.markers)
    before = second.trained_state()
    with pytest.raises(UserError, match=r"rows of other markers.*\[/no\]"):
        second.load_trained(tmp_path / "saved")
    assert second.load_trained(tmp_path / "saved", partial=True) == []
    given, now = first.trained_state(), second.trained_state()
    rows = [name for name in now if name.endswith(".rows")]
    assert rows
    for name in rows:
        for i, marker in enumerate(OTHERS.markers):
            known = marker in first.registry.markers
            place = first.registry.markers.index(marker) if known else i
            assert torch.equal(now[name][i], (given if known else before)[name][place]), marker
    # The same answers, whatever ids its markers have now.
    turned = make(kind, registry=TaskRegistry([SA, dataclasses.replace(
        NER, labels=NER.labels[::-1])]), **options)
    assert turned.tokenizer.marker_ids != first.tokenizer.marker_ids
    turned.load_trained(tmp_path / "saved")
    torch.testing.assert_close(losses(turned), losses(first))


def test_rows_that_nobody_can_name(make: Make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(path.read_text().replace('"[T/L]",', "", 1))
    with pytest.raises(UserError, match=r"19 marker rows, and 18 markers are named"):
        load(tmp_path / "saved")


# ---- what does not fit


def test_folders_that_are_no_saved_model(tmp_path: Path, tiny_checkpoints: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"gone.config\.json does not exist; give the folder of a"):
        load(tmp_path / "gone")
    with pytest.raises(UserError, match=r"whisper.config\.json: model_type.*'whisper'"):
        load(tiny_checkpoints["whisper"])


@pytest.mark.parametrize(("change", "message"), [
    ({"lora": LORA | {"rank": 3}}, "other shape .*lora_A"),
    ({"lora": {"rank": 0}}, "unknown .*lora_"),
    ({"projector": "conv", "projector_options": {}}, "missing .*projector"),
    ({"projektor": "conv"}, "projektor.*did you mean 'projector'"),
])
def test_weights_of_another_configuration(make: Make, tmp_path: Path, change: dict[str, Any],
                                          message: str) -> None:
    make().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"model": value["model"] | change}))
    with pytest.raises(UserError, match=f"config.json.*{message}"):
        load(tmp_path / "saved")


def test_missing_damaged_and_further_weights_are_named(make: Make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    whole = path.read_bytes()
    save_file(model.trained_state() | {"projector.more": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"unknown \['projector\.more'\]"):
        load(tmp_path / "saved")
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load(tmp_path / "saved")
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(No such .*; copy or"):
        load(tmp_path / "saved")


def test_other_base_weights_are_reported(make: Make, tmp_path: Path,
                                         tiny_checkpoints: dict[str, str]) -> None:
    llm = shutil.copytree(tiny_checkpoints["llm"], tmp_path / "llm")
    make(llm=str(llm)).save_pretrained(tmp_path / "saved")
    make_llm("llama", make_tokenizer(), seed=1).save_pretrained(llm)
    with pytest.warns(UserWarning, match=r"LLM '.*llm' has other weights .* scores will differ"):
        load(tmp_path / "saved")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_lora_takes_quantised_layers_for_what_they_are(make: Make, tmp_path: Path,
                                                       bits: str) -> None:
    """PEFT's plain adapters would be merged into packed bytes."""
    save_wide_llm(tmp_path / "wide")
    wide = {"llm": str(tmp_path / "wide")}
    model: Any = make(quantization=bits, **wide)
    layer = model.llm.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    batch = make_batch(model.train(), SHORT)
    with torch.autocast("cpu", torch.bfloat16):
        model.losses(batch).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all()
               for named in model.trainable_groups().values() for _, p in named)
    assert set(model.trained_state()) == set(make(**wide).trained_state())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(losses(load(tmp_path / "saved")), losses(model.eval()))
