"""Measure speed and memory: training steps, decoding, recognition; on a CPU or a GPU.

    python eval/benchmark.py train                              # random weights, no download
    python eval/benchmark.py decode --device cuda --precision bf16
    python eval/benchmark.py train --model adapters/whisper-base--smollm2-135m
    python eval/benchmark.py decode --model runs/mine --ways token rewrite verbatim  # hypotheses
    python eval/benchmark.py recognise --manifest dev.jsonl --silence 3 30

Without --model the model has random weights in the sizes of --encoder and --llm; without --manifest
the clips are noise of SLUE's lengths. Rounds alternate, so that what else the machine does meets
all measurements alike; memory is that of one round in a process of its own. To compare two
revisions, run each checkout's own script in turn on one machine, and lay the results side by side.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import soundfile
import torch
from tabulate import tabulate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unislu_llm.config import DecodeConfig, ModelConfig, TrainConfig
from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.frame_cache import FrameCache, build_frames, encoder_settings
from unislu_llm.data.loading import load_examples
from unislu_llm.data.sampler import sorted_batches
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.hypotheses import load_recogniser, recognise
from unislu_llm.decoding.hypothesis_bias import HypothesisBias
from unislu_llm.decoding.recogniser import WhisperRecogniser
from unislu_llm.errors import UserError, reported
from unislu_llm.io import write_json
from unislu_llm.loss import weighted_loss
from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.run_folder import find_run, load_model, versions
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.setting_types import Transcript
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.tokenizer import Example, make_examples
from unislu_llm.training import process
from unislu_llm.training.optim import build_optimizer
from unislu_llm.utterance import Utterance

RATE = 16_000
# Sizes: of Whisper's encoders (width, layers, heads), of LLMs (width, inner width, layers, heads,
# of keys, width of a head, vocabulary); tiny is for tests.
ENCODERS = {"tiny": (32, 2, 2), "base": (512, 6, 8), "small": (768, 12, 12),
            "medium": (1024, 24, 16)}
LLMS = {"tiny": (32, 64, 2, 4, 2, 8, 400),
        "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49_152),
        "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 64, 151_936),
        "1b": (2048, 8192, 16, 32, 8, 64, 128_256),
        "qwen2.5-7b": (3584, 18_944, 28, 28, 4, 128, 152_064),
        "llama-70b": (8192, 28_672, 80, 64, 8, 128, 128_256)}
_LLM_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "head_dim", "vocab_size")
WORDS = ("the", "council", "met", "in", "paris", "on", "monday", "and", "we", "thank", "them",
         "for", "a", "wonderful", "report", "that", "was", "long", "not", "bad", "said", "anna")


# ---- what is measured


def random_model(encoder: str, llm: str, projector: str, precision: str, seed: int,
                 device: str = "cpu", change: Callable[[Any], Any] = lambda llm: llm) -> SLUModel:
    """A speech LLM of these sizes; its tokenizer spells, so texts have about four ids a word.

    Its backbones are drawn on `device`, and the LLM goes through `change`, before it gets LoRA.
    """
    spelling = Tokenizer(models.BPE())
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    spelling.train_from_iterator([], trainers.BpeTrainer(
        special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token="</s>")
    torch.manual_seed(seed)
    width, layers, heads = ENCODERS[encoder]
    sizes: dict[str, Any] = {**dict(zip(_LLM_FIELDS, LLMS[llm], strict=True)),
                             "max_position_embeddings": 8192,
                             "tie_word_embeddings": True, "initializer_range": 0.05}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kind: Any = WhisperConfig  # its fields are not typed as keyword arguments
    torch.set_default_dtype(dtype)  # billions of weights are not drawn in fp32 first
    try:
        with torch.device(device):
            network: Any = change(LlamaForCausalLM(LlamaConfig(**sizes)))
            whisper: Any = WhisperEncoder(kind(
                d_model=width, encoder_layers=layers, encoder_attention_heads=heads,
                encoder_ffn_dim=4 * width if width > 32 else 64, num_mel_bins=80))
    finally:
        torch.set_default_dtype(torch.float32)
    config = ModelConfig(encoder=f"random-{encoder}", llm=f"random-{llm}", projector=projector,
                         prompt_suffix="\n")
    ctc = list(range(1, 257)) if projector == "ctc" else None
    return SpeechLLM(config, TaskRegistry(), whisper, network, tokenizer, ctc).eval()


def random_clips(folder: Path, count: int, seed: int) -> list[Example]:
    """Noise of SLUE's lengths (means of 10.4 and 8.0 s) with words at 2.5 a second.

    Half is annotated with an entity, half with sentiment.
    """
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        mean = 10.4 if i % 2 else 8.0
        seconds = round(float(np.clip(rng.gamma(3.2, mean / 3.2), 1.0, 29.0)), 3)
        path = folder / f"{i}.wav"
        noise = rng.normal(0.0, 0.1, round(seconds * RATE)).clip(-1, 1)
        soundfile.write(path, noise, RATE, subtype="PCM_16")
        text = " ".join(rng.choice(WORDS, max(2, round(2.5 * seconds))))
        labels: dict[str, Any] = ({"ner": (Span("ORG", 0, text.index(" ")),)} if i % 2
                                  else {"sa": "Neutral"})
        found.append(Utterance(str(i), path, text, labels, duration=seconds, hypothesis=text))
    return make_examples(found, TaskRegistry())


class Bench:
    """A model and clips, and the work that is timed."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        if args.threads:
            torch.set_num_threads(args.threads)
        self.args, self.device = args, torch.device(args.device)
        self.tokens, self.prompt, self.wer = 0, 0.0, 0.0  # of the last round
        if args.what == "recognise":
            self.examples = self._examples(TaskRegistry(), folder)
            self.seconds = sum(e.utterance.seconds for e in self.examples)
            return
        model = load_model(find_run(args.model), args.precision) if args.model else random_model(
            args.encoder, args.llm, args.projector, args.precision, args.seed)
        self.model = model.to(self.device)
        examples = self._examples(model.registry, folder)
        if model.reads_hypothesis:  # a first pass is another program's time
            examples = [replace(e, utterance=replace(e.utterance, hypothesis=e.utterance.hypothesis
                                                     or e.utterance.text)) for e in examples]
        self.examples, self.seconds = examples, sum(e.utterance.seconds for e in examples)
        cache = self._frames(folder / "frames") if args.what == "train" and args.cache else None
        self.dataset = SpeechDataset(examples, listens=model.listens, frame_cache=cache)
        self.collate = model.collator()

    def _examples(self, registry: TaskRegistry, folder: Path) -> list[Example]:
        args = self.args
        if not args.manifest:
            return random_clips(folder, args.clips, args.seed)
        examples = load_examples(args.manifest, registry, flag="manifest")
        return examples[::max(1, len(examples) // args.clips)][:args.clips]

    def _frames(self, folder: Path) -> FrameCache:
        encoder = self.model.encoder
        if encoder is None:
            raise UserError("--cache: the model does not listen, so there are no frames to keep")
        cache = FrameCache(folder, encoder_settings(encoder, self.args.precision))
        build_frames(cache, encoder, [e.utterance for e in self.examples], device=self.device)
        return cache

    def work(self) -> dict[str, Callable[[], None]]:
        """What is timed, by name."""
        if self.args.what == "decode":
            return {f"batch {n}{f', {way}' * bool(way)}": partial(self.decode, n, way)
                    for n in self.args.batch_sizes for way in self.args.ways or [""]}
        if self.args.what == "recognise":
            dtype = torch.bfloat16 if self.args.precision == "bf16" else torch.float32
            makers = {f"{name}, {s:g} s of silence": WhisperRecogniser(
                name, device=self.device, dtype=dtype, silence=s) for s in self.args.silence
                for name in self.args.recogniser if ":" not in name}
            makers |= {name: load_recogniser.__wrapped__(name, device=self.device)
                       for name in self.args.recogniser if ":" in name}
            return {name + f", {n} beams" * (n > 1): partial(self.recognise, maker, n)
                    for name, maker in makers.items() for n in self.args.num_beams}
        self.optimizer = build_optimizer(self.model.trainable_groups(), TrainConfig())
        return {f"batch {self.args.batch_size}": self.train}

    def train(self) -> None:
        """One epoch, from audio files to the optimizer's steps."""
        self.model.train()
        self.tokens = 0
        for indices in sorted_batches(self.examples, self.args.batch_size):
            batch = self.collate([self.dataset[i, 0] for i in indices]).to(self.device)
            with self._autocast():
                loss = weighted_loss(self.model.losses(batch), batch.target_parts, "dynamic")
            loss.backward()
            groups = self.optimizer.param_groups
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.tokens += sum(batch.target_lengths)

    def decode(self, size: int, way: str) -> None:
        """Every clip's transcript and all tasks of the model, by the grammar, greedily."""
        ways: dict[str, Any] = {"transcript": "rewrite" if way == "token" else way or None}
        options = DecodeConfig(batch_size=size, max_new_tokens=self.args.new_tokens, grammar=True,
                               force_task=True, **ways)
        engine, names, prefill = Engine(self.model, options), self.model.registry.names, (
            self.model.prefill)
        self.tokens, self.prompt = 0, 0.0

        def timed(batch: Batch) -> State:
            started = time.perf_counter()
            state = prefill(batch)
            wait(self.device)
            self.prompt += time.perf_counter() - started
            return state

        # One token at a time is what is decoded where nothing is known of what comes next.
        ahead = HypothesisBias.ahead if way != "token" else lambda bias: [None] * len(bias._row)
        with (mock.patch.object(HypothesisBias, "ahead", ahead),
              mock.patch.object(self.model, "prefill", timed)):
            for indices in sorted_batches(self.examples, size):
                batch = self.collate([self.dataset[i, 0] for i in indices])
                with self._autocast():
                    answers = engine.answer(batch, [names] * len(indices))
                self.tokens += sum(sum(a.n_tokens.values()) for a in answers)

    def recognise(self, recogniser: WhisperRecogniser, num_beams: int) -> None:
        """Every clip's hypothesis, and its WER, which is that of noise without --manifest."""
        utterances = list({id(e.utterance): e.utterance for e in self.examples}.values())
        made = dict(recognise(recogniser, utterances, TaskRegistry(), num_beams=num_beams,
                              batch_size=self.args.batch_size))
        self.wer = corpus_wer([u.text for u in utterances],
                              [made[i].text for i in range(len(utterances))], "whisper").wer

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.args.precision == "bf16")


# ---- how it is measured


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Speed of each piece of work, the median over rounds, and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        work = bench.work()
        times: dict[str, list[float]] = {name: [] for name in work}
        last: dict[str, dict[str, float]] = {}
        for turn in range(-1, args.rounds):  # the first warms up and does not count
            for name in list(work)[::-1 if turn % 2 else 1]:
                wait(bench.device)
                started = time.perf_counter()
                work[name]()
                wait(bench.device)
                if turn >= 0:
                    times[name].append(time.perf_counter() - started)
                last[name] = {"tokens": bench.tokens, "prompt_s": bench.prompt, "wer": bench.wer}
            print(f"round {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
    found = {}
    for name, seconds in times.items():
        took = statistics.median(seconds)
        found[name] = {
            "clips_per_s": len(bench.examples) / took, "audio_s_per_s": bench.seconds / took,
            "seconds": took, "least": min(seconds), "most": max(seconds)}
        if args.what == "recognise":
            found[name]["wer"] = last[name]["wer"]
            continue
        found[name]["tokens_per_s"] = last[name]["tokens"] / took
        if args.what == "decode":  # encoder and prompt are the same for all ways
            found[name] |= {"prompt_s": last[name]["prompt_s"],
                            "behind_prompt_s": took - last[name]["prompt_s"]}
        if args.memory:
            # A fresh process, since a process's peak does not come down again.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found[name]["peak_gib"] = pool.submit(peak_memory, args, name).result()
    return found


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """Peak memory of this process in GiB, after one round of a piece of work."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        bench.work()[name]()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return process.peak_memory(gpu=False)


def wait(device: torch.device) -> None:
    """Work that was given to a GPU is not done when the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode", "recognise"])
    parser.add_argument("--model", default="", help="saved model or run folder; default: random")
    parser.add_argument("--encoder", choices=list(ENCODERS), default="base", help="random weights")
    parser.add_argument("--llm", choices=list(LLMS), default="smollm2-135m", help="random weights")
    parser.add_argument("--projector", default="mlp", help="of the random model")
    parser.add_argument("--manifest", nargs="+", default=[], help="clips; default: noise")
    parser.add_argument("--clips", type=int, default=16, help="of each round")
    parser.add_argument("--batch-size", type=int, default=8, help="train: clips a step")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="decode")
    parser.add_argument("--num-beams", type=int, nargs="+", default=[1], help="recognise")
    parser.add_argument("--ways", nargs="+", choices=["token", *get_args(Transcript)], default=[],
                        help="decode: of a hypothesis; default: the model's")
    parser.add_argument("--recogniser", nargs="+", default=["openai/whisper-base"],
                        help="recognise: Whisper, ctranslate2:WHISPER, or a server's URL")
    parser.add_argument("--silence", type=float, nargs="+", default=[3.0, 30.0],
                        help="recognise: seconds behind each clip")
    parser.add_argument("--new-tokens", type=int, default=64, help="decode: bound of any answer")
    parser.add_argument("--cache", action="store_true", help="train: frames are cached before")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    args = parser.parse_args(argv)
    with reported():
        found = measure(args)
        print(tabulate([{"": name, **row} for name, row in found.items()], headers="keys",
                       tablefmt="github", floatfmt=".3g"))
        if args.out:
            options = {key: value for key, value in vars(args).items() if key != "out"}
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            write_json(args.out, {"options": json.loads(json.dumps(options, default=str)),
                                  "versions": versions(), "threads": torch.get_num_threads(),
                                  "load_average": load, args.what: found})


if __name__ == "__main__":
    main()
