"""A saved model holds what was trained and no base weights, and comes back as it was; a folder that does not fit is named."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.models.speech_llm import SpeechLLM, SpeechLLMConfig
from unislu_llm.models.whisper_slu import WhisperSLU, WhisperSLUConfig
from unislu_llm.tasks import NER, LabelTask, TaskRegistry
from unislu_llm.utterance import Utterance

LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
OWN_TASKS = TaskRegistry([NER, LabelTask("acts", "[DA]", ("yes", "no"), "[A]", "[/A]", multi=True)]).to_dict()
Make = Callable[..., SLUModel]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llm": ("speech_llm", {"lora": LORA, "projector": "qformer", "projector_options": {"heads": 4, "window": 10}}),
    "llm without lora": ("speech_llm", {"projector": "linear", "prompt_prefix": "hear ", "prompt_suffix": " say"}),
    "llm, encoder lora": ("speech_llm", {"lora": LORA, "encoder_mode": "lora", "encoder_lora": LORA}),
    "llm, encoder top": ("speech_llm", {"lora": LORA, "encoder_mode": "top", "encoder_top_layers": 1}),
    "llm, tasks of one's own": ("speech_llm", {"lora": LORA, "tasks": OWN_TASKS}),
    "whisper": ("whisper_slu", {}),
    "whisper lora, 30 s": ("whisper_slu", {"decoder_mode": "lora", "lora": LORA, "encoder_mode": "frozen",
                                            "pad_to_30s": True}),
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_whisper: Callable[..., Any], tiny_llm: Callable[..., Any],
         tiny_tokenizer: Callable[..., Any]) -> Make:
    """Build a model from base checkpoints in folders, as a run does, and move its trainable weights at random."""
    monkeypatch.setenv("UNISLU_CACHE", str(tmp_path / "cache"))
    whisper, whisper_tokenizer = tiny_whisper()
    whisper.save_pretrained(tmp_path / "whisper")
    whisper_tokenizer.save_pretrained(tmp_path / "whisper")
    tokenizer = tiny_tokenizer()
    tiny_llm("llama", tokenizer).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")

    def built(kind: str, **options: Any) -> SLUModel:
        model: SLUModel
        if kind == "speech_llm":
            model = SpeechLLM.build(SpeechLLMConfig(encoder=str(tmp_path / "whisper"), llm=str(tmp_path / "llm"), **options))
        else:
            model = WhisperSLU.build(WhisperSLUConfig(encoder=str(tmp_path / "whisper"), **options))
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return built


@torch.no_grad()
def losses(model: SLUModel) -> torch.Tensor:
    """Losses of two clips, entities and a bare transcript."""
    generator = torch.Generator().manual_seed(3)
    texts = (("anna met the council", {"ner": (("PERSON", 0, 4),)}, "ner", 9_000), ("yes", {}, None, 20_000))
    items = [(Sample(Utterance("u", None, text, labels), task), 0.1 * torch.randn(n, generator=generator))
             for text, labels, task, n in texts]
    return model.losses(model.collator()(items))


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_comes_back_as_it_was(make: Make, tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    model = make(kind, **options)
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the base is the one it was trained on
        loaded = SLUModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(losses(loaded), losses(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name
    assert loaded.codec.marker_ids == model.codec.marker_ids
    assert loaded.config.to_dict() == model.config.to_dict()
    assert type(model).from_pretrained(tmp_path / "saved").codec.registry.names == model.codec.registry.names


@pytest.mark.parametrize("case", CASES)
def test_it_holds_what_was_trained_and_no_base_weights(make: Make, tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    model = make(kind, **options)
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == kind
    assert len(config["encoder_hash"]) == 64
    if kind == "speech_llm":
        assert len(config["llm_hash"]) == 64
        assert not any(name.startswith("llm.") and ".lora_" not in name and not name.endswith(".rows") for name in state)
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@pytest.mark.parametrize("case", ["llm, encoder top", "whisper"])
def test_what_a_stage_has_frozen_is_saved_as_well(make: Make, tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    model = make(kind, **options)
    model.requires_grad_(False)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(losses(SLUModel.from_pretrained(tmp_path / "saved")), losses(model))


def test_weights_gathered_elsewhere_are_saved_instead(make: Make, tmp_path: Path) -> None:
    model = make("speech_llm", lora=LORA)
    gathered = {name: torch.zeros_like(value) for name, value in model.trained_state().items()}
    model.save_pretrained(tmp_path / "saved", gathered)
    assert not any(value.any() for value in load_file(tmp_path / "saved" / "model.safetensors").values())


# What does not fit


def test_folders_that_are_no_saved_model(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.config\.json does not exist; give a folder written by save_pretrained"):
        SLUModel.from_pretrained(tmp_path / "gone")
    make("whisper_slu")
    with pytest.raises(UserError, match="model_type 'whisper'"):
        SLUModel.from_pretrained(tmp_path / "whisper")


def test_a_model_of_the_other_kind(make: Make, tmp_path: Path) -> None:
    make("whisper_slu").save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="model_type 'whisper_slu' is not speech_llm"):
        SpeechLLM.from_pretrained(tmp_path / "saved")


def test_missing_weights(make: Make, tmp_path: Path) -> None:
    make("speech_llm").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        SLUModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("change", "message"), [
    ({"lora": LORA | {"rank": 3}}, "other shape .*lora_A"),
    ({"lora": None}, "unknown .*lora_"),
    ({"projector": "conv", "projector_options": {}}, "missing .*projector"),
])
def test_weights_of_another_configuration(make: Make, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make("speech_llm", lora=LORA).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"does not fit its config.json.*{message}"):
        SLUModel.from_pretrained(tmp_path / "saved")


def test_a_damaged_weight_file(make: Make, tmp_path: Path) -> None:
    make("speech_llm").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        SLUModel.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        SLUModel.from_pretrained(tmp_path / "saved")


def test_other_base_weights_are_reported(make: Make, tmp_path: Path, tiny_llm: Callable[..., Any],
                                         tiny_tokenizer: Callable[..., Any]) -> None:
    make("speech_llm").save_pretrained(tmp_path / "saved")
    tiny_llm("llama", tiny_tokenizer(), seed=1).save_pretrained(tmp_path / "llm")
    with pytest.warns(UserWarning, match=r"LLM '.*llm' has other weights .* scores will differ"):
        SLUModel.from_pretrained(tmp_path / "saved")


def test_a_base_that_is_gone(make: Make, tmp_path: Path) -> None:
    make("speech_llm").save_pretrained(tmp_path / "saved")
    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="llm"):
        SLUModel.from_pretrained(tmp_path / "saved")


def test_extra_weights_are_named(make: Make, tmp_path: Path) -> None:
    model = make("speech_llm")
    model.save_pretrained(tmp_path / "saved")
    save_file(model.trained_state() | {"projector.more": torch.zeros(1)}, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown \['projector\.more'\]"):
        SLUModel.from_pretrained(tmp_path / "saved")
