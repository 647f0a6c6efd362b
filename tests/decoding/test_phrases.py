"""Phrase lists: what their trie adds, which phrases of a list are raised, and what comes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.common import Build, batch_of, decode, noise
from tests.tiny import make_whisper
from unislu_llm.cli import main
from unislu_llm.config import DecodeConfig
from unislu_llm.decoding import hypotheses as module
from unislu_llm.decoding import phrases as phrase_module
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.hypotheses import ModelRecogniser
from unislu_llm.decoding.phrases import MOST, PhraseBias, Phrases
from unislu_llm.decoding.predict import understand
from unislu_llm.decoding.recogniser import Transcript, WhisperRecogniser
from unislu_llm.errors import UserError
from unislu_llm.tasks import SEPARATOR
from unislu_llm.tokenizer import UnifiedTokenizer

SAID = "the council met in paris on monday"
LIST = Phrases(("Paris", "anna voted", "European Parliament", "union", SAID), 3.0)


def gains(tokenizer: Any, phrases: Sequence[str], ids: Sequence[int]) -> list[float]:  # by 2 nats
    bias, found = PhraseBias(tokenizer, [tuple(phrases)], 2.0), []
    for token in ids:
        found.append(float(bias(torch.zeros(1, len(tokenizer)))[0, token]))
        bias.advance(torch.tensor([[token]]))
    return found


@pytest.mark.parametrize("metaspace", [None, "never"])
@pytest.mark.parametrize(("phrases", "text"), [
    (["paris", "monday"], "in {Paris} on {MONDAY}"), (["met in rome", "met"], "{met} in a"),
    (["Anna Paris"], "{anna paris}. {Anna Paris}, {ANNA PARIS}"), (["pari"], "in paris"),
    (["aris"], "in paris"), (["paris on"], "in paris, on"), (["anna voted"], "anna met"),
    (["met in paris", "paris on monday"], "{met in paris on monday}"),
    (["met in", "met in paris on"], "we {met in} paris again"), (["[paris"], "in {paris}")])
def test_complete_phrases_gain_and_others_give_back(
        tokenizer_of: Callable[[str | None], Any], metaspace: str | None,
        phrases: list[str], text: str) -> None:
    base = tokenizer_of(metaspace)
    ids = base(re.sub("[{}]", "", f" {text} ."), add_special_tokens=False)["input_ids"]
    marked = re.findall("{(.*?)}", text)
    expected = sum(len(base(f" {part}", add_special_tokens=False)["input_ids"]) for part in marked)
    assert sum(gains(base, phrases, ids)) == 2.0 * expected


def test_a_bonus_token_by_token(tokenizer: UnifiedTokenizer) -> None:
    first, second, *_ = tokenizer.text_ids("parisian")
    bias, zeros = PhraseBias(tokenizer.base, [("parisian",), ()], 2.0), torch.zeros(2, 500)
    assert bias(zeros)[0, first] == 2.0
    assert not bias(zeros)[1].any(), "no phrase, no change"
    bias.advance(torch.tensor([[first], [first]]))
    out = bias(zeros)[0]
    assert out[second] == 2.0
    others = tokenizer.text_ids("anna, council.") + tokenizer.base("n")["input_ids"]
    assert (out[others] == -2.0).all(), "taken back where it is left, inside the word or behind it"
    assert out[first] == 0.0, "one is left, the next one begun"
    ended = PhraseBias(tokenizer.base, [("parisian",)], 2.0, [tokenizer.marker_ids[SEPARATOR]])
    ended.advance(torch.tensor([[first, tokenizer.marker_ids[SEPARATOR]]]))
    assert not ended(zeros[:1]).any()


def test_of_a_list_only_what_resembles_the_first_pass_is_raised() -> None:
    listed = Phrases(("Latvia", "Dawit Isaak", "Giegold", "東京", "Hoppenstedt", "Zürich"), 2.0)
    assert listed.like("lat via thanked david isaac") == ("Latvia", "Dawit Isaak")
    assert listed.like("we flew to zurich, and to 東京 today") == ("東京", "Zürich")
    assert listed.like("") == ()
    many = Phrases(tuple(f"paris {i}" for i in range(100)), 2.0)
    assert (many.like("it was paris 7")[0], len(many.like("paris 7"))) == ("paris 7", 30)


def test_what_the_decoder_considered_is_raised_as_well(tokenizer: UnifiedTokenizer) -> None:
    listed, logits = Phrases(("Latvia", "Hoppenstedt"), 2.0), torch.zeros(2, 3, len(tokenizer.base))
    first = tokenizer.text_ids("Hoppenstedt")[0]
    logits[:, :, tokenizer.text_ids("we")] = 9.0
    logits[0, 1, first] = logits[1, 2, first] = 4.0  # in the second row behind its end
    assert listed.maybe_said(tokenizer.base, ["lat via", "so far"], [2, 1], logits.unbind(1)) == [
        ("Latvia", "Hoppenstedt"), ()]


def test_errors_name_file_and_line(tmp_path: Path, tiny_run: Callable[..., Path],
                                   capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "names.txt"
    file.write_text("\ufeff# people\n\nAnna\n  Dawit   Isaak\r\nAnna\n", "utf-8")
    assert Phrases.of(file, 2.0) == Phrases(("Anna", "Dawit Isaak"), 2.0)
    assert Phrases.of([], 2.0) is Phrases.of("", 2.0) is None
    for text, wrong in (("Anna\n" + "a" * 201, "names.txt:2: .*200"), ("# a\n", "no phrase"),
                        ("Anna\n?!", "names.txt:2: "), ("a\n" * (MOST + 1), f":{MOST + 1}: more")):
        file.write_text(text)
        with pytest.raises(UserError, match=wrong):
            Phrases.of(str(file), 2.0)
    for text in ("", "Ann\ud800a"):
        with pytest.raises(UserError, match=r"phrases\[1\]"):
            Phrases.of(["Anna", text], 2.0)
    args = ["predict", str(tiny_run()), "corpus", "--phrases", str(file), "--phrase-boost"]
    assert main([*args, "2"]) == main([*args, "-1"]) == 2
    assert "more than 10,000 phrases" in (said := capsys.readouterr().err)
    assert "--phrase-boost: must be at least 0" in said


def test_whisper_says_a_phrase_that_is_raised_enough(tmp_path: Path, build: Build,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for part in make_whisper(init_std=0.3):
        part.save_pretrained(tmp_path)
    own, waves = WhisperRecogniser(str(tmp_path)), noise(3)
    plain = own(waves, "en")
    monkeypatch.setattr(phrase_module, "_RARE", 0.0)
    assert own(waves, "en", Phrases(("quetzalcoatlus",), 500.0)) == plain, "it is like nothing"
    monkeypatch.setattr(phrase_module, "_RARE", -99.0)
    assert own(waves, "en", Phrases(("quetzalcoatlus",), 0.0)) == plain, "by no nats"
    long = f"{SAID} we thank the european parliament"  # too long to be said four times
    forced = own(waves, "en", Phrases((long,), 500.0))
    assert all(long in t.text.lower() for t in forced)
    assert [t.evidence for t in forced] == [t.evidence for t in plain]
    slu = ModelRecogniser(build("whisper"))
    assert all(long in t.text.lower() for t in slu(waves, "en", Phrases((long,), 500.0)))
    for recogniser in (own, slu):
        assert recogniser(waves, "en", LIST) == [recogniser([w], "en", LIST)[0] for w in waves]


@pytest.mark.parametrize("options", [{"hypothesis_bias": 2.0}, {"num_beams": 2},
                                     {"transcript": "verbatim"}])
def test_an_llm_that_rewrites_is_drawn_to_phrases(build: Build, options: dict[str, Any]) -> None:
    model, waves = build("llm", 3, separator=2.0, hypothesis="manifest"), noise(4)
    texts = [SAID, "", "we thank the european parlament", "ana voted for the union"]
    how = DecodeConfig(grammar=True, force_task=True, **options)

    def said(which: slice, phrases: Phrases | None) -> list[Any]:
        batch = batch_of(model, waves[which], texts[which])
        return Engine(model, how, phrases).answer(batch, [["ner"]] * len(batch))

    plain, raised = decode(model, waves, [["ner"]] * 4, texts, **options), said(slice(None), LIST)
    assert str(raised[1]) == str(plain[1]), "nothing is like an empty hypothesis"
    alone = [said(slice(i, i + 1), LIST)[0] for i in range(4)]
    assert [(a.transcript, a.outputs) for a in alone] == [(a.transcript, a.outputs) for a in raised]
    forced = said(slice(3, 4), Phrases(("anna voted",), 500.0))[0].transcript.lower()
    assert ("anna voted" in forced) is ("transcript" not in options)


def test_phrases_reach_the_recogniser_of_every_window(build: Build,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build("llm", hypothesis="manifest", transcript="verbatim"), []

    def says(waves: Sequence[Tensor], language: str, **asked: Any) -> list[Transcript]:
        given.extend([asked] * len(waves))
        return [Transcript("anna")] * len(waves)

    monkeypatch.setattr(module, "recogniser_of", lambda *_: says)
    speech = 0.1 * torch.randn(16_000 * 45).numpy(), 16_000
    assert understand(model, speech, [], phrases=["Anna"]).transcript == "anna anna"
    asked = {"phrases": Phrases(("Anna",), DecodeConfig().phrase_boost)}
    assert given == [asked] * 2
    understand(model, speech, [])
    understand(model, speech, [], options=DecodeConfig(num_beams=3))
    assert given == [asked, asked, {}, {}, {"num_beams": 3}, {"num_beams": 3}]
