"""Every preset of `adapters/` on a tiny random model of the very architecture that it is written for.

The tiny model has the layers, tying, vocabulary padding and tokenizer habits of the real one; what holds here for layer
names, masks, prompts and heads holds there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from unislu_llm.data.collate import Batch, SpeechDataset
from unislu_llm.data.targets import make_samples
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, weighted_loss
from unislu_llm.models import weights
from unislu_llm.models.head import logits_of
from unislu_llm.models.projectors import build_projector
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.build import model_config
from unislu_llm.training.config import Config, apply_preset, find_preset, load_config
from unislu_llm.utterance import Utterance

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "adapters"
PRESETS = sorted(ADAPTERS.glob("*.yaml"))
each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)

CHATML = {"specials": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]}
SMOLLM2 = {"arch": "llama", "tied": True,
           "tokenizer": CHATML | {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}}
QWEN2 = {"arch": "qwen2", "tied": True, "extra": 32,
         "tokenizer": CHATML | {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>"}}
GEMMA3 = {"arch": "gemma3_text", "tied": True, "extra": -1,
          "tokenizer": {"specials": ["<start_of_turn>", "<end_of_turn>"], "metaspace": "never", "add_bos": True,
                        "bos": "<bos>", "eos": "<eos>"}}
QWEN3_TOKENIZER = {"specials": [*CHATML["specials"], "<think>", "</think>"], "bos": None, "eos": "<|im_end|>",
                   "pad": "<|endoftext|>"}
BACKBONES: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-360M-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2,
    "google/gemma-3-270m": GEMMA3,
    "google/gemma-3-1b-it": GEMMA3,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN2,
    "Qwen/Qwen2.5-7B-Instruct": QWEN2 | {"tied": False},
    "Qwen/Qwen3-0.6B": QWEN2 | {"arch": "qwen3", "tokenizer": QWEN3_TOKENIZER},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "arch": "llama", "tied": False, "tokenizer": {"metaspace": "always", "add_bos": True, "pad": "</s>"}},
    "meta-llama/Llama-3.2-1B-Instruct": {
        "arch": "llama", "tied": True,
        "tokenizer": {"specials": ["<|start_header_id|>", "<|end_header_id|>"], "add_bos": True,
                      "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "pad": None}},
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "arch": "mistral", "tied": False, "llm_options": {"sliding_window": None},
        "tokenizer": {"specials": ["[INST]", "[/INST]"], "metaspace": "always", "add_bos": True, "pad": None}},
}
"""What the real model and tokenizer look like, by name. `extra` is the rows of the embedding beyond the tokenizer (Qwen
pads its vocabulary; Gemma's tokenizer has one token, for images, that its text models have no row for)."""


def read(preset: Path) -> Config:
    config = Config()
    apply_preset(config, preset)
    return config


class Tiny:
    """Builds tiny models and batches for a preset."""

    def __init__(self, tokenizer: Callable[..., Any], llm: Callable[..., Any], speech_llm: Callable[..., SpeechLLM],
                 utterances: Callable[..., list[Utterance]]) -> None:
        self._tokenizer, self._llm, self._speech_llm, self._utterances = tokenizer, llm, speech_llm, utterances

    def parts(self, preset: Path) -> dict[str, Any]:
        facts = BACKBONES[read(preset).model.llm]
        tokenizer, extra = self._tokenizer(**facts["tokenizer"]), facts.get("extra", 0)
        if extra < 0:
            tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
        options = facts.get("llm_options", {}) | {"vocab_size": len(tokenizer) + extra}
        return {"arch": facts["arch"], "tied": facts["tied"], "tokenizer": tokenizer, "llm_options": options}

    def llm(self, preset: Path) -> Any:
        """The LLM alone, with the weights that it has in :meth:`model`."""
        parts = self.parts(preset)
        return self._llm(parts["arch"], parts["tokenizer"], tied=parts["tied"], **parts["llm_options"])

    def model(self, preset: Path, **changes: Any) -> SpeechLLM:
        settings = model_config("speech_llm", read(preset).model, TaskRegistry())
        keys = ("llm", "projector", "projector_options", "lora", "prompt_prefix", "prompt_suffix")
        return self._speech_llm(**self.parts(preset), **{key: getattr(settings, key) for key in keys} | changes)

    def batch(self, model: SpeechLLM) -> Batch:
        data = SpeechDataset(make_samples(self._utterances(), model.config.registry))
        return model.collator()([data[i] for i in range(len(data))])


@pytest.fixture
def tiny(tiny_tokenizer: Any, tiny_llm: Any, tiny_speech_llm: Any, make_utterances: Any) -> Tiny:
    return Tiny(tiny_tokenizer, tiny_llm, tiny_speech_llm, make_utterances)


def step(model: SpeechLLM, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = weighted_loss(model.losses(batch), batch.target_parts, "dynamic")
    loss.backward()
    optimizer.step()
    return float(loss.detach())


# ---- the files -----------------------------------------------------------------------------------------------------


@each_preset
def test_preset_is_found_by_the_name_of_its_llm(preset: Path) -> None:
    config = read(preset)
    assert find_preset(config.model.llm, ADAPTERS) == preset
    build_projector(config.model.projector, 64, 32, 1.0, config.model.projector_options)
    assert config.model.lora.rank > 0
    assert config.train.precision == yaml.safe_load(preset.read_text())["precision"]


def test_every_backbone_has_one_preset() -> None:
    assert sorted(read(preset).model.llm for preset in PRESETS) == sorted(BACKBONES)


@pytest.mark.parametrize(("line", "named"), [
    ("precison: bf16", "'precision'"), ("projecter: mlp", "'projector'"), ("lora: {rnak: 4}", "'rank'"),
    ("precision: int8", "int8.*fp32, bf16, fp16"),
])
def test_unknown_key_in_a_preset_names_the_file_and_the_nearest_key(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"llm: some/model\n{line}\n")
    with pytest.raises(UserError, match=f"mine.yaml.*{named}"):
        read(path)


def test_precision_of_a_preset_is_a_default_below_config_file_and_flag(tmp_path: Path) -> None:
    plain, chosen = tmp_path / "plain.yaml", tmp_path / "chosen.yaml"
    plain.write_text("train: {epochs: 1}\n")
    chosen.write_text("train: {precision: fp32}\n")

    def precision(*argv: str) -> str:
        return load_config([*argv], plain, ADAPTERS, "").train.precision

    assert precision() == "fp32"
    assert precision("--llm", "google/gemma-3-1b-it") == "bf16"
    assert precision("--adapter", str(ADAPTERS / "llama3.2-1b.yaml")) == "bf16"
    assert precision("--llm", "google/gemma-3-1b-it", "--config", str(chosen)) == "fp32"
    assert precision("--llm", "google/gemma-3-1b-it", "--train.precision", "fp32") == "fp32"


def test_own_preset_brings_its_llm_and_prompt(tmp_path: Path) -> None:
    mine, plain = tmp_path / "mine.yaml", tmp_path / "plain.yaml"
    mine.write_text('llm: some/model\nprompt_suffix: "->"\nlora: {rank: 2}\n')
    plain.write_text("model: {llm: google/gemma-3-270m}\n")
    model = load_config(["--adapter", str(mine)], plain, ADAPTERS, "").model
    assert (model.llm, model.prompt_suffix, model.lora.rank) == ("some/model", "->", 2)


def test_lora_target_that_the_model_lacks_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"c_attn.*q_proj"):
        tiny.model(PRESETS[0], lora={"rank": 4, "alpha": 8, "target_modules": ["q_proj", "c_attn"]})


# ---- the models ----------------------------------------------------------------------------------------------------


@each_preset
def test_prompt_is_written_in_the_models_own_tokens(preset: Path, tiny: Tiny) -> None:
    model = tiny.model(preset)
    tokenizer, config, facts = model.codec.tokenizer, model.config, BACKBONES[model.config.llm]["tokenizer"]
    for special in [s for s in facts.get("specials", []) if s in config.prompt_prefix + config.prompt_suffix]:
        prompt = (model.prefix + model.suffix).count(tokenizer.convert_tokens_to_ids(special))
        assert prompt == (config.prompt_prefix + config.prompt_suffix).count(special)
    begins = model.prefix[:1] == [tokenizer.bos_token_id]
    assert begins == bool(facts.get("add_bos") or config.prompt_prefix.startswith(facts.get("bos") or "<s>"))
    assert model.prefix.count(tokenizer.bos_token_id) <= 1
    assert tokenizer.decode(model.suffix, skip_special_tokens=False).strip() == config.prompt_suffix.strip()


@each_preset
def test_two_steps_train_what_should_train_and_nothing_else(preset: Path, tiny: Tiny) -> None:
    model = tiny.model(preset).train()
    batch = tiny.batch(model)
    groups = model.trainable_groups()
    assert set(groups) == {"projector", "lora", "markers"}
    targets, layers = model.config.lora["target_modules"], model.llm.config.num_hidden_layers
    assert len(groups["lora"]) == 2 * len(targets) * layers
    assert all(name.startswith("llm.") for name, _ in groups["lora"])
    trainable = [(name, p) for group in groups.values() for name, p in group]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for _, p in trainable], lr=1e-4)
    first = step(model, batch, optimizer)
    assert [name for name, p in trainable if p.grad is None] == []
    second = step(model, batch, optimizer)  # in the first one lora_A has no gradient yet, behind a lora_B of zeros
    assert [name for name, p in trainable if not p.grad.abs().sum() > 0] == []
    assert 0 < second < first < float("inf")
    now = dict(model.named_parameters())
    assert [name for name, value in frozen.items() if not torch.equal(value, now[name])] == []


@each_preset
@torch.no_grad()
def test_logits_are_those_of_the_untouched_llm(preset: Path, tiny: Tiny) -> None:
    model, plain = tiny.model(preset), tiny.llm(preset)
    size, ids = plain.config.vocab_size, torch.arange(3, 43).reshape(2, 20)
    embeddings = plain.get_input_embeddings()(ids)
    torch.testing.assert_close(model.llm.get_input_embeddings()(ids), embeddings)
    hidden = model.llm.base_model(inputs_embeds=embeddings).last_hidden_state
    logits = logits_of(model.llm, hidden)
    torch.testing.assert_close(logits, model.llm(inputs_embeds=embeddings).logits)
    markers = list(model.codec.marker_ids.values())
    others = [i for i in range(size) if i not in markers]
    torch.testing.assert_close(logits[..., others], plain(inputs_embeds=embeddings).logits[..., others])
    assert logits.shape[-1] >= max(markers) + 1
    # Ids that belong to nobody (a tokenizer longer than the model) must never be chosen.
    assert torch.isin(logits.argmax(-1), torch.tensor(others + markers)).all()


@each_preset
@torch.no_grad()
def test_marker_rows_start_at_the_mean_of_their_words(preset: Path, tiny: Tiny) -> None:
    model, plain = tiny.model(preset), tiny.llm(preset)
    codec, hidden = model.codec, torch.randn(5, plain.config.hidden_size)
    logits = model.llm.get_output_embeddings()(hidden)
    for marker, i in codec.marker_ids.items():
        words = torch.tensor(codec.text_ids(codec.registry.meaning(marker)))
        expected = plain.get_input_embeddings()(words).mean(0)  # with Gemma's scale, which the marker must get too
        torch.testing.assert_close(model.llm.get_input_embeddings()(torch.tensor([i]))[0], expected)
        torch.testing.assert_close(logits[:, i], hidden @ plain.get_output_embeddings().weight[words].mean(0))
    assert len(model.trainable_groups()["markers"]) == (1 if BACKBONES[model.config.llm]["tied"] else 2)


@each_preset
def test_batched_generation_equals_one_by_one_and_teacher_forcing(preset: Path, tiny: Tiny) -> None:
    model = tiny.model(preset)
    batch = tiny.batch(model)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    together: Any = model.generate(batch.mel, batch.mel_lengths, **options)
    logits = torch.stack(together.logits, dim=1).float()
    eos = model.codec.eos_id
    assert len({tuple(row) for row in together.sequences.tolist()}) > 1, "all answers are one: nothing is tested"
    for i, row in enumerate(together.sequences.tolist()):
        length = row.index(eos) + 1 if eos in row else len(row)
        frames = int(batch.mel_lengths[i])
        alone: Any = model.generate(batch.mel[i:i + 1, :, :frames], batch.mel_lengths[i:i + 1], **options)
        assert alone.sequences[0].tolist()[:length] == row[:length]
        assert set(row[length:]) <= {model.codec.pad_id}
        torch.testing.assert_close(torch.stack(alone.logits, dim=1)[0, :length].float(), logits[i, :length],
                                   rtol=1e-3, atol=1e-3)
        ids = torch.tensor([row[:length]])
        with torch.no_grad():  # training sees the prompt that generation sees
            losses = model(batch.mel[i:i + 1], batch.mel_lengths[i:i + 1], ids, torch.full_like(ids, ASR_PART))
        expected = -logits[i, :length].log_softmax(-1).gather(1, ids[0][:, None])[:, 0]
        torch.testing.assert_close(losses[0], expected, rtol=1e-3, atol=1e-3)


BF16 = [path for path in PRESETS if read(path).train.precision == "bf16"]


@pytest.mark.parametrize("preset", BF16, ids=lambda path: path.stem)
def test_bf16_presets_train_and_decode_in_bf16(preset: Path, tiny: Tiny) -> None:
    model = tiny.model(preset)
    batch = tiny.batch(model)
    reference = model.losses(batch).sum().item()
    for parameter in model.parameters():  # as a run has it: frozen weights in bf16, trained ones in fp32
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.losses(batch).sum()
        assert len(model.generate(batch.mel, batch.mel_lengths, max_new_tokens=2)) == len(batch)
    loss.backward()
    assert loss.item() == pytest.approx(reference, rel=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    # Without autocast, as a loaded model is used.
    assert len(model.generate(batch.mel, batch.mel_lengths, max_new_tokens=2)) == len(batch)


@pytest.mark.weights
def test_smollm2_prompt_is_its_chat_template() -> None:
    preset = read(ADAPTERS / "smollm2-135m.yaml").model
    tokenizer = AutoTokenizer.from_pretrained(weights.resolve(preset.llm).path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "SPEECH"}], tokenize=False,
                                         add_generation_prompt=True)
    assert text.endswith(f"{preset.prompt_prefix}SPEECH{preset.prompt_suffix}")
