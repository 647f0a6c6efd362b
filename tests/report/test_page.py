"""The page of a comparison: numbers, plots, strangers' text, clips, and what its readers need."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import soundfile

from unislu_llm.report import page
from unislu_llm.report.page import write_page
from unislu_llm.report.plots import draw_plot

DATA = Path(__file__).parents[1] / "data_files"
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script> $x$ \0 \ud800'


def make_report(systems: int = 3, file: str = "report.json", words: tuple[str, ...] = ()) -> Any:
    """The first systems of a report; each of the `words` becomes hostile, wherever it is."""
    text = (DATA / file).read_text("utf-8")
    for word in words:
        text = text.replace(word, json.dumps(HOSTILE)[1:-1])
    gone = [system["name"] for system in json.loads(text)["systems"]][systems:]
    report = json.loads(text, object_hook=lambda some: {
        key: value for key, value in some.items() if key not in gone})
    return report | {"systems": report["systems"][:systems]}


def elements(path: Path) -> list[tuple[str, dict[str, str | None]]]:
    """Every element of a page with its attributes."""
    found, parser = list[tuple[str, dict[str, str | None]]](), HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))  # type: ignore
    parser.feed(path.read_text("utf-8"))
    return found


def text_of(path: Path) -> str:
    return html.unescape(" ".join(re.sub(r"<.*?>", " ", path.read_text("utf-8")).split()))


def test_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    report = make_report(2)
    report["curves"]["llm-reads"][1]["scores"] |= {"guard_wer": 7.5, "guard_wer_read": 8.25}
    text = text_of(write_page(report, tmp_path / "new"))
    for row in (
            "score whisper-decoder llm-reads llm-reads, difference WER ↓ 16.40 [12.40, 20.40]",
            "35.50 [31.50, 39.50] 52.90 [47.40, 58.00] +17.40 [+11.20, +23.10] p 0.001",
            "SA macro-F1 llm-reads +0.50 [-1.00, +2.00] p 0.480 +17.40 [+11.20, +23.10] p 0.001",
            "hallucinated ner whisper-decoder 58 31 20 9 5 13 ner llm-reads 68 27 16 9 3 13",
            "ner PLACE 60 llm-reads 35.00 [26.00, 44.00] 5.00", "9,000 1,501 901 350 250 16.68",
            "WER by audio llm-reads 5-10 s 100 18.90 [14.90, 22.90]", "Negative 37 113 0",
            "NER F1 llm-reads 20 3.00 23.00", "WER of the guard set llm-reads 20 3.00 7.50",
            "WER of the guard set read llm-reads 20 3.00 8.25", "sa llm-reads 0.65 0.58 60 0.09"):
        assert row in text, row


def test_points_stand_where_their_numbers_are() -> None:
    rows = [{"task": "sa", "system": name, "confidence": x, "share right": 0.5}
            for name, x in (("a", 0.13), ("b", 0.9), ("a", 0.77))]
    svg = ElementTree.fromstring(draw_plot("calibration", rows, ["a", "b"]))
    low, high = (next(float(t.get("x", "")) for t in svg.iter("text") if t.text == value)
                 for value in ("0.0", "1.0"))
    for i, points in enumerate(([0.13, 0.77], [0.9])):
        drawn = [(float(use.get("x", "")) - low) / (high - low) for use in svg.iter("use")
                 if use.get("fill") == f"var(--c{i})"]  # the last one is of the legend
        assert drawn[:-1] == pytest.approx(points, abs=1e-3)


def test_text_of_strangers_stays_text(tmp_path: Path) -> None:
    path = write_page(make_report(words=(
        "llm-reads-and-listens", "vp_0", "PLACE", "speaker 1", "budget", "transcribes")), tmp_path)
    tags = [tag for tag, _ in elements(path)]
    assert (tags.count("script"), tags.count("img")) == (1, 0)
    assert not [key for _, attrs in elements(path) for key in attrs if key.startswith("on")]
    shown = HOSTILE.replace("\0", "\ufffd").replace("\ud800", "\ufffd")
    assert html.unescape(path.read_text("utf-8")).count(shown) > 30


@pytest.mark.parametrize("report", [
    make_report(), make_report(2), make_report(1), make_report(2, "report_lacking.json"),
    make_report() | {"examples": make_report()["examples"] * 50}])
def test_page_is_small_and_for_every_reader(report: dict[str, Any], tmp_path: Path) -> None:
    path = write_page(report, tmp_path)
    found = elements(path)
    assert path.stat().st_size < 5_000_000
    assert "://" not in path.read_text("utf-8")  # no other machine, and no name of one
    levels = [int(tag[1]) for tag, _ in found if re.fullmatch("h[1-6]", tag)]
    assert max(b - a for a, b in itertools.pairwise([0, *levels])) == 1
    ids = [f"#{attrs['id']}" for _, attrs in found if "id" in attrs]
    assert len(ids) == len({*ids, *(attrs["href"] for tag, attrs in found if tag == "a")})
    assert all(attrs.get("aria-label") for tag, attrs in found
               if attrs.get("role") in ("img", "region") or tag == "audio")


def test_clips_lie_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "draw_plot", lambda *_: "")
    (tmp_path / "secret.wav").write_text("no audio")
    report = make_report(words=("vp_0",))
    for example, file in zip(report["examples"], (DATA / "librivox.flac", tmp_path / "secret.wav"),
                             strict=True):
        example["audio"] = str(file)
    path = write_page(report, tmp_path / "a")
    [clip] = (tmp_path / "a" / "audio").iterdir()
    assert [attrs["src"] for tag, attrs in elements(path) if tag == "audio"] == [
        f"audio/{clip.name}"]
    assert text_of(path).count("No audio: ") == 1
    report["examples"][0]["crop"] = [1.0, 1.5]  # a stretch of a recording
    write_page(report, tmp_path / "c")
    [clip] = (tmp_path / "c" / "audio").iterdir()
    assert (clip.suffix, soundfile.info(clip).duration) == (".wav", 0.5)
    del report["examples"][0]["crop"]
    monkeypatch.setattr(page, "_MOST_BYTES", 1000)
    assert text_of(write_page(report, tmp_path / "b")).count("No audio: ") == 2


def test_entities_are_marked_where_they_stand() -> None:
    outputs = {"ner": [["A", "HE"], ["B", "her"], ["C", "x"]], "sa": "Positive"}
    assert page._marked("The hero met he", outputs, {"ner": ["her"]}) == (
        [("The ", None), ("her", ["B", "her", True]), ("o met ", None), ("he", ["A", "HE", False]),
         ("", None)], [("C", "x", False)])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
def test_policy_lets_the_script_run(tmp_path: Path) -> None:
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={tmp_path}", write_page(make_report(), tmp_path)],
                          capture_output=True, text=True, timeout=120, check=True)
    assert '<button type="button">score</button>' in done.stdout
