"""Answers to speech from an LLM that gets embeddings as its prompt: vLLM's `prompt_embeds`.

    vllm serve MERGED --enable-prompt-embeds
    python eval/prompt_embeds.py MODEL MERGED --url http://127.0.0.1:8000/v1 AUDIO [AUDIO ...]

Encoder, projector and recogniser of MODEL run here, its LLM (MERGED, of `unislu export MODEL
--merged`) there. Without --url, transformers reads the embeddings. The request was not run.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from typing import Any
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM

from unislu_llm import load
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.decoding.hypotheses import with_hypotheses
from unislu_llm.decoding.inputs import utterances_of
from unislu_llm.errors import reported
from unislu_llm.models.speech_llm import lay_out
from unislu_llm.tokenizer import Example


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name, count in (("model", None), ("merged", None), ("audio", "+"), ("--url", None)):
        parser.add_argument(name, nargs=count)
    args = parser.parse_args()
    model: Any = load(args.model)
    utterances = with_hypotheses(model, list(utterances_of(args.audio)[0]))
    clips = SpeechDataset([Example(u, None) for u in utterances], listens=model.listens)
    if not args.url:
        llm: Any = AutoModelForCausalLM.from_pretrained(args.merged, dtype=torch.float32)
    for i, path in enumerate(args.audio):
        batch = model.collator()([clips[i, 0]]).to(model.device)
        parts = model._prompt(batch, model.speech(batch, transcribe=True))
        embeds = lay_out(parts, "left")[0]  # (1, positions, dim)
        if not args.url:
            ids = llm.generate(inputs_embeds=embeds, max_new_tokens=256)
            print(path, model.tokenizer.base.batch_decode(ids)[0])  # saved there as well
            continue
        torch.save(embeds[0].to("cpu", torch.bfloat16), file := io.BytesIO())
        body = {"model": args.merged, "max_tokens": 256, "temperature": 0,
                "prompt_embeds": base64.b64encode(file.getvalue()).decode()}
        request = Request(f"{args.url}/completions", json.dumps(body).encode(),
                          {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as reply:
            print(path, json.load(reply)["choices"][0]["text"])


if __name__ == "__main__":
    with reported():
        main()
