"""Settings of `eval/check_decoding.py` and `eval/benchmark.py`. Apart from the rest, so that `--help` does not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_MINI = Path("recipes/data/mini")
MINI_MANIFESTS = tuple(_MINI / f"{corpus}_{part}.jsonl" for corpus in ("entities", "sentiment") for part in ("train", "dev"))
"""The mini corpus, from the root of the source tree."""


@dataclass
class CheckMalformed:
    """Count malformed answers of random models, with the grammar and without it."""

    decodes: int = 2000
    """Answers at least, in equal parts by decoder, search and forced or free task."""
    searches: list[Literal["greedy", "beam 4", "sampling"]] = field(default_factory=lambda: ["greedy", "beam 4", "sampling"])
    """How tokens are chosen."""
    out: Path = Path("eval/results/check-decoding-malformed.json")
    """Result file."""
    seed: int = 0
    """Of models, audio and budgets."""
    threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""


@dataclass
class CheckBatching:
    """Compare batched decoding with decoding one by one, token for token, on clips of very unequal lengths."""

    model: list[Path] = field(default_factory=list)
    """Run folders of the training recipes, or folders of saved models."""
    clips: int = 300
    """Clips: speech of the manifests, cut and joined to lengths that are log-uniform between 0.2 and 30 seconds."""
    batch_sizes: list[int] = field(default_factory=lambda: [3, 16])
    """Compared with 1."""
    orders: list[Literal["sorted", "random"]] = field(default_factory=lambda: ["sorted", "random"])
    """How clips are dealt to batches: by length, as decoding does it, or at random, with the most padding."""
    beams: list[int] = field(default_factory=lambda: [1, 4])
    """Searches: 1 is greedy."""
    max_new_tokens: int = 24
    """Of any answer."""
    manifest: list[Path] = field(default_factory=lambda: list(MINI_MANIFESTS))
    """Where the speech is from."""
    out: Path = Path("eval/results/check-decoding-batching.json")
    """Result file; finished batches are kept beside it, in `<name>.partial.jsonl`, until it is written."""
    seed: int = 0
    """Of the clips and of the random order."""
    threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""


@dataclass
class DecodeBenchmark:
    """Speed of decoding beside plain `generate` of transformers: alternating runs, medians and spread."""

    model: list[Path] = field(default_factory=list)
    """Run folders of the training recipes, or folders of saved models."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Utterances at one time."""
    clips: int = 16
    """Clips that every timing decodes, whatever its batch size; evenly spread over the manifests."""
    new_tokens: int = 32
    """New tokens of every answer, no fewer and no more, for every system alike."""
    repeats: int = 5
    """Timings of each system."""
    parts: list[Literal["speed", "tasks", "grammar"]] = field(default_factory=lambda: ["speed", "tasks", "grammar"])
    """speed: beside plain generate, with and without grammar; tasks: several tasks of a file; grammar: its overhead on
    decoders of 49 thousand (SmolLM2-135M) and 262 thousand (Gemma 3 270M) tokens."""
    manifest: list[Path] = field(default_factory=lambda: [p for p in MINI_MANIFESTS if p.stem.endswith("dev")])
    """Where the clips are from."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of frozen weights and computation."""
    static_cache: bool = False
    """Decode with a cache of fixed size (ours alone)."""
    compile: bool = False
    """With the static cache, compile the decoder's forward (GPU)."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor seconds of this process, for a machine that does other work as well (with --threads 1)."""
    out: Path = Path("eval/results/benchmark-decode.json")
    """Result file."""
    threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""


@dataclass
class TrainBenchmark:
    """Speed and memory of training beside the speech LLM classes of transformers: equal sizes, clips and batches."""

    encoder: Literal["tiny", "base", "small"] = "base"
    """Size of the Whisper encoder, with random weights; tiny is for tests."""
    llm: Literal["tiny", "smollm2-135m"] = "smollm2-135m"
    """Size of the LLM, with random weights."""
    vocab: int = 49_152
    """Of the LLM: 49152 is SmolLM2's, 262144 Gemma's."""
    parts: list[Literal["speed", "memory"]] = field(default_factory=lambda: ["speed", "memory"])
    """speed: alternating runs; memory: one step of each system in a process of its own."""
    systems: list[str] = field(
        default_factory=lambda: ["ours", "ours, cached", "GlmAsr", "Voxtral", "AudioFlamingo3", "Qwen2Audio"])
    """Also known: "ours, packed" and "ours, full logits" (memory alone)."""
    full_logits: bool = False
    """Also measure the memory of a step of ours that makes the logits of all positions at one time."""
    clips: int = 16
    """Clips, of the lengths of SLUE: half 10.4 s in the mean, half 8.0 s."""
    batch_size: int = 8
    """Clips a step, the same for every system."""
    repeats: int = 3
    """Timings of each system."""
    warm_up: int = 1
    """Rounds before them, not counted."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor seconds of this process, for a machine that does other work as well (with --threads 1)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of frozen weights and computation."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Of clips, weights and batches."""
    threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""
    out: Path = Path("eval/results/benchmark-train.json")
    """Result file."""
    plot: Path | None = None
    """Also draw the speeds into this file (PNG, SVG or PDF)."""


@dataclass
class CacheBenchmark:
    """What the encoder cache changes in training: losses of the first steps with and without it, and their time."""

    config: Path = Path("recipes/configs/quickstart_llm.yaml")
    """Config of the run."""
    kind: Literal["speech_llm", "whisper_slu"] = "speech_llm"
    """Decoder."""
    steps: int = 20
    """Optimizer steps of every variant."""
    control: float = 1e-5
    """Relative change of the trained weights at the start of the control run, which has no cache."""
    out: Path = Path("eval/results/benchmark-cache.json")
    """Result file."""
    threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""
