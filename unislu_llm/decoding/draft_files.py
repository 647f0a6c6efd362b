"""Copies of manifests with drafts; work that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from unislu_llm.data import audio
from unislu_llm.data.batching import seconds
from unislu_llm.data.clean import moved
from unislu_llm.data.manifest import Row, iter_rows
from unislu_llm.data.shards import JsonLines
from unislu_llm.decoding.drafts import Drafter, Heard
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

KEPT = ".drafts"
"""Subfolder of the copies that remembers drafts: by recogniser and settings, then by contents of the audio."""

TextRows = Literal["skip", "copy"]

_SHOWN = 10


@dataclass
class Report:
    """What became of one manifest.

    Args:
        manifest: read. copy: written.
        made, known: drafts made now and remembered from a run before. copied: transcripts that are drafts of rows without audio.
        without: rows without audio or over 30 s, kept as they are.
        pairs: transcript and draft of each row whose draft was heard.
    """

    manifest: Path
    copy: Path
    made: int
    known: int
    copied: int
    without: int
    pairs: list[tuple[str, str]]


def write_drafts(drafter: Drafter, settings: Mapping[str, Any], manifests: Sequence[Path], folder: Path,
                 registry: TaskRegistry, *, language: str = "en", progress: bool = True,
                 text_rows: TextRows = "skip") -> list[Report]:
    """Write a copy of each manifest in `folder`, its rows with a `draft` each; all else in them stays, audio paths follow.

    Drafts are kept as they are made: a call that was stopped, or whose manifests share clips with an earlier one's, goes on
    from there. Copies appear whole or not at all.

    Args:
        drafter: with a recogniser, if a row has audio.
        settings: what drafts follow from besides the audio: others make others.
        language: Whisper language code of rows that name none.
        text_rows: rows without audio stay as they are, or have their transcript, styled, as a draft if they have none.

    Raises:
        UserError: a manifest with problems, two of one name, unreadable audio, or a file in the way of a copy.
    """
    copies = plan_copies(manifests, folder)
    kept = Kept(folder, settings)
    every = {manifest: read_rows(manifest, registry) for manifest in manifests}
    return [_copy(drafter, kept, manifest, copies[manifest], rows, language, progress, text_rows == "copy")
            for manifest, rows in every.items()]


def plan_copies(manifests: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where each manifest's copy goes.

    Raises:
        UserError: two manifests of one name, or a copy in place of a manifest.
    """
    copies = {manifest: folder / manifest.name for manifest in manifests}
    if len(set(copies.values())) < len(manifests):
        raise UserError("two of the manifests have one file name; give them --out folders of their own")
    for manifest, copy in copies.items():
        if copy.resolve() == manifest.resolve():
            raise UserError(f"--out {folder} is the folder of {manifest.name}; name another")
    return copies


class Kept:
    """Drafts on disk, by contents of the audio.

    Args:
        folder: of the copies. settings: what drafts follow from besides the audio.
        loops: whether a draft repeats itself matters; older files that do not say so are passed over.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, loops: bool = False) -> None:
        digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
        self._lines = JsonLines(folder / KEPT / digest[:16])
        self._heard = {str(row["audio"]): Heard(str(row["draft"]), bool(row.get("loop"))) for _, row in self._lines.new()
                       if "draft" in row and ("loop" in row or not loops)}
        self._files: dict[Path, str] = {}

    def key(self, u: Utterance, language: str) -> str:
        assert u.audio is not None
        if u.audio not in self._files:
            try:
                with u.audio.open("rb") as stream:
                    self._files[u.audio] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{u.source}: field 'audio': {u.audio} cannot be read ({error.strerror})") from error
        return hashlib.sha256(f"{self._files[u.audio]} {u.start} {u.end} {language}".encode()).hexdigest()[:40]

    def __contains__(self, key: str) -> bool:
        return key in self._heard

    def __getitem__(self, key: str) -> Heard:
        return self._heard[key]

    def add(self, drafts: Mapping[str, Heard]) -> None:
        try:
            self._lines.append({"audio": key, "draft": heard.text, "loop": heard.loop} for key, heard in drafts.items())
        except OSError as error:
            raise UserError(f"--out: {self._lines.folder} cannot be written ({error.strerror or error})") from error
        self._heard |= drafts


def read_rows(manifest: Path, registry: TaskRegistry, *, without_text: bool = False) -> list[Row]:
    """Rows of a manifest that has no problems; see :func:`unislu_llm.data.manifest.iter_rows`.

    Raises:
        UserError: it has some.
    """
    rows = list(iter_rows(manifest, registry, check_audio=True, without_text=without_text))
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        listed = "\n".join(map(str, problems[:_SHOWN]))
        raise UserError(f"{manifest}: {len(problems)} problem{'s' * (len(problems) > 1)}; correct the manifest:\n{listed}")
    return rows


def _copy(drafter: Drafter, kept: Kept, manifest: Path, copy: Path, rows: Sequence[Row], language: str,
          progress: bool, from_text: bool) -> Report:
    utterances = [row.utterance for row in rows if row.utterance is not None]
    drafts, made = hear(drafter, kept, utterances, language, manifest.name if progress else "")
    pairs: list[tuple[str, str]] = []
    lines: list[bytes] = []
    copied = 0
    for row, u, heard in zip(rows, utterances, drafts, strict=True):
        assert row.content is not None
        raw = moved(row.raw, row.content, manifest.parent, copy.parent)
        draft = None if heard is None else heard.text
        if draft is not None:
            pairs.append((u.text, draft))
        elif from_text and u.audio is None and u.draft is None:
            draft, copied = drafter.styled(u.text), copied + 1
        if draft is not None:
            raw = json.dumps(json.loads(raw) | {"draft": draft}, ensure_ascii=False).encode("utf-8")
        lines.append(raw + b"\n")
    write_copy(copy, b"".join(lines))
    return Report(manifest, copy, made, len(pairs) - made, copied, len(rows) - len(pairs) - copied, pairs)


def hear(drafter: Drafter, kept: Kept, utterances: Sequence[Utterance], language: str,
         label: str) -> tuple[list[Heard | None], int]:
    """What is heard in each utterance, None without audio or over 30 s; and how many of these were not known before.

    Args:
        language: Whisper language code of utterances that name none. label: of the progress bar; "" shows none.
    """
    asked: dict[str, tuple[Utterance, str]] = {}
    keys: list[str | None] = []
    for u in utterances:
        if u.audio is None or seconds(u) > audio.MAX_SECONDS:
            keys.append(None)
            continue
        code = (u.language or language).lower().split("-")[0]
        keys.append(kept.key(u, code))
        asked.setdefault(str(keys[-1]), (u, code))
    new = {key: value for key, value in asked.items() if key not in kept}
    _make(drafter, kept, new, label)
    return [None if key is None else kept[key] for key in keys], sum(key in new for key in keys)


def _make(drafter: Drafter, kept: Kept, new: Mapping[str, tuple[Utterance, str]], label: str) -> None:
    """Drafts of clips, batched by language and length, each batch kept when it is made."""
    order = sorted(new, key=lambda key: (new[key][1], -seconds(new[key][0])))
    with tqdm(total=len(order), desc=label, unit="clip", disable=not (label and order)) as bar:
        while order:
            language = new[order[0]][1]
            some = [key for key in order[:drafter.batch_size] if new[key][1] == language]
            order = order[len(some):]
            kept.add(dict(zip(some, drafter.hear([_wave(new[key][0]) for key in some], language), strict=True)))
            bar.update(len(some))


def _wave(u: Utterance) -> Any:
    assert u.audio is not None
    try:
        return audio.load(u.audio, u.start, u.end, max_seconds=audio.MAX_SECONDS)
    except UserError as error:
        raise UserError(f"{u.source}: field 'audio': {error}") from error


def write_copy(copy: Path, text: bytes) -> None:
    """The copy, whole or not at all; one that is there already and says the same stays."""
    try:
        if copy.exists():
            if copy.is_file() and copy.read_bytes() == text:
                return
            raise UserError(f"{copy} exists and differs (other drafts, or an older manifest); remove it, or give another --out")
        partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(text)
        partial.replace(copy)
    except OSError as error:
        raise UserError(f"{copy}: cannot be written ({error.strerror or error})") from error
