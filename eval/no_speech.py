"""Measure what is taken for no speech: sounds without any, and every clip of manifests.

    python eval/no_speech.py recipes/data/mini/*_dev.jsonl --out eval/results/no_speech.json
    python eval/no_speech.py --model adapters/whisper-base--smollm2-135m --source ctc a.jsonl

The sounds are made here, 200 of 12 kinds and 0.3 to 30 s, the same everywhere. Counted is what
`unislu predict` would refuse, and what it would answer with a warning that there may be no speech,
a repetition, or another language.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from unislu_llm.config import DecodeConfig
from unislu_llm.data.manifest import read_manifest
from unislu_llm.decoding import no_speech
from unislu_llm.decoding.hypotheses import load_recogniser, recognise
from unislu_llm.errors import reported
from unislu_llm.io import portable, write_json
from unislu_llm.run_folder import versions
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

RATE = 16_000
KINDS = ("silence", "faint noise", "white noise", "pink noise", "brown noise", "hum", "tone",
         "chirp", "clicks", "melody", "chords", "warble")


def coloured(rng: np.random.Generator, n: int, power: int) -> np.ndarray:
    """Noise whose power falls with frequency to this power, of peak 1."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    frequency = np.arange(len(spectrum))
    frequency[0] = 1
    wave = np.fft.irfft(spectrum / frequency ** (power / 2), n)
    return wave / np.abs(wave).max()


def tones(n: int, frequencies: list[float], decay: float = 0.0) -> np.ndarray:
    """Sines of these frequencies in Hz together, which die away."""
    time = np.arange(n) / RATE
    return sum((np.sin(2 * np.pi * f * time) * np.exp(-decay * time) for f in frequencies),
               np.zeros(n)) / len(frequencies)


def music(rng: np.random.Generator, n: int, ratios: tuple[float, ...]) -> np.ndarray:
    """Plucked notes of a scale, or chords of these ratios, with overtones."""
    wave, at = np.zeros(n), 0
    while at < n:
        length = min(n - at, int(RATE * rng.choice([0.25, 0.5, 1.0])))
        root = 220 * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 11]) / 12)
        wave[at:at + length] = tones(
            length, [root * ratio * k for ratio in ratios for k in (1, 2, 3)], 3.0)
        at += length
    return wave


def sound(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Samples `(n,)` of a kind, of peak 1 at most."""
    time = np.arange(n) / RATE
    if kind in ("silence", "faint noise"):
        return 1e-3 * rng.standard_normal(n) if kind == "faint noise" else np.zeros(n)
    if kind in ("white noise", "pink noise", "brown noise"):
        return coloured(rng, n, ("white", "pink", "brown").index(kind.split()[0]))
    if kind in ("hum", "tone"):
        return tones(n, [50, 100, 150, 250] if kind == "hum" else [rng.uniform(100, 4000)])
    if kind == "chirp":
        low, high = rng.uniform(50, 500), rng.uniform(1000, 7000)
        return np.sin(2 * np.pi * (low * time + (high - low) * time ** 2 / (2 * n / RATE)))
    if kind == "clicks":
        wave = np.zeros(n)
        wave[rng.integers(0, n, max(1, int(3 * n / RATE)))] = 1.0
        return wave
    if kind == "warble":  # noise that swells, as of a crowd or the sea
        return coloured(rng, n, 1) * (
            0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(0.5, 5) * time))
    return music(rng, n, (1.0,) if kind == "melody" else (1.0, 1.25, 1.5))


def sounds(count: int, seed: int = 0) -> Iterator[Utterance]:
    """Clips without speech, each kind in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        n = int(RATE * np.exp(rng.uniform(np.log(0.3), np.log(30))))
        wave = sound(kind, rng, n)
        if kind not in ("silence", "faint noise"):  # peak of -30 to -3 dB
            wave = wave * 10 ** (rng.uniform(-30, -3) / 20)
        yield Utterance(f"{kind}/{i}", Path(kind), "", corpus=kind, duration=n / RATE,
                        samples=torch.from_numpy(wave.astype(np.float32)))


def verdicts(rows: list[tuple[str, no_speech.Evidence | None]], threshold: float
             ) -> dict[str, dict[str, int]]:
    """By name of a set of clips: how many there are, are refused, and have which warning."""
    found: dict[str, Counter[str]] = {}
    for name, evidence in rows:
        counts = found.setdefault(name, Counter(clips=0, refused=0, warned=0))
        none, warnings = (no_speech.judge(evidence, threshold, "en") if evidence else (False, ()))
        counts["clips"] += 1
        counts["refused"] += none
        counts["warned"] += bool(warnings)
    return {name: dict(counts) for name, counts in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="*", type=Path, help="of speech")
    parser.add_argument("--model", default="openai/whisper-base", help="a Whisper or saved model")
    parser.add_argument("--source", default="decoder", choices=["decoder", "ctc"])
    parser.add_argument("--sounds", type=int, default=200, help="clips without speech")
    parser.add_argument("--threshold", type=float, default=DecodeConfig().no_speech)
    parser.add_argument("--out", type=Path, help="file of the result")
    args = parser.parse_args(argv)
    registry = TaskRegistry()
    recogniser = load_recogniser(args.model, args.source)
    rows: list[tuple[str, no_speech.Evidence | None]] = []
    sets = [("", list(sounds(args.sounds))), *(
        (f"{path.parent.name}/{path.stem}", read_manifest(path, registry))
        for path in args.manifests)]
    for name, utterances in sets:
        spoken = [u for u in utterances if u.audio]
        for i, transcript in recognise(recogniser, spoken, registry, progress=name or "sounds"):
            rows.append((name or spoken[i].corpus, transcript.evidence))
    report(rows, args)


def report(rows: list[tuple[str, no_speech.Evidence | None]], args: argparse.Namespace) -> None:
    """Print a table, and write the result."""
    found = verdicts(rows, args.threshold)
    print(tabulate([{"": name, **counts} for name, counts in found.items()], headers="keys",
                   tablefmt="github"))
    if args.out:
        # The openai/whisper rule beside ours, at several thresholds: how the values were chosen.
        known = [(name in KINDS, e) for name, e in rows if e and e.log_prob is not None]
        rules = {f"{t:g}": {side: {
            "whisper": sum(e.no_speech > t and (e.log_prob or 0) < no_speech.LOG_PROB
                           for kind, e in known if kind == (side == "sounds")),
            "ours": sum(no_speech.judge(e, t, "en")[0] for kind, e in known
                        if kind == (side == "sounds"))} for side in ("sounds", "speech")}
            for t in (0.3, 0.4, 0.5, 0.6, 0.7)}
        about: dict[str, Any] = {
            "model": portable(args.model) if Path(args.model).exists() else args.model,
            "source": args.source, "threshold": args.threshold, "refused_by_threshold": rules,
            "sets": found, "command": "python eval/no_speech.py " + " ".join(
                portable(a) if Path(a).exists() else a for a in sys.argv[1:]),
            "versions": {k: v for k, v in versions().items() if k != "command"}}
        write_json(args.out, about)


if __name__ == "__main__":
    with reported():
        main()
