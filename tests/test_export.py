"""An exported model is the run's in a smaller dtype, and its card says what files say."""

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

from tests.hub import TOKEN, Hub, connected
from unislu_llm import load, understand
from unislu_llm.cli import main
from unislu_llm.decoding.hypotheses import load_recogniser
from unislu_llm.errors import UserError
from unislu_llm.export import export
from unislu_llm.io import sha256, write_sums

RUN, OUT = Path("runs/tiny"), Path("adapters/tiny--tiny")
NAMES = {"encoder": "tiny/whisper", "llm": "tiny/llm"}
FILES = {"model.safetensors", "config.json", "README.md", "SHA256SUMS"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def run(tiny_run: Callable[..., Path], tiny_checkpoints: dict[str, str]) -> Callable[..., Path]:
    """Factory: a finished run, and its base models under public names in the current folder."""

    def make(kind: str = "speech_llm") -> Path:
        folder = tiny_run(kind)
        for name in ("whisper", "llm"):
            shutil.copytree(tiny_checkpoints[name], Path("tiny") / name)
        return folder

    return make


def names_of(kind: str) -> dict[str, str]:
    return NAMES if kind == "speech_llm" else {"encoder": NAMES["encoder"]}


def score_file(weights: Path, name: str) -> Path:
    """A score file as eval/evaluate.py writes it, of these weights."""
    wer: dict[str, Any] = {"wer": 21.25}
    tasks = {"ner": {"entity": {"f1": 36.5}, "label": {"f1": 51.5}}, "sa": {"macro_f1": 42.5}}
    block = {"wer": {"overall": wer, "by_corpus": {"tiny": wer}}, "tasks": tasks,
             "slue_score": 50.0}
    path = Path(f"{name}.json")
    path.write_text(json.dumps({
        "run": name, "weights_sha256": sha256(weights / "model.safetensors"),
        "command": f"eval/evaluate.py {Path('runs/tiny').absolute()}", "decode": {"grammar": True},
        "manifests": [{"file": "corpus/dev.jsonl"}],
        "intervals": {"slue": {"wer": {"low": 12.25, "high": 98.75},
                               "sa/macro_f1": {"low": 1.5, "high": 2.5}}},
        "scores": {"malformed": {"share": 1.5}, "protocols": {"slue": block},
                   "position": {"ner": {"f1": 61.5}}}}))
    return path


@pytest.mark.parametrize(("kind", "dtype"), [("speech_llm", "bf16"), ("speech_llm", "fp32"),
                                             ("speech_llm", "fp16"), ("whisper_slu", "bf16")])
def test_the_weights_come_back_as_fp32_parameters(kind: str, dtype: Any,
                                                  run: Callable[..., Path]) -> None:
    original = load_file(run(kind) / "best" / "model.safetensors")
    _, difference = export(RUN, OUT, dtype=dtype, names=names_of(kind))
    assert {p.name for p in OUT.iterdir()} == FILES
    stored = load_file(OUT / "model.safetensors")
    assert set(stored) == set(original)
    for base in (torch.float32, torch.bfloat16):  # of the frozen weights
        loaded = load(OUT, dtype=base).trained_state()
        assert set(loaded) == set(original)
        for name, value in original.items():
            assert stored[name].dtype == DTYPES[dtype]
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], value.to(DTYPES[dtype]).float()), name
    assert difference is not None
    assert (difference == 0) == (dtype == "fp32")
    assert difference < 0.5


def test_the_card_says_what_the_files_say(run: Callable[..., Path], tmp_path: Path) -> None:
    results = score_file(run() / "best", "tiny")
    Path("note.md").write_text("Tones under CC0.")
    export(RUN, OUT, licence="Apache-2.0", results=(results,), data_note=Path("note.md"),
           names=NAMES)
    card = (OUT / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == list(NAMES.values())
    assert front["datasets"] == ["tiny"]
    assert re.findall(r"^## (.+)$", card, re.M) == [
        "What it is", "How to use it", "Training data", "Training settings", "Scores", "Limits"]
    assert "| tiny | dev.jsonl | 8 | 4 | 2 |" in card
    for row in ("| wer | 21.25 [12.25, 98.75] |", "| ner_f1 | 36.50 |",
                "| sa_f1 | 42.50 [1.50, 2.50] |", "| slue | 50.00 |"):
        assert row in card
    finished, versions = (json.loads((RUN / f).read_text())
                          for f in ("finished.json", "versions.json"))
    for text in ("Tones under CC0.", "`eval/evaluate.py runs/tiny`", versions["git"],
                 f"{finished['train_seconds'] / 60:.1f} minutes", "max_steps: 2",
                 "the run's weights, not yet in this dtype"):
        assert text in card
    assert "synthetic" not in card
    assert "/" + tmp_path.parts[1] not in card + (OUT / "config.json").read_text()


def test_what_is_not_known_is_left_out(run: Callable[..., Path]) -> None:
    run()
    for file in ("finished.json", "versions.json", "metrics.jsonl"):
        (RUN / file).unlink()
    shutil.rmtree("corpus")
    export(RUN, OUT, names=NAMES, check=False)
    card = (OUT / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert not {"license", "language", "datasets"} & set(front)
    assert "|  | dev.jsonl |  |" in card
    assert not re.search("minutes|git revision|None|nats", card.replace("None are given", ""))


def test_an_export_is_replaced_whole_and_keeps_what_others_put_there(run: Callable[..., Path]
                                                                     ) -> None:
    run()
    export(RUN, OUT, names=NAMES, check=False)
    results = score_file(OUT, "exported")
    for name in ("LICENSE", "NOTICE"):
        (OUT / name).write_text(f"own {name}", encoding="utf-8")
    with pytest.raises(UserError, match="is no SPDX identifier"):
        export(RUN, OUT, licence="my own", names=NAMES, check=False)
    assert "None are given" in (OUT / "README.md").read_text()  # the old one
    export(RUN, OUT, results=(results,), names=NAMES, check=False)
    assert "scored: these weights" in (OUT / "README.md").read_text()
    assert [(OUT / name).read_text() for name in ("LICENSE", "NOTICE")] == [
        "own LICENSE", "own NOTICE"]
    assert [p.name for p in OUT.parent.iterdir()] == [OUT.name]
    (old := OUT.with_name(f"{OUT.name}.old")).mkdir()  # somebody's, which nobody may remove
    export(RUN, OUT, names=NAMES, check=False)
    assert old.is_dir()
    with pytest.raises(UserError, match="scores of other weights"):
        export(RUN, OUT, dtype="fp16", results=(results,), names=NAMES, check=False)
    with pytest.raises(UserError, match="is not empty and no export"):
        export(RUN, Path("corpus"), names=NAMES, check=False)


def test_the_command_names_problems(run: Callable[..., Path],
                                    capsys: pytest.CaptureFixture[str]) -> None:
    run()
    names = ["--encoder", NAMES["encoder"], "--llm", NAMES["llm"]]
    base = ["export", str(RUN), "--no-check"]
    Path("empty.md").touch()
    assert main([*base, "--out", str(OUT), *names]) == 0
    assert "the card names no licence" in capsys.readouterr().out
    assert main(["export", str(RUN), "--out", str(OUT), *names, "--licence", "MIT"]) == 0
    out = capsys.readouterr().out
    assert "nats (fine: 0 in fp32, below 0.05 in fp16, 0.5 in bf16" in out
    assert "no licence" not in out
    for args, expected in (
        ([*base, "--out", "new"], "model.encoder"),
        ([*base, "--out", "new", *names, "--results", "gone.json"], "gone.json cannot be read"),
        ([*base, "--out", "new", *names, "--data-note", "FILE"], "--data-note FILE cannot be read"),
        ([*base, "--out", "new", *names, "--data-note", "empty.md"], "empty.md is empty"),
        (["export", str(OUT), "--out", "new", *names], "saved model without its run"),
    ):
        assert main(args) == 2
        assert expected in capsys.readouterr().err
        assert not Path("new").exists()


def test_a_share_of_lora_s_update_is_kept(run: Callable[..., Path],
                                          capsys: pytest.CaptureFixture[str]) -> None:
    best = run() / "best"
    results = score_file(best, "tiny")
    args = [*ARGS, "--dtype", "fp32", "--lora-scale"]
    for share, more, expected in (("1.5", [], "give a share over 0 up to 1"),
                                  ("0.5", ["--results", str(results)], "scores of other weights")):
        assert main([*args, share, *more]) == 2
        assert expected in capsys.readouterr().err
    assert main([*args, "0.5"]) == 0
    assert "a share of 0.5 was kept" in (OUT / "README.md").read_text()
    trained, kept = (load(folder).trained_state() for folder in (best, OUT))
    assert any(".lora_B." in name and value.any() for name, value in trained.items())
    for name, value in trained.items():
        assert torch.equal(kept[name], value * (0.5 if ".lora_B." in name else 1))


def test_the_largest_directions_of_lora_s_updates_are_kept(
        run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A rank that is lower than the trained one gives the best update of that rank."""
    best, args = run() / "best", [*ARGS, "--dtype", "fp32", "--lora-rank"]
    trained, old = load(best).trained_state(), load(best).config.lora
    assert main([*args, str(old.rank + 1)]) == 2
    assert f"--lora-rank {old.rank + 1}: the model's is {old.rank}" in capsys.readouterr().err
    assert main([*args, "1"]) == 0
    assert "the 1 largest directions were kept" in (OUT / "README.md").read_text()
    model = load(OUT)
    kept, new = model.trained_state(), model.config.lora
    assert (new.rank, new.alpha / new.rank) == (1, old.alpha / old.rank)
    for name in (n for n in trained if ".lora_A." in n):
        other = name.replace("lora_A", "lora_B")
        update, left = trained[other] @ trained[name], kept[other] @ kept[name]
        assert left.any()
        assert torch.linalg.matrix_rank(left) == 1
        lost = torch.linalg.svdvals(update)[1:].norm()
        torch.testing.assert_close((update - left).norm(), lost, rtol=1e-3, atol=1e-6)


def test_a_model_that_makes_the_hypotheses_goes_with_it(
        hub: Hub, run: Callable[..., Path], tmp_path: Path) -> None:
    """Moved or published, it says what the run says."""
    best, maker = run() / "best", tmp_path / "maker"
    shutil.copytree(RUN, maker)
    saved = json.loads((best / "config.json").read_text())
    saved["model"] |= {"hypothesis": "manifest", "recogniser": str(maker)}
    (best / "config.json").write_text(json.dumps(saved))
    write_sums(best)
    clip = Path("corpus/audio/u0.wav").absolute()
    said = understand(load(RUN), clip).to_dict()
    assert main([*ARGS, "--dtype", "fp32", "--push", "me/tiny"]) == 0
    assert "by the model in `recogniser/` stands in its prompt" in (OUT / "README.md").read_text()
    shutil.rmtree(maker)
    load_recogniser.cache_clear()
    with pytest.raises(UserError, match=r"maker.* was not found"):
        understand(load(RUN), clip)
    assert "## Training data" in (OUT / "recogniser" / "README.md").read_text()
    OUT.rename("moved")
    for name in ("moved", "me/tiny"):
        load_recogniser.cache_clear()
        assert understand(load(name), clip).to_dict() == said
    load_recogniser.cache_clear()


def test_names_of_a_recogniser_are_its_own(run: Callable[..., Path], tmp_path: Path) -> None:
    """It is of another Whisper than the model, and has a recogniser itself."""
    best, maker = run() / "best", tmp_path / "maker"
    shutil.copytree("tiny/whisper", "tiny/other")

    def changed(folder: Path, encoder: str, **model: Any) -> None:
        saved = json.loads((folder / "config.json").read_text())
        saved["model"] |= {"hypothesis": "manifest", "encoder": encoder, **model}
        saved["bases"]["encoder"]["name"] = encoder
        (folder / "config.json").write_text(json.dumps(saved))
        write_sums(folder)

    shutil.copytree(best, inner := tmp_path / "inner")
    shutil.copytree(best, inner / "recogniser")
    shutil.copytree(RUN, maker)
    changed(maker / "best", "tiny/other", recogniser=str(inner))
    changed(best, str(Path("tiny/whisper").absolute()), recogniser=str(maker))
    with pytest.raises(UserError, match=r"model\.encoder 'tiny/other' is a folder"):
        export(RUN, OUT, names=NAMES | {"encoder": "me/whisper"}, check=False)
    shutil.move("tiny/other", tmp_path / "gone")  # now a name on the hub
    export(RUN, OUT, names=NAMES | {"encoder": "me/whisper"}, check=False)
    names = [json.loads((OUT / part / "config.json").read_text())["bases"]["encoder"]["name"]
             for part in ("", "recogniser")]
    assert names == ["me/whisper", "tiny/other"]
    assert (OUT / "recogniser" / "recogniser" / "recogniser" / "config.json").is_file()


@pytest.mark.parametrize(("settings", "flags", "refused"), [
    ({"recogniser": "ctranslate2:openai/whisper-base"}, {}, ""),
    ({"encoder": "tiny/whisper"}, {}, r"model\.encoder 'tiny/whisper' is a folder"),
    ({"encoder": "tiny/whisper"}, {"encoder": "openai/whisper-base"}, ""),
])
def test_a_model_that_only_reads_names_who_hears_for_it(
        settings: dict[str, str], flags: dict[str, str], refused: str,
        run: Callable[..., Path]) -> None:
    path = run() / "best" / "config.json"
    saved = json.loads(path.read_text())
    saved["model"] |= {"hypothesis": "manifest", "projector": "none",
                       "encoder": "openai/whisper-base", **settings}
    del saved["bases"]["encoder"]
    path.write_text(json.dumps(saved))
    write_sums(path.parent)
    flags = {"llm": NAMES["llm"], **flags}
    if refused:
        with pytest.raises(UserError, match=refused):
            export(RUN, OUT, names=flags, check=False)
        return
    export(RUN, OUT, names=flags, check=False)
    assert json.loads((OUT / "config.json").read_text())["model"]["encoder"] == (
        "openai/whisper-base")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with connected(Hub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


ARGS = ["export", str(RUN), "--out", str(OUT), "--no-check", "--encoder", NAMES["encoder"], "--llm",
        NAMES["llm"]]


def test_what_is_published_loads_by_its_name(hub: Hub, run: Callable[..., Path],
                                             capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert main([*ARGS, "--push", "me/tiny", "--private"]) == 0
    assert "published as me/tiny: https://huggingface.co/me/tiny/commit/" in capsys.readouterr().out
    assert hub.private["me/tiny"]
    for name in ("LICENSE", "predictions/dev.jsonl", "notes.txt"):
        (OUT / name).parent.mkdir(exist_ok=True)
        (OUT / name).write_text(f"own {name}")
    assert main([*ARGS, "--push", "me/tiny", "--revision", "v1", "--dtype", "fp32"]) == 0
    first, second = (hub.repos["me/tiny"][hub.branches["me/tiny"][b]] for b in ("main", "v1"))
    assert set(first) == FILES
    assert set(second) == {*FILES, "LICENSE"}
    assert tuple(
        re.search(rb"load\(.*\)", files["README.md"])[0]  # type: ignore[index]
        for files in (first, second)) == (b'load("me/tiny")', b'load("me/tiny@v1")')
    shutil.rmtree(OUT)
    trained = load(RUN).trained_state()
    for name, dtype in (("me/tiny", torch.bfloat16), ("me/tiny@v1", torch.float32)):
        for key, value in load(name).trained_state().items():
            assert torch.equal(value, trained[key].to(dtype).float())


def test_what_cannot_be_published_is_said_before_the_work(
        hub: Hub, run: Callable[..., Path], capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run()

    def refused(*more: str) -> str:
        assert main([*ARGS, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "Traceback" not in error
        return error

    assert "add --push USER/MODEL" in refused("--private")
    assert "--push tiny: give user/model" in refused("--push", "tiny")
    assert "--push a b/c: is no name on the hub" in refused("--push", "a b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub does not know this token" in refused("--push", "me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "nobody is logged in; `hf auth login`" in refused("--push", "me/tiny")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert "--push me/tiny: ConnectError" in refused("--push", "me/tiny")
    assert not OUT.exists()
    assert not hub.repos
    # What only the upload shows leaves the folder, and says how to go on.
    error = refused("--push", "other/tiny")
    assert "this token may not write there" in error
    assert f"`hf upload other/tiny {OUT}`" in error
    assert {p.name for p in OUT.iterdir()} == FILES
    hub.commit("me/open", {})
    assert "the repository is there and public" in refused("--push", "me/open", "--private")
    assert hub.repos["me/open"] == {hub.branches["me/open"]["main"]: {}}


def test_a_note_that_is_not_there_is_said_before_a_model_is_loaded(
        run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr("unislu_llm.export.load_model", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(UserError, match=r"--data-note gone\.md cannot be read"):
        export(RUN, OUT, names=NAMES, data_note=Path("gone.md"))


def test_a_value_out_of_range_is_refused(run: Callable[..., Path]) -> None:
    path = run() / "best" / "model.safetensors"
    state = load_file(path)
    next(iter(state.values())).view(-1)[0] = 1e30
    save_file(state, path)
    write_sums(path.parent)
    with pytest.raises(UserError, match=r"does not fit fp16; give --dtype bf16"):
        export(RUN, OUT, dtype="fp16", names=NAMES, check=False)
    assert not any(OUT.parent.iterdir())
