"""From the manifests of a run to its examples, with the hypotheses that the model reads.

A row longer than Whisper's 30 s may carry `segments`, in order, each written like a row of its own,
its times in seconds of the audio file. It is cut there, and its own text and labels give way to the
segments'.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from unislu_llm.config import ModelConfig
from unislu_llm.data.audio import END_SLACK, MAX_SECONDS, SAMPLE_RATE, count_samples
from unislu_llm.data.findings import Unread, UnreadFields
from unislu_llm.data.manifest import first_ten, manifest_name, read_rows
from unislu_llm.data.row_reader import Problem, RowReader
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, SpanTask, TaskRegistry
from unislu_llm.tokenizer import Example, make_examples
from unislu_llm.utterance import Utterance

log = logging.getLogger(__name__)
_warn_once = cache(log.warning)  # of a manifest, however many runs are scored on it

_MAX_GAP = 1.0  # seconds: in a longer gap there may be speech that nobody transcribed
_OVERLAP = 0.05  # seconds by which rounded time stamps of neighbours may overlap
_INHERITED = ("corpus", "speaker", "language", "text_source")


def load_examples(manifests: Sequence[str], registry: TaskRegistry, *, limit: int = 0,
                  flag: str = "data.train", scored: bool = False,
                  language: str = "") -> list[Example]:
    """Examples of some manifests, which messages call `flag`.

    At most `limit` of each manifest, evenly spread; 0 takes all. Where they are `scored` rows
    without audio are refused, and ids that come twice in a corpus. Raises UserError: no manifest is
    named, one has problems or rows that cannot be used, or all annotations of `data.train` are of
    unknown tasks.
    """
    if not manifests:
        raise UserError(f"{flag} names no manifest; list JSON-lines files in the config or give "
                        f"--{flag} FILE...")
    examples: list[Example] = []
    unread: list[Unread] = []
    for path in manifests:
        rows = read_rows(path, registry, corpus=manifest_name(path), check_audio=True,
                         language=language)
        unread += UnreadFields(path, registry, rows).values()
        utterances = handle_long([row.utterance for row in rows if row.utterance], registry)
        if scored and (mute := next((u for u in utterances if u.audio is None), None)):
            raise UserError(f"{mute.where}: field 'audio': the row has no audio, so nothing can be "
                            f"predicted for it; take it out of {flag}")
        pseudo = sum(u.text_source is not None for u in utterances)
        if pseudo and flag != "data.train":
            _warn_once(f"{path}: the transcripts of {pseudo} of {len(utterances)} rows were written"
                       " by a recogniser (`text_source`); WER and the phrases of spans are measured"
                       " against these pseudo-labels, not against what was said")
        # What is forgotten shows in the transcript, and each utterance counts once.
        found = make_examples(utterances, TaskRegistry([]) if flag == "data.guard" else registry)
        # Manifests are often sorted by speaker or length: the first ones would be no sample.
        step = len(found) / limit if limit and len(found) > limit else 1.0
        examples += [found[int(i * step)] for i in range(int(len(found) / step))]
    _check_unread(unread, registry, flag, annotated=any(e.task for e in examples))
    # Predictions are told apart by these keys; two of one name would overwrite each other.
    for key, count in Counter(e.key for e in examples).most_common(1) if scored else ():
        if count > 1:
            places = ", ".join(e.utterance.where for e in examples if e.key == key)
            raise UserError(f"{places}: field 'id': {key} is there {count} times in {flag}; give "
                            "the manifests' rows a `corpus`, or score them one by one")
    return examples


def _check_unread(unread: Sequence[Unread], registry: TaskRegistry, flag: str,
                  annotated: bool) -> None:
    """Say which annotations no task reads; raises UserError: `data.train` has no others."""
    known, bare = ", ".join(registry.names) or "none", flag == "data.train" and not annotated
    advice = "describe it in a tasks file (--data.tasks FILE)"
    nothing = f"{flag}: nothing is annotated for a known task ({known})"
    spans = [field for field in unread if field.spans]
    # A list of no tasks says that transcripts are all that is wanted.
    if spans and bare and registry.names:
        raise UserError(f"{nothing}; is the field {spans[0]} a task? Then {advice}; else take it "
                        "out")
    for field in spans:
        _warn_once(f"{flag}: the field {field} is no known task ({known}) and is not read; if it is"
                   f" one, {advice}")
    if rest := ", ".join(str(field) for field in unread if not field.spans):
        _warn_once(f"{nothing}, so that transcripts alone train; not read: {rest}; if one is a "
                   f"task, {advice}" if bare else f"{flag}: not read: {rest}")


def check_hypotheses(examples: Sequence[Example], model: ModelConfig) -> list[Example]:
    """Training examples with the hypotheses that a model reads: their rows', or the references.

    What has audio and no hypothesis is recognised before training begins; text has nothing to
    recognise, nor does a `ctc` projector that is yet to train make hypotheses.

    Raises UserError: no example can have one; or some cannot, and the model does not listen.
    """
    if model.hypothesis == "reference":
        return [Example(replace(e.utterance, hypothesis=e.utterance.text), e.task)
                for e in examples]
    lacking = [e.utterance for e in examples if e.utterance.hypothesis is None
               and (e.utterance.audio is None or model.recogniser == "ctc")]
    if lacking and model.hypothesis == "manifest":
        share = f"data.train: {len(lacking)} of {len(examples)} examples have no hypothesis"
        if len(lacking) == len(examples) or model.projector == "none":
            text = any(u.audio is None for u in lacking)
            flags = " openai/whisper-base FILE --out DIR --copy-text" if text else ""
            raise UserError(f"{share}, the first {lacking[0].where}; add them with `unislu "
                            f"transcribe{flags}`")
        log.warning("%s, the first %s; they train without one, as with train.hypothesis_dropout; "
                    "`unislu transcribe` adds them", share, lacking[0].where)
    return list(examples)


def handle_long(utterances: Sequence[Utterance], registry: TaskRegistry) -> list[Utterance]:
    """Utterances of at most 30 s, in order, with their durations; longer ones are cut. Raises
    UserError: one for all rows that are too long and cannot be cut; or an unreadable file."""
    reader = RowReader(registry)
    out, bad = list[Utterance](), list[str]()
    for u in utterances:
        if u.audio is not None and u.stated_seconds is None:
            try:  # what was measured is kept, so that no header is read again
                u = replace(u, duration=count_samples(u.audio, u.start) / SAMPLE_RATE)
            except UserError as error:
                raise UserError(f"{u.where}: field 'audio': {error}") from error
        if u.seconds <= MAX_SECONDS:
            out.append(u)
            continue
        segments, problems = read_segments(u, reader, u.start + u.seconds)
        bad += [f"{u.where}: {p.field}: {p.message}" for p in problems[:1]]
        pieces: list[Utterance] = []
        for segment in segments:
            joined = _join(pieces[-1], segment, registry) if pieces else None
            pieces[-1:] = [joined] if joined else [*pieces[-1:], segment]
        out += [replace(piece, id=f"{u.id}-{i:03d}") for i, piece in enumerate(pieces)]
    if bad:
        raise UserError(f"{len(bad)} row{'s are' if len(bad) > 1 else ' is'} longer than "
                        f"{MAX_SECONDS:g} s and cannot be cut:\n{first_ten(bad)}")
    return out


def read_segments(u: Utterance, reader: RowReader,
                  end: float) -> tuple[list[Utterance], list[Problem]]:
    """The segments of an utterance whose audio ends at `end` seconds, and what is wrong there."""
    if not u.segments:
        return [], [Problem("segments", "segments", f"is missing; '{u.id}' has {end - u.start:.1f} "
                            "s, and is cut at annotated segments only")]
    # What segments do not say of these is the row's own.
    inherited = {key: value for key in _INHERITED if (value := getattr(u, key)) is not None}
    pieces, problems = list[Utterance](), list[Problem]()
    for i, segment in enumerate(u.segments):
        found, piece = [Problem("", "", "must be an object with start, end and text")], None
        if isinstance(segment, dict):
            # The id is a place-holder: pieces are numbered when it is known which are joined.
            piece, found = reader.read(
                {**inherited, **segment, "id": "segment", "audio": str(u.audio)}, u.source)
            found += [Problem(key, "", "is missing") for key in ("start", "end")
                      if segment.get(key) is None]
        if piece is not None and piece.end is not None and not found:
            length = piece.end - piece.start
            if piece.start < u.start - END_SLACK or piece.end > end + END_SLACK:
                found.append(Problem("", "", f"{piece.start:g} s to {piece.end:g} s is outside the "
                                     f"row, which reaches from {u.start:g} s to {end:g} s"))
            elif length > MAX_SECONDS:
                found.append(Problem("", "", f"has {length:.1f} s, {MAX_SECONDS:g} s is the limit"))
            elif pieces and piece.start < (pieces[-1].end or 0.0) - _OVERLAP:
                found.append(Problem("start", "", f"{piece.start:g} s is before the end of the "
                                     "segment before it"))
            # Its file was named from the working folder, and its length follows from its times.
            pieces.append(replace(piece, audio=u.audio, duration=None))
        problems += [Problem(f"segments[{i}].{p.field}".rstrip("."), "segments", p.message)
                     for p in found]
    return pieces, problems


def _join(left: Utterance, right: Utterance, registry: TaskRegistry) -> Utterance | None:
    """Neighbours as one utterance; None where they do not belong together or are too long."""
    gap, length = right.start - (left.end or 0.0), (right.end or 0.0) - left.start
    alike = all(getattr(left, key) == getattr(right, key) for key in _INHERITED)
    # Of a label of the whole utterance, such as a sentiment, there could be only one.
    spans_only = all(isinstance(registry[name], SpanTask) for name in left.labels)
    if (length > MAX_SECONDS or gap > _MAX_GAP or not alike or not spans_only
            or left.labels.keys() != right.labels.keys()):
        return None
    shift = len(left.text) + 1
    labels: dict[str, Any] = {
        name: (*value, *(Span(str(s[0]), int(s[1]) + shift, int(s[2]) + shift)
                         for s in right.labels[name]))
        for name, value in left.labels.items()}
    halves = (left.hypothesis, right.hypothesis)  # one alone would not be of the whole
    return replace(left, text=f"{left.text} {right.text}", labels=labels, end=right.end,
                   hypothesis=None if None in halves else "{} {}".format(*halves).strip())
