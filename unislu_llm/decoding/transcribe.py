"""Copies of manifests with hypotheses or pseudo-labels; a call that was stopped goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unislu_llm.config import DecodeConfig
from unislu_llm.data.annotations import listed_phrases
from unislu_llm.data.audio import MAX_SECONDS
from unislu_llm.data.manifest import Row, moved, read_rows
from unislu_llm.data.phrases import place_phrases
from unislu_llm.decoding.hypotheses import clean, load_recogniser, recognise
from unislu_llm.decoding.no_speech import judge
from unislu_llm.decoding.other_recognisers import URLS
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.recogniser import Recogniser, Transcript
from unislu_llm.errors import UserError
from unislu_llm.io import append_json, atomic
from unislu_llm.setting_types import Precision
from unislu_llm.tasks import SpanTask, TaskRegistry
from unislu_llm.utterance import Utterance


@dataclass
class Report:
    """What became of one manifest, of which `copy` was written."""

    copy: Path
    # `rows`; transcripts `made` now, `known` from a call that was stopped, `looped`, empty for
    # `no_speech`; rows whose hypothesis is `copied` from their text, or that have none (`mute`);
    # `filled` pseudo-labels.
    counts: Counter[str]
    # Text, recognised hypothesis, and the row's language.
    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    # `file:line (id)` of rows that the copy lacks, by reason; and by span task, of filled rows
    # that lost it because a phrase was not recognised.
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def transcribe(model: str, manifests: Sequence[Path], folder: Path, registry: TaskRegistry, *,
               source: str = "decoder", language: str = "en", copy_text: bool = False,
               pseudo_label: bool = False, name: str = "", precision: Precision = "fp32",
               batch_size: int = 8, phrases: Phrases | None = None,
               num_beams: int = 1) -> list[Report]:
    """Write a copy of each manifest whose rows have a hypothesis, or with `pseudo_label` a text.

    All else in the rows stays, audio paths follow. A pseudo-label is for rows with audio that
    lack `text`: they get the transcript as `text`, and their spans, given by phrases, get places
    in it. As in sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947) what was not
    understood is left out. No row gets a hypothesis then.

    Args:
        model: Whisper checkpoint (name or folder), or folder of a saved model.
        manifests: JSON-lines files.
        folder: of the copies; what a stopped call had made waits there for the next.
        registry: tasks of the manifests.
        source: of a saved model `decoder`, or `ctc` for the greedy text of its projector.
        language: Whisper language code of rows that name none.
        copy_text: rows without audio and hypothesis get their own text as one.
        pseudo_label: write texts.
        name: of the recogniser in `text_source`; default: the checkpoint's, or its folder's.
        precision: of the recogniser.
        batch_size: clips at one time.
        num_beams: of the recogniser; 1 is greedy.
        phrases: that are raised in what is recognised.

    Raises:
        UserError: no such recogniser, a manifest with problems, two of one name, unreadable audio,
            a file in the way of a copy, or no row of a manifest is left.
    """
    if phrases and source == "ctc":
        raise UserError("--phrases: by --source ctc no decoder chooses words; drop one of the two")
    if num_beams > 1 and (source == "ctc" or model.startswith(URLS)):
        raise UserError("--num-beams: neither a server nor --source ctc is searched by beams; drop "
                        "one of the two")
    device, half = "cuda" if torch.cuda.is_available() else "cpu", precision == "bf16"
    load = partial(load_recogniser, model, source, device=device,
                   dtype=torch.bfloat16 if half else torch.float32)
    name = name or (Path(model).resolve().name if Path(model).is_dir() else model)
    try:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return write_copies(
                load, manifests, folder, registry, settings=[model, source, precision],
                copy_text=copy_text, text_source=name if pseudo_label else "", language=language,
                batch_size=batch_size, progress=True, **({"phrases": phrases} if phrases else {}),
                **({"num_beams": num_beams} if num_beams > 1 else {}))
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error})") from error


def write_copies(load: Callable[[], Recogniser], manifests: Sequence[Path], folder: Path,
                 registry: TaskRegistry, *, settings: Sequence[str], copy_text: bool = False,
                 text_source: str = "", progress: bool = False, **options: Any) -> list[Report]:
    """The work of :func:`transcribe`, with a recogniser that is loaded when the first clip has to
    be heard, its `settings`, and `options` of :func:`recognise`."""
    copies = [folder / manifest.name for manifest in manifests]
    if len(set(copies)) < len(copies):
        raise UserError("two of the manifests have one file name; give them --out folders of "
                        "their own")
    if all(copy.exists() for copy in copies):  # some: a call was stopped among them
        raise UserError(f"{copies[0]} exists; remove it, or give another --out")
    # All manifests are checked before the first recognition, which may take hours.
    every = [read_rows(manifest, registry, check_audio=True, without_text=bool(text_source),
                       language=options.get("language", "")) for manifest in manifests]
    reports, waiting = [], []
    for manifest, copy, rows in zip(manifests, copies, every, strict=True):
        report = Report(copy, Counter(rows=len(rows)))
        # A changed manifest or another recogniser makes another file: nothing stale is taken over.
        key = hashlib.sha256(json.dumps([*settings, options]).encode() + manifest.read_bytes())
        kept = folder / f".{manifest.name}.{key.hexdigest()[:16]}.transcripts"
        asked = [u for row in rows if (u := row.utterance) is not None and u.audio is not None
                 and u.seconds <= MAX_SECONDS and not (text_source and u.text)]
        found = _resume(kept, load, asked, registry, report.counts,
                        progress=manifest.name if progress else "", **options)
        text = b"".join(
            moved(content, manifest.parent, folder) for row in rows
            if (content := _content(row, found, registry, copy_text, text_source, report)))
        if not text:
            reasons = ", ".join(f"{len(some)} {why}" for why, some in report.left_out.items())
            raise UserError(f"{manifest}: no row is left ({reasons}); is it speech, and in the "
                            "language of --language?")
        if copy.exists() and copy.read_bytes() != text:
            raise UserError(f"{copy} exists and differs; remove it, or give another --out")
        with atomic(copy, "wb") as handle:
            handle.write(text)
        reports.append(report)
        waiting.append(kept)
    # Not before all copies are written, so that a call stopped among them can go on.
    for kept in waiting:
        kept.unlink(missing_ok=True)
    return reports


def _resume(kept: Path, load: Callable[[], Recogniser], asked: Sequence[Utterance],
            registry: TaskRegistry, counts: Counter[str], **options: Any) -> dict[str, Transcript]:
    """Transcripts by id, empty where there is no speech; each is kept in a file as it is made."""
    known: dict[str, Transcript] = {}
    data = kept.read_bytes() if kept.exists() else b""
    for line in data.splitlines():
        with contextlib.suppress(ValueError, KeyError):  # a call was killed as it wrote
            row = json.loads(line)
            known[row["id"]] = Transcript(row["text"], row["loop"], row["evidence"])
    new = [u for u in asked if u.id not in known]
    counts["made"], counts["known"] = len(new), len(known)
    if new:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data[:data.rfind(b"\n") + 1])
        for i, t in recognise(load(), new, registry, **options):
            # Of the evidence nothing is kept but that there is no speech.
            none = t.evidence and judge(t.evidence, DecodeConfig().no_speech, "")[0]
            t = Transcript("", False, t.evidence) if none else t._replace(evidence=None)
            known[new[i].id] = t
            append_json(kept, {"id": new[i].id, **t._asdict()})
    counts["looped"] = sum(t.loop for t in known.values())
    counts["no_speech"] = sum(t.evidence is not None for t in known.values())
    return known


def _content(row: Row, found: Mapping[str, Transcript], registry: TaskRegistry, copy_text: bool,
             text_source: str, report: Report) -> dict[str, Any] | None:
    """What a row of the copy holds; None where it is left out."""
    u = row.utterance
    assert u is not None
    made, place = found.get(u.id), f"{u.source} ({u.id})"
    if text_source:
        if u.text:
            return row.content
        if made is None or made.loop or not made.text:
            why = ("over 30 s" if made is None else "repeats itself" if made.loop else
                   "holds no speech" if made.evidence else "is empty")
            report.left_out[why].append(place)
            return None
        report.counts["filled"] += 1
        content = row.content | {"text": made.text, "text_source": text_source}
        for task in place_spans(content, registry, u.language or ""):
            report.left_out[task].append(place)
        return content
    if made is not None:
        report.pairs.append((u.text, made.text, u.language or ""))
    elif copy_text and u.audio is None and u.hypothesis is None:
        report.counts["copied"] += 1
        made = Transcript(clean(u.text, registry))
    else:
        report.counts["mute"] += u.audio is None and u.hypothesis is None
        return row.content
    return row.content | {"hypothesis": made.text}


def place_spans(row: dict[str, Any], registry: TaskRegistry, language: str = "") -> list[str]:
    """Give the phrases of a row's span tasks their places in its text; returns the tasks that were
    taken out: one of their phrases was not found, and would be trained as absent."""
    lost = []
    for task in registry:
        if not isinstance(task, SpanTask) or row.get(task.name) is None:
            continue
        # The wording is a recogniser's: the first place of a phrase is as good as another.
        spans, why = place_phrases(row["text"], listed_phrases(row[task.name]), first=True,
                                   language=language)
        if why:
            del row[task.name]
            lost.append(task.name)
        else:
            row[task.name] = [span._asdict() for span in spans]
    return lost
