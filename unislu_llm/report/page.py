"""One page of a comparison, plots and all: it opens from disk and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from unislu_llm.data import audio
from unislu_llm.errors import UserError
from unislu_llm.io import write_text
from unislu_llm.report.plots import draw_plot

_ROOM = Path(__file__).parent
_PLAYED = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"}  # by browsers
_MOST_BYTES = 20_000_000  # of a clip: a whole recording is no example
# XML has no place for these, and the last ones turn text around, which may hide what is said.
_ODD = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html`, and beside it in `audio` the clips that its examples play, and return
    the page; the folder can be moved. `report` is what `report.json` holds; its text is shown as
    text, whatever it says. Clips that are no audio, or not there, are said to be missing."""
    report = _clean(report)
    for number, example in enumerate(report["examples"], 1):
        example["clip"] = _copy_clip(example, number, folder / "audio")
    names = [system["name"] for system in report["systems"]]
    pages = Environment(loader=FileSystemLoader(_ROOM), autoescape=True, trim_blocks=True,
                        lstrip_blocks=True, undefined=StrictUndefined)
    pages.filters["marked"] = _marked
    pages.globals["draw"] = lambda kind, rows: Markup(draw_plot(kind, rows, names))
    parts = {kind: Markup((_ROOM / f"page.{kind}").read_text("utf-8")) for kind in ("css", "js")}
    # The browser takes this style and runs this script, and none that came with the data.
    digests = {kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
               for kind, text in parts.items()}
    write_text(page := folder / "report.html", pages.get_template("page.jinja").render(
        report=report, names=names, digests=digests, **parts))
    return page


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_clean(key): _clean(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(part) for part in value]
    return _ODD.sub("\ufffd", value) if isinstance(value, str) else value


def _copy_clip(example: Mapping[str, Any], number: int, folder: Path) -> str | None:
    """Copy an example's audio; the way to it from the page, or None where there is none."""
    source = Path(example["audio"] or "")
    name = re.sub(r"[^A-Za-z0-9.-]", "_", f"{number:03}-{example['id'][:60]}{source.suffix}")
    try:
        # A manifest may name any file of this machine, and the page is passed on: audio alone.
        soundfile.info(source)
        whole = (crop := example.get("crop", [0.0, None])) == [0.0, None]
        if source.suffix.lower() not in _PLAYED or (
                whole and source.stat().st_size > _MOST_BYTES):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        if whole:
            shutil.copyfile(source, folder / name)
        else:
            name = Path(name).with_suffix(".wav").name
            soundfile.write(folder / name, audio.load(source, *crop), audio.SAMPLE_RATE)
    except (OSError, UserError, soundfile.SoundFileError):
        return None
    return f"audio/{name}"


def _marked(text: str, outputs: Mapping[str, Any],
            wrong: Mapping[str, Sequence[str]]) -> tuple[list[Any], list[Any]]:
    """Pieces of a text, each with its entity or None, and the entities that do not stand in it;
    an entity is its label, its phrase, and whether it is wrong."""
    found, absent = list[Any](), list[Any]()
    for task, label, phrase in ((task, *e) for task, entities in outputs.items()
                                for e in entities or () if isinstance(e, list)):
        # As a word if there is one: not the `he` of `the`. Some scripts have no blanks.
        forms = (rf"(?<!\w){re.escape(phrase)}(?!\w)", re.escape(phrase))
        place = next((m.span() for form in forms for m in re.finditer(form, text, re.IGNORECASE)
                      if m[0] and all(m.end() <= a or b <= m.start() for a, b, *_ in found)), ())
        (found if place else absent).append((*place, label, phrase, phrase in wrong.get(task, ())))
    pieces, done = list[Any](), 0
    for start, end, *entity in sorted(found):
        pieces += [(text[done:start], None), (text[start:end], entity)]
        done = end
    return [*pieces, (text[done:], None)], absent
