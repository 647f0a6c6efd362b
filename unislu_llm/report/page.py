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

from unislu_llm.io import write_text
from unislu_llm.report.plots import draw_plots

_ROOM = Path(__file__).parent
_PLAYED = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"}  # by browsers
_MOST_BYTES = 20_000_000  # of a clip: a whole recording is no example
# XML has no place for these, and the last ones turn text around, which may hide what is said.
_ODD = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html`, and beside it in `audio` the clips that its examples play.

    Args:
        report: what `report.json` holds. All of its text is shown as text, whatever it says.
        folder: is made if need be; it can be moved as a whole.

    Returns the page. A clip that cannot be copied is said to be missing on the page.
    """
    report = _clean(report)
    for number, example in enumerate(report["examples"], 1):
        example["clip"] = _copy_clip(example, number, folder / "audio")
    pages = Environment(loader=FileSystemLoader(_ROOM), autoescape=True, trim_blocks=True,
                        lstrip_blocks=True, undefined=StrictUndefined)
    pages.filters["marked"] = _marked
    parts = {kind: (_ROOM / f"page.{kind}").read_text("utf-8") for kind in ("css", "js")}
    # The page runs this script and has this style, and nothing that came with the data.
    digests = {kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
               for kind, text in parts.items()}
    plots = {name: (rows, Markup(svg)) for name, (rows, svg) in draw_plots(report).items()}
    text = pages.get_template("page.jinja").render(
        report=report, plots=plots, digests=digests,
        **{kind: Markup(text) for kind, text in parts.items()})
    write_text(page := folder / "report.html", text)
    return page


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _ODD.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(part) for key, part in value.items()}
    return [_clean(part) for part in value] if isinstance(value, list | tuple) else value


def _copy_clip(example: Mapping[str, Any], number: int, folder: Path) -> str | None:
    """Copy an example's audio; the way to it from the page, or None where there is none."""
    source = Path(example["audio"] or "")
    try:
        # A manifest may name any file of this machine, and the page is passed on: audio alone.
        if source.suffix.lower() not in _PLAYED or source.stat().st_size > _MOST_BYTES:
            return None
        soundfile.info(source)
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9.-]", "_", f"{number:03}-{example['id'][:60]}{source.suffix}")
        shutil.copyfile(source, folder / name)
    except (OSError, ValueError, soundfile.SoundFileError):
        return None
    return f"audio/{name}"


def _marked(text: str, outputs: Mapping[str, Any], wrong: Mapping[str, Sequence[str]],
            ) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Pieces of a text, each with its entity or None, and the entities that do not stand in it;
    an entity is label, phrase, and whether it is wrong."""
    found: list[tuple[int, int, Any]] = []
    absent = []
    for task, entities in outputs.items():
        for label, phrase in entities if isinstance(entities, list) else ():
            # As a word if there is one: not the `he` of `the`. Some scripts have no blanks.
            places = [match.span() for pattern in (rf"(?<!\w){re.escape(phrase)}(?!\w)",
                                                   re.escape(phrase))
                      for match in re.finditer(pattern, text, re.IGNORECASE)
                      if match[0] and all(match.end() <= start or end <= match.start()
                                          for start, end, _ in found)]
            entity = (label, phrase, phrase in wrong.get(task, ()))
            if places:
                found.append((*places[0], entity))
            else:
                absent.append(entity)
    pieces, done = list[tuple[str, Any]](), 0
    for start, end, entity in sorted(found):
        pieces += [(text[done:start], None), (text[start:end], entity)]
        done = end
    return [*pieces, (text[done:], None)], absent
