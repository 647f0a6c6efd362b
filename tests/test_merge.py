"""A merged folder is a plain causal LM: others load it without us, and it answers as ours does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import regex
import torch
from transformers import AutoTokenizer

from tests.models.common import make_batch
from tests.tiny import make_llm, make_speech_llm, make_tokenizer
from unislu_llm.cli import main
from unislu_llm.errors import UserError
from unislu_llm.io import write_sums
from unislu_llm.merge import grammars, merge
from unislu_llm.models.lora import merge_lora
from unislu_llm.models.markers import write_markers
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry
from unislu_llm.unified import encode, render
from unislu_llm.utterance import Utterance

ROOT = Path(__file__).parents[1]
READS = {"projector": "none", "hypothesis": "manifest", "hypothesis_prompt": "\nDraft:",
         "prompt_prefix": "say", "lora": {"rank": 2, "alpha": 4, "target_modules": ["auto"]}}


def trained(model: Any) -> Any:
    """Give adapters and markers something to change: both start as if they were not there."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name or name.endswith(".rows"):
            parameter.data.normal_(0, 0.3)
    return model


def logits(llm: Any) -> torch.Tensor:
    ids = torch.arange(3, len(llm.get_input_embeddings().weight) - 1, 7)
    with torch.no_grad():
        return llm(input_ids=torch.cat([ids, ids + 1])[None], use_cache=False).logits


@pytest.mark.parametrize(("arch", "options"), [
    ("llama", {}), ("llama", {"tied": False}), ("gemma3_text", {}),
    ("llama", {"llm_options": {"vocab_size": 450}})], ids=str)
def test_logits_stay_as_they_were(arch: str, options: Any) -> None:
    llm = trained(make_speech_llm(arch=arch, **READS, **options)).llm
    before, head = logits(llm), llm.get_output_embeddings()
    tied = llm.get_input_embeddings().rows is head.rows
    assert merge_lora(llm, torch.bfloat16) > 2
    write_markers(llm)
    torch.testing.assert_close(logits(llm), before, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in llm.modules())
    assert (llm.get_input_embeddings().weight is llm.get_output_embeddings().weight) == tied
    assert llm.config.vocab_size == len(llm.get_input_embeddings().weight)


def test_ids_of_nobody_are_never_the_likeliest() -> None:
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["unused0", "unused1"])
    llm = trained(make_speech_llm(tokenizer=tokenizer, llm_options={"vocab_size": rows}, **READS)).llm
    before = logits(llm)
    write_markers(llm)
    after = logits(llm)
    torch.testing.assert_close(after[..., :rows], before[..., :rows])
    assert (after[..., rows:rows + 2] < after.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_layers_are_merged_as_the_numbers_that_they_stand_for(bits: Any, tmp_path: Path
                                                                        ) -> None:
    tokenizer = make_tokenizer()
    for part in (tokenizer, make_llm("llama", tokenizer, hidden_size=64, head_dim=16,
                                     intermediate_size=128)):
        part.save_pretrained(tmp_path)  # 4 bits come in blocks of 64
    from tests.tiny import model_config
    model = trained(SpeechLLM.build(model_config(
        **READS | {"llm": str(tmp_path), "quantization": bits}), TaskRegistry()).eval())
    before, layer = logits(model.llm), model.llm.model.layers[0].self_attn.q_proj
    eye = torch.eye(64)
    weight, delta = (f(eye).T.float() for f in (layer.base_layer, lambda x: layer(x)
                                                - layer.base_layer(x)))
    assert merge_lora(model.llm, torch.float32) > 2
    merged = model.llm.model.layers[0].self_attn.q_proj
    assert type(merged) is torch.nn.Linear
    # The layer itself multiplies in bf16, or rounds what comes in to 8 bits.
    torch.testing.assert_close(merged.weight, weight + delta, atol=0.02, rtol=0.02)
    assert not any(type(m).__module__.startswith("bitsandbytes") for m in model.llm.modules())
    after = logits(model.llm)
    assert (after - before).norm() < 0.1 * before.norm()
    model.llm.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


ALONE = """
import json, sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("unislu_llm", "peft"): raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
for row in map(json.loads, open(folder + "/parity.jsonl", encoding="utf-8")):
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=len(row["answer_ids"]))[0, ids.shape[1]:].tolist()
    print(int(ids[0].tolist() == row["prompt_ids"]), int(out == row["answer_ids"]), row["margin"])
assert "unislu_llm" not in sys.modules
"""


def answered_alone(folder: Path) -> list[tuple[bool, bool, float]]:
    """Of each parity prompt, whether plain transformers has our ids and our answer; its margin."""
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True,
                          text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return [(a == "1", b == "1", float(c)) for a, b, c in rows]
