"""The console command `unislu`. Subcommands import what they need themselves, so that `--help` is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unislu_llm.errors import UserError

if TYPE_CHECKING:
    from unislu_llm.tasks import TaskRegistry
    from unislu_llm.utterance import Utterance

_CHUNK = 64  # files answered together: enough for batches of similar length, soon enough for whoever waits


def _many(name: str) -> Any:
    return tyro.conf.arg(metavar=f"{name} [{name} ...]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 2 for bad input (an `error:` on stderr), else the subcommand's."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["prepare"]:  # has subcommands of its own
        from unislu_llm.cli_prepare import main_prepare

        return main_prepare(args[1:])
    commands: dict[str, Any] = {"predict": predict, "validate": validate, "prepare": prepare}
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            commands, args=args, prog="unislu", config=(tyro.conf.FlagCreatePairsOff,),
            description="Unified spoken language understanding: transcript, entities and labels from speech.")
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # `unislu ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def predict(model: Annotated[Path, tyro.conf.arg(metavar="MODEL")], audio: Annotated[list[Path], _many("AUDIO")], /,
            tasks: tuple[str, ...] = ("all",), as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
            batch_size: int = 8, threads: int = 0) -> int:
    """Print transcript, entities and labels of audio files of up to 30 s.

    A file that cannot be read is one error; the others are answered, and the exit status is 2.

    Args:
        model: Folder of a saved model, or a run folder (its best checkpoint).
        audio: Audio files: WAV, FLAC, Ogg, Opus, MP3; any rate, mixed down to mono.
        tasks: Tasks to answer; without names: transcripts alone.
        as_json: Print one JSON object a file.
        batch_size: Files decoded at one time.
        threads: CPU threads; 0 takes all cores this process may use.
    """
    if not audio:
        raise UserError("no audio file is named; give one or more")
    if batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, found {batch_size}")
    from unislu_llm.analysis.runs import find_run, load_model
    from unislu_llm.decoding.generate import DecodeOptions, understand
    from unislu_llm.training.plan import use_threads

    use_threads(threads)
    run = find_run(model)
    registry = run.registry()
    names = list(registry.names) if tasks == ("all",) else list(dict.fromkeys(tasks))
    for name in names:
        registry[name]  # an unknown task is named before the model is loaded
    loaded = None
    failed = 0
    for start in range(0, len(audio), _CHUNK):
        good, errors = _readable(audio[start:start + _CHUNK])
        for error in errors:
            failed += 1
            _fail(error)
        if good:
            loaded = loaded or load_model(run)
        for result in understand(loaded, good, names, DecodeOptions(batch_size=batch_size)) if loaded and good else []:
            print(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(_lines(result, names)), flush=True)
    return 2 if failed else 0


def validate(manifests: Annotated[list[Path], _many("MANIFEST")], /, tasks_file: Path | None = None,
             audio: bool = False) -> int:
    """Check manifests to the end: every problem as file:line: field: message, then what is in them.

    The exit status is 1 when there are problems, 2 when a manifest cannot be read at all.

    Args:
        manifests: JSON-lines files.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        audio: Also open the audio files: do they exist, can they be read, are crops inside, are lengths as stated.
    """
    if not manifests:
        raise UserError("no manifest is named; give one or more JSON-lines files")
    from unislu_llm.data.summary import Summary
    from unislu_llm.tasks import TaskRegistry

    registry = TaskRegistry.from_yaml(tasks_file) if tasks_file else TaskRegistry()
    summary = Summary(registry)
    problems = unreadable = 0
    for path in manifests:
        bad: set[str] = set()
        try:
            for where, message, utterance, seconds in _checked(path, registry, audio):
                if utterance is not None:
                    summary.add(utterance, seconds)
                    continue
                problems += 1
                bad.add(where)
                print(f"{where}: {message}")
        except UserError as error:
            unreadable += 1
            _fail(error)
        summary.bad_rows += len(bad)
    print(f"{problems or 'no'} problem{'s' * (problems != 1)} in {', '.join(str(p) for p in manifests)}\n\n{summary}")
    return 2 if unreadable else int(problems > 0)


def prepare() -> int:
    """Write the manifest of a corpus: slue-voxpopuli, slue-voxceleb, slue-hub, conll, csv."""
    from unislu_llm.cli_prepare import main_prepare

    return main_prepare(["--help"])


def _checked(path: Path, registry: TaskRegistry,
             audio: bool) -> Iterator[tuple[str, str, Utterance | None, float | None]]:
    """`(file:line, problem, None, None)` of what is wrong, `(file:line, "", utterance, seconds)` of each good row."""
    from unislu_llm.data.manifest import Problem, iter_manifest
    from unislu_llm.data.summary import measure

    for item in iter_manifest(path, registry, check_audio=audio):
        if isinstance(item, Problem):
            where, _, message = str(item).partition(f": {item.field}: ")
            yield where, f"{item.field}: {message}", None, None
            continue
        try:
            yield item.source, "", item, measure(item, audio)
        except UserError as error:
            yield item.source, str(error), None, None


def _readable(files: Sequence[Path]) -> tuple[list[Path], list[UserError]]:
    """The files that can be decoded, and one error for each that cannot."""
    from unislu_llm.data import audio

    good: list[Path] = []
    errors: list[UserError] = []
    for file in files:
        try:
            audio.load(file, max_seconds=audio.MAX_SECONDS)
            good.append(file)
        except UserError as error:
            errors.append(error)
    return good, errors


def _lines(result: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    """A result of `understand` for people."""
    lines = [result["file"], f"  text: {_printable(result['text'])}"]
    for name in tasks:
        value = result[name]
        if isinstance(value, list):
            value = "; ".join(v if isinstance(v, str) else f"{v[0]}: {v[1]}" for v in value) or "none"
        lines.append(f"  {name}: {_printable(value or 'no usable answer')}")
    if result["problems"]:
        lines.append(f"  malformed: {', '.join(result['problems'])}")
    return lines


def _printable(text: str) -> str:
    """On one line, without what would steer a terminal: models of byte-level tokenizers can emit any character."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _fail(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
