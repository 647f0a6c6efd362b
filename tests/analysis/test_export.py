"""An exported model is the run's in a smaller dtype, loads and trains on like it, and its card says what files say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from unislu_llm.analysis.evaluate import evaluate
from unislu_llm.analysis.export import ExportOptions as Options
from unislu_llm.analysis.export import export
from unislu_llm.analysis.options import EvalOptions
from unislu_llm.cli import main
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.training.config import Config, apply
from unislu_llm.training.loop import Trainer

OUT = Path("adapters/tiny--tiny")
NAMES = {"encoder": "tiny/whisper", "llm": "tiny/llm"}
FILES = {"model.safetensors", "config.json", "README.md"}
SECTIONS = ("What it is", "How to use it", "Training data", "Training settings", "Scores", "Limits")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def run(tiny_run: Callable[..., Path], tiny_checkpoints: dict[str, str]) -> Callable[..., Path]:
    """Factory: a finished run seen from the current folder, where its base models lie under public names."""

    def make(kind: str = "speech_llm") -> Path:
        folder = tiny_run(kind)
        Path("tiny").mkdir()
        for name in ("whisper", "llm"):
            shutil.copytree(tiny_checkpoints[name], Path("tiny") / name)
        return folder

    return make


def names_of(kind: str) -> dict[str, str]:
    return NAMES if kind == "speech_llm" else {"encoder": NAMES["encoder"]}


def score(folder: Path, out: str = "results") -> Path:
    """Score files of a run or an export, on the run's manifest."""
    assert evaluate(EvalOptions([folder], manifest=[Path("corpus/dev.jsonl")], out=Path(out), threads=1),
                    ["eval/evaluate.py", str(folder.absolute())]) == 0
    return next(Path(out).glob(f"{folder.name}-*.json"))


@pytest.mark.parametrize(("kind", "dtype"), [("speech_llm", "bf16"), ("speech_llm", "fp32"), ("speech_llm", "fp16"),
                                             ("whisper_slu", "bf16")])
def test_the_weights_come_back_as_fp32_parameters(kind: str, dtype: str, run: Callable[..., Path]) -> None:
    original = load_file(run(kind) / "best" / "model.safetensors")
    done = export(Options(Path("runs/tiny"), OUT, dtype, names=names_of(kind)))  # type: ignore[arg-type]
    assert {p.name for p in OUT.iterdir()} == FILES == set(done.sizes)
    stored = load_file(OUT / "model.safetensors")
    assert set(stored) == set(original)
    for base in (torch.float32, torch.bfloat16):  # of the frozen weights
        loaded = SLUModel.from_pretrained(OUT, dtype=base).trained_state()
        assert set(loaded) == set(original)
        for name, value in original.items():
            assert stored[name].dtype == DTYPES[dtype]
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], value.to(DTYPES[dtype]).float()), name
    assert done.comparison is not None
    assert (done.comparison.difference == 0) == (dtype == "fp32")
    assert done.comparison.difference < 0.05 * done.comparison.mean
    assert sum(done.comparison.groups.values()) == sum(v.numel() for v in original.values())
    bytes_each = 4 if dtype == "fp32" else 2
    assert done.sizes["model.safetensors"] < bytes_each * sum(v.numel() for v in original.values()) + 150 * len(original) + 200


def test_training_goes_on_from_it(run: Callable[..., Path], accelerator_state: None) -> None:
    config = Config(output="runs/more")
    apply(config, yaml.safe_load((run() / "config.yaml").read_text()), "test")
    export(Options(Path("runs/tiny"), OUT, names=NAMES, check=False))
    apply(config, {"output": "runs/more", "model": {"init": str(OUT)}, "train": {"eval_start": False}}, "test")
    Trainer("speech_llm", config).fit()
    losses = [row["loss"] for line in Path("runs/more/metrics.jsonl").read_text().splitlines()
              if (row := json.loads(line))["part"] == "train"]
    assert len(losses) == 2
    first = SLUModel.from_pretrained("runs/more/last").trained_state()
    start = SLUModel.from_pretrained(OUT).trained_state()
    assert all(v.dtype == torch.float32 for v in load_file("runs/more/last/model.safetensors").values())
    assert any(not torch.equal(first[name], start[name]) for name in start)
    before = next(json.loads(line)["loss"] for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()
                  if json.loads(line)["part"] == "train")
    assert losses[0] < before  # where the first run ended, not where it began


@pytest.fixture
def accelerator_state() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_the_card_says_what_the_files_say(run: Callable[..., Path], tmp_path: Path) -> None:
    results = score(run())
    scored = json.loads(results.read_text())
    scored["intervals"] = {"slue": {"wer": {"low": 12.25, "high": 98.75}}}
    results.write_text(json.dumps(scored))
    export(Options(Path("runs/tiny"), OUT, licence="Apache-2.0", results=(results,), data_note="Tones under CC0.", names=NAMES))
    card = (OUT / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == list(NAMES.values())
    assert front["datasets"] == ["tiny"]
    assert [r["metrics"][0]["type"] for r in front["model-index"][0]["results"]] == ["wer", "f1", "f1"]
    assert re.findall(r"^## (.+)$", card, re.M) == list(SECTIONS)
    for block in scored["scores"]["protocols"].values():
        for value in (block["wer"]["overall"]["wer"], block["tasks"]["ner"]["entity"]["f1"], block["tasks"]["sa"]["macro_f1"]):
            assert f"{value:.2f}" in card
    assert "[12.25, 98.75]" in card
    assert re.search(r"\| tiny +\| dev.jsonl +\| 8 +\| 4 +\| 2 +\| 0 ", card)
    finished, versions = (json.loads((Path("runs/tiny") / f).read_text()) for f in ("finished.json", "versions.json"))
    for text in ("Tones under CC0.", "`eval/evaluate.py runs/tiny`", versions["git"], f"{finished['train_seconds'] / 60:.1f}",
                 "max_steps: 2", "the run's weights, before they were stored"):
        assert text in card
    assert "synthetic" not in card
    assert "/" + tmp_path.parts[1] not in card + (OUT / "config.json").read_text()


def test_what_is_not_known_is_left_out(run: Callable[..., Path]) -> None:
    folder = run()
    for file in ("finished.json", "versions.json", "metrics.jsonl"):
        (folder / file).unlink()
    shutil.rmtree("corpus")
    export(Options(folder, OUT, names=NAMES, check=False))
    card = (OUT / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert not {"license", "model-index", "metrics", "language", "datasets"} & set(front)
    assert re.search(r"\| +\| dev.jsonl +\| +\|", card)
    assert not re.search("minutes|git revision|None|nats", card.replace("None are given", ""))


def test_an_export_is_replaced_whole_and_keeps_its_predictions(run: Callable[..., Path]) -> None:
    run()
    export(Options(Path("runs/tiny"), OUT, names=NAMES, check=False))
    results = score(OUT)
    predictions = sorted((OUT / "predictions").iterdir())
    assert predictions
    for name in ("LICENSE", "NOTICE"):
        (OUT / name).write_text(f"own {name}", encoding="utf-8")
    with pytest.raises(UserError, match="would name a folder of this machine"):
        export(Options(Path("runs/tiny"), OUT, data_note="from /data/corpora/voices", names=NAMES, check=False))
    assert "None are given" in (OUT / "README.md").read_text()  # the old one
    export(Options(Path("runs/tiny"), OUT, results=(results,), names=NAMES, check=False))
    assert "scored: these weights" in (OUT / "README.md").read_text()
    assert sorted((OUT / "predictions").iterdir()) == predictions
    assert [(OUT / name).read_text(encoding="utf-8") for name in ("LICENSE", "NOTICE")] == ["own LICENSE", "own NOTICE"]
    assert [p.name for p in OUT.parent.iterdir()] == [OUT.name]
    with pytest.raises(UserError, match="scores of other weights"):
        export(Options(Path("runs/tiny"), OUT, "fp16", results=(results,), names=NAMES, check=False))
    (OUT / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"also holds notes\.txt"):
        export(Options(Path("runs/tiny"), OUT, names=NAMES, check=False))


def test_commands_take_it_and_name_problems(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    base = ["export", str(folder), "--threads", "1"]

    def unislu(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(list(args)), *capsys.readouterr()

    names = ["--encoder", NAMES["encoder"], "--llm", NAMES["llm"]]
    Path("note.md").write_text("Tones of the test.")
    status, out, err = unislu(*base, "--out", str(OUT), *names, "--data-note", "note.md", "--max-mb", "0.01")
    assert status == 0
    assert "largest difference" in out
    assert "no --licence" in out
    assert "over --max-mb" in err
    assert "Tones of the test." in (OUT / "README.md").read_text()
    clip = str(next(Path("corpus/audio").glob("*.wav")))
    status, out, _ = unislu("predict", str(OUT), clip, "--json", "--threads", "1")
    assert status == 0
    assert set(json.loads(out)) >= {"text", "ner", "sa"}
    for args, expected in (
        ([*base, "--out", "corpus", *names], "--out corpus is not empty and no export"),
        ([*base, "--out", "new"], "model.encoder"),
        ([*base, "--out", "new", *names, "--licence", "my own"], "is no SPDX identifier"),
        ([*base, "--out", "new", *names, "--results", "gone.json"], "--results gone.json: cannot be read"),
        (["export", str(OUT), "--out", "new", *names], "saved model without its run"),
    ):
        status, _, err = unislu(*args)
        assert (status, expected in err) == (2, True), err
        assert not Path("new").exists()
    shutil.rmtree("tiny/llm")
    status, _, err = unislu("predict", str(OUT), clip)
    assert status == 2
    assert "tiny/llm" in err


def test_a_value_out_of_range_is_refused(run: Callable[..., Path]) -> None:
    path = run() / "best" / "model.safetensors"
    state: dict[str, Any] = load_file(path)
    name = next(iter(state))
    state[name].view(-1)[0] = 1e30
    save_file(state, path)
    with pytest.raises(UserError, match=r"does not fit fp16; give --dtype bf16"):
        export(Options(Path("runs/tiny"), OUT, "fp16", names=NAMES, check=False))
    assert not any(OUT.parent.iterdir())
