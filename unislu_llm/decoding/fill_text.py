"""Copies of manifests in which rows without a transcript have a recogniser's: sequence-level knowledge distillation.

A pseudo-transcript makes training data of audio that nobody wrote down (Kim and Rush 2016, arXiv 1606.07947; for speech
Kahn et al. 2020, arXiv 1909.09116). As there, what the recogniser did not understand is left out rather than learnt: empty
transcripts and those that repeat themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unislu_llm.data.clean import moved
from unislu_llm.data.manifest import Row
from unislu_llm.data.rows import Phrase, read_phrases
from unislu_llm.data.tally import Tally
from unislu_llm.decoding.draft_files import Kept, hear, plan_copies, read_rows, write_copy
from unislu_llm.decoding.drafts import Drafter
from unislu_llm.errors import UserError
from unislu_llm.scoring.text import ner_tokens, normalise_phrase
from unislu_llm.tasks import Span, SpanTask, TaskRegistry

EMPTY, LOOPS, LONG = "nothing heard", "repeats itself", "over 30 s"
"""Why a row is left out."""

_MORE_WORDS = 2  # that a phrase may have in the transcript than in the annotation: `16` is `sixteen`, `a 100` is `one hundred`


@dataclass
class FillReport:
    """What became of one manifest.

    Args:
        manifest: read. copy: written.
        given: rows with a transcript, kept as they are. filled: rows that got one.
        made: of the transcripts (those of rows left out included), how many were not known from a call before.
        tally: rows left out by reason; span annotations left out of filled rows.
    """

    manifest: Path
    copy: Path
    given: int
    filled: int
    made: int
    tally: Tally


def fill_text(drafter: Drafter, settings: Mapping[str, Any], manifests: Sequence[Path], folder: Path, registry: TaskRegistry,
              name: str, *, language: str = "en", progress: bool = True) -> list[FillReport]:
    """Write a copy of each manifest in `folder` whose rows all have a transcript: their own, or what is heard in their audio.

    A filled row has `text_source`. Its labels stay; its spans, given by their phrases (:func:`read_phrases`), get the places
    where these are said. A task with a phrase that is not found leaves the row: it would be trained as absent.

    Args:
        drafter: with a recogniser, if a row lacks a transcript. settings: what transcripts follow from besides the audio.
        name: of the recogniser, for `text_source`. language: Whisper language code of rows that name none.

    Raises:
        UserError: as `write_drafts`; or no row of a manifest is left.
    """
    copies = plan_copies(manifests, folder)
    kept = Kept(folder, settings, loops=True)
    every = {manifest: read_rows(manifest, registry, without_text=True) for manifest in manifests}
    return [_fill(drafter, kept, manifest, copies[manifest], rows, registry, name, language, progress)
            for manifest, rows in every.items()]


def lacks_text(row: Row) -> bool:
    """Whether a row, read `without_text`, has to be heard."""
    return row.utterance is not None and not row.utterance.text


def _fill(drafter: Drafter, kept: Kept, manifest: Path, copy: Path, rows: Sequence[Row], registry: TaskRegistry, name: str,
          language: str, progress: bool) -> FillReport:
    lacking = [row.utterance for row in rows if row.utterance is not None and lacks_text(row)]
    found, made = hear(drafter, kept, lacking, language, manifest.name if progress else "")
    heard = iter(found)
    tally = Tally(read=len(rows))
    lines: list[bytes] = []
    for row in rows:
        assert row.content is not None
        raw = moved(row.raw, row.content, manifest.parent, copy.parent)
        if lacks_text(row):
            where, transcript = f"{manifest}:{row.line} ({row.content['id']})", next(heard)
            if transcript is None or transcript.loop or not transcript.text:
                tally.drop(LONG if transcript is None else LOOPS if transcript.loop else EMPTY, where)
                continue
            content = json.loads(raw) | {"text": transcript.text, "text_source": name}
            raw = json.dumps(_with_places(content, registry, tally, where), ensure_ascii=False).encode("utf-8")
        lines.append(raw + b"\n")
    if not lines:
        reasons = ", ".join(f"{n} {reason}" for reason, n in tally.dropped.items())
        raise UserError(f"{manifest}: no row is left ({reasons}); is it speech, and in the language of --language?")
    write_copy(copy, b"".join(lines))
    return FillReport(manifest, copy, len(rows) - len(lacking), len(lacking) - tally.dropped.total(), made, tally)


def _with_places(row: dict[str, Any], registry: TaskRegistry, tally: Tally, where: str) -> dict[str, Any]:
    """The row with its span tasks placed in its text, or left out."""
    for task in registry:
        if not isinstance(task, SpanTask) or row.get(task.name) is None:
            continue
        phrases = read_phrases(row[task.name], task, [])
        spans = place_phrases(row["text"], phrases)
        if spans is None:
            del row[task.name]
            tally.note(task.name, where)
        else:
            row[task.name] = [span._asdict() for span in spans]
    return row


def place_phrases(text: str, phrases: Sequence[Phrase]) -> list[Span] | None:
    """Where phrases are said in a transcript, in order and without overlap; None where one is not.

    Words are those of SLUE's NER text, case aside; where they differ, stretches of words that Whisper's normaliser makes equal
    count too (`12-ounce` and `twelve ounce`). Long phrases are placed first, each at the first place that is free.
    """
    spans: list[Span] = []
    for phrase in sorted(phrases, key=lambda p: -len(p.text)):
        free = (place for place in find_phrase(text, phrase.text)
                if not any(place[0] < span.end and span.start < place[1] for span in spans))
        place = next(free, None)
        if place is None:
            return None
        spans.append(Span(phrase.label, *place))
    return sorted(spans, key=lambda span: span.start)


def find_phrase(text: str, phrase: str) -> list[tuple[int, int]]:
    """Start and end (characters) of each place in `text` where `phrase` is said, in order."""
    tokens, words = ner_tokens(text), [token.text.lower() for token in ner_tokens(phrase)]
    wanted = normalise_phrase(phrase, "whisper")
    if not words:
        return []
    n = len(words)
    places = [(i, i + n) for i in range(len(tokens) - n + 1) if [t.text.lower() for t in tokens[i:i + n]] == words]
    if not places and wanted:
        sizes = range(1, n + _MORE_WORDS + 1)
        equal = [(i, i + k) for k in sizes for i in range(len(tokens) - k + 1)
                 if normalise_phrase(text[tokens[i].start:tokens[i + k - 1].end], "whisper") == wanted]
        # The normaliser drops `um`: the shortest of stretches inside one another is the phrase.
        places = sorted(p for p in equal if not any(q != p and p[0] <= q[0] and q[1] <= p[1] for q in equal))
    return [(tokens[i].start, tokens[j - 1].end) for i, j in places]
