"""Voicing: the same seed gives the same samples, stopped or not; noise has the asked level."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm.data.manifest import read_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry

SPOKEN: list[str] = []
"""Every text that a fake voice has spoken."""


@dataclass(frozen=True)
class ToneVoice:
    """A tone whose length grows with the text; `stop` interrupts it."""

    name: str
    hertz: float = 200.0

    def speak(self, text: str) -> np.ndarray:
        SPOKEN.append(text)
        if text == "stop":
            raise KeyboardInterrupt
        seconds = np.arange(800 * (len(text) + 1)) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * self.hertz * seconds)
        return (tone * np.hanning(len(tone))).astype(np.float32)


TONES = (ToneVoice("low", 150.0), ToneVoice("high", 300.0))


@pytest.fixture
def voice(recipe: Callable[[str], ModuleType]) -> Callable[..., list[Any]]:
    """Factory: clips of texts by id, in a folder."""
    voices = recipe("make_voices")

    def run(texts: dict[str, str], folder: Path, mix: str = "clean", seed: int = 0) -> list[Any]:
        SPOKEN.clear()
        return voices.voice_lines([voices.Line(*item) for item in texts.items()], folder,
                                  voices=TONES, mix=voices.MIXES[mix], seed=seed)

    return run


@pytest.mark.parametrize(("kind", "snr"), [("pink", -3), ("babble", 7.5), ("pink", 20)])
def test_noise_is_added_at_the_asked_ratio(kind: str, snr: float,
                                           recipe: Callable[[str], ModuleType]) -> None:
    noise, rng = recipe("noise"), np.random.default_rng(3)
    speech = ToneVoice("a").speak("a few words to degrade")
    talkers = [rng.standard_normal(n).astype(np.float32) for n in (900, 50_000, 4_000)]
    noisy = noise.degrade(speech, noise.Condition(None, kind, snr), rng, lambda: talkers)
    power = [np.mean(np.square(x, dtype=np.float64)) for x in (speech, noisy - speech)]
    assert 10 * np.log10(power[0] / power[1]) == pytest.approx(snr, abs=0.01)


def test_the_same_seed_gives_the_same_samples_in_any_order(voice: Callable[..., list[Any]],
                                                           tmp_path: Path) -> None:
    texts = {f"u{i}": "la " * (i + 2) for i in range(6)}
    one = voice(texts, tmp_path / "a", "multi", 7)
    two = voice(dict(reversed(texts.items())), tmp_path / "b", "multi", 7)[::-1]
    other = voice(texts, tmp_path / "c", "multi", 8)
    assert [(c.speaker, c.condition) for c in one] != [(c.speaker, c.condition) for c in other]
    for a, b in zip(one, two, strict=True):
        assert (a.speaker, a.condition) == (b.speaker, b.condition)
        np.testing.assert_array_equal(soundfile.read(a.audio)[0], soundfile.read(b.audio)[0])


def test_a_stopped_run_goes_on_and_makes_what_is_missing_or_changed(
        voice: Callable[..., list[Any]], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        voice({"a": "one two", "b": "stop"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.opus"]
    voice({"a": "one two", "b": "three"}, tmp_path)
    assert SPOKEN == ["three"]
    (tmp_path / "a.opus").write_bytes((tmp_path / "a.opus").read_bytes()[:40])
    voice({"a": "one two", "b": "another"}, tmp_path)
    assert SPOKEN == ["one two", "another"]
    with pytest.raises(UserError, match="share the file"):
        voice({"a:b": "x", "A/b": "x"}, tmp_path)


def test_rows_without_audio_are_voiced(recipe: Callable[[str], ModuleType], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    source, out, voices = tmp_path / "a.jsonl", tmp_path / "spoken.jsonl", recipe("make_voices")
    source.write_text('{"id": "a", "text": "we like it", "sa": "Positive"}\n'
                      f'{{"id": "b", "text": "{"long" * 160}"}}\n', encoding="utf-8")
    monkeypatch.setattr(voices, "VOICES", TONES)
    monkeypatch.setattr(sys, "argv", ["make_voices.py", str(source), "--out", str(out)])
    voices.main()
    assert "2 rows voiced, 1 of them over 30 s and left out" in capsys.readouterr().out
    spoken, = read_manifest(out, TaskRegistry(), check_audio=True)
    assert (spoken.text, spoken.labels["sa"]) == ("we like it", "Positive")
    assert (spoken.speaker in ("low", "high"), spoken.seconds) == (True, pytest.approx(0.55))
