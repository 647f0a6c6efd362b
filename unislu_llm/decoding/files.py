"""Files named on a command line: found, read, answered one after another, and shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from unislu_llm.config import DecodeConfig
from unislu_llm.data import audio
from unislu_llm.decoding.answer import Answer
from unislu_llm.decoding.inputs import One, expand
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.predict import understand
from unislu_llm.errors import UserError
from unislu_llm.io import named, printable
from unislu_llm.models.base import SLUModel

STDIN = "-"


def find_files(names: Sequence[str]) -> Iterator[str | UserError]:
    """The files that names stand for (:func:`~unislu_llm.decoding.inputs.expand`), or what is wrong
    with a name; `-` is the standard input."""
    for name in names:
        try:
            yield from [name] if name == STDIN else expand(name)
        except UserError as error:
            yield error


def answer_files(load: Callable[[], SLUModel], files: Sequence[str | UserError],
                 tasks: Sequence[str], options: DecodeConfig,
                 **how: Any) -> Iterator[tuple[str, Answer | UserError]]:
    """Each file with its answer, or with what is wrong with it, in their order.

    Args:
        load: gives the model; called once, when a file could be read.
        files: errors are handed on.
        tasks, options, how: of :func:`~unislu_llm.decoding.predict.understand`.
    """
    Phrases.of(options.phrases, options.phrase_boost)  # what is wrong there is told before loading
    chunk, model = options.batch_size, None
    for start in range(0, len(files), chunk):
        some = files[start:start + chunk]
        # One bad file must not end a batch of good ones.
        read = [_read(file) for file in some]
        good = [found for found in read if not isinstance(found, UserError)]
        model = model or (load() if good else None)
        answers = iter(understand(model, good, tasks, options, **how) if model and good else ())
        for file, found in zip(some, read, strict=True):
            name = os.fsencode(str(file)).decode("utf-8", "replace")  # which may be none of UTF-8
            yield name, found if isinstance(found, UserError) else next(answers)


def _read(file: str | UserError) -> One | UserError:
    if isinstance(file, UserError):
        return file
    try:
        samples = (audio.from_bytes(sys.stdin.buffer.read(), STDIN) if file == STDIN
                   else audio.load(file))
    except UserError as error:
        return error
    # A long recording is read again, window by window: not all of them are held at one time.
    if file != STDIN and len(samples) > audio.MAX_SAMPLES:
        return Path(file)
    return samples, audio.SAMPLE_RATE


def write_answers(answers: Iterable[tuple[str, Answer | UserError]], total: int,
                  show: Callable[[str, Answer], str], out: Path | None) -> int:
    """Print answers as they come, or write them to a new file, and errors to stderr; how many of
    the latter. On a terminal a progress bar stays below them.

    Raises UserError: the file is there, or cannot be written.
    """
    failed, target = 0, None if out else sys.stdout
    with (named(out or "standard output"), ExitStack() as stack,
          tqdm(total=total, unit="file", disable=None if total > 1 else True) as bar):
        for file, answer in answers:
            if isinstance(answer, UserError):
                failed += 1
                tqdm.write(f"error: {answer}", file=sys.stderr)
            else:
                # Where no file could be read, none is left behind.
                target = target or stack.enter_context(_new(out))
                tqdm.write(show(file, answer), file=target)
                target.flush()
            bar.update()
    if out:
        print(f"{out}: {total - failed} answers")
    return failed


def _new(out: Path | None) -> TextIO:
    assert out is not None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("x", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error


def as_json(file: str, answer: Answer, confidences: bool = False) -> str:
    """An answer on one line."""
    values = {"file": file, **answer.to_dict()}
    for part in () if confidences else (values, *values.get("windows", ())):
        part.pop("confidence", None)
        part.pop("evidence", None)
    return json.dumps(values, ensure_ascii=False)


def as_text(file: str, answer: Answer) -> str:
    """An answer for people."""
    if answer.no_speech:
        return f"{file}\n  no speech"
    values = answer.to_dict()
    lines = [file, f"  text: {printable(answer.transcript)}"]
    for name in answer.outputs:
        value = values[name]
        # Where the words of a phrase could be found in the audio, its seconds are told as well.
        if value is not None and name in answer.spans:
            value = [f"{s['label']}: {s['phrase']} ({s['start_seconds']:.1f}-"
                     f"{s['end_seconds']:.1f} s)" for s in answer.spans[name]]
        if isinstance(value, list):
            value = "; ".join(v if isinstance(v, str) else ": ".join(v) for v in value) or "none"
        lines.append(f"  {name}: {printable(value or 'no usable answer')}")
    if values["problems"]:
        lines.append(f"  malformed: {', '.join(values['problems'])}")
    lines += [f"  warning: {warning}" for warning in answer.warnings]
    return "\n".join(lines)
