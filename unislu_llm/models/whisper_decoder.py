"""One pass of Whisper's decoder, and the prompt that it begins with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask

from unislu_llm.errors import UserError


def run_decoder(decoder: Any, ids: Tensor, frames: Tensor | None, frame_bias: Tensor | None,
                attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: Any = None) -> Tensor:
    """Hidden states `(rows, n, dim)` after ids `(rows, n)`, over frames `(rows, T_enc, dim)`."""
    # transformers' own forward lets every token attend to all frames, padding included, and passes
    # None where its layers take a mask. Here the mask is an argument of each layer's call: a layer
    # that is computed again in the backward pass (gradient checkpointing) sees the mask of its own
    # forward pass, whatever ran in between.
    embeddings = decoder.embed_tokens(ids)
    causal = create_causal_mask(
        config=decoder.config, inputs_embeds=embeddings, attention_mask=attention_mask,
        past_key_values=past_key_values, position_ids=position_ids)
    hidden = embeddings + decoder.embed_positions(ids, position_ids=position_ids)
    hidden = F.dropout(hidden, p=decoder.dropout, training=decoder.training)
    bias = None if frame_bias is None else frame_bias.to(hidden.dtype)
    for layer in decoder.layers:
        hidden = layer(hidden, causal, frames, encoder_attention_mask=bias,
                       past_key_values=past_key_values, use_cache=past_key_values is not None)
    return decoder.layer_norm(hidden)


def whisper_prompt(whisper: Any, tokenizer: PreTrainedTokenizerBase, language: str) -> list[int]:
    """Ids of `<|startoftranscript|><|en|><|transcribe|><|notimestamps|>`.

    Raises:
        UserError: the language is not one of the checkpoint's.
    """
    names, vocabulary = ["<|notimestamps|>"], tokenizer.get_vocab()
    # English-only checkpoints have no language and no task.
    if getattr(whisper.generation_config, "is_multilingual", True):
        names = [f"<|{language}|>", "<|transcribe|>", *names]
    if names[0] not in vocabulary:
        raise UserError(f"language '{language}' is not one of Whisper's; use a code such as "
                        "en, de, fr")
    return [int(whisper.config.decoder_start_token_id), *(vocabulary[name] for name in names)]
