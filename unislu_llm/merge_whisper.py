"""A Whisper tuned on transcripts alone as a plain Whisper checkpoint, which everything loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from unislu_llm import weights
from unislu_llm.data.audio import batch_log_mel
from unislu_llm.errors import UserError
from unislu_llm.export import DTYPES
from unislu_llm.io import new_folder
from unislu_llm.models.lora import merge_lora
from unislu_llm.models.saved import Base
from unislu_llm.models.whisper_decoder import run_decoder
from unislu_llm.run_folder import Run, load_model

# Of log-probabilities, nats: by rounding of weights.
_CLOSE = {"fp32": 1e-2, "fp16": 0.1, "bf16": 0.5}


def merge_whisper(run: Run, out: Path, dtype: str) -> str:
    """Write a folder for `WhisperForConditionalGeneration` that transcribes as the trained model
    does; returns what there is to say of it.

    Raises UserError, and writes nothing: the model has tasks, whose markers no plain Whisper knows;
    its weights are the base's; or the folder foretells other words.
    """
    model: Any = load_model(run, "fp32")
    if model.registry.names:
        raise UserError(f"--merged: {run.model} writes {', '.join(model.registry.names)} beside "
                        "transcripts, and a plain Whisper has no markers for them; train it on "
                        "transcripts alone (--data.tasks recipes/configs/tasks_none.yaml)")
    whisper, base = model.whisper, Base.resolve("Whisper", model.config.encoder,
                                                model.bases.get("encoder"))[0]
    expected = _foretold(whisper, model.prompt, model.n_mels)
    merge_lora(whisper, DTYPES[dtype])
    # No transcript has a marker: its rows go, and the vocabulary is the base's again.
    for get, put in ((whisper.get_input_embeddings, whisper.set_input_embeddings),
                     (whisper.get_output_embeddings, whisper.set_output_embeddings)):
        put(get().base)
    whisper.config.vocab_size = len(whisper.get_input_embeddings().weight)
    plain = weights.from_pretrained(WhisperForConditionalGeneration, base, dtype=torch.float32)
    theirs = plain.state_dict()
    if all(torch.equal(own.to(DTYPES[dtype]), theirs[name].to(DTYPES[dtype]))
           for name, own in whisper.state_dict().items()):
        raise UserError(f"--merged: in {dtype} {run.model} has the weights of {base.name}, so that "
                        "it was never trained, or too little; train it, or give --dtype fp32")
    with new_folder(out) as new:
        whisper.to(DTYPES[dtype]).save_pretrained(new)
        weights.from_pretrained(AutoTokenizer, base).save_pretrained(new)
        WhisperFeatureExtractor(feature_size=model.n_mels).save_pretrained(new)
        merged = WhisperForConditionalGeneration.from_pretrained(new, dtype=torch.float32).eval()
        off = float((_foretold(merged, model.prompt, model.n_mels) - expected).abs().max())
        if not off <= _CLOSE[dtype]:
            raise UserError(f"--merged: {out} foretells other words, by {off:.3g} nats (rounding: "
                            f"{_CLOSE[dtype]}); try --dtype fp32, and please report it")
    return (f"{out}: a plain Whisper checkpoint in {dtype}; log-probabilities differ by {off:.2g} "
            f"nats at most\nuse it: unislu transcribe {out} FILE --out DIR, or --encoder {out}\n")


@torch.no_grad()
def _foretold(whisper: Any, prompt: Sequence[int], n_mels: int) -> Tensor:
    """Log-probabilities `(1, prompt, words)` behind each token of the prompt, of a clip of noise
    padded to 30 s."""
    noise = torch.randn(32_000, generator=torch.Generator().manual_seed(1)) / 10
    mel, _ = batch_log_mel([noise], n_mels, silence=30)
    frames = whisper.model.encoder(mel).last_hidden_state
    hidden = run_decoder(whisper.model.decoder, torch.tensor([list(prompt)]), frames, None)
    logits = whisper.get_output_embeddings()(hidden).float()
    return logits[..., : min(prompt)].log_softmax(-1)  # words: markers and prompts come behind
