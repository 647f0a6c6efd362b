"""`unislu predict`: transcript, entities and labels of audio files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from unislu_llm.errors import UserError

_CHUNK = 64  # files answered together: enough for batches of similar length, soon enough for whoever waits


def predict(model: Annotated[Path, tyro.conf.arg(metavar="MODEL")],
            audio: Annotated[list[Path], tyro.conf.arg(metavar="AUDIO [AUDIO ...]")], /,
            tasks: tuple[str, ...] = ("all",), as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
            long_audio: Literal["refuse", "windows"] = "refuse", window: tuple[float, float] = (20.0, 28.0), overlap: float = 0.0,
            num_beams: int = 1, n_best: int = 1, grounded: bool = False, no_grammar: bool = False,
            confidences: bool = False, batch_size: int = 8, threads: int = 0) -> int:
    """Print transcript, entities and labels of audio files.

    A file that cannot be read is one error; the others are answered, and the exit status is 2.

    Args:
        model: Folder of a saved model, or a run folder (its best checkpoint).
        audio: Audio files: WAV, FLAC, Ogg, Opus, MP3; any rate, mixed down to mono.
        tasks: Tasks to answer; without names: transcripts alone.
        as_json: Print one JSON object a file, with all that is known.
        long_audio: Files over 30 s: refuse them, or cut them at pauses into windows and join the answers.
        window: Seconds after a window's start between which it ends.
        overlap: Seconds by which windows overlap.
        num_beams: Beams; 1 is greedy.
        n_best: With --json: alternatives to print, at most as many as beams.
        grounded: Phrases of span tasks are whole words of the transcript.
        no_grammar: Let the model answer on its own, malformed or not.
        confidences: With --json: how sure the decoder is.
        batch_size: Files (or windows) decoded at one time.
        threads: CPU threads; 0 takes all cores this process may use.
    """
    if not audio:
        raise UserError("no audio file is named; give one or more")
    for flag, value in (("batch-size", batch_size), ("num-beams", num_beams)):
        if value < 1:
            raise UserError(f"--{flag} must be 1 or more, found {value}")
    if not 1 <= n_best <= num_beams:
        raise UserError(f"--n-best {n_best} needs --num-beams {max(n_best, 1)} or more and is 1 or more")
    if grounded and no_grammar:
        raise UserError("--grounded needs the grammar; drop --no-grammar")
    if overlap and long_audio != "windows":
        raise UserError("--overlap is that of windows; add --long-audio windows")
    from unislu_llm.analysis.runs import find_run, load_model
    from unislu_llm.decoding.generate import DecodeOptions, understand
    from unislu_llm.decoding.windows import WindowOptions, understand_long
    from unislu_llm.training.plan import use_threads

    use_threads(threads)
    options = DecodeOptions(batch_size=batch_size, num_beams=num_beams, grounded=grounded, grammar=False if no_grammar else None)
    windows = WindowOptions(*window, overlap=overlap)
    run = find_run(model)
    registry = run.registry()
    names = list(registry.names) if tasks == ("all",) else list(dict.fromkeys(tasks))
    for name in names:
        registry[name]  # an unknown task is named before the model is loaded
    loaded = None
    failed = 0
    for start in range(0, len(audio), _CHUNK):
        good, errors = _readable(audio[start:start + _CHUNK], long_audio == "windows")
        for error in errors:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not good:
            continue
        loaded = loaded or load_model(run)
        more: dict[str, Any] = {"confidences": confidences, "n_best": n_best}
        results = understand_long(loaded, good, names, options, windows, **more) if long_audio == "windows" \
            else understand(loaded, good, names, options, **more)
        for result in results:
            print(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(_lines(result, names)), flush=True)
    return 2 if failed else 0


def _readable(files: Sequence[Path], any_length: bool) -> tuple[list[Path], list[UserError]]:
    """The files that can be decoded, and one error for each that cannot."""
    from unislu_llm.data import audio
    from unislu_llm.decoding.windows import is_long

    good: list[Path] = []
    errors: list[UserError] = []
    for file in files:
        try:
            if not any_length and is_long(file):
                raise UserError(f"{file}: {audio.count_samples(file) / audio.SAMPLE_RATE:.2f} s is longer than the limit of "
                                f"{audio.MAX_SECONDS} s; add --long-audio windows, or cut the file")
            audio.load(file)
            good.append(file)
        except UserError as error:
            errors.append(error)
    return good, errors


def _lines(result: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    """A result of `understand`, or of `understand_long`, for people."""
    lines = [result["file"], f"  text: {_printable(result['text'])}"]
    for name in tasks:
        value, placed = result[name], result.get("spans", {}).get(name)
        if value is not None and placed is not None:
            value = [f"{s['label']}: {s['phrase']} ({s['start_seconds']:.1f}-{s['end_seconds']:.1f} s)" for s in placed]
        if isinstance(value, list):
            value = "; ".join(v if isinstance(v, str) else f"{v[0]}: {v[1]}" for v in value) or "none"
        lines.append(f"  {name}: {_printable(value or 'no usable answer')}")
    if result["problems"]:
        lines.append(f"  malformed: {', '.join(result['problems'])}")
    return lines


def _printable(text: str) -> str:
    """On one line, without what would steer a terminal: models of byte-level tokenizers can emit any character."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
