"""Speed of decoding: beside plain `generate` of transformers, by batch size, and what the grammar and a second task cost.

Every system writes the same number of tokens for every clip (the end-of-text token does not end an answer here), from
the same waves, weights and device, in alternating runs. Log-mel, encoder and decoder are timed; reading files and loading
models are not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, WhisperFeatureExtractor
from transformers.generation import GenerationMixin
from transformers.utils.logging import set_verbosity_error

from unislu_llm.analysis.benchmark_options import DecodeBenchmark
from unislu_llm.analysis.benchmarking import alternate, decoder_of, environment, shown, spread, table, write
from unislu_llm.analysis.runs import file_hash, find_run, load_model
from unislu_llm.data.collate import SpeechDataset
from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.decoding.generate import DecodeOptions, decode_batch, predict, understand
from unislu_llm.decoding.grammar import grammar_of
from unislu_llm.errors import UserError
from unislu_llm.models import weights
from unislu_llm.models.base import WEIGHTS_FILE, SLUModel
from unislu_llm.models.markers import install_markers
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.build import load_samples
from unislu_llm.training.plan import peak_memory, use_threads

RATE = 16_000
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
NEVER = 2**31 - 1
"""An end-of-text id that no vocabulary has."""
VOCABULARIES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m")
GRAMMAR_BATCH, GRAMMAR_CONTEXT = 16, 48
"""Rows, and positions of speech and prompt before the first new token, in the part `grammar`."""


def run(options: DecodeBenchmark, command: Sequence[str] = ()) -> int:
    """Run the parts, print a table of each, write the result.

    Returns:
        Exit status: 0, or 2 for bad input (one message on stderr).
    """
    use_threads(options.threads)
    set_verbosity_error()
    try:
        result = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(result | {"command": shown(command), "environment": environment()}, options.out)
    for part in options.parts:
        if rows := result.get(part):
            print(f"\n{part}\n\n{table([_short(row) for row in rows])}")
    print(f"\nwritten to {options.out}")
    return 0


def measure(options: DecodeBenchmark) -> dict[str, Any]:
    """Rows of every part.

    Raises:
        UserError: no model where one is needed, or a model, manifest or audio file cannot be read.
    """
    needs = [part for part in options.parts if part != "grammar"]
    if needs and not options.model:
        raise UserError(f"--parts {' '.join(needs)} needs --model with run folders, e.g. --model runs/my-run")
    result: dict[str, Any] = {"clips": options.clips, "new_tokens": options.new_tokens, "repeats": options.repeats,
                              "precision": options.precision, "clock": options.clock, "models": {},
                              **{part: [] for part in options.parts}}
    for path in options.model if needs else []:
        run_ = find_run(path)
        model = load_model(run_, options.precision)
        samples, waves = _clips(options, model)
        result["models"][run_.label] = {"weights_sha256": file_hash(run_.model / WEIGHTS_FILE),
                                        "audio_seconds": round(sum(map(len, waves)) / RATE, 2)}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            if "speed" in options.parts:
                result["speed"] += [{"model": run_.label, **row} for row in speed_rows(model, samples, waves, options)]
            if "tasks" in options.parts:
                result["tasks"] += [{"model": run_.label, **row} for row in task_rows(model, samples, options)]
        del model
    if "grammar" in options.parts:
        for name in VOCABULARIES:
            result["grammar"].append(grammar_row(name, options))
    return result


def speed_rows(model: SLUModel, samples: list[Sample], waves: list[Tensor], options: DecodeBenchmark) -> list[dict[str, Any]]:
    """A row for every batch size and system: ours, ours with the grammar, and plain generate."""
    seconds, rows = sum(map(len, waves)) / RATE, []
    how = DecodeOptions(max_new_tokens=options.new_tokens, extra_tokens=options.new_tokens, tokens_per_second=0.0,
                        force_task=True, static_cache=options.static_cache, compile=options.compile)
    plain = PlainGenerate(model, options.new_tokens)
    for size in options.batch_sizes:
        systems: dict[str, Callable[[], object]] = {
            "ours": _ours(model, samples, waves, replace(how, grammar=False), size),
            "ours, grammar": _ours(model, samples, waves, replace(how, grammar=True), size),
            "plain generate": partial(_in_order, plain, waves, size)}
        with endless(model):
            memory = {name: _peak(system) for name, system in systems.items()}  # warm-up as well
            times = alternate(systems, options.repeats, warm_up=0, clock=CLOCKS[options.clock])
        medians = {name: spread(taken)["median"] for name, taken in times.items()}
        print(f"  batch {size}: " + ", ".join(f"{name} {median:.2f} s" for name, median in medians.items()), flush=True)
        for name, taken in times.items():
            median = medians[name]
            over = [100 * (a / b - 1) for a, b in zip(taken, times["ours"], strict=True)]
            rows.append({"system": name, "batch": size, "device": str(model.device), "dtype": options.precision,
                         "seconds": spread(taken), "rtf": median / seconds,
                         "tokens_per_s": len(waves) * options.new_tokens / median, "utterances_per_s": len(waves) / median,
                         "peak_gib": memory[name], "percent_over_ours": spread(over)})
    return rows


def _ours(model: SLUModel, samples: list[Sample], waves: list[Tensor], how: DecodeOptions, size: int) -> Callable[[], object]:
    """All clips in batches of similar length, as `predict` makes them."""
    collator = model.collator()
    order = sorted(range(len(waves)), key=lambda i: -len(waves[i]))
    batches = [order[i:i + size] for i in range(0, len(order), size)]
    return lambda: [decode_batch(model, [samples[i] for i in b], [waves[i] for i in b], how, collator) for b in batches]


def _in_order(plain: PlainGenerate, waves: list[Tensor], size: int) -> None:
    for i in range(0, len(waves), size):
        plain(waves[i:i + size])


class PlainGenerate:
    """What one writes with transformers alone: 30-second features, its own encoder, its own `generate`, arrival order.

    Args:
        model: its weights are used, without its way to decode. new_tokens: of every answer.
    """

    def __init__(self, model: SLUModel, new_tokens: int) -> None:
        self.model: Any = model
        self.new_tokens = new_tokens
        self.features = WhisperFeatureExtractor(feature_size=model.n_mels)

    @torch.inference_mode()
    def __call__(self, waves: Sequence[Tensor]) -> Tensor:
        """New token ids `(batch, new tokens)` of a batch of waves `(S,)`."""
        features = self.features([w.numpy() for w in waves], sampling_rate=RATE, return_tensors="pt").input_features
        features = features.to(self.model.device)
        return self._llm(features) if isinstance(self.model, SpeechLLM) else self._whisper(features)

    def _llm(self, features: Tensor) -> Tensor:
        model = self.model
        net = model.encoder.whisper
        frames = net(features.to(net.conv1.weight.dtype)).last_hidden_state
        full = torch.full((len(frames),), frames.shape[1], device=frames.device)
        prefix, suffix = model._embed(model.prefix), model._embed(model.suffix)
        speech = model.projector(frames, full)[0].to(prefix.dtype)
        embeds = torch.cat([prefix.expand(len(speech), -1, -1), speech, suffix.expand(len(speech), -1, -1)], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return model.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=self.new_tokens)

    def _whisper(self, features: Tensor) -> Tensor:
        """Whisper's own generate would take neighbouring marker tokens for timestamps and decode such windows again."""
        model = self.model
        model._cross_bias = None
        prompt = torch.tensor(model.prompt, device=features.device).expand(len(features), -1)
        out: Any = GenerationMixin.generate(model.whisper, features, decoder_input_ids=prompt, max_new_tokens=self.new_tokens)
        return out


def task_rows(model: SLUModel, samples: list[Sample], options: DecodeBenchmark) -> list[dict[str, Any]]:
    """`understand` of the same files: all tasks in one call beside one call for each, answers of natural length."""
    files = [str(s.utterance.audio) for s in samples]
    names = model.codec.registry.names
    rows = []
    for size in options.batch_sizes:
        how = DecodeOptions(batch_size=size, max_new_tokens=options.new_tokens * 2)
        systems: dict[str, Callable[[], object]] = {
            f"{len(names)} tasks, one call": partial(understand, model, files, names, how),
            f"{len(names)} tasks, a call each": partial(_each, model, files, names, how),
            "one task": partial(understand, model, files, names[:1], how)}
        times = alternate(systems, options.repeats // 2 + 1, clock=CLOCKS[options.clock])
        one = spread(times["one task"])["median"]
        rows += [{"system": name, "batch": size, "device": str(model.device), "dtype": options.precision,
                  "seconds": spread(taken), "time_to_one_task": spread(taken)["median"] / one} for name, taken in times.items()]
        rows[-len(systems)]["same_as_alone"] = _same_as_alone(model, samples, names, how)
    return rows


def _same_as_alone(model: SLUModel, samples: list[Sample], names: Sequence[str], how: DecodeOptions) -> str:
    """By task, how many answers with a shared transcript are those of `generate` for that task alone, its token forced."""
    together = understand(model, [str(s.utterance.audio) for s in samples], names, how)
    found = []
    for name in names:
        alone = predict(model, [Sample(s.utterance, name) for s in samples], replace(how, force_task=True, grammar=True))
        same = sum(a["hyp_text"] == t["text"] and a["hyp"] == t[name] for a, t in zip(alone, together, strict=True))
        found.append(f"{name} {same} of {len(samples)}")
    return ", ".join(found)


def _each(model: SLUModel, files: list[str], names: Sequence[str], how: DecodeOptions) -> None:
    for name in names:
        understand(model, files, [name], how)


def grammar_row(name: str, options: DecodeBenchmark) -> dict[str, Any]:
    """What the grammar adds to the time of an LLM's `generate`, in percent, on embeddings of a typical length.

    Twice: `overhead_percent` from runs with and without it, which other work on the machine disturbs; `inside_percent` from the
    time spent in it within one run, over the rest of that run (CPU alone: a GPU works behind the clock's back).

    Raises:
        UserError: the checkpoint cannot be had.
    """
    found = weights.resolve(name)
    codec = TextCodec(AutoTokenizer.from_pretrained(found.path), TaskRegistry())
    llm: Any = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32, attn_implementation="sdpa").eval()
    install_markers(llm, codec)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm.to(device)
    settings = {"eos_token_id": NEVER, "pad_token_id": codec.pad_id, "do_sample": False, "max_new_tokens": options.new_tokens}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(codec.marker_ids.values()), (GRAMMAR_BATCH, GRAMMAR_CONTEXT), generator=generator).to(device)
    embeds, mask = llm.get_input_embeddings()(ids), torch.ones_like(ids)
    grammar, requests = grammar_of(codec), [("ner", True)] * GRAMMAR_BATCH
    clock, shares = CLOCKS[options.clock], list[float]()

    @torch.inference_mode()
    def decode(processors: list[Any]) -> Tensor:
        return llm.generate(inputs_embeds=embeds, attention_mask=mask, logits_processor=processors, **settings)

    def guided() -> Tensor:
        timed = _Timed(grammar.processor(requests, [options.new_tokens] * GRAMMAR_BATCH), clock)
        began = clock()
        ids = decode([timed])
        shares.append(100 * timed.seconds / (clock() - began - timed.seconds))
        return ids

    times = alternate({"plain": lambda: decode([]), "grammar": guided}, options.repeats, clock=clock)
    over = [100 * (a / b - 1) for a, b in zip(times["grammar"], times["plain"], strict=True)]
    return {"llm": name, "vocabulary": len(codec.tokenizer), "batch": GRAMMAR_BATCH, "device": device, "dtype": "fp32",
            "seconds": spread(times["plain"]), "seconds_grammar": spread(times["grammar"]), "overhead_percent": spread(over),
            "inside_percent": spread(shares[-options.repeats:]) if device == "cpu" else None}


class _Timed(LogitsProcessor):
    """Another processor, with the time spent in it."""

    def __init__(self, inner: LogitsProcessor, clock: Callable[[], float]) -> None:
        self.inner, self.clock, self.seconds = inner, clock, 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        began = self.clock()
        scores = self.inner(input_ids, scores)  # type: ignore[assignment]
        self.seconds += self.clock() - began
        return scores


@contextmanager
def endless(model: SLUModel) -> Iterator[None]:
    """Within it no token ends an answer of `model`: all have the greatest number of tokens."""
    config = decoder_of(model).generation_config
    kept = config.eos_token_id
    config.eos_token_id = NEVER
    try:
        yield
    finally:
        config.eos_token_id = kept


def _clips(options: DecodeBenchmark, model: SLUModel) -> tuple[list[Sample], list[Tensor]]:
    registry = model.codec.registry
    found = [s for s in load_samples([str(p) for p in options.manifest], registry, 0, "manifest") if s.task]
    step = max(1, len(found) // options.clips)
    dataset = SpeechDataset(found[::step][:options.clips])
    return dataset.samples, [dataset[i][1] for i in range(len(dataset))]


def _peak(system: Callable[[], object]) -> float:
    """Peak memory in GiB: on a GPU of this system, on a CPU of the process so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    system()
    return peak_memory()


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for people: median [least, largest]."""
    return {key: f"{v['median']:.3g} [{v['min']:.3g}, {v['max']:.3g}]" if isinstance(v, dict) else v for key, v in row.items()}
