"""The page of `unislu demo`: what it marks, that it takes answers as text, and its API."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import ROOT
from unislu_llm import cli, demo, understand
from unislu_llm.decoding.answer import Answer
from unislu_llm.errors import UserError
from unislu_llm.tasks import NER, SA, LabelTask, TaskRegistry

TEXT = "paris and new york, then <script> new york"
YORK, PARIS, ACTS = ("PLACE", "new york"), ("PLACE", "paris"), LabelTask(
    "acts", "[DA]", ("yes", "no"), "[A]", "[/A]", multi=True)


def test_phrases_are_marked_where_they_are_said() -> None:
    for phrases, marked, missing in (
            ([YORK, ("ORG", "<script>"), YORK], ["new york", "<script>", "new york"], []),
            ([PARIS, YORK, PARIS], ["paris", "new york"], ["PLACE: paris"]),  # said once
            ([("LAW", "york, then"), ("ORG", "new york, then")], ["new york, then"],
             ["LAW: york, then"])):
        pieces, lost = demo.segments(TEXT, phrases)
        assert "".join(text for text, _ in pieces) == TEXT
        assert ([text for text, label in pieces if label], lost) == (marked, missing)


def test_all_that_an_answer_says_is_shown(tiny_speech_llm: Callable[..., Any]) -> None:
    outputs: dict[str, Any] = {"ner": (PARIS, ("LAW", "x")), "sa": "Neutral", "acts": ("yes", "no")}
    shares = {"Positive": 0.25, "Neutral": 0.75, "Negative": 0.0}
    answer = Answer("in paris", 1.0, outputs, {"sa": ("no_end",)}, probabilities={"sa": shares},
                    warnings=("may be no speech",))
    assert demo.shown(tiny_speech_llm(registry=TaskRegistry([NER, SA, ACTS])), answer) == [
        [("in ", None), ("paris", "PLACE")], shares, "yes, no",
        "warning: may be no speech\nnot marked: LAW: x\nmalformed: no_end", answer.to_dict()]


def test_the_page_answers_as_python_does_and_takes_all_as_text(
        tiny_speech_llm: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    page = demo.page(models := {"<b>": tiny_speech_llm(), "two": tiny_speech_llm(seed=1)})
    assert [b.value for b in page.blocks.values() if type(b).__name__ in ("HTML", "Markdown")] == [
        "<h1>Understand speech</h1>", "<h2>&lt;b&gt;</h2>", "<h2>two</h2>"]
    clip, broken = ROOT / "recipes/data/mini/audio/iv_dev_002.opus", tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, share=False, quiet=True, ssr_mode=False)
        client = Client(url, verbose=False)
        for i, model in enumerate(models.values(), 1):
            shown = client.predict(handle_file(clip), api_name=f"/understand_{i}")
            assert shown[-1] == understand(model, clip).to_dict()
        with pytest.raises(Exception, match=r"^broken\.wav: cannot be read"):
            client.predict(handle_file(broken), api_name="/understand_1")
    finally:
        page.close()


def test_others_need_a_password_and_gradio_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNISLU_TOKEN", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", Any)
    with pytest.raises(UserError, match="--host ::0 lets others in: set UNISLU_TOKEN"):
        cli.demo("no/model", host="::0")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'unislu_llm\[demo\]'"):
        cli.demo("no/model")
