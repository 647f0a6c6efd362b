"""Hypotheses: the same alone and in batches, cut where they loop; models get those that lack."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.common import Build, noise
from tests.tiny import make_whisper
from unislu_llm.config import DecodeConfig
from unislu_llm.data import audio
from unislu_llm.decoding import hypotheses as module
from unislu_llm.decoding import recogniser as whisper_module
from unislu_llm.decoding.hypotheses import (
    ModelRecogniser,
    clean,
    load_recogniser,
    recognise,
    recogniser_of,
    with_hypotheses,
)
from unislu_llm.decoding.predict import predict, understand
from unislu_llm.decoding.recogniser import Transcript, WhisperRecogniser
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance
from unislu_llm.weights import fast_type

REGISTRY = TaskRegistry()
Write = Callable[..., list[Utterance]]


class Says:
    """A recogniser that says how long a clip is, and notes what it was asked."""

    def __init__(self, loop: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.loop = loop

    def __call__(self, waves: Sequence[Tensor], language: str) -> list[Transcript]:
        self.batches.append([len(wave) for wave in waves])
        return [Transcript(f"  Heard {len(w)}\n[NER] {language} ", self.loop) for w in waves]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a tiny Whisper that does not say one thing to everything."""
    model, tokenizer = make_whisper(init_std=0.3)
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ctc_model(tiny_speech_llm: Build, **options: Any) -> Any:
    model = tiny_speech_llm(projector="ctc", projector_options={"heads": 2, "blank_bias": 0.0},
                            whisper_options={"init_std": 0.3}, **options)
    model.learn_vocabulary(["the council met", "we thank anna"])  # type: ignore[operator]
    return model


def test_joiners_inside_words_stay() -> None:
    said = "می\u200cخواهم ශ්\u200dරී \u202e\x07"
    assert clean(said, REGISTRY) == said[:-3]


def test_another_language_than_a_models_own_is_told(
        tiny_speech_llm: Build, make_utterances: Write,
        caplog: pytest.LogCaptureFixture) -> None:
    maker = ModelRecogniser(tiny_speech_llm(whisper_options={"init_std": 0.3}))
    rows = [dataclasses.replace(u, language=code) for u, code in
            zip(make_utterances(), ("de_DE", "fr", None, "en-US"), strict=False)]
    list(recognise(maker, rows, REGISTRY))
    assert "clips of language de, fr are taken for en" in caplog.text


def test_transcripts_are_the_same_alone_and_in_a_batch(whisper: str,
                                                       tiny_speech_llm: Build) -> None:
    waves = noise(4)
    reads = tiny_speech_llm(hypothesis="manifest", encoder=whisper)
    for recogniser in (WhisperRecogniser(whisper),
                       ModelRecogniser(ctc_model(tiny_speech_llm), "ctc"),
                       ModelRecogniser(tiny_speech_llm(whisper_options={"init_std": 0.3})),
                       ModelRecogniser(reads)):
        for beams in (1, 3):
            together = recogniser(waves, "en", num_beams=beams)
            alone = [recogniser([wave], "en", num_beams=beams)[0] for wave in waves]
            assert [t[:2] for t in together] == [t[:2] for t in alone]
            assert beams > 1 or together == alone
            assert len(set(together)) > 1, "it listens"
    with pytest.raises(UserError, match="'ctc'"):
        ModelRecogniser(tiny_speech_llm(), "ctc")
    with pytest.raises(UserError, match="language 'xx'"):
        WhisperRecogniser(whisper)(waves[:1], "xx")
    with pytest.raises(UserError, match="saved model with the projector 'ctc'"):
        load_recogniser(whisper, "ctc")


@torch.no_grad()
def test_clips_are_padded_by_their_own_length(whisper: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[torch.Tensor] = []
    generate = whisper_module.GenerationMixin.generate
    monkeypatch.setattr(whisper_module.GenerationMixin, "generate", lambda self, **how: (
        heard.append(how["encoder_outputs"].last_hidden_state), generate(self, **how))[1])
    waves = [torch.randn(int(16_000 * seconds)) for seconds in (1.0, 2.5, 2.0, 28.0)]
    WhisperRecogniser(whisper, silence=3.0)(waves, "en")
    assert [tuple(frames.shape[:2]) for frames in heard] == [(2, 250), (1, 500), (1, 1500)]
    heard.clear()
    recogniser = WhisperRecogniser(whisper)
    recogniser(waves[:1], "en")
    mel, _ = audio.batch_log_mel(waves[:1], silence=30)
    theirs = recogniser._whisper.model.encoder(mel).last_hidden_state
    torch.testing.assert_close(heard[0], theirs, atol=1e-4, rtol=1e-4)


def test_beams_find_what_is_likelier(whisper: str) -> None:
    """As transformers' search does; the evidence is of the text that stands."""
    recogniser, waves = WhisperRecogniser(whisper, silence=0.0), noise(6)
    greedy, beams = (recogniser(waves, "en", num_beams=n) for n in (1, 4))
    pairs = [(a.evidence.log_prob, b.evidence.log_prob) for a, b in zip(greedy, beams, strict=True)
             if a.text != b.text]
    assert pairs
    assert all(b > a for a, b in pairs), "by the mean over a text's tokens, which beams go by"


def test_loops_are_cut(whisper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recogniser = WhisperRecogniser(whisper)
    tokenizer = recogniser._tokenizer
    once = tokenizer(" we met in paris", add_special_tokens=False)["input_ids"]
    said = [9, *once * 6]
    generate = whisper_module.GenerationMixin.generate
    monkeypatch.setattr(whisper_module.GenerationMixin, "generate", lambda self, **how: torch.cat(
        [generate(self, **how)[:, :4], torch.tensor([said])], dim=1))
    wave = torch.zeros(160_000)
    cut, = recogniser([wave], "en")
    assert cut[:2] == (tokenizer.decode([9, *once]), True)
    assert cut.evidence.compression > 2.4, "of what was said before it was cut"
    said[:] = [9, *once * 2, 10]
    whole, = recogniser([wave], "en")
    assert whole[:2] == (tokenizer.decode(said), False)
    assert whole.evidence.compression < 2.4


def test_clips_are_batched_by_length_and_tidied(make_utterances: Write) -> None:
    says = Says()
    utterances = make_utterances(seconds=(0.9, 1.6, 0.6, 1.2, 0.7))
    utterances[2] = dataclasses.replace(utterances[2], start=0.1, end=0.5, language="de-DE",
                                        duration=None)
    found = [(i, t.text) for i, t in recognise(says, utterances, REGISTRY, batch_size=3)]
    assert found == [(2, "heard 6400 de"), (1, "heard 25600 en"), (3, "heard 19200 en"),
                     (0, "heard 14400 en"), (4, "heard 11200 en")]
    assert says.batches == [[6400], [25600, 19200, 14400], [11200]], "one language a batch"


def test_models_get_the_hypotheses_that_they_lack(whisper: str, make_utterances: Write,
                                                  tiny_speech_llm: Build,
                                                  caplog: pytest.LogCaptureFixture,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_speech_llm(hypothesis="manifest", encoder=whisper,
                            whisper_options={"init_std": 0.3})
    utterances = make_utterances()
    files = [u.audio for u in utterances if u.audio]
    own = WhisperRecogniser(whisper, dtype=fast_type(torch.device("cpu")))
    made = sorted(recognise(own, utterances, REGISTRY))
    expected = [t.text for _, t in made]
    assert [a.hypothesis for a in understand(model, files)] == expected
    given = [dataclasses.replace(u, hypothesis=h)
             for u, h in zip(utterances, (None, "given", None, ""), strict=True)]
    found = with_hypotheses(model, [*given, given[0]])
    assert [u.hypothesis for u in found] == [expected[0], "given", expected[2], "", expected[0]]
    assert found[0] is found[4]
    options = DecodeConfig(max_new_tokens=12)
    first, same, other = (
        predict(model, [Example(dataclasses.replace(u, hypothesis=h), None)
                        for u, h in zip(utterances, texts, strict=True)], options)
        for texts in ([None] * 4, expected, ["we thank the european parliament"] * 4))
    assert first == same
    assert [row["hypothesis"] for row in first] == expected
    assert [row["raw"] for row in first] != [row["raw"] for row in other]
    assert with_hypotheses(tiny_speech_llm(), given) == given, "one that reads none"
    assert recogniser_of(model) is recogniser_of(model), "it is loaded once"
    own = ctc_model(tiny_speech_llm, hypothesis="manifest", recogniser="ctc")
    assert recogniser_of(own)(noise(2), "en") == ModelRecogniser(own, "ctc")(noise(2), "en")
    monkeypatch.setattr(module, "recogniser_of", lambda *_: Says(loop=True))
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        with_hypotheses(model, given)
    assert "2 of 2 hypotheses repeated themselves" in caplog.text


def test_a_recogniser_that_reads_gets_text_as_manifests_hold_it(
        tiny_speech_llm: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = tiny_speech_llm(hypothesis="manifest"), []
    for text in ("We  MET [NER]in Paris", "we met in paris", "we thank the european parliament"):
        monkeypatch.setattr(module, "recogniser_of", lambda *_, text=text: (
            lambda waves, *_: [Transcript(text)] * len(waves)))
        said.append(ModelRecogniser(model)(noise(1), "en"))
    assert said[0] == said[1] != said[2]


def test_references_are_for_manifests(make_utterances: Write, tiny_speech_llm: Build) -> None:
    model, utterances = tiny_speech_llm(hypothesis="reference"), make_utterances()
    found = predict(model, [Example(u, None) for u in utterances], DecodeConfig(max_new_tokens=8))
    assert [row["hypothesis"] for row in found] == [u.text for u in utterances]
    with pytest.raises(UserError, match="not used on files"):
        understand(model, [u.audio for u in utterances if u.audio])
