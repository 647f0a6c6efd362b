"""A run goes on from a saved model with its own tasks and settings, or says what does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import CTC, fitted, stop_after, weights
from unislu_llm import models
from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.models.markers import MarkerEmbedding
from unislu_llm.training.build import build_registry
from unislu_llm.training.trainer import Trainer

Make = Callable[..., Config]
DRUGS = "{kind: span, name: drugs, marker: '[DRUGS]', labels: [DRUG, DOSE]}"


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[..., str]:
    """Factory: a file of tasks, each an item of YAML."""
    def make(*items: str) -> str:
        path = tmp_path / f"{len(items)}{sum(map(ord, ''.join(items)))}.yaml"
        path.write_text("".join(f"- {item}\n" for item in items))
        return str(path)

    return make


@pytest.fixture
def spoken(tiny_config: Make) -> str:
    """The corpus of `tiny_config`, each row also annotated for drugs, by a phrase."""
    path = Path(tiny_config().data.train[0])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(
        row | {"drugs": {"DRUG": [row["text"].split()[-1]]}}) + "\n" for row in rows))
    return str(path)


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """Trained marker rows of a saved model, by marker."""
    state, names = weights(folder), json.loads((folder / "config.json").read_text())["markers"]
    rows = next(value for name, value in state.items() if name.endswith(".rows"))
    return dict(zip(names, rows, strict=True))


def test_a_task_is_added_and_the_others_are_kept(
        tiny_config: Make, tasks: Callable[..., str], spoken: str,
        caplog: pytest.LogCaptureFixture) -> None:
    first = fitted("speech_llm", tiny_config("first", train={"max_steps": 1})).run / "last"
    still = {"lr": dict.fromkeys(("projector", "lora", "markers"), 0.0), "max_steps": 1}
    train = still | {"init": str(first)}
    # Its own tasks, where the run names none.
    assert build_registry(tiny_config(train=train)).names == ("ner", "sa")
    more = tasks(DRUGS, "builtin: sa", "builtin: ner")
    with caplog.at_level(logging.WARNING):
        trainer = Trainer("speech_llm", tiny_config("more", train=train, data={"tasks": more}))
    assert "last are ner, sa; yours are drugs, sa, ner. New" in caplog.text
    assert "for: [DRUGS] [DRUG] [/DRUG] [DOSE] [/DOSE]; dropped ones: none" in caplog.text
    assert {e.task for e in trainer.dataset.examples} == {"ner", "sa", "drugs"}
    embedding = trainer.model.lm.get_input_embeddings()
    assert isinstance(embedding, MarkerEmbedding)
    drug = trainer.model.tokenizer.text_ids("drug phrase")
    second = trainer.fit() / "last"
    before, after = rows_of(first), rows_of(second)
    assert all(torch.equal(after[marker], row) for marker, row in before.items())
    torch.testing.assert_close(after["[DRUG]"], embedding.base.weight[drug].float().mean(0))
    # And taken away again: what is left is what it was.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        third = fitted("speech_llm", tiny_config("less", data={"tasks": tasks(DRUGS)}, train=still
                                                 | {"init": str(second)})).run / "last"
    assert "for: none; dropped ones: [SA] [S]" in caplog.text
    assert all(torch.equal(row, after[marker]) for marker, row in rows_of(third).items())
    assert models.load(third).registry.names == ("drugs",)


def test_a_run_is_resumed_with_its_own_tasks(tiny_config: Make, tasks: Callable[..., str],
                                             spoken: str) -> None:
    def config(resume: bool, *items: str) -> Config:
        made = tiny_config(data={"tasks": tasks(*items)} if items else {}, train={"save_every": 1})
        return made.model_copy(update={"resume": resume})

    stop_after(Trainer("speech_llm", config(False, DRUGS, "builtin: sa")), 1)
    for items, yours in (((DRUGS.replace("DRUG, DOSE", "DOSE, DRUG"), "builtin: sa"), "DOSE DRUG"),
                         (("builtin: ner",), r"ner \(PLACE")):
        with pytest.raises(UserError, match=r"--resume: the run's tasks are drugs \(DRUG DOSE\), "
                           rf"sa \(Positive .*; yours .* are .*{yours}.*--train\.init"):
            Trainer("speech_llm", config(True, *items))
    for items in ((DRUGS, "builtin: sa"), ()):
        assert Trainer("speech_llm", config(True, *items)).progress.step == 1


@pytest.mark.parametrize(("there", "here", "named"), [
    ({}, {"llm": "org/other"}, "model.llm is 'org/other' here and "),
    ({}, {"encoder": "org/other"}, "model.encoder is 'org/other' here and "),
    (CTC, {"projector": "mlp"}, "model.projector is 'mlp' here and 'ctc' there"),
    ({}, {"lora": {"rank": 2}}, "model.lora.rank is 2 here and 4 there"),
    ({}, {"lora": {"alpha": 4}}, "model.lora.alpha is 4.0 here and 8.0 there"),
    ({}, {"lora": {"target_modules": ["q_proj"]}}, "model.lora.target_modules is ['q_proj'] here"),
    ({"encoder_mode": "full"}, {}, "model.encoder_mode is 'frozen' here and 'full' there"),
    ({"encoder_mode": "top", "encoder_top_layers": 2}, {
        "encoder_mode": "top", "encoder_top_layers": 1}, "model.encoder_top_layers is 1 here"),
    ({}, {"projector_options": {"hidden": 16}}, "other shape"),
])
def test_settings_that_the_weights_rule_out_are_named(
        there: dict[str, Any], here: dict[str, Any], named: str, tiny_config: Make,
        tmp_path: Path) -> None:
    first = Trainer("speech_llm", tiny_config("first", model=there)).model
    first.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError) as caught:
        Trainer("speech_llm", tiny_config(model=here, train={"init": str(tmp_path / "saved")}))
    assert named in str(caught.value)
    assert str(tmp_path / "saved") in str(caught.value)


def test_settings_that_may_differ(tiny_config: Make, tmp_path: Path,
                                  tiny_checkpoints: dict[str, str]) -> None:
    Trainer("speech_llm", tiny_config("first")).model.save_pretrained(tmp_path / "saved")
    copy = shutil.copytree(tiny_checkpoints["llm"], tmp_path / "copy")
    model = {"llm": str(copy), "hypothesis": "reference", "hypothesis_bias": 2.0, "language": "en",
             "transcript": "verbatim", "prompt_suffix": "now", "encoder_mode": "top"}
    train = {"init": str(tmp_path / "saved")}
    made = Trainer("speech_llm", tiny_config(model=model, train=train)).model
    assert (made.config.prompt_suffix, made.config.hypothesis_bias) == ("now", 2.0)
    with pytest.raises(UserError, match=r"saved is a speech_llm, and this recipe trains a whisper"):
        Trainer("whisper_slu", tiny_config(train=train))
