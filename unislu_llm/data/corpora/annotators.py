"""Own data as annotation tools export it: Label Studio, Prodigy, doccano, brat."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unislu_llm.data.corpora import source
from unislu_llm.data.corpora.source import Dropped, FileSource, Rows
from unislu_llm.data.mending import from_utf16
from unislu_llm.data.row_reader import lookalike
from unislu_llm.errors import UserError
from unislu_llm.tasks import LabelTask, TaskRegistry

_SPANS = ("labels", "hypertextlabels")  # Label Studio's results of Text and HyperText
_Item = tuple[str, list[tuple[str, int, int]] | None, list[str] | None, Any]
"""Text, spans and labels of the whole text (None: not what was annotated), and audio."""


@dataclass(frozen=True)
class _Export(FileSource):
    """JSON lines or an array, an object a text."""

    task: str = "ner"  # Task of labelled spans.
    label_task: str = "sa"  # Task of labels of a whole text.

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        for number, (where, row) in enumerate(source.read_objects(self.file), 1):
            with source.as_published(where):
                if (item := self.read(row, where, dropped)) is None:
                    continue
                said, spans, labels, audio = item
                text, moved = source.tidy(said, spans or ())
            made: dict[str, Any] = {"id": str(row.get("id", f"{self.file.stem}-{number}")),
                                    "text": text}
            if spans is not None:
                made[registry[self.task].name] = moved
            if labels is not None:
                task = registry[self.label_task]
                one = isinstance(task, LabelTask) and not task.multi and len(labels) == 1
                made[task.name] = labels[0] if one else labels
            if self.audio and audio:  # an address of the tool's server: its last part counts,
                name = re.split(r"[/\\=]", str(audio))[-1]  # after Label Studio's eight digits
                made["audio"] = name if (self.audio / name).is_file() else re.sub(
                    r"^[0-9a-f]{8}-", "", name)
            yield where, source.with_audio(made, self.audio, self.file)

    def read(self, row: dict[str, Any], where: str, dropped: Dropped) -> _Item | None:
        """What was annotated; None, and named in `dropped`, where nothing is to be read."""
        raise NotImplementedError


class LabelStudio(_Export):
    """Own data in Label Studio's JSON or JSON-MIN: spans of text or HTML, choices, text areas."""

    def read(self, row: dict[str, Any], where: str, dropped: Dropped) -> _Item | None:
        if "annotations" not in row:  # JSON-MIN, in which a row is one annotation
            row = {"data": row, "annotations": [{"result": [*_minimal(row, self.label_task)]}]}
        done = [a for a in row["annotations"] if not a.get("was_cancelled")]
        if len(done) != 1:
            dropped["annotation dropped: of a text the first is read" if done else
                    "row dropped: not annotated, or skipped"].append(where)
        data, spans, labels = row["data"], [], list[str]()
        text = data.get("text") or next((v for key, v in data.items() if isinstance(v, str) and (
            key == "html" or lookalike(key, ("text",)))), "")  # any key may be shown
        results = done[0]["result"] if done else []
        if any(region["type"] == "hypertextlabels" for region in results):
            text = html.unescape(re.sub(r"<[^>]*>", "", text))  # what is shown, and counted
        for region in results:
            kind, value = region["type"], region.get("value", {})
            if kind == "textarea":
                text = text or " ".join(value["text"])
            elif kind == "choices":
                labels += value["choices"]
            elif kind in _SPANS and "text" in value:
                start, end = map(value.get("globalOffsets", value).get, ("start", "end"))
                if text[start:end] != value["text"]:  # JavaScript counts an emoji as two
                    start, end = from_utf16(text, start, end)
                spans += [(label, start, end) for label in value[kind]]
            else:
                dropped[f"annotation dropped: '{kind}' is no span of the text"].append(where)
        audio = next((value for value in data.values() if re.search(
            r"\.(wav|flac|ogg|opus|mp3)$", str(value).lower())), None)
        return (text, spans if spans or (self._spans and not labels) else None, labels or None,
                audio) if done else None

    @cached_property
    def _spans(self) -> bool:
        """Whether spans were looked for: no export says so but by the spans that were found."""
        found = (region for _, row in source.read_objects(self.file)
                 for a in row.get("annotations", [{"result": [*_minimal(row, self.label_task)]}])
                 for region in a.get("result", ()))
        return any(region.get("type") in _SPANS for region in found)


def _minimal(row: dict[str, Any], label_task: str) -> Iterator[dict[str, Any]]:
    """The results of a row of JSON-MIN, which stand beside its data, as JSON has them."""
    for key, value in row.items():
        if isinstance(value, str) and lookalike(key, (label_task,)):
            value = {"choices": [value]}
        for one in value if isinstance(value, list) else [value]:
            yield from ({"type": kind, "value": one} for kind in (*_SPANS, "choices")
                        if isinstance(one, dict) and kind in one)


class Prodigy(_Export):
    """Own data in Prodigy's JSON lines: spans and choices; what was not accepted is left out."""

    def read(self, row: dict[str, Any], where: str, dropped: Dropped) -> _Item | None:
        if (answer := row.get("answer", "accept")) != "accept":
            dropped[f"row dropped: answer: {answer}"].append(where)
            return None
        audio = row.get("path", "" if "data:" in row.get("audio", "") else row.get("audio"))
        spans = [(s["label"], s["start"], s["end"]) for s in row.get("spans", ())]
        return (row.get("text") or row["transcript"], spans if "spans" in row else None,
                row.get("accept") or ([row["label"]] if "label" in row else None), audio)


class Doccano(_Export):
    """Own data in doccano's JSON lines: spans (`label` or `entities`), or labels of a text."""

    def read(self, row: dict[str, Any], where: str, dropped: Dropped) -> _Item | None:
        if row.get("relations"):
            dropped["annotation dropped: relations"].append(where)
        given = row.get("label", row.get("labels")) or []
        if "entities" not in row and not self._spans:
            return row["text"], None, given or None, row.get("audio")
        spans = ([(e["label"], e["start_offset"], e["end_offset"]) for e in row["entities"]]
                 if "entities" in row else [(label, start, end) for start, end, label in given])
        return row["text"], spans, None, row.get("audio")

    @cached_property
    def _spans(self) -> bool:
        """Whether rows have spans: an empty list may be of both kinds, so the first other says."""
        some = (row.get("label", row.get("labels")) for _, row in source.read_objects(self.file))
        return isinstance(next((given for given in some if given), [[]])[0], list)


@dataclass(frozen=True)
class Brat(FileSource):
    """Own data in brat's folders (--file FOLDER): lines of .txt, and their spans in .ann.

    The id is the file's name, and where it has several lines a number."""

    task: str = "ner"  # Task of the spans.

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        for file in sorted(self.file.rglob("*.txt")):
            lines = [line + "\n" for _, line in source.read_lines(file)]
            spans, at = list(_brat(file, "".join(lines), dropped)), 0
            for number, line in enumerate(lines, 1):
                text, moved = source.tidy(line, [(label, start - at, end - at) for label, start, end
                                          in spans if at <= start < at + len(line)])
                at += len(line)
                row = {"id": file.stem + f"-{number}" * (len(lines) > 1), "text": text,
                       registry[self.task].name: moved}
                if text:
                    yield f"{file}:{number}", source.with_audio(row, self.audio, file)


def _brat(file: Path, text: str, dropped: Dropped) -> Iterator[tuple[str, int, int]]:
    for where, line in source.read_lines(file.with_suffix(".ann")):
        found = re.fullmatch(r"T\d+\t(\S+) (\d+) (\d+)\t(.*)", line)
        if found and text[int(found[2]):int(found[3])].split() == found[4].split():
            yield found[1], int(found[2]), int(found[3])
        elif line.startswith("T") and ";" not in line:
            raise UserError(f"{where}: expected T1, label, start, end and the phrase that "
                            f"{file.name} has there")
        elif line:  # attributes, relations, events, notes; or a phrase in several pieces
            dropped[f"annotation dropped: brat's '{line[0]}', no plain span"].append(where)
