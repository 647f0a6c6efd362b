"""Silence and noise are not answered, what is doubtful is told of, evaluation only marks it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoding.common import REGISTRY, Build, noise
from tests.tiny import make_whisper
from unislu_llm.config import DecodeConfig
from unislu_llm.data.manifest import write_manifest
from unislu_llm.decoding import hypotheses as module
from unislu_llm.decoding import recogniser as whisper_module
from unislu_llm.decoding.files import as_json, as_text
from unislu_llm.decoding.no_speech import Evidence, evidence_of, judge, silent
from unislu_llm.decoding.predict import predict, understand
from unislu_llm.decoding.recogniser import Transcript, WhisperRecogniser
from unislu_llm.decoding.transcribe import write_copies
from unislu_llm.errors import UserError
from unislu_llm.scoring.score import score_predictions
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

SHORT = DecodeConfig(max_new_tokens=24)
NOISE, SPEECH = Evidence(0.9, "en", 0.3, -2.0, 0.9), Evidence(0.05, "en", 0.99, -0.3, 1.2)
GERMAN = Evidence(0.05, "de", 0.98, -0.3, 1.2)


class Hears:
    """A recogniser with the same evidence of every clip."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def __call__(self, waves: Sequence[Tensor], language: str) -> list[Transcript]:
        return [Transcript("anna met the council", evidence=self.evidence)] * len(waves)


@pytest.mark.parametrize(("evidence", "none", "warnings"), [
    (SPEECH, False, []),
    (NOISE, True, []),
    (Evidence(0.9, "en", 0.4, -0.4, 0.3), True, []),  # `you`, in silence
    (Evidence(0.9, "en", 0.99, -0.4, 0.9), False, ["may be no speech (probability 0.90)"]),
    (Evidence(0.59, "en", 0.9, -3.0, 0.9), False, []),
    (Evidence(0.02, "km", 0.5, -1.2, 13.4), False, [
        "may be no speech (probability 0.02, no language above 0.50)",
        "repeats itself (compression ratio 13.4)"]),
    (GERMAN, False, [
        "sounds like German (0.98); the model was trained on English (model.language)"]),
    (Evidence(0.9, log_prob=-0.5), False, ["may be no speech (probability 0.90)"]),
    (Evidence(0.9, log_prob=-1.5), True, []),
    (Evidence(1.0), True, []),
])
def test_the_rule(evidence: Evidence, none: bool, warnings: list[str]) -> None:
    assert judge(evidence, 0.6, "en-GB") == (none, tuple(warnings))
    assert judge(evidence, 1.0, "en")[0] is False


def test_what_the_first_logits_say() -> None:
    names = {"a": 0, "<|en|>": 1, "<|de|>": 2, "<|nospeech|>": 3, "<|transcribe|>": 4}
    tokenizer = SimpleNamespace(get_vocab=lambda: names)
    whisper = SimpleNamespace(generation_config=SimpleNamespace(is_multilingual=True))
    logits = torch.tensor([[0.1, 0.1, 0.2, 0.5, 0.1], [0.1, 0.6, 0.2, 0.05, 0.05]]).log()
    assert evidence_of(tokenizer, whisper, logits) == [
        Evidence(0.5, "de", 0.6667), Evidence(0.05, "en", 0.75)]
    whisper.generation_config.is_multilingual = False
    assert evidence_of(tokenizer, whisper, logits)[0] == Evidence(0.5)
    names["<|nocaptions|>"] = names.pop("<|nospeech|>")
    assert evidence_of(tokenizer, whisper, logits)[0] == Evidence(0.5)
    assert Evidence(0.5).of_words(-0.5, " so" * 100).compression > 2.4
    assert Evidence(0.5).of_words(-0.5, "").compression == 0.0
    assert silent(torch.zeros(9))
    assert silent(torch.full((9,), -1 / 32768))
    assert not silent(torch.full((9,), -1e-3))


def test_a_recogniser_reads_it_from_its_own_pass(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_whisper(init_std=0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen: list[Tensor] = []
    monkeypatch.setattr(whisper_module, "evidence_of", lambda *given: (
        seen.append(given[2]), evidence_of(*given))[1])
    recogniser, wave = WhisperRecogniser(str(tmp_path)), noise(1)[0]
    generate, made = whisper_module.GenerationMixin.generate, []
    monkeypatch.setattr(whisper_module.GenerationMixin, "generate", lambda self, **how: (
        made.append(generate(self, **how)), made[-1])[1])
    transcript, = recogniser([wave], "en")
    mel, _ = whisper_module.audio.batch_log_mel([wave], silence=30)
    with torch.no_grad():
        logits = model(input_features=mel, decoder_input_ids=made[0]).logits
    torch.testing.assert_close(seen[0], logits[:, 0], atol=1e-3, rtol=1e-3)
    steps = logits.log_softmax(-1)[:, 3:-1].gather(2, made[0][:, 4:, None])
    assert transcript.evidence is not None
    assert transcript.evidence.log_prob == pytest.approx(float(steps.mean()), abs=1e-3)


def reads(build: Build, monkeypatch: pytest.MonkeyPatch, evidence: Evidence) -> Any:
    monkeypatch.setattr(module, "recogniser_of", lambda *_: Hears(evidence))
    return build("llm", projector="none", hypothesis="manifest", transcript="verbatim")


def test_noise_is_not_answered(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = reads(build, monkeypatch, NOISE), (noise(1)[0], 16_000)
    answer = understand(model, clip, ["ner", "sa", "acts"], SHORT)
    assert answer.no_speech
    assert (answer.transcript, answer.hypothesis) == ("", "anna met the council")
    assert answer.outputs == {"ner": (), "sa": None, "acts": ()}
    assert as_text("a.wav", answer) == "a.wav\n  no speech"
    plain = json.loads(as_json("a.wav", answer))
    assert plain == {"file": "a.wav", "text": "", "ner": [], "sa": None, "acts": [],
                     "problems": [], "no_speech": True, "hypothesis": "anna met the council"}
    assert json.loads(as_json("a.wav", answer, confidences=True))["evidence"]["no_speech"] == 0.9
    off = understand(model, clip, "sa", SHORT.model_copy(update={"no_speech": 1.0}))
    assert (off.no_speech, off.transcript) == (False, "anna met the council")


def test_another_language_is_told_of(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = reads(build, monkeypatch, GERMAN), (noise(1)[0], 16_000)
    warning = "sounds like German (0.98); the model was trained on English (model.language)"
    answer = understand(model, clip, "sa", SHORT)
    assert (answer.transcript, answer.warnings) == ("anna met the council", (warning,))
    assert as_text("a.wav", answer).endswith(f"\n  warning: {warning}")
    assert understand(model, clip, "sa", SHORT, language="de").warnings == ()


def test_evaluation_marks_and_does_not_change(build: Build, monkeypatch: pytest.MonkeyPatch,
                                              make_utterances: Callable[..., Any]) -> None:
    found = {}
    examples = [Example(u, "sa") for u in make_utterances(seconds=(0.9, 1.6))]
    for evidence in (SPEECH, NOISE):
        rows = predict(reads(build, monkeypatch, evidence), examples, SHORT)
        assert score_predictions(rows, REGISTRY)["no_speech"] == 2 * (evidence is NOISE)
        found[evidence] = [{k: v for k, v in row.items() if k != "no_speech"} for row in rows]
    assert found[SPEECH] == found[NOISE]
    stored = [Example(Utterance("a", e.utterance.audio, "", hypothesis="so it is"), None)
              for e in examples[:1]]
    model = reads(build, monkeypatch, NOISE)
    assert "no_speech" not in predict(model, stored, SHORT)[0], "nothing is known of it"


def test_without_a_recogniser(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whisper's own decoder says it, a `ctc` projector is blank; else only silence is known."""
    clip, silence = (noise(1)[0], 16_000), (np.zeros(9_000), 16_000)
    listens = build("llm")
    assert [a.no_speech for a in understand(listens, [clip, silence], "sa", SHORT)] == [False, True]
    blank = build("llm", projector="ctc", ctc_tokens=range(5, 90),
                  projector_options={"blank_bias": 1e4})
    assert understand(blank, clip, "sa", SHORT).no_speech
    whisper = build("whisper")
    own = understand(whisper, clip, "sa", SHORT)
    assert own.evidence is not None
    assert own.evidence.log_prob == pytest.approx(np.log(own.confidence["text"]), abs=1e-3)
    monkeypatch.setattr("unislu_llm.decoding.engine.evidence_of",
                        lambda *given: [Evidence(0.9, "en", 0.3)] * len(given[2]))
    assert understand(whisper, clip, "sa", SHORT).no_speech


def test_reading_models_know_silence_by_the_samples(build: Build,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    model = reads(build, monkeypatch, SPEECH)
    clips = [(noise(1)[0], 16_000), (np.zeros(9_000), 16_000)]
    assert [a.no_speech for a in understand(model, clips, "sa", SHORT)] == [False, True]


def test_copies_have_no_words_of_noise(make_utterances: Callable[..., Any], tmp_path: Path) -> None:
    manifest = tmp_path / "a.jsonl"
    write_manifest(manifest, make_utterances(seconds=(0.9, 1.6)))
    copies = [write_copies(lambda e=evidence: Hears(e), [manifest], tmp_path / str(i), REGISTRY,
                           settings=[])[0] for i, evidence in enumerate((SPEECH, NOISE))]
    assert [c.counts["no_speech"] for c in copies] == [0, 2]
    texts = [[json.loads(line)["hypothesis"] for line in c.copy.read_text().splitlines()]
             for c in copies]
    assert texts == [["anna met the council"] * 2, [""] * 2]


@pytest.mark.parametrize("name", ["https://example.org/a.wav?b=c", "s3://bucket/a.wav"])
def test_an_address_is_no_file(name: str, build: Build) -> None:
    for given in (name, Path(name)):
        with pytest.raises(UserError) as error:
            understand(build("llm"), given)
        how = f": curl -LO '{name}'" if name.startswith("http") else " first"
        assert str(error.value) == f"{name}: is an address, not a file; download it{how}"
