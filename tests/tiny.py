"""Tiny random models, tokenizers and utterances, made in milliseconds from configurations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.config import Config, ModelConfig
from unislu_llm.models.projectors import NONE
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.whisper_slu import WhisperSLU
from unislu_llm.tasks import Span, Task, TaskRegistry
from unislu_llm.unified import encode
from unislu_llm.utterance import Utterance

TEXTS = (
    "the council met in paris on monday",
    "we thank the european parliament for its work",
    "this is a wonderful report and i am very glad",
    "it was a bad and sad evening for us all",
    "anna voted against the law of two thousand and four",
)
WHISPER_TOKENS = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
SAMPLE_RATE = 16_000


def make_tokenizer(*, specials: Sequence[str] = (), metaspace: str | None = None,
                   add_bos: bool = False, bos: str | None = "<s>", eos: str = "</s>",
                   pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on a few sentences; it spells any text.

    `metaspace` is SentencePiece's way: words start with `▁`; `always`, `first` (Llama 2) or `never`
    (Gemma) is whether a text does. Default: byte level, as GPT-2.
    """
    names = list(dict.fromkeys(t for t in (pad, bos, eos, *specials) if t))
    tokenizer = Tokenizer(models.BPE())
    if metaspace is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Metaspace(prepend_scheme=metaspace)])
        alphabet = [chr(c) for c in range(33, 127)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    lead = " " if metaspace in (None, "never") else ""
    tokenizer.train_from_iterator([lead + text for text in TEXTS], trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, show_progress=False, initial_alphabet=alphabet))
    if metaspace is not None:
        # Bytes are no special tokens, which decoding would leave out.
        trained = json.loads(tokenizer.to_str())["model"]
        vocab = trained["vocab"] | {f"<0x{i:02X}>": len(trained["vocab"]) + i for i in range(256)}
        tokenizer.model = models.BPE(vocab, [tuple(pair) for pair in trained["merges"]],
                                     byte_fallback=True, unk_token=eos, fuse_unk=True)
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad,
        additional_special_tokens=[AddedToken(t, special=True) for t in specials] or None)


def make_whisper(*, seed: int = 0, **options: Any,
                 ) -> tuple[WhisperForConditionalGeneration, PreTrainedTokenizerFast]:
    """A random Whisper, two layers on either side, with its tokenizer; options of its config."""
    tokenizer = make_tokenizer(specials=WHISPER_TOKENS, bos=None, pad=None, eos="<|endoftext|>")
    eos, start = tokenizer.eos_token_id, tokenizer.get_vocab()[WHISPER_TOKENS[0]]
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "d_model": 32, "num_mel_bins": 80, "dropout": 0.0,
        "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
        "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    config = WhisperConfig(**sizes | options, eos_token_id=eos, bos_token_id=eos, pad_token_id=eos,
                           decoder_start_token_id=start, suppress_tokens=None,
                           begin_suppress_tokens=None)
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.is_multilingual = True
    return model, tokenizer


def make_whisper_encoder(*, seed: int = 0, **options: Any) -> WhisperEncoder:
    """The encoder of :func:`make_whisper`: 32-dimensional frames, 80 mel bins."""
    return make_whisper(seed=seed, **options)[0].model.encoder


def make_llm(arch: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None, *,
             tied: bool = True, seed: int = 0, **options: Any) -> Any:
    """A random causal LM of an architecture: size 32, two layers, grouped-query attention."""
    tokenizer = tokenizer or make_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 1024, "tie_word_embeddings": tied,
        # Larger than usual, so that a random model's next-token choices are far from ties.
        "initializer_range": 0.3, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if arch == "gemma3_text":
        # Both kinds of layer, and a window that short test inputs exceed. Embeddings are scaled up
        # and layers normalised: with large weights it would repeat its last token, whatever it
        # hears.
        sizes |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
                  "query_pre_attn_scalar": 8, "initializer_range": 0.1}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes | options)).eval()


def model_config(**settings: Any) -> ModelConfig:
    """A :class:`ModelConfig` of tiny parts; `lora` None is rank 0."""
    defaults: dict[str, Any] = {
        "encoder": "tiny-whisper", "llm": "tiny-llm",
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}}
    if settings.get("projector", "mlp") == "mlp":
        defaults["projector_options"] = {"stack": 5, "hidden": 32}
    settings = defaults | settings
    return ModelConfig(**settings | {"lora": settings["lora"] or {"rank": 0}})


def save_wide_llm(folder: Path) -> None:
    """An LLM that is wide enough for 4 bits, which come in blocks of 64, and its tokenizer."""
    tokenizer = make_tokenizer()
    for part in (tokenizer, make_llm("llama", tokenizer, hidden_size=64, intermediate_size=128,
                                     head_dim=16)):
        part.save_pretrained(folder)


def make_speech_llm(*, arch: str = "llama", tied: bool = True, seed: int = 0,
                    tokenizer: PreTrainedTokenizerFast | None = None,
                    whisper_options: dict[str, Any] | None = None,
                    llm_options: dict[str, Any] | None = None, registry: TaskRegistry | None = None,
                    ctc_tokens: Sequence[int] | None = None, **settings: Any) -> SpeechLLM:
    """A tiny :class:`SpeechLLM` in eval mode; other arguments are of its :class:`ModelConfig`."""
    tokenizer, config = tokenizer or make_tokenizer(), model_config(**settings)
    encoder = None if config.projector == NONE else make_whisper(
        seed=seed, **whisper_options or {})[0].model.encoder
    llm = make_llm(arch, tokenizer, tied=tied, seed=seed, **llm_options or {})
    torch.manual_seed(seed)
    return SpeechLLM(config, registry or TaskRegistry(), encoder, llm, tokenizer, ctc_tokens).eval()


def make_whisper_slu(*, seed: int = 0, whisper_options: dict[str, Any] | None = None,
                     registry: TaskRegistry | None = None, **settings: Any) -> WhisperSLU:
    """A tiny :class:`WhisperSLU` in eval mode, of which everything trains."""
    whisper, tokenizer = make_whisper(seed=seed, **whisper_options or {})
    config = model_config(**{"encoder_mode": "full"} | settings)
    torch.manual_seed(seed)
    return WhisperSLU(config, registry or TaskRegistry(), whisper, tokenizer).eval()


def unified_string(utterance: Utterance, task: Task | None) -> str:
    return "".join(piece.text for piece in encode(utterance, task))


def write_utterances(folder: Path, *, seconds: Sequence[float] = (0.9, 1.6, 0.6, 1.2),
                     seed: int = 0) -> list[Utterance]:
    """Utterances with WAV files (16 kHz, tone and noise) of these lengths; in turn: two entities,
    sentiment, not annotated, annotated as without entities.
    """
    rng = np.random.default_rng(seed)
    kinds: list[tuple[str, dict[str, Any]]] = [
        (TEXTS[0], {"ner": (Span("PLACE", 19, 24), Span("WHEN", 28, 34))}),
        (TEXTS[2], {"sa": "Positive"}),
        (TEXTS[1], {}),
        (TEXTS[3], {"ner": ()}),
    ]
    utterances = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, length in enumerate(seconds):
        time = np.arange(round(length * SAMPLE_RATE)) / SAMPLE_RATE
        tone = np.sin(2 * np.pi * (200 + 90 * i) * time * (1 + 0.2 * time))
        wave = 0.3 * tone + 0.05 * rng.standard_normal(len(time))
        path = folder / f"u{i}.wav"
        soundfile.write(path, wave.astype(np.float32), SAMPLE_RATE)
        text, labels = kinds[i % len(kinds)]
        utterances.append(Utterance(f"u{i}", path, text, labels, corpus="tiny",
                                    duration=len(time) / SAMPLE_RATE))
    return utterances


def train_tiny_run(kind: str, folder: Path, checkpoints: dict[str, str],
                   rows: Path | None = None, tasks: Path | None = None) -> None:
    """Two steps of training in `folder`: `corpus/dev.jsonl` (8 utterances, or `rows`) and
    `runs/tiny`."""
    from unislu_llm.data.manifest import write_manifest
    from unislu_llm.training.trainer import Trainer

    seconds = (0.9, 1.6, 0.6, 1.2, 0.7, 0.8, 1.0, 0.5)
    manifest = rows or folder / "corpus" / "dev.jsonl"
    if rows is None:
        write_manifest(manifest, write_utterances(folder / "corpus" / "audio", seconds=seconds))
    Trainer(kind, Config.model_validate({
        "output": "runs/tiny",
        "model": {"encoder": checkpoints["whisper"], "llm": checkpoints["llm"],
                  "projector_options": {"stack": 5, "hidden": 32},
                  "lora": {"rank": 4, "target_modules": ["q_proj"]}},
        "data": {key: [str(rows or "corpus/dev.jsonl")] for key in ("train", "dev")} | {
            "tasks": tasks and str(tasks)},
        "train": {"max_steps": 2, "batch_size": 8, "trackers": [], "threads": 1},
        "decode": {"max_new_tokens": 12, "batch_size": 3}})).fit()
