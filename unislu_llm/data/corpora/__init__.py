"""From a corpus as it is published to a manifest: read, check, measure the audio, count, write."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from unislu_llm.data.audio import MAX_SECONDS, SAMPLE_RATE, count_samples
from unislu_llm.data.corpora import published
from unislu_llm.data.corpora.annotators import Brat, Doccano, LabelStudio, Prodigy
from unislu_llm.data.corpora.own_data import Conll, Hub, Kaldi, Nemo, Table
from unislu_llm.data.corpora.source import Dropped, Source
from unislu_llm.data.manifest import first_ten, read_manifest, write_manifest
from unislu_llm.data.row_reader import FIELDS, RowReader
from unislu_llm.data.validate import Summary
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

SOURCES: dict[str, type[Source]] = {
    "table": Table, "csv": Table, "conll": Conll, "hub": Hub, "kaldi": Kaldi, "nemo": Nemo,
    "label-studio": LabelStudio, "prodigy": Prodigy, "doccano": Doccano, "brat": Brat,
    **published.SOURCES}
"""Sources, by the subcommand of `unislu prepare`. In those that are not published, but the user's
own, what is wrong is an error: no row is dropped for it."""


def prepare(source: Source, out: Path, *, tasks_file: Path | None = None,
            corpus_name: str | None = None, language: str = "",
            exclude: Sequence[Path] = ()) -> str:
    """Write the manifest of a source, whole or not at all; what became of the rows, as a table.

    Rows are dropped, counted and (the first ten of a reason) named when a manifest could not have
    them, an id comes again, or their audio is missing, unreadable, without the crop or over 30 s.
    What a manifest could not have is an error in own data. Raises UserError: the source cannot be
    read, all of its audio is missing, or no row is left.

    Args:
        source: e.g. :class:`SlueVoxPopuli`.
        out: the manifest; clips that the source makes go to the folder `<out>_audio`.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        corpus_name: corpus of every row, in place of the source's.
        language: code of rows that name none, e.g. de.
        exclude: manifests whose rows are left out, by id and by text (case and blanks apart).
    """
    registry = TaskRegistry.from_yaml(tasks_file)
    dropped, page = Dropped(list), Summary(registry)
    # One row at a time: a corpus needs no more memory than its ids.
    write_manifest(out, _rows(source, registry, dropped, page, out, exclude, corpus_name, language))
    mute = (f"\n{page.mute} of {page.rows} rows have no audio, and are text alone; audio is named "
            "by --audio FOLDER (with <id>.wav, .flac, ...) or the rows' own `audio`")
    return (f"{page.read:>8} rows read\n{_counts(dropped)}\n{out}\n{page}"
            f"{mute * (_own(source) and page.mute > 0)}")


def _own(source: Source) -> bool:
    return type(source) not in published.SOURCES.values()


def _rows(source: Source, registry: TaskRegistry, dropped: Dropped, page: Summary, out: Path,
          exclude: Sequence[Path], corpus_name: str | None, language: str) -> Iterator[Utterance]:
    """What the manifest gets; at the end it raises UserError where that is nothing, or faulty."""
    tested = [u for path in exclude for u in read_manifest(path, registry, language=language)]
    # What a model is tested on must not train it, as text either.
    tested_ids, tested_texts = {u.id for u in tested}, {_plain(u.text) for u in tested}
    reader, wrong, ids = RowReader(registry, language=language), list[str](), set[str]()
    known, with_audio = {*FIELDS, *registry.names}, False
    for where, row in source.rows(registry, dropped, out.parent / f"{out.stem}_audio"):
        page.read, with_audio = page.read + 1, with_audio or row.get("audio") is not None
        for key in row.keys() - known:
            dropped[f"values of '{key}' not read, which is no key of a manifest"].append(where)
        u, problems = reader.read(row, where)
        if u is None:
            # The first problem is the reason; own data is to be corrected, and told them all.
            named = [f"{where}: {p.field}: {p.message}" for p in problems]
            wrong += named
            dropped[f"row dropped: {problems[0].kind}"].append(named[0])
            continue
        seconds, reason = _measured(u)
        if u.id in ids:
            reason = "id comes again"
        elif u.id in tested_ids or _plain(u.text) in tested_texts:
            reason = "in an excluded manifest"
        if reason:
            dropped[f"row dropped: {reason}"].append(f"{where}: '{u.id}' ({u.audio or 'text'})")
        else:
            ids.add(u.id)
            yield page.add(replace(u, duration=seconds, corpus=corpus_name or u.corpus))
    if wrong and _own(source):
        columns = " or map its columns (--columns KEY=COLUMN)" * hasattr(source, "columns")
        raise UserError(f"{len(wrong)} problem{'s' * (len(wrong) > 1)}; correct the source"
                        f"{columns}:\n{first_ten(wrong)}")
    # Where every file is missing the folder is wrong, and text alone is not what was wanted.
    if not ids or (with_audio and page.mute == page.rows):
        raise UserError(f"no row{' with audio' if ids else ''} of {page.read} is left, nothing is "
                        f"written\n{_counts(dropped)}")


def _counts(dropped: Dropped) -> str:
    return "".join(
        f"{len(places):>8} {re.sub('^row ', 'rows ' if places[1:] else 'row ', reason)}\n"
        + "".join(f"{'':>10} {place}\n" for place in places[:10] if reason.startswith("row"))
        for reason, places in sorted(dropped.items(), key=lambda item: -len(item[1])))


def _measured(u: Utterance) -> tuple[float | None, str]:
    """Length of the audio in seconds, to the millisecond; and why the row is dropped, or ""."""
    if u.audio is None:
        return u.duration, ""
    try:
        seconds = count_samples(u.audio, u.start, u.end) / SAMPLE_RATE
    except UserError:
        return None, ("audio cannot be read or has no such stretch" if os.path.isfile(u.audio)
                      else "missing audio file")
    return round(seconds, 3), f"longer than {MAX_SECONDS:g} s" * (seconds > MAX_SECONDS)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
