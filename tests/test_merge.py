"""A merged folder is a plain causal LM: others load it without us, and it answers as ours does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from tests.tiny import (
    TEXTS,
    make_speech_llm,
    make_tokenizer,
    model_config,
    save_wide_llm,
    unified_string,
)
from unislu_llm.cli import main
from unislu_llm.decoding.recogniser import WhisperRecogniser
from unislu_llm.io import read_json_lines
from unislu_llm.merge import grammars
from unislu_llm.models.lora import merge_lora
from unislu_llm.models.markers import write_markers
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.whisper_decoder import run_decoder
from unislu_llm.models.whisper_slu import WhisperSLU
from unislu_llm.tasks import NER, SA, LabelTask, Span, TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

ROOT = Path(__file__).parents[1]
ALONE = ("import runpy, sys; sys.modules.update(unislu_llm=None, peft=None); del sys.argv[0]; "
         "runpy.run_path(sys.argv[0], run_name='__main__')")
READS: dict[str, Any] = {
    "projector": "none", "hypothesis": "manifest", "prompt_prefix": "say", "prompt_suffix": "</s>",
    "lora": {"rank": 2, "alpha": 4, "target_modules": ["auto"]}}


def trained(model: Any) -> Any:
    """Give adapters and markers something to change: both start as if they were not there."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name or name.endswith(".rows"):
            parameter.data.normal_(0, 0.3)
    return model


def logits(llm: Any, marker: int) -> Tensor:
    with torch.no_grad():
        return llm(input_ids=torch.tensor([[5, 99, marker, 7, marker + 3, 250]])).logits


@pytest.mark.parametrize(("arch", "tied", "extra", "gap"), [
    ("llama", True, 0, 2), ("llama", False, 0, 0), ("llama", True, 50, 0), ("gpt2", True, 0, 0),
    ("gemma3_text", True, 0, 0)])
def test_logits_stay_as_they_were(arch: str, tied: bool, extra: int, gap: int) -> None:
    tokenizer = make_tokenizer()
    rows = len(tokenizer) + extra
    tokenizer.add_tokens([f"unused{i}" for i in range(gap)])
    llm = trained(make_speech_llm(**READS, arch=arch, tied=tied, tokenizer=tokenizer,
                                  llm_options={"vocab_size": rows})).llm
    marker = llm.get_input_embeddings().first
    before = logits(llm, marker)
    assert merge_lora(llm, torch.bfloat16) > 1
    write_markers(llm)
    after, named = logits(llm, marker), [*range(rows), *range(rows + gap, before.shape[-1])]
    torch.testing.assert_close(after[..., named], before[..., named], atol=1e-4, rtol=1e-4)
    # Of ids that are nobody's the most that there is to say: they are never the likeliest.
    assert set(after.argmax(-1).flatten().tolist()) <= set(named)
    assert not [name for name, _ in llm.named_modules() if "lora" in name or "base" in name]
    assert (llm.get_input_embeddings().weight is llm.get_output_embeddings().weight) == tied
    assert llm.config.vocab_size == len(llm.get_input_embeddings().weight) == before.shape[-1]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_layers_become_the_numbers_that_they_stand_for(bits: str, tmp_path: Path) -> None:
    save_wide_llm(tmp_path)
    config = model_config(**READS | {"llm": str(tmp_path), "quantization": bits})
    llm = trained(SpeechLLM.build(config, TaskRegistry()).eval()).llm
    marker, layer = int(llm.get_input_embeddings().first), llm.model.layers[0].self_attn.q_proj
    before, delta = logits(llm, marker), layer.get_delta_weight("default")
    base = layer.base_layer(torch.eye(64)).T.float()
    assert merge_lora(llm, torch.float32) > 1
    merged = llm.model.layers[0].self_attn.q_proj
    # The layer itself multiplies in bf16, or rounds what comes in to 8 bits: 1 part in 100.
    torch.testing.assert_close(merged.weight, base + delta, atol=0.01, rtol=0.01)
    assert {type(m) for n, m in llm.named_modules() if n.endswith("_proj")} == {nn.Linear}
    assert (logits(llm, marker) - before).norm() < 0.05 * before.norm()
    write_markers(llm)
    llm.save_pretrained(tmp_path / "plain")
    assert "quantization" not in (tmp_path / "plain" / "config.json").read_text()


def answered_alone(folder: str) -> str:
    """The last line of the folder's parity.py, to which importing unislu_llm is an error."""
    done = subprocess.run([sys.executable, "-c", ALONE, f"{folder}/parity.py", folder],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_plain_transformers_answers_as_we_do(tmp_path: Path, tiny_checkpoints: dict[str, str],
                                             capsys: pytest.CaptureFixture[str]) -> None:
    model = SpeechLLM.build(model_config(**READS | {
        "projector": "mlp", "llm": tiny_checkpoints["llm"],
        "encoder": tiny_checkpoints["whisper"]}), TaskRegistry([SA]))
    folder, out, clips = tmp_path / "model", tmp_path / "out", tmp_path / "clips.jsonl"
    clips.write_text("".join(json.dumps({"id": t, "hypothesis": t}) + "\n" for t in TEXTS[:2]))
    command = ["export", str(folder), "--merged", "--dtype", "fp32", "--out", str(out),
               "--manifest", str(clips)]
    model.save_pretrained(folder)
    assert main(command) == 2
    assert "lora_B is zero" in capsys.readouterr().err
    assert not out.exists()
    trained(model).save_pretrained(folder)
    assert main(command) == 0
    assert "does not hear" in (said := capsys.readouterr().out)
    assert "other tokens" not in said
    assert [r["task"] for r in read_json_lines(out / "parity.jsonl")] == [None, None, "sa", "sa"]
    assert answered_alone(str(out)).startswith("4 prompts: ")
    assert not [p for p in out.rglob("*.[jm]*") if str(tmp_path) in p.read_text()]
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("name", ["whisper-base--gemma-3-270m", "whisper-base--smollm2-135m"])
def test_a_shipped_adapter_answers_without_us(name: str, tmp_path: Path) -> None:
    assert main(["export", f"{ROOT}/adapters/{name}", "--merged", "--out", f"{tmp_path}/out"]) == 0
    assert answered_alone(f"{tmp_path}/out").startswith("90 prompts: ")


def test_grammars_take_answers_and_nothing_else() -> None:
    acts = LabelTask("acts", "[DA]", ('say "hi"', "b\\c", "été"), "[D]", "[/D]", multi=True)
    files = grammars(TaskRegistry([NER, SA, acts]))

    def takes(name: str, text: str) -> bool:
        rule = files[f"{name}.gbnf"].splitlines()[0].partition("::=")[2]
        parts = {"text": r"[^\[]*", "phrase": r"\s*[^\[\s][^\[]*", " ": ""}
        pattern = regex.sub(r'"(?:\\.|[^"\\])*"|\w+| ', lambda m: parts[m[0]] if m[0] in parts
                            else regex.escape(json.loads(m[0])), rule)
        return regex.fullmatch(pattern, text) is not None

    u = Utterance("u", None, "we met in paris", {
        "ner": (Span("PLACE", 10, 15),), "sa": "Neutral", "acts": ('say "hi"', "été")})
    for task in (NER, SA, acts):
        answer = unified_string(u, task)
        assert [name for name in ("asr", "ner", "sa", "acts", "all") if takes(name, answer)] == [
            task.name, "all"]
        assert takes(f"{task.name}-outputs", answer.partition(task.marker)[2])
    assert takes("asr", u.text)
    assert takes("ner", "[T/L][NER]")
    for text in ("[T/L][NER][PLACE] [/PLACE]", "[T/L][NER][PLACE]a[/WHEN]", "a[T/L]", "[NER]",
                 "[T/L][SA][S]Good[/S]", "[T/L][SA]", '[T/L][DA][D]été[/D][D]b\\c[/D]'):
        assert not takes("all", text), text
    lark, gbnf = (files[f"all.{kind}"].splitlines()[0] for kind in ("lark", "gbnf"))
    assert lark.replace("start:", "root ::=") == gbnf


def test_a_whisper_tuned_on_transcripts_becomes_a_plain_checkpoint(
        tiny_checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
        ) -> None:
    settings = {"encoder": tiny_checkpoints["whisper"], "encoder_mode": "lora",
                "decoder_mode": "lora", "lora": {"rank": 2, "alpha": 4}}
    for name, tasks, says in (("tasks", TaskRegistry(), "writes ner, sa beside transcripts"),
                              ("new", TaskRegistry([]), "never trained"),
                              ("tuned", TaskRegistry([]), "")):
        model: Any = WhisperSLU.build(model_config(**settings), tasks)
        (trained(model) if name == "tuned" else model).save_pretrained(tmp_path / name)
        code = main(["export", str(tmp_path / name), "--merged", "--out", str(tmp_path / "out"),
                     "--dtype", "fp32"])
        said = capsys.readouterr()
        assert (code != 0) == bool(says) == (not (tmp_path / "out").exists()), said.err
        assert says in said.err
    assert "a plain Whisper checkpoint in fp32" in said.out
    merged = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    clip = 0.1 * torch.randn(16_000)
    batch = model.eval().collator().from_waves(
        [Example(Utterance("a", None, "the council met"), None)], [clip])
    frames, _ = model.encoder(batch.mel, batch.speech_lengths)
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[*model.prompt, *own(" the council met").input_ids]])
    with torch.no_grad():
        logits = merged(encoder_outputs=(frames,), decoder_input_ids=ids).logits
        expected = model.logits(run_decoder(model.whisper.model.decoder, ids, frames, None))
    # All but the marker, which a plain Whisper cannot say.
    torch.testing.assert_close(logits, expected[..., :logits.shape[-1]], rtol=1e-4, atol=1e-5)
    recogniser = WhisperRecogniser(str(tmp_path / "out"))
    assert len(recogniser([clip], "en")) == 1, "it makes hypotheses"
