"""From a corpus as it is published to a manifest: read, check, measure the audio, count, write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unislu_llm.data.audio import MAX_SECONDS, SAMPLE_RATE, count_samples
from unislu_llm.data.corpora.own_data import Conll, Csv
from unislu_llm.data.corpora.slue import SlueHub, SlueVoxCeleb, SlueVoxPopuli
from unislu_llm.data.corpora.source import Dropped
from unislu_llm.data.manifest import first_ten, read_manifest, write_manifest
from unislu_llm.data.row_reader import RowReader
from unislu_llm.data.validate import summary
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

Source = SlueVoxPopuli | SlueVoxCeleb | SlueHub | Conll | Csv
"""A corpus in some layout; its fields are the flags of its subcommand."""

SOURCES: dict[str, type[Any]] = {"slue-voxpopuli": SlueVoxPopuli, "slue-voxceleb": SlueVoxCeleb,
                                 "slue-hub": SlueHub, "conll": Conll, "csv": Csv}
"""Sources, by the subcommand of `unislu prepare`."""


def prepare(source: Source, out: Path, *, tasks_file: Path | None = None,
            corpus_name: str | None = None, exclude: Sequence[Path] = ()) -> str:
    """Write the manifest of a source, whole or not at all; what became of the rows, as a table.

    Rows are dropped, counted and (the first ten of a reason) named when a manifest could not have
    them, an id comes again, or their audio is missing, unreadable, without the crop or over 30 s.
    What a manifest could not have is an error in own data.

    Args:
        source: e.g. :class:`SlueVoxPopuli`.
        out: the manifest; clips that the source makes go to the folder `<out>_audio`.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        corpus_name: corpus of every row, in place of the source's.
        exclude: manifests whose rows are left out, by id and by text (case and blanks apart).

    Raises:
        UserError: the source cannot be read, all of its audio is missing, or no row is left.
    """
    registry = TaskRegistry.from_yaml(tasks_file)
    tested = [u for path in exclude for u in read_manifest(path, registry)]
    # What a model is tested on must not train it, as text either.
    tested_ids, tested_texts = {u.id for u in tested}, {_plain(u.text) for u in tested}
    reader, dropped, wrong = RowReader(registry), Dropped(list), list[str]()
    rows: dict[str, Utterance] = {}
    n_read, with_audio = 0, False
    for where, row in source.rows(registry, dropped, out.parent / f"{out.stem}_audio"):
        n_read, with_audio = n_read + 1, with_audio or row.get("audio") is not None
        u, problems = reader.read(row, where)
        if u is None:
            # The first problem is the reason; own data is to be corrected, and told them all.
            named = [f"{where}: {p.field}: {p.message}" for p in problems]
            wrong += named
            dropped[f"row dropped: {problems[0].kind}"].append(named[0])
            continue
        seconds, reason = _measured(u)
        if u.id in rows:
            reason = "id comes again"
        elif u.id in tested_ids or _plain(u.text) in tested_texts:
            reason = "in an excluded manifest"
        if reason:
            dropped[f"row dropped: {reason}"].append(f"{where}: '{u.id}' ({u.audio or 'text'})")
        else:
            rows[u.id] = replace(u, duration=seconds, corpus=corpus_name or u.corpus)
    if wrong and isinstance(source, Conll | Csv):
        raise UserError(f"{len(wrong)} problem{'s' * (len(wrong) > 1)}; correct the source:\n"
                        f"{first_ten(wrong)}")
    counts = _counts(dropped)
    # Where every file is missing the folder is wrong, and text alone is not what was wanted.
    if not rows or (with_audio and all(u.audio is None for u in rows.values())):
        raise UserError(f"no row{' with audio' if rows else ''} of {n_read} is left, nothing is "
                        f"written\n{counts}")
    write_manifest(out, rows.values())
    page = f"{n_read:>8} rows read\n{counts}\n{out}\n{summary([*rows.values()], registry)}"
    if isinstance(source, Conll | Csv) and (mute := sum(u.audio is None for u in rows.values())):
        page += (f"\n{mute} of {len(rows)} rows have no audio, and are text alone; audio is named "
                 "by --audio FOLDER (with <id>.wav, .flac, ...) or the rows' own `audio`")
    return page


def _counts(dropped: Dropped) -> str:
    lines = ""
    for reason, places in sorted(dropped.items(), key=lambda item: -len(item[1])):
        lines += f"{len(places):>8} {reason}\n"
        if reason.startswith("row"):
            lines += "".join(f"{'':>10} {place}\n" for place in places[:10])
    return lines


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
